"""Merges a run, compares the written model with the trained model, and only then gives the folder its final name."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qdpo.errors import ConfigError, VerificationError
from qdpo.export.merge.merge import BaseWeights, MergeReport, merge_run
from qdpo.export.proof import verify
from qdpo.export.proof.distance import TIE, Side
from qdpo.export.proof.verify import PAIRS, TrainedScores, Verification
from qdpo.model.device import DTYPES
from qdpo.run import disk
from qdpo.run.folder import RunDir
from qdpo.run.watcher import Watcher


@dataclass(frozen=True)
class MergeOptions:
    """`data`: pairs to compare on instead of the run's held-out pairs; `pairs`: the most to use."""

    base: BaseWeights = "dequantized"
    dtype: str | None = None
    prove: bool = True
    compare: bool = False
    data: str | None = None
    pairs: int = PAIRS


def merge_proved(
    run: RunDir, out: Path, options: MergeOptions, watcher: Watcher
) -> tuple[MergeReport, list[Verification]]:
    """Writes the merged model to the new folder `out` and verifies it; with `compare` the other base choice as well.

    Raises: as `merge_run`; VerificationError if the written model is not the trained model; then no folder is left.
    """
    found: list[Verification] = []

    def check(folder: Path, report: MergeReport) -> None:
        if not options.prove:
            return
        trained = verify.score_trained(run, options.data, options.pairs, watcher)
        found.append(verify.verify(trained, folder, base=report.base, dtype=report.dtype, watcher=watcher))
        _require_equal(found[0], f"{out} was not written.")
        verify.write_verification(folder, run, found[0])
        if options.compare:
            found.append(_other(run, folder, report, trained, watcher))

    report = merge_run(run, out, base=options.base, dtype=options.dtype, watcher=watcher, check=check)
    return report, found


def check_again(run: RunDir, folder: Path, options: MergeOptions, watcher: Watcher) -> list[Verification]:
    """Verifies an existing merged folder. Raises: ConfigError; VerificationError."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds no merged model: it has no config.json. Merge first, without `--check`.")
    written = disk.read_json(folder / "config.json")
    dtype = next((name for name, one in DTYPES.items() if str(one) == f"torch.{written.get('dtype')}"), "?")
    trained = verify.score_trained(run, options.data, options.pairs, watcher)
    found = verify.verify(trained, folder, base=options.base, dtype=dtype, watcher=watcher)
    _require_equal(found, f"Do not use {folder}.")
    verify.write_verification(folder, run, found)
    return [found]


def _require_equal(found: Verification, then: str) -> None:
    if found.fault is not None:
        raise VerificationError(
            f"{found.fault} Compared on {found.pairs} pairs of {found.source}. {then} Try `--dtype fp32`, which "
            "rounds nothing; if it also fails, please report this with the run's environment.json."
        )


def _other(run: RunDir, folder: Path, report: MergeReport, trained: TrainedScores, watcher: Watcher) -> Verification:
    """The same comparison for the other base; its model is discarded."""
    other: BaseWeights = "original" if report.base == "dequantized" else "dequantized"
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-compare-") as work:
        merged = Path(work) / other
        made = merge_run(run, merged, base=other, dtype=report.dtype, watcher=watcher)
        found = verify.verify(trained, merged, base=made.base, dtype=made.dtype, watcher=watcher)
        shutil.rmtree(merged)
    return found


def table(found: list[Verification]) -> list[str]:
    """The trained model and the merged models side by side, and the verdicts."""
    first = found[0]
    names = ["trained", *(f"{one.base}, {one.dtype}" for one in found)]
    distances = [one.distance for one in found]
    sides = [first.trained, *(one.merged for one in found)]
    of_sides: list[tuple[str, Callable[[Side], float]]] = [
        ("reward margin", lambda one: one.margin),
        ("reward accuracy", lambda one: one.accuracy),
        ("perplexity, chosen", lambda one: one.perplexity_chosen),
        ("perplexity, rejected", lambda one: one.perplexity_rejected),
    ]
    rows = [
        ("KL from trained, nats a token", "", *(f"{one.kl:.5f}" for one in distances)),
        ("same most likely token", "", *(f"{one.top1_exact:.2%}" for one in distances)),
        (f"the same, or a tie within {TIE} nats", "", *(f"{one.top1:.2%}" for one in distances)),
        ("adapter's effect", "100%", *(f"{one.share:.1%} ± {one.share_error:.1%}" for one in distances)),
        *((label, *(f"{value(one):.4f}" for one in sides)) for label, value in of_sides),
    ]
    title = f"{first.pairs} pairs, {first.tokens:,} answer tokens, of {first.source}"
    head = ("", *names)
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [title]
    for row in [head, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return [*lines, *(f"{one.base}: {one.verdict}" for one in found)]
