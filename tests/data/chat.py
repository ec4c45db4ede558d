"""The one place where the tests of templates and faults meet the code under test."""

from collections.abc import Sequence

from qdpo.data.layouts.pair import Message, Pair, Rejection, detect_layout
from qdpo.data.read.files import Place
from qdpo.data.tokens.cut import Limits
from qdpo.data.tokens.encode import Encoder, IdLists
from qdpo.data.tokens.render import Renderer
from qdpo.data.tokens.sieve import Preparation, Prepared


def ids_of(prompt: list[Message], chosen: str, rejected: str, tokenizer) -> IdLists | Rejection:
    """Ids of a conversation's prompt and of the answers behind it, as they will be trained, or why there are none."""
    rendered = Renderer(tokenizer=tokenizer).render(
        Pair(prompt=prompt, chosen=chosen, rejected=rejected, row=1, is_chat=True)
    )
    if isinstance(rendered, Rejection):
        return rendered
    ids = next(Encoder(tokenizer, "auto").encode([rendered]))
    return Rejection(1, "special_token_in_text", "the tokenizer cannot read it as text") if ids is None else ids


def prepare_rows(
    rows: Sequence[dict], tokenizer, *, max_tokens: int, max_prompt_tokens: int, template: str
) -> Prepared:
    """A whole data set with its layout found, its rows paired, rendered, tokenised, cut and sieved."""
    work = Preparation(
        tokenizer, Limits(max_tokens, max_prompt_tokens), Renderer(tokenizer=tokenizer, template=template)
    )
    located = [(Place("test data", number), row) for number, row in enumerate(rows, 1)]
    work.add(located, detect_layout(rows, {}, "test data"))
    return work.finish()
