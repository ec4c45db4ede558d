"""The tokens at which answers end: those of prepared pairs, or the one that a new answer would be trained with."""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from qdpo.data.layouts.pair import Pair, Rejection
from qdpo.data.tokens.encode import Encoder
from qdpo.data.tokens.render import Renderer
from qdpo.data.tokens.store import TokenPair
from qdpo.data.tokens.templates import Options
from qdpo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """The ids of all special tokens of the tokenizer."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset({place for place, token in added if token.special}.union(tokenizer.all_special_ids))


def ends_of_pairs(pairs: Iterable[TokenPair], tokenizer: "PreTrainedTokenizerBase", *, max_tokens: int) -> list[int]:
    """The special tokens with which answers end, the most frequent first; an answer that fills its row may be cut."""
    special, found = special_ids(tokenizer), Counter[int]()
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            if len(pair.prompt) + len(answer) < max_tokens and int(answer[-1]) in special:
                found[int(answer[-1])] += 1
    return [token for token, _count in found.most_common()]


def ends_of_template(tokenizer: "PreTrainedTokenizerBase", template: str, options: Options) -> list[int]:
    """The special token with which an answer to a plain question would be trained to end; empty if there is none."""
    renderer = Renderer(tokenizer=tokenizer, template=template, options=options)
    question = [{"role": "user", "content": "Hello"}]
    pair = Pair(prompt=question, chosen="Yes.", rejected="No.", row=1, is_chat=bool(tokenizer.chat_template))
    try:
        text = renderer.render(pair)
    except DataError:  # no end token: an answer of this model ends only at its length limit
        return []
    if isinstance(text, Rejection):
        return []
    ids = next(Encoder(tokenizer, template).encode([text]))
    last = [] if ids is None else [answer[-1] for answer in ids[1:] if answer]
    return [token for token in dict.fromkeys(last) if token in special_ids(tokenizer)]
