"""The stages in order: what is left of each, its table, its verdicts, and an exit code."""

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.proof import figures, fits, others, right, speed
from benchmarks.proof.items import OK, Item, Options, Verdict
from benchmarks.proof.records import Records, source_mark
from benchmarks.proof.runner import run_process, run_stage
from benchmarks.rounds import ROOT
from qdpo.settings import layered

TITLES = {1: "right", 2: "fits", 3: "fast", 4: "against others", 5: "presets"}
STAGES: dict[int, Any] = {1: right, 2: fits, 3: speed, 4: others}
MET, MISSED, CANNOT, LEFT = 0, 1, 2, 3


def main(words: list[str], help_text: str | None) -> int:
    given = parse(words, help_text)
    if given.device == "cuda" and not torch.cuda.is_available() and given.stage != 5:
        print(
            f"gpu_proof: torch {torch.__version__} finds no CUDA device. --device cpu --tiny tries the script out and "
            "measures nothing that counts.",
            file=sys.stderr,
        )
        return CANNOT
    if given.device == "cpu" and not given.tiny:
        print("gpu_proof: --device cpu needs --tiny: a CPU proves nothing of a GPU.", file=sys.stderr)
        return CANNOT
    options = Options(
        given.device, given.tiny, given.trl_python, given.out.resolve(), given.presets.resolve(), given.readme.resolve()
    )
    records = Records(options.folder, real=options.cuda and not options.tiny, commit=source_mark())
    codes = []
    for stage in [given.stage] if given.stage else sorted(TITLES):
        print(f"stage {stage}, {TITLES[stage]}: {records.commit}", flush=True)
        codes.append(figures.run(options, records) if stage == 5 else run(stage, given, options, records, words))
    return next((code for code in (CANNOT, MISSED, LEFT) if code in codes), MET)


def parse(words: list[str], help_text: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=help_text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=sorted(TITLES))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks")
    parser.add_argument("--budget-s", type=float, default=480.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--retry", action="store_true")
    parser.add_argument("--trl-python")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--presets", type=Path, default=layered.shipped_folder())
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    return parser.parse_args(words)


def run(stage: int, given: argparse.Namespace, options: Options, records: Records, words: list[str]) -> int:
    """Measures what is missing, prints the stage's table and verdicts, and keeps the verdicts beside the results."""
    module, begun = STAGES[stage], time.monotonic()
    wanted: Iterator[Item] = (item for item in module.items(options, records) if re.search(given.only, item.name))
    # In a process of its own: a CUDA context here would take memory from every measurement.
    asked = Item(stage, "about", "benchmarks.about", "about_job", {"words": words, "device": given.device})
    answer = run_process(asked, asked.limit_s)
    if answer is None or answer.status != OK:
        print(f"gpu_proof: the device does not answer: {answer}", file=sys.stderr)
        return CANNOT
    head = {**answer.values, "commit": records.commit}
    left = run_stage(
        wanted, options, records, head, budget_s=given.budget_s - (time.monotonic() - begun), retry=given.retry,
        say=lambda line: print(f"  {line}", flush=True),
    )  # fmt: skip
    results = records.of_stage(stage)
    verdicts: list[Verdict] = module.verdicts(results, options)
    records.write_verdicts(stage, [asdict(verdict) for verdict in verdicts])
    print()
    if not records.real:
        print("TRIED OUT with tiny shapes: no figure below says anything of a GPU, and no card's memory was held to.")
    for line in module.table(results, records):
        print(line)
    print()
    for verdict in verdicts:
        print(f"{ {True: 'met', False: 'MISSED', None: 'not measured'}[verdict.met]:13}{verdict.goal}: {verdict.found}")
    if left:
        print(f"left for the next call: {'; '.join(left)}")
    return exit_code(verdicts, left)


def exit_code(verdicts: Sequence[Verdict], left: Sequence[str]) -> int:
    if any(verdict.met is False for verdict in verdicts):
        return MISSED
    return LEFT if left else MET
