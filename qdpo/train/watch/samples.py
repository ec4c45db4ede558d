"""Completes fixed prompts, once with the adapter off and at each evaluation with it on, for samples.jsonl."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from qdpo.data.layouts.turns import excerpt
from qdpo.model.device import release_memory
from qdpo.model.generate.generate import complete
from qdpo.model.policy.adapter import Policy
from qdpo.run import disk
from qdpo.run.lines import is_sampled, mend_lines
from qdpo.run.record import AnswerLengths
from qdpo.run.watcher import Watcher
from qdpo.settings.schema import SamplesConfig
from qdpo.train.watch.prompts import SamplePrompt, question

SampleLine = dict[str, Any]

# Tokens in a piece of text (an n-gram) that counts as repeated when it occurs again.
PIECE = 4


class Samples:
    """One line per prompt: its text, the answer `before`, the newest one `after`, and all since step 1 in `during`."""

    def __init__(
        self, path: Path, policy: Policy, tokenizer: Any, prompts: Sequence[SamplePrompt], config: SamplesConfig,
        watcher: Watcher, *, keep_through: int,
    ):  # fmt: skip
        """Resumes the file as it was after step `keep_through`, if it holds the same prompts."""
        self._path, self._policy, self._tokenizer, self._prompts = path, policy, tokenizer, prompts
        self._config, self._watcher = config, watcher
        texts = [str(tokenizer.decode(prompt.ids)) for prompt in prompts]
        self._lines: list[SampleLine] = [{"row": p.row, "prompt": text} for p, text in zip(prompts, texts, strict=True)]
        kept = mend_lines(path, is_sampled, watcher.say, due=keep_through > 0 and bool(prompts))
        if [line["prompt"] for line in kept] == texts:
            self._lines = [_cut_back(line, keep_through) for line in kept]
        elif kept:
            watcher.say(f"samples: {path.name} starts again (the prompts have changed)")

    def complete(self, step: int, look: Callable[[], None] | None = None) -> dict[str, float]:
        """Completes the prompts greedily (once per step) and returns the metrics for the evaluation's record.

        At step 0 the adapter is off; only then is `before` written. `look` may end it by an exception, at any token.
        """
        if not self._prompts:
            return {}
        if "before" not in self._lines[0] and not self._answer(0, look):
            return {}
        if step > 0 and step not in self._steps() and not self._answer(step, look):
            return {}
        place = 0 if step == 0 else self._steps().index(step) + 1
        first = self._lines[0]
        shown = first["before"] if place == 0 else first["during"][place - 1]["answer"]
        what = "with the adapter off" if place == 0 else f"after step {step}"
        self._watcher.say(f"sample {what}: {excerpt(question(first['prompt']), 80)} → {excerpt(shown, 160)}")
        counts = [_history(line)[place] for line in self._lines]
        return {
            "samples/tokens": float(statistics.median(each["tokens"] for each in counts)),
            "samples/cut": statistics.mean(float(each["cut"]) for each in counts),
            "samples/repetition": statistics.mean(each["repetition"] for each in counts),
        }

    def write(self) -> None:
        """Raises: DiskError if the file cannot be written; the previous file stays intact."""
        if self._prompts:
            lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in self._lines)
            disk.write_text(self._path, "".join(lines))

    def summary(self) -> AnswerLengths | None:
        """Median lengths before and after, in tokens, end token included; None if nothing was completed."""
        if not self._prompts or not self._steps():
            return None
        before, after = (
            statistics.median(line[f"{side}_tokens"] for line in self._lines) for side in ("before", "after")
        )
        return AnswerLengths(count=len(self._lines), median_tokens_before=before, median_tokens_after=after)

    def _steps(self) -> list[int]:
        return [each["step"] for each in self._lines[0].get("during", [])]

    def _answer(self, step: int, look: Callable[[], None] | None) -> bool:
        """Completes all prompts. Reports and returns False if even one prompt at a time needs too much memory."""
        self._watcher.begin("completing sample prompts", len(self._prompts), "answer")
        answers = None
        for batch in (25, 1):
            try:
                answers = self._complete(batch, look, off=step == 0)
                break
            except torch.cuda.OutOfMemoryError:
                release_memory(self._policy.device)
        self._watcher.finish()
        if answers is None:
            self._watcher.say("samples: none this time (not enough memory to complete even one prompt)")
            return False
        for line, ids in zip(self._lines, answers, strict=True):
            about = self._about(ids)
            text = str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()
            if step == 0:
                line |= {"before": text, **{f"before_{name}": value for name, value in about.items()}}
            else:
                line.setdefault("during", []).append({"step": step, "answer": text, **about})
                line |= {"after": text, "after_tokens": about["tokens"]}
        return True

    def _complete(self, batch: int, look: Callable[[], None] | None, *, off: bool) -> list[list[int]]:
        def answers() -> list[list[int]]:
            return complete(
                self._policy.peft, self._tokenizer, [prompt.ids for prompt in self._prompts], batch=batch,
                max_new_tokens=self._config.max_new_tokens, repetition_penalty=self._config.repetition_penalty,
                look=look,
            )  # fmt: skip

        if not off:
            return answers()
        with self._policy.reference():
            return answers()

    def _about(self, ids: list[int]) -> dict[str, Any]:
        cut = len(ids) >= self._config.max_new_tokens
        return {"tokens": len(ids), "cut": cut, "repetition": round(repetition(ids), 4)}


def repetition(ids: Sequence[int]) -> float:
    """Share of an answer's pieces of PIECE tokens that repeat an earlier one; 0 for answers too short to tell."""
    pieces = [tuple(ids[place : place + PIECE]) for place in range(len(ids) - PIECE + 1)]
    return 1 - len(set(pieces)) / len(pieces) if pieces else 0.0


def _history(line: SampleLine) -> list[SampleLine]:
    before = {name: line[f"before_{name}"] for name in ("tokens", "cut", "repetition")}
    return [before, *line.get("during", [])]


def _cut_back(line: SampleLine, step: int) -> SampleLine:
    """The line as it was after step `step`."""
    if step < 0 or "before_cut" not in line:  # a new file, or one from before answers were sampled during training
        return {"row": line["row"], "prompt": line["prompt"]}
    during = [each for each in line.get("during", []) if each["step"] <= step]
    kept = {name: value for name, value in line.items() if name not in ("during", "after", "after_tokens")}
    if during:
        kept |= {"during": during, "after": during[-1]["answer"], "after_tokens": during[-1]["tokens"]}
    return kept
