"""What CUDA itself takes of a card's memory beside torch's allocator: the context, and every kernel that was loaded."""

import subprocess
from typing import Any

import torch

from benchmarks.proof import settings
from benchmarks.proof.items import NotApplicable, NotMeasured
from qdpo.forecast import memory
from qdpo.forecast.memory import GIB
from qdpo.measure.bench import run_bench

# Every kernel of a large model. Not the paged optimizer, whose states the driver counts and torch does not.
WORDS = (
    "train.optimizer=adamw8bit",
    "model.path=Qwen/Qwen2.5-7B", "memory.kept_layers=1", "memory.offload=true", "memory.embeddings=device",
    "memory.tokens_per_row=4096", "train.pairs_per_step=4",
)  # fmt: skip


def runtime(job: dict[str, Any]) -> dict[str, Any]:
    """GiB by the driver's count, less torch's own and less what others held before; after a real step."""
    if job["device"] != "cuda":
        raise NotApplicable("there is no CUDA context on a CPU")
    before = held_by_others()
    run_bench(settings.resolve(job, *WORDS), limit_gib=None, others_gib=None, number=1, longest=2048, say=print)
    device = settings.device_of(job)
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    taken = total - free - torch.cuda.memory_reserved(device) - before
    return {"context_gib": taken / GIB, "assumed_gib": memory.CONTEXT / GIB, "held_by_others_gib": before / GIB}


def held_by_others() -> float:
    """Bytes of the card that are taken before this process touches it, as the driver says."""
    return driver_says("memory.used")


def driver_says(what: str) -> float:
    """Bytes by the driver's count, without a CUDA context in this process. Raises: NotMeasured if it does not say."""
    query = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise NotMeasured(f"nvidia-smi does not say {what}: {error}") from error
    lines = found.stdout.split()
    if len(lines) != 1 or not lines[0].isdigit():
        raise NotMeasured(f"nvidia-smi says {found.stdout.strip()!r} of {what}; one GPU and one number are needed")
    return float(lines[0]) * 2**20
