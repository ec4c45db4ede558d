"""Judges that need no model: prefer the shorter or longer answer, or the answer that matches a pattern."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import regex

from qdpo.collect.candidates import Answer, Candidates
from qdpo.collect.judge.run import Judge, Judgement, left_open, picked
from qdpo.errors import ConfigError

MATCH_TIMEOUT_S = 1.0
"""Time limit of a search in one answer: some patterns need time that grows exponentially with the text."""


class LengthJudge(Judge):
    """Prefers the shorter (or longer) complete answer; an answer that was cut at the length limit loses."""

    def __init__(self, items: Sequence[Candidates], direction: Literal["shorter", "longer"], margin: float = 0.1):
        """`margin` is the minimum difference, as a share of the longer answer. `items` are all candidates."""
        self.name = f"length:{direction} margin={margin:g}"
        self._direction, self._margin = direction, margin
        self._in_tokens = _counted_alike(items)

    def opening(self, items: Sequence[Candidates]) -> list[str]:
        why = "" if self._in_tokens else " (some answers lack `tokens`, or come from different models)"
        return [
            f"the {self._direction} answer is better if lengths differ by {self._margin:.0%} or more; an answer that "
            f"was cut at the length limit loses. Length is counted in {self._unit}{why}."
        ]

    def decide(self, items: Sequence[Candidates]) -> Iterator[Judgement]:
        """Decide every prompt; nothing here can fail."""
        for item in items:
            found = self._choose(item.answers)
            yield left_open(self.name, item, found) if isinstance(found, str) else picked(self.name, item, *found)

    def figures(self) -> dict[str, Any]:
        return {"unit": self._unit}

    @property
    def _unit(self) -> str:
        return "tokens" if self._in_tokens else "characters"

    def _length(self, answer: Answer) -> int:
        # Characters, not words: Chinese, Japanese and Thai put no spaces between words.
        return answer.tokens or 0 if self._in_tokens else len(answer.text)

    def _choose(self, answers: Sequence[Answer]) -> tuple[Answer, Answer] | str:
        """Best and worst, or the reason why there are none."""
        whole = sorted((answer for answer in answers if not answer.cut), key=self._length)
        cut = [answer for answer in answers if answer.cut]
        if not whole:
            return "all answers are cut at the length limit"
        best, other = (whole[0], whole[-1]) if self._direction == "shorter" else (whole[-1], whole[0])
        if cut:
            return best, max(cut, key=self._length)
        longest = self._length(whole[-1])
        if longest - self._length(whole[0]) < max(self._margin * longest, 1):
            return f"lengths differ by less than {self._margin:.0%}"
        return best, other


def _counted_alike(items: Sequence[Candidates]) -> bool:
    """True if every answer has its number of tokens, all counted by one model's tokenizer."""
    answers = [answer for item in items for answer in item.answers]
    models = {answer.origin.model if answer.origin else None for answer in answers}
    return len(models) == 1 and all(answer.tokens is not None for answer in answers)


class RegexJudge(Judge):
    """Prefers an answer in which the pattern is found; with `!` before it, an answer in which it is not."""

    def __init__(self, pattern: str):
        """Raises: ConfigError for a pattern that is not a regular expression."""
        self.name = f"regex:{pattern}"
        self._is_better = not pattern.startswith("!")
        try:
            self._pattern = regex.compile(pattern.removeprefix("!"))
        except regex.error as error:
            raise ConfigError(f"--by {self.name}: not a regular expression: {error}.") from None
        if not self._pattern.pattern:
            raise ConfigError("--by regex: needs a pattern, as in `--by 'regex:(?i)thank you'` (or 'regex:!…').")

    def opening(self, items: Sequence[Candidates]) -> list[str]:
        found = "is found" if self._is_better else "is not found"
        return [
            f"an answer in which {self._pattern.pattern!r} {found} is better. If there are several, the two closest in "
            "length make the pair, so that the model does not learn length instead."
        ]

    def decide(self, items: Sequence[Candidates]) -> Iterator[Judgement]:
        for item in items:
            try:
                better = [bool(self._search(answer)) == self._is_better for answer in item.answers]
            except TimeoutError:
                reason = f"the pattern takes more than {MATCH_TIMEOUT_S:g} s in an answer"
                yield left_open(self.name, item, reason)
                continue
            pairs = [(best, worst) for best, is_better in zip(item.answers, better, strict=True) if is_better
                     for worst, wins in zip(item.answers, better, strict=True) if not wins]  # fmt: skip
            if pairs:
                yield picked(self.name, item, *min(pairs, key=lambda pair: abs(len(pair[0].text) - len(pair[1].text))))
            else:
                matched = "every" if all(better) == self._is_better else "no"
                yield left_open(self.name, item, f"{matched} answer matches")

    def _search(self, answer: Answer) -> Any:
        return self._pattern.search(answer.text, timeout=MATCH_TIMEOUT_S)
