"""A local reward model as judge: scores every answer, and prefers the highest to the lowest."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qdpo.collect.candidates import Answer, Candidates
from qdpo.collect.judge import reward_scores
from qdpo.collect.judge.run import Judge, Judgement, left_open, picked
from qdpo.data.layouts.turns import excerpt
from qdpo.data.tokens.template_bounds import TemplateFault, render
from qdpo.errors import ConfigError, OutOfMemoryError
from qdpo.model.base import fetch
from qdpo.model.base.folder import read_json
from qdpo.model.base.load import load_tokenizer
from qdpo.model.device import choose_device, choose_dtype, release_memory
from qdpo.run import disk
from qdpo.run.watcher import Say

AnswerRows = dict[str, list[int]]
"""Token ids of prompt and answer, by the answer's id."""

PROMPTS_AT_A_TIME = 16
"""Prompts in a group: answers of a group are batched by length, and its decisions come when the group is done."""
TOKENS_AT_A_TIME = 8192
"""Largest batch in tokens, padding included; halved if the device runs out of memory."""


class RewardJudge(Judge):
    """Leaves prompts open whose scores differ by less than `margin`, or that the model or its template cannot take."""

    def __init__(self, name: str, load: Callable[[], tuple[Any, Any]], *, margin: float, say: Say):
        """`load` returns model and tokenizer; it is called only if there is something to score."""
        self.name = f"reward-model:{name} margin={margin:g}"
        self._load, self._margin, self._say = load, margin, say
        self._budget = TOKENS_AT_A_TIME

    def opening(self, items: Sequence[Candidates]) -> list[str]:
        self._model, self._tokenizer = self._load()
        self._longest = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        answers = sum(len(item.answers) for item in items)
        return [f"scoring {answers:,} answers to {len(items):,} prompts; the highest is preferred to the lowest"]

    def decide(self, items: Sequence[Candidates]) -> Iterator[Judgement]:
        for place in range(0, len(items), PROMPTS_AT_A_TIME):
            group = items[place : place + PROMPTS_AT_A_TIME]
            rows = {item.id: self._rows(item) for item in group}
            wanted = [row for found in rows.values() if isinstance(found, dict) for row in found.values()]
            scores = self._scores(wanted)
            for item in group:
                found = rows[item.id]
                if isinstance(found, str):
                    yield left_open(self.name, item, found)
                else:
                    yield self._decision(item, {id_: scores[tuple(row)] for id_, row in found.items()})

    def _rows(self, item: Candidates) -> AnswerRows | str:
        """Token ids of each answer's row, or the reason why there are none."""
        try:
            rows = {answer.id: self._row(item, answer) for answer in item.answers}
        except TemplateFault as fault:
            return f"the model's template refuses the prompt: {excerpt(fault, 200)}"
        if (tokens := max(map(len, rows.values()))) > self._longest:
            return f"longer than the {self._longest:,} tokens that the model reads: {tokens:,}"
        return rows

    def _row(self, item: Candidates, answer: Answer) -> list[int]:
        turns = [*item.turns, {"role": "assistant", "content": answer.text}]
        text = render(self._tokenizer, turns)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])  # as apply_chat_template does

    def _decision(self, item: Candidates, scores: dict[str, float]) -> Judgement:
        if not all(map(math.isfinite, scores.values())):
            return left_open(self.name, item, "a score is not a number")
        answers = sorted(item.answers, key=lambda answer: scores[answer.id])
        difference = scores[answers[-1].id] - scores[answers[0].id]
        if difference == 0 or difference < self._margin:
            return left_open(self.name, item, f"scores differ by less than {self._margin:g}", scores=scores)
        return picked(self.name, item, answers[-1], answers[0], scores=scores)

    def _scores(self, rows: Sequence[list[int]]) -> dict[tuple[int, ...], float]:
        """The reward of each row, keyed by its token ids; rows of similar length share a batch.

        Raises: OutOfMemoryError if not even one row fits.
        """
        waiting = sorted({tuple(row) for row in rows}, key=len)
        found: dict[tuple[int, ...], float] = {}
        while waiting:
            count = max(1, min(len(waiting), self._budget // len(waiting[-1])))  # the longest first; it sets the width
            batch = waiting[-count:]
            try:
                scores = reward_scores.rewards(self._model, batch)
            except torch.cuda.OutOfMemoryError:
                release_memory(self._model.device)
                if count == 1:
                    raise OutOfMemoryError(
                        f"The reward model cannot read {len(batch[0]):,} tokens in the free memory. Close other "
                        "programs, or leave out long answers. Decisions made so far are saved."
                    ) from None
                self._budget = count * len(waiting[-1]) // 2
                self._say(f"out of memory: {self._budget:,} tokens at a time from here on")
                continue
            del waiting[-count:]
            found |= dict(zip(batch, scores, strict=True))
        return found


def reward_judge(path: str, *, quantization: str, device: str, margin: float, say: Say) -> RewardJudge:
    """The judge for a folder or a hub id. Raises: ConfigError for other kinds of files."""
    if path.endswith(".gguf") or path.startswith("pypi:"):
        raise ConfigError(f"--by reward-model:{path}: GGUF files have no reward head. Give a folder or a hub id.")
    name = Path(path).resolve().name if Path(path).exists() else path
    load = partial(_load, path, quantization, device, say)
    return RewardJudge(f"{name} {quantization}", load, margin=margin, say=say)


def _load(path: str, quantization: str, device: str, say: Say) -> tuple[Any, Any]:
    """Load model and tokenizer. Raises: ConfigError for other models, if possible before the download."""
    place = choose_device(device, say)
    owner = f"The model {path!r} (from --by)"
    try:
        folder = fetch.locate_base(
            path, revision=None, cache_dir=disk.cache_folder(None), announce=say,
            refuse=lambda config: reward_scores.check_reward_config(config, owner),
        ).folder  # fmt: skip
    except ConfigError as error:  # its messages name model.path
        raise ConfigError([problem.replace("model.path", "--by") for problem in error.problems]) from error
    reward_scores.check_reward_config(read_json(folder / "config.json"), owner)
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        raise ConfigError(f"{owner} has no chat template, so the format of its dialogues is unknown.")
    dtype = choose_dtype("auto", place, say)
    model = reward_scores.load_reward_model(folder, quantization=quantization, dtype=dtype, device=place, announce=say)
    return model, tokenizer
