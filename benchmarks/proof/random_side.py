"""qdpo's side of stage 4, in rounds: the real step on a base with random weights, with settings that `auto` finds.

The job: `words`, settings · `shape`, a folder with the model's config · `ids`, each [prompt, chosen, rejected], in the
order of training · `allowed_gib`, what torch's allocator may take · `rounds`, the number of steps of each.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from benchmarks.rounds import Parent
from qdpo.data.tokens.sieve import TokenPair
from qdpo.families import shapes
from qdpo.forecast import choose, memory
from qdpo.forecast.memory import GIB
from qdpo.measure import random_base, steps
from qdpo.model.device import DTYPES, choose_device, choose_dtype, peak_gib
from qdpo.run.record import MemoryChoice
from qdpo.settings import layered
from qdpo.train.policy.build import Loaded, make_policy, probe_pairs
from qdpo.train.start import auto_memory
from qdpo.train.step.optimizer import choose_optimizer


def main() -> None:
    parent = Parent()
    job = parent.job
    config = layered.resolve(job["words"]).config
    device = choose_device(config.model.device, print)
    allowed = auto_memory.available(device)
    if job["allowed_gib"] is not None:
        allowed = job["allowed_gib"] * GIB
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(allowed / total, device)
    pairs = [
        TokenPair(*(np.array(part, dtype=np.int32) for part in ids), row) for row, ids in enumerate(job["ids"], 1)
    ]  # fmt: skip
    loaded, choice, optimizer = _load(job, config, device, allowed, pairs)
    found = {f"memory.{name}": value for name, value in dataclasses.asdict(choice).items()}
    parent.answer(found={**found, "optimizer": optimizer})
    running = steps.timed_steps(
        auto_memory.settled(config, choice), loaded, pairs, tokens_per_row=choice.tokens_per_row,
        optimizer_name=optimizer,
    )  # fmt: skip
    for number, size in enumerate(job["rounds"]):
        parent.wait()
        if number == 0 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        taken = [next(running) for _step in range(size)]
        parent.answer(
            seconds=sum(step.seconds for step in taken), positions=sum(step.tokens for step in taken),
            peak_gib=peak_gib(device),
        )  # fmt: skip


def _load(
    job: dict[str, Any], config: Any, device: torch.device, allowed: float, pairs: list[TokenPair]
) -> tuple[Loaded, MemoryChoice, str]:
    """Policy, memory settings and optimizer that `auto` finds for these pairs and this memory, longest row tried."""
    dtype = choose_dtype(config.model.dtype, device, print)
    architecture = AutoConfig.from_pretrained(job["shape"], local_files_only=True)
    shape = shapes.from_config(architecture.to_dict(), job["shape"])
    optimizer = choose_optimizer("auto", device, print)
    cuda = device.type == "cuda"
    run = choose.settings_of(
        config.model, config.adapter, config.memory, optimizer=optimizer, element=DTYPES[dtype].itemsize, cuda=cuda,
        context=not cuda,
    )  # fmt: skip
    chosen = choose.choose(
        shape, run, auto_memory.lengths_of(pairs, config.train.pairs_per_step), choose.given_of(config.memory, shape),
        limit=allowed * choose.PLANNED_SHARE,
        host_limit=auto_memory.HOST_SHARE * auto_memory.available(auto_memory.CPU),
    )  # fmt: skip
    choice = auto_memory.memory_of(chosen)
    torch.manual_seed(0)
    model = random_base.random_base(
        architecture, quantization="nf4", double_quant=True, dtype=DTYPES[dtype], device=device
    )
    loaded = make_policy(
        auto_memory.settled(config, choice), model, device=device, dtype=dtype, probe_with=probe_pairs(pairs), say=print
    )
    kept = auto_memory.try_worst_row(
        loaded, pairs, tokens_per_row=chosen.tokens_per_row, kept_layers=chosen.run.kept_layers, may_lower=True,
        optimizer_bytes=memory.STATE_BYTES[optimizer] * memory.adapter_numbers(shape, run.rank), say=print,
    )  # fmt: skip
    return loaded, dataclasses.replace(choice, kept_layers=kept), optimizer


if __name__ == "__main__":
    main()
