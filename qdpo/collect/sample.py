"""Draws several answers to each prompt from your own model and writes them as candidates; resumes where it stopped."""

import gc
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from qdpo.collect.answering_model import Sampler
from qdpo.collect.candidates import Answer, Candidates, read_lines
from qdpo.collect.decisions import held
from qdpo.data.tokens.prompts_only import Prompt, encode_prompts, prompts_of
from qdpo.data.tokens.templates import uses_chat_template
from qdpo.errors import ConfigError, DataError, OutOfMemoryError
from qdpo.families.config_fields import positions
from qdpo.model.generate.sample import Draw, Drawn, bytes_an_answer, draw
from qdpo.run import disk
from qdpo.run.watcher import Watcher
from qdpo.settings.layered import shipped_folder
from qdpo.train.start import auto_memory

MEMORY_SHARE = 0.8
"""Share of the memory free after loading; the rest is for the computation itself."""
MOST_AT_ONCE = {"cuda": 128, "cpu": 32}
"""Answers in a batch: a larger batch waits longer for its longest answer, and a stop loses more. Not measured."""
ROUNDS = 3
"""Most rounds for a prompt: answers that are empty or repeat another answer are drawn again."""


@dataclass(frozen=True)
class SamplingParameters:
    """Parameters of the sampling."""

    n: int = 4
    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int = 512
    seed: int = 0


@dataclass(kw_only=True)
class Sampled:
    """Result of a call: prompts in the file at the end and before, and the counts of this call's draws."""

    prompts: int = 0
    before: int = 0
    answers: int = 0
    repeated: int = 0
    """Draws that repeat another answer to the prompt."""
    empty: int = 0
    cut: int = 0
    """Answers that end at the length limit."""
    short: int = 0
    """Prompts with fewer different answers than were asked for."""

    def lines(self) -> list[str]:
        """Lines for the user."""
        if self.prompts == self.before:
            return [f"nothing to do: all {self.prompts:,} prompts are answered"]
        cut = f", {self.cut:,} of them cut at --max-new-tokens" if self.cut else ""
        found = [f"{self.answers:,} answers to {self.prompts - self.before:,} prompts{cut}"]
        if self.repeated or self.empty:
            found.append(f"left out: {self.repeated:,} repeated answers, {self.empty:,} empty answers")
        if self.short:
            found.append(
                f"{self.short:,} prompts have fewer different answers than --n; a higher --temperature makes answers "
                "differ"
            )
        return found


@dataclass
class _Work:
    """A prompt in progress, with the answers found so far."""

    prompt: Candidates
    ids: list[int]
    answers: list[Answer] = field(default_factory=list)
    draws: int = 0
    """Draws numbered so far."""
    waiting: int = 0
    rounds: int = 0


def read_prompts(path: str, column: str | None, limit: int | None, watcher: Watcher) -> list[Prompt]:
    """The first `limit` distinct prompts of a file or data set. Raises: DataError, with the line if it is known."""
    found = prompts_of(path, column=column, shipped=shipped_folder())
    distinct: dict[str, Prompt] = {}
    for prompt in found:
        distinct.setdefault(json.dumps([prompt.turns, prompt.tools]), prompt)
    if len(distinct) < len(found):
        watcher.say(f"{len(found) - len(distinct):,} prompts are repeated; each is answered once")
    return list(distinct.values())[:limit]


def sample(
    sampler: Sampler, prompts: Sequence[Prompt], out: Path, drawing: SamplingParameters, watcher: Watcher
) -> Sampled:
    """Write a line to `out` for each prompt that has none yet, as soon as its answers are drawn.

    Raises: ConfigError if `out` was drawn with other settings; DataError for a prompt that is too long for the model;
    DiskError.
    """
    with held(out):
        ids = encode_prompts(prompts, sampler.tokenizer, sampler.data)
        _check_lengths(sampler, prompts, ids, drawing.max_new_tokens)
        drawn = asdict(drawing) | {"template": sampler.data.template}
        asked = [Candidates(_written(one, sampler), (), one.origin, drawn, one.tools) for one in prompts]
        done = _done(out, drawn, sampler, watcher)
        left = [_Work(one, tokens) for one, tokens in zip(asked, ids, strict=True) if one.id not in done]
        counts = Sampled(before=len(done), prompts=len(done) + len(left))
        if left:
            if done:
                watcher.say(f"{len(done):,} prompts are answered already; {len(left):,} are left")
            _answer(sampler, left, out, drawing, watcher, counts)
            _put_in_order(out, asked)
        return counts


def _answer(
    sampler: Sampler, works: list[_Work], out: Path, drawing: SamplingParameters, watcher: Watcher, counts: Sampled
) -> None:
    """Draw the answers, longest prompts first: out-of-memory errors come early, and time left is not underestimated."""
    works = sorted(works, key=lambda work: -len(work.ids))
    batch = _at_once(sampler, len(works[0].ids), drawing)
    watcher.say(f"answers: {drawing.n} to each of {len(works):,} prompts, {batch} at a time")
    watcher.begin("sampling", len(works) * drawing.n, "answer")
    queue = deque(draw for work in works for draw in _ask(work, drawing))
    while queue:
        members = [queue.popleft() for _ in range(min(batch, len(queue)))]
        found = _try(sampler, [one for _work, one in members], drawing)
        if found is None:
            gc.collect()
            torch.cuda.empty_cache()
            batch = max(1, len(members) // 2)
            watcher.say(f"not enough memory: {batch} answers at a time from here on")
            queue.extendleft(reversed(members))
            continue
        again: list[tuple[_Work, Draw]] = []
        finished = 0
        for (work, one), drawn in zip(members, found, strict=True):
            _take(work, one, drawn, sampler, counts)
            if work.waiting == 0:
                again += _ask(work, drawing)
            if work.waiting == 0:
                _write(work, out, drawing, counts)
                finished += drawing.n
        watcher.advance(finished)
        queue.extendleft(reversed(again))
    watcher.finish()


def _ask(work: _Work, drawing: SamplingParameters) -> list[tuple[_Work, Draw]]:
    """The draws that the prompt still needs; empty if it has all its answers or has used all its rounds."""
    missing = drawing.n - len(work.answers)
    if work.rounds == ROUNDS or not missing:
        return []
    numbers = range(work.draws, work.draws + missing)
    work.rounds, work.draws, work.waiting = work.rounds + 1, work.draws + missing, missing
    return [(work, Draw(work.ids, _seed(drawing.seed, work.prompt.id, number))) for number in numbers]


def _take(work: _Work, one: Draw, drawn: Drawn, sampler: Sampler, counts: Sampled) -> None:
    work.waiting -= 1
    text = str(sampler.tokenizer.decode(drawn.ids, skip_special_tokens=True)).strip()
    if not text:
        counts.empty += 1
    elif any(answer.text == text for answer in work.answers):
        counts.repeated += 1
    else:
        work.answers.append(Answer(text, sampler.origin, len(drawn.ids), drawn.cut, one.seed))


def _write(work: _Work, out: Path, drawing: SamplingParameters, counts: Sampled) -> None:
    line = Candidates(work.prompt.prompt, tuple(work.answers), work.prompt.place, work.prompt.drawn, work.prompt.tools)
    disk.append_text(out, json.dumps(line.to_json(), ensure_ascii=False) + "\n")
    counts.answers += len(work.answers)
    counts.cut += sum(answer.cut for answer in work.answers)
    counts.short += len(work.answers) < drawing.n


def _try(sampler: Sampler, draws: list[Draw], drawing: SamplingParameters) -> list[Drawn] | None:
    """Draw a batch; None if it does not fit. Raises: OutOfMemoryError if the batch is a single answer."""
    try:
        return draw(
            sampler.model, sampler.tokenizer, draws, max_new_tokens=drawing.max_new_tokens,
            temperature=drawing.temperature, top_p=drawing.top_p,
        )  # fmt: skip
    except torch.cuda.OutOfMemoryError as error:
        if len(draws) > 1:
            return None
        raise OutOfMemoryError(
            f"One answer of {drawing.max_new_tokens} tokens to a prompt of {len(draws[0].prompt)} does not fit in "
            "memory. Give a smaller --max-new-tokens, or shorter prompts."
        ) from error


def _at_once(sampler: Sampler, longest: int, drawing: SamplingParameters) -> int:
    element = sampler.model.get_output_embeddings().weight.element_size()
    one = bytes_an_answer(sampler.model.config, element, longest, drawing.max_new_tokens)
    fits = int(auto_memory.available(sampler.device) * MEMORY_SHARE / one)
    return max(1, min(fits, MOST_AT_ONCE[sampler.device.type]))


def _written(prompt: Prompt, sampler: Sampler) -> str | list[dict[str, Any]]:
    """The prompt as the model read it, including its system message; as messages if the model uses a chat template."""
    if not prompt.is_chat and not uses_chat_template(sampler.tokenizer, sampler.data.template):
        return str(prompt.turns[0]["content"])
    system = [{"role": "system", "content": sampler.data.system}]
    return prompt.turns if prompt.turns[0]["role"] == "system" or not sampler.data.system else system + prompt.turns


def _seed(seed: int, prompt: str, number: int) -> int:
    """Seed of one answer's random stream; independent of the file and of the prompt's place in it."""
    return int(sha256(f"{seed} {prompt} {number}".encode()).hexdigest()[:12], 16)


def _check_lengths(sampler: Sampler, prompts: Sequence[Prompt], ids: Sequence[list[int]], new: int) -> None:
    limit = positions(sampler.model.config.get_text_config())
    allowed = limit.count if limit else None
    for prompt, tokens in zip(prompts, ids, strict=True):
        if allowed is not None and len(tokens) + new > allowed:
            raise DataError(
                f"The prompt in {prompt.origin} has {len(tokens):,} tokens; with {new:,} more (--max-new-tokens) it "
                f"exceeds the model's {allowed:,} positions. Shorten the prompt or the answers."
            )


def _done(out: Path, drawn: dict[str, Any], sampler: Sampler, watcher: Watcher) -> set[str]:
    """Ids of the prompts in `out`. Raises: ConfigError if its answers come from other settings or another model."""
    if not out.exists() or not out.stat().st_size:
        return set()
    if disk.cut_torn_line(out):
        watcher.say(f"the last line of {out} is incomplete (after a crash); its prompt is answered again")
    lines = read_lines(out)
    for line in lines:
        for name, value in drawn.items():
            if line.drawn.get(name) != value:
                raise ConfigError(
                    f"{line.place} was drawn with {name}={line.drawn.get(name)}, but this command has {name}={value}. "
                    "Give the same settings to resume the file, or another --out."
                )
        if any(answer.origin != sampler.origin for answer in line.answers):
            then = next(answer.origin for answer in line.answers if answer.origin != sampler.origin)
            raise ConfigError(
                f"{line.place} has answers of {then.name if then else 'an unknown model'}, not of "
                f"{sampler.origin.name} as it is loaded now. Give another --out."
            )
    return {line.id for line in lines}


def _put_in_order(out: Path, asked: Sequence[Candidates]) -> None:
    """Sort the file by the order of the prompts, with prompts of earlier calls that are not among them first."""
    place = {prompt.id: number for number, prompt in enumerate(asked)}
    lines = sorted(read_lines(out), key=lambda line: place.get(line.id, -1))
    disk.write_text(out, "".join(json.dumps(line.to_json(), ensure_ascii=False) + "\n" for line in lines))
