"""One start for both trainers: the same base, initial adapter, pairs, order and schedule, as a job for either side."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.pairs import Candidate, read_candidates, same_in_both, write_rows
from benchmarks.rounds import Side
from benchmarks.tiny import save_tiny_base
from qdpo.data import stored
from qdpo.model.base import fetch
from qdpo.model.base.load import load_base, load_tokenizer
from qdpo.model.policy import adapter
from qdpo.run.disk import read_json
from qdpo.run.folder import RunDir
from qdpo.settings import layered
from qdpo.settings.schema import RunConfig
from qdpo.train.start.length import RunLength
from qdpo.train.start.open_run import cache_folder

MAX_TOKENS = 1024  # TRL's default max_length
PAIRS_PER_STEP, SEED, LEARNING_RATE = 8, 0, 1e-4


class Start:
    """What both sides begin with: rows.jsonl, held.jsonl and adapter/ in `work`, and the pairs of the rows."""

    def __init__(self, options: argparse.Namespace, trl_python: str, work: Path, *, steps: int, start_b: float) -> None:
        self.work, self._trl_python = work, trl_python
        self.base = save_tiny_base(work / "base", hybrid=options.hybrid) if options.tiny else _demo_base()
        candidates = read_candidates(options.data, load_tokenizer(self.base), max_tokens=MAX_TOKENS)
        same = self._same_in_both(candidates)
        self.differing = len(same) - sum(same)
        print(f"token ids: {self.differing} of {len(same)} pairs differ between TRL and qdpo; both go without them")
        kept = [candidate for candidate, equal in zip(candidates, same, strict=True) if equal]
        self.pairs = kept[: steps * PAIRS_PER_STEP]
        write_rows(work / "rows.jsonl", self.pairs)
        write_rows(work / "held.jsonl", self.pairs[:1])
        _write_adapter(work / "adapter", self.base, start_b)

    def qdpo_job(self, name: str, rounds: list[int], changes: dict[str, Any]) -> dict[str, Any]:
        """A run in work/runs/NAME with a cache of its own."""
        settings = {
            "model.path": self.base, "model.device": "cpu",
            "adapter.start": self.work / "adapter", "adapter.reference": "base",
            "data.path": self.work / "rows.jsonl", "data.eval_path": self.work / "held.jsonl",
            "data.max_tokens": MAX_TOKENS, "loss.beta": 0.1, "train.pairs_per_step": PAIRS_PER_STEP,
            "train.steps": sum(rounds), "train.seed": SEED, "train.learning_rate": LEARNING_RATE,
            "train.schedule": "constant", "train.warmup_steps": 0, "train.max_grad_norm": 1.0, "samples.count": 0,
            "output.dir": self.work / "runs", "output.name": name, "cache.dir": self.work / "caches" / name, **changes,
        }  # fmt: skip
        return {"settings": [f"{setting}={value}" for setting, value in settings.items()], "rounds": rounds}

    def trl_job(
        self, pairs: Sequence[Candidate], rounds: list[int], model: dict[str, Any], arguments: dict[str, Any]
    ) -> dict[str, Any]:
        """The same for TRL; `pairs` are all pairs of all steps in order, `model` says how the base is loaded."""
        common = {
            "max_length": MAX_TOKENS, "beta": 0.1, "max_steps": sum(rounds), "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0,
            "per_device_train_batch_size": PAIRS_PER_STEP,
        }  # fmt: skip
        return {
            "folder": str(self.base), "adapter": str(self.work / "adapter"), "rounds": rounds,
            "pairs": [pair.texts.three for pair in pairs], "response_head": False, "arguments": {**common, **arguments},
            **model,
        }  # fmt: skip

    def in_order_of(self, name: str) -> list[Candidate]:
        """The pairs in the order in which the run NAME, which has planned itself, takes them."""
        run = RunDir(self.work / "runs" / name)
        train, _held = stored.load(run)
        record = read_json(run.record)
        config = RunConfig.model_validate(layered.nested(record["settings"]))
        found = record["found"]
        plan = RunLength(found["train.steps"], found["total_pairs"], found["train.warmup_steps"])
        places = [place for step in range(plan.steps) for place in plan.indices(step, config.train, len(train))]
        return [self.pairs[train[place].row - 1] for place in places]

    def _same_in_both(self, candidates: Sequence[Candidate]) -> list[bool]:
        texts = [candidate.texts.three for candidate in candidates]
        job = {"folder": str(self.base), "pairs": texts, "arguments": {"max_length": MAX_TOKENS}}
        with Side("TRL tokens", self._trl_python, "benchmarks.trl_side", job, self.work / "tokens.log") as side:
            return same_in_both(candidates, side.opening["ids"], MAX_TOKENS)


def _demo_base() -> Path:
    config = layered.resolve(["preset=demo"]).config
    cache = cache_folder(config)
    return fetch.locate_base(str(config.model.path), revision=None, cache_dir=cache, announce=print).folder


def _write_adapter(folder: Path, base_folder: Path, start_b: float) -> None:
    """A fresh qdpo adapter as PEFT saves it, but for B: drawn, so that every term of a step counts."""
    model = load_base(
        base_folder, quantization="none", double_quant=False, dtype="fp32", device=torch.device("cpu"),
        attention_name="sdpa", announce=print,
    )  # fmt: skip
    model = adapter.new_adapter(model, rank=16, alpha=32, targets=["all-linear"], rslora=False, seed=SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, start_b)
    model.save_pretrained(folder)
