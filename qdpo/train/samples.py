"""Completions of held-out prompts with the adapter off and on, written side by side."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qdpo import rundir
from qdpo.config import SamplesConfig
from qdpo.data.tokens import TokenPair
from qdpo.model.adapter import Policy
from qdpo.model.generate import complete
from qdpo.train.meters import Watcher


def write_samples(
    path: Path, policy: Policy, tokenizer: Any, pairs: Sequence[TokenPair], config: SamplesConfig, watcher: Watcher
) -> dict[str, Any] | None:
    """Completes the first `config.count` distinct held-out prompts greedily, before and after; None if count is 0.

    Returns the median lengths, in tokens, with the end token; a completion that was cut counts as max_new_tokens.
    """
    prompts = list({pair.prompt.tobytes(): pair for pair in pairs}.values())[: config.count]
    if not prompts:
        return None
    watcher.begin("completing held-out prompts, before and after", 2 * len(prompts), "answer")
    ids = [pair.prompt.tolist() for pair in prompts]

    def answers() -> list[list[int]]:
        return complete(
            policy,
            tokenizer,
            ids,
            max_new_tokens=config.max_new_tokens,
            repetition_penalty=config.repetition_penalty,
        )

    with policy.reference():
        before = answers()
    watcher.advance(len(prompts))
    after = answers()
    watcher.advance(len(prompts))
    watcher.finish()

    def text(answer: list[int]) -> str:
        return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()

    lines = [
        {"row": pair.row, "prompt": str(tokenizer.decode(pair.prompt)), "before": text(old), "after": text(new),
         "before_tokens": len(old), "after_tokens": len(new)}
        for pair, old, new in zip(prompts, before, after, strict=True)
    ]  # fmt: skip
    rundir.write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return {
        "count": len(lines),
        "median_tokens_before": statistics.median(line["before_tokens"] for line in lines),  # type: ignore[type-var]
        "median_tokens_after": statistics.median(line["after_tokens"] for line in lines),  # type: ignore[type-var]
    }
