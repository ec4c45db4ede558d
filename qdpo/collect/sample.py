"""Several answers to each prompt from one's own model, written as candidates; goes on where it was stopped."""

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
from qdpo.model.generate.sample import Draw, Drawn, bytes_an_answer, draw
from qdpo.run import disk
from qdpo.run.watcher import Watcher
from qdpo.settings.layered import shipped_folder
from qdpo.train.start import auto_memory

MEMORY_SHARE = 0.8
"""Of what is free after loading: the rest is for what generation itself computes."""
MOST_AT_ONCE = {"cuda": 128, "cpu": 32}
"""Answers in a batch: a larger one waits longer for its longest answer, and a stop loses more. Unmeasured estimates."""
ROUNDS = 3
"""How often a prompt is asked at most: answers that are empty, or said already, are drawn anew."""


@dataclass(frozen=True)
class SamplingParameters:
    """How answers are drawn."""

    n: int = 4
    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int = 512
    seed: int = 0


@dataclass(kw_only=True)
class Sampled:
    """What was done: prompts in the file at the end and before, and what became of the draws of this call."""

    prompts: int = 0
    before: int = 0
    answers: int = 0
    repeated: int = 0
    """Draws that said what another answer to the prompt says."""
    empty: int = 0
    cut: int = 0
    """Answers that end at the length limit."""
    short: int = 0
    """Prompts with fewer different answers than were asked for."""

    def lines(self) -> list[str]:
        """For the user to read."""
        if self.prompts == self.before:
            return [f"nothing to do: all {self.prompts:,} prompts are answered"]
        cut = f", {self.cut:,} of them cut at --max-new-tokens" if self.cut else ""
        found = [f"{self.answers:,} answers to {self.prompts - self.before:,} prompts{cut}"]
        if self.repeated or self.empty:
            found.append(f"{self.repeated:,} draws said what was said before, {self.empty:,} were empty: left out")
        if self.short:
            found.append(
                f"{self.short:,} prompts have fewer different answers than --n asks for; a higher --temperature makes "
                "them differ"
            )
        return found


@dataclass
class _Work:
    """One prompt on its way; answers are those found so far."""

    prompt: Candidates
    ids: list[int]
    answers: list[Answer] = field(default_factory=list)
    draws: int = 0
    """Numbers given out so far."""
    waiting: int = 0
    rounds: int = 0


def read_prompts(path: str, column: str | None, limit: int | None, watcher: Watcher) -> list[Prompt]:
    """The first `limit` distinct prompts of a file or data set. Raises: DataError, naming a line where it can."""
    found = prompts_of(path, column=column, shipped=shipped_folder())
    distinct: dict[str, Prompt] = {}
    for prompt in found:
        distinct.setdefault(json.dumps(prompt.turns), prompt)
    if len(distinct) < len(found):
        watcher.say(f"{len(found) - len(distinct):,} prompts are repeated; each is answered once")
    return list(distinct.values())[:limit]


def sample(
    sampler: Sampler, prompts: Sequence[Prompt], out: Path, drawing: SamplingParameters, watcher: Watcher
) -> Sampled:
    """Writes a line to `out` for each prompt that has none yet, as soon as its answers are drawn.

    Raises: ConfigError if `out` was drawn otherwise; DataError for a prompt that does not fit the model; DiskError.
    """
    with held(out):
        ids = encode_prompts(prompts, sampler.tokenizer, sampler.data)
        _check_lengths(sampler, prompts, ids, drawing.max_new_tokens)
        drawn = asdict(drawing) | {"template": sampler.data.template}
        asked = [Candidates(_written(prompt, sampler), (), prompt.origin, drawn) for prompt in prompts]
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
    """Longest prompts first: what does not fit shows at the start, and the time left is overstated, if anything."""
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
    """The draws that the prompt still needs; none when it has all its answers, or was asked often enough."""
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
    line = Candidates(work.prompt.prompt, tuple(work.answers), work.prompt.place, work.prompt.drawn)
    disk.append_text(out, json.dumps(line.to_json(), ensure_ascii=False) + "\n")
    counts.answers += len(work.answers)
    counts.cut += sum(answer.cut for answer in work.answers)
    counts.short += len(work.answers) < drawing.n


def _try(sampler: Sampler, draws: list[Draw], drawing: SamplingParameters) -> list[Drawn] | None:
    """None where the batch does not fit. Raises: OutOfMemoryError if it is a single answer."""
    try:
        return draw(
            sampler.model, sampler.tokenizer, draws, max_new_tokens=drawing.max_new_tokens,
            temperature=drawing.temperature, top_p=drawing.top_p,
        )  # fmt: skip
    except torch.cuda.OutOfMemoryError as error:
        if len(draws) > 1:
            return None
        raise OutOfMemoryError(
            f"One answer of {drawing.max_new_tokens} tokens to a prompt of {len(draws[0].prompt)} does not fit into "
            "memory. Give a smaller --max-new-tokens, or shorter prompts."
        ) from error


def _at_once(sampler: Sampler, longest: int, drawing: SamplingParameters) -> int:
    element = sampler.model.get_output_embeddings().weight.element_size()
    one = bytes_an_answer(sampler.model.config, element, longest, drawing.max_new_tokens)
    fits = int(auto_memory.available(sampler.device) * MEMORY_SHARE / one)
    return max(1, min(fits, MOST_AT_ONCE[sampler.device.type]))


def _written(prompt: Prompt, sampler: Sampler) -> str | list[dict[str, Any]]:
    """The prompt as the model read it, its system message too: as messages where they are rendered as such."""
    if not prompt.is_chat and not uses_chat_template(sampler.tokenizer, sampler.data.template):
        return str(prompt.turns[0]["content"])
    system = [{"role": "system", "content": sampler.data.system}]
    return prompt.turns if prompt.turns[0]["role"] == "system" or not sampler.data.system else system + prompt.turns


def _seed(seed: int, prompt: str, number: int) -> int:
    """The seed of one answer's random stream: the same for this prompt in any file and at any place."""
    return int(sha256(f"{seed} {prompt} {number}".encode()).hexdigest()[:12], 16)


def _check_lengths(sampler: Sampler, prompts: Sequence[Prompt], ids: Sequence[list[int]], new: int) -> None:
    allowed = getattr(sampler.model.config.get_text_config(), "max_position_embeddings", None)
    for prompt, tokens in zip(prompts, ids, strict=True):
        if allowed is not None and len(tokens) + new > allowed:
            raise DataError(
                f"The prompt in {prompt.origin} has {len(tokens):,} tokens; with {new:,} more (--max-new-tokens) that "
                f"is beyond the model's {allowed:,} positions. Shorten the prompt or the answers."
            )


def _done(out: Path, drawn: dict[str, Any], sampler: Sampler, watcher: Watcher) -> set[str]:
    """Ids of the prompts that `out` holds. Raises: ConfigError where its answers are drawn by other means."""
    if not out.exists() or not out.stat().st_size:
        return set()
    if disk.cut_torn_line(out):
        watcher.say(f"the last line of {out} was torn off by a crash; its prompt is answered again")
    lines = read_lines(out)
    for line in lines:
        for name, value in drawn.items():
            if line.drawn.get(name) != value:
                raise ConfigError(
                    f"{line.place} was drawn with {name}={line.drawn.get(name)}, and this call says {name}={value}. "
                    "Give the same settings to go on with the file, or another --out."
                )
        if any(answer.origin != sampler.origin for answer in line.answers):
            then = next(answer.origin for answer in line.answers if answer.origin != sampler.origin)
            raise ConfigError(
                f"{line.place} holds answers of {then.name if then else 'an unknown model'}, and not of "
                f"{sampler.origin.name} as it is loaded now. Give another --out."
            )
    return {line.id for line in lines}


def _put_in_order(out: Path, asked: Sequence[Candidates]) -> None:
    """In the order of the prompts, those of earlier calls with other prompts first."""
    place = {prompt.id: number for number, prompt in enumerate(asked)}
    lines = sorted(read_lines(out), key=lambda line: place.get(line.id, -1))
    disk.write_text(out, "".join(json.dumps(line.to_json(), ensure_ascii=False) + "\n" for line in lines))
