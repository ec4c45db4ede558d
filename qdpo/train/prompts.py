"""Which prompts are completed for reading: held-out ones, or those of a file; and how one is shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdpo.config import DataConfig, SamplesConfig
from qdpo.data.encode import Encoder
from qdpo.data.files import FileRows
from qdpo.data.pair import Pair, Rejection
from qdpo.data.render import Renderer
from qdpo.data.templates import settle_template
from qdpo.data.tokens import TokenPair
from qdpo.data.turns import Message, RowProblem, read_text, read_turns
from qdpo.errors import ConfigError

# Where the last user turn begins and ends in the prompts of common templates.
USER_TURNS = {
    "<|im_start|>user\n": "<|im_end|>",
    "<|start_header_id|>user<|end_header_id|>\n\n": "<|eot_id|>",
    "[INST]": "[/INST]",
    "<start_of_turn>user\n": "<end_of_turn>",
}


@dataclass(frozen=True)
class Prompt:
    """A prompt to complete; `row` counts from 1, in the data or in samples.prompts."""

    row: int
    ids: list[int]


def held_out_prompts(pairs: Sequence[TokenPair], count: int) -> list[Prompt]:
    """The first `count` distinct prompts of these pairs."""
    distinct = list({pair.prompt.tobytes(): pair for pair in pairs}.values())
    return [Prompt(pair.row, pair.prompt.tolist()) for pair in distinct[:count]]


def prompts_of_file(samples: SamplesConfig, data: DataConfig, tokenizer: Any) -> list[Prompt] | None:
    """The first prompts of samples.prompts; None if it is not set. Raises: ConfigError if there are none, or broken."""
    if samples.prompts is None:
        return None
    path, count = Path(samples.prompts).expanduser(), samples.count
    if not path.is_file():
        raise ConfigError(
            f"samples.prompts={path} is no file. Give a text file with a prompt a line, or a .jsonl with a `prompt` or "
            "`messages` in each row; without the setting, held-out prompts are completed."
        )
    settle_template(tokenizer, data.template)
    renderer = Renderer(tokenizer, data.template, data.system, data.refused_system, data.merge_same_role)
    texts, rows = [], []
    for row, (turns, is_chat) in enumerate(_turns(path, count), 1):
        # Rendered as a pair, with answers that are thrown away: the ids are then those that training would give it.
        rendered = renderer.render(Pair(turns, "yes", "no", row, is_chat))
        if isinstance(rendered, Rejection):
            raise ConfigError(f"samples.prompts={path}, row {row} cannot be a prompt: {rendered.detail}.")
        texts.append(rendered)
        rows.append(row)
    if not texts and count > 0:
        raise ConfigError(f"samples.prompts={path} holds no prompts. Write one a line, or leave the setting out.")
    encoded = Encoder(tokenizer, data.template).encode(texts)
    return [Prompt(row, list(ids[0])) for row, ids in zip(rows, encoded, strict=True) if ids is not None]


def _turns(path: Path, count: int) -> list[tuple[list[Message], bool]]:
    if path.suffix != ".jsonl":
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [([{"role": "user", "content": line}], False) for line in lines[:count]]
    found: list[tuple[list[Message], bool]] = []
    for row in FileRows([path], count):
        value = row.get("prompt", row.get("messages"))
        try:
            if isinstance(value, str):
                found.append(([{"role": "user", "content": read_text(value, "prompt")}], False))
            else:
                found.append((read_turns(value, "prompt" if "prompt" in row else "messages"), True))
        except RowProblem as problem:
            raise ConfigError(f"samples.prompts={path}, row {len(found) + 1}: {problem.detail}.") from None
    return found


def question(prompt: str) -> str:
    """The last user turn of a rendered prompt, or the prompt's end: for display only."""
    for begin, end in USER_TURNS.items():
        if begin in prompt:
            prompt = prompt.rsplit(begin, 1)[1].split(end, 1)[0]
            break
    return prompt.strip()[-400:]
