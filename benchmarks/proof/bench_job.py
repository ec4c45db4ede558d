"""`qdpo bench` as an item: the real step on random weights, under a card's memory."""

from typing import Any

from benchmarks.proof import settings
from qdpo.measure.bench import print_measured, run_bench
from qdpo.model.device import use_deterministic_kernels


def bench(job: dict[str, Any]) -> dict[str, Any]:
    """The figures of `Measured`. The job: words, card_gib, steps, longest, context_gib; deterministic."""
    resolved = settings.resolve(job, *job["words"])
    settings.check_card(job)
    if job.get("deterministic"):
        use_deterministic_kernels()
    longest = 2 * settings.TINY_TOKENS if job["tiny"] else job["longest"]
    measured = run_bench(
        resolved, limit_gib=job["card_gib"], others_gib=None, number=job["steps"], longest=longest, say=print,
        context_gib=job["context_gib"],
    )  # fmt: skip
    print_measured(measured, print)
    return vars(measured)
