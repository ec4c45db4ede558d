"""The one place where the tests of templates and faults meet the code under test."""

from collections.abc import Sequence

from qdpo.data.encode import IdLists, encode
from qdpo.data.pair import Message, Pair, Rejection, detect_layout
from qdpo.data.render import render
from qdpo.data.tokens import Prepared, prepare


def ids_of(prompt: list[Message], chosen: str, rejected: str, tokenizer) -> IdLists | Rejection:
    """Ids of a conversation's prompt and of the answers behind it, as they will be trained, or why there are none."""
    rendered = render(Pair(prompt, chosen, rejected, 1, is_chat=True), tokenizer)
    return rendered if isinstance(rendered, Rejection) else next(encode([rendered], tokenizer, "auto"))


def prepare_rows(
    rows: Sequence[dict], tokenizer, *, max_tokens: int, max_prompt_tokens: int, template: str
) -> Prepared:
    """A whole data set with its layout found, its rows paired, rendered, tokenised, cut and sieved."""
    layout = detect_layout(rows, {}, "test data")
    limits = {"max_tokens": max_tokens, "max_prompt_tokens": max_prompt_tokens}
    return prepare(rows, layout, tokenizer, **limits, template=template, system=None, limit=None)
