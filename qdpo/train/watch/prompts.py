"""Selects the prompts that are completed for reading (held-out, or from a file) and formats them for display."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdpo.data.tokens.prompts_only import encode_prompts, read_prompts
from qdpo.data.tokens.sieve import TokenPair
from qdpo.data.tokens.templates import settle_template
from qdpo.settings.schema import DataConfig, SamplesConfig

# The markers around the last user turn in the prompts of common templates.
USER_TURNS = {
    "<|im_start|>user\n": "<|im_end|>",
    "<|start_header_id|>user<|end_header_id|>\n\n": "<|eot_id|>",
    "[INST]": "[/INST]",
    "<start_of_turn>user\n": "<end_of_turn>",
}


@dataclass(frozen=True)
class SamplePrompt:
    """A prompt to complete; `row` counts from 1, in the data or in samples.prompts."""

    row: int
    ids: list[int]


def held_out_prompts(pairs: Sequence[TokenPair], count: int) -> list[SamplePrompt]:
    """The first `count` distinct prompts of the pairs."""
    distinct = list({pair.prompt.tobytes(): pair for pair in pairs}.values())
    return [SamplePrompt(pair.row, pair.prompt.tolist()) for pair in distinct[:count]]


def prompts_of_file(samples: SamplesConfig, data: DataConfig, tokenizer: Any) -> list[SamplePrompt] | None:
    """The first prompts of samples.prompts; None if it is not set. Raises: DataError if it is empty or broken."""
    if samples.prompts is None:
        return None
    settle_template(tokenizer, data.template)
    read = read_prompts(Path(samples.prompts).expanduser(), "samples.prompts")[: samples.count]
    return [SamplePrompt(row, ids) for row, ids in enumerate(encode_prompts(read, tokenizer, data), 1)]


def question(prompt: str) -> str:
    """The last user turn of a rendered prompt, or the prompt's end; for display only."""
    for begin, end in USER_TURNS.items():
        if begin in prompt:
            prompt = prompt.rsplit(begin, 1)[1].split(end, 1)[0]
            break
    return prompt.strip()[-400:]
