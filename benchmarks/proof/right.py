"""Stage 1: is it right? The gpu tests, one process for each thing they show; kills; what determinism costs.

On a CPU the gpu tests are skipped, and say so; kills and determinism run there too.
"""

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.proof.fits import met_or_unknown, said
from benchmarks.proof.items import NOT_APPLICABLE, OK, Failed, Item, NotApplicable, Options, Result, Verdict
from benchmarks.proof.records import Records
from benchmarks.rounds import ROOT

# What is shown, and the functions of tests/test_gpu.py that show it; a test sees to it that none is left out.
GROUPS = {
    "varlen attention: causality, windows, backward": (
        "test_varlen_is_as_exact_as_sdpa", "test_the_path_of_this_card_is_announced",
    ),
    "the head in full precision": ("test_the_head_never_rounds_logits_to_bf16",),
    "packed rows equal separate sequences": ("test_packed_rows_are_as_exact_as_separate_sequences",),
    "fast parts equal their plain twins": ("test_fast_parts_are_as_exact_as_plain_ones",),
    "gradients after an evaluation": ("test_an_evaluation_changes_no_gradient",),
    "fp32 equals the CPU": ("test_fp32_training_equals_the_cpu",),
    "starts at its reference, and learns": ("test_a_4_bit_run_learns_and_starts_at_its_reference",),
    "inputs and embeddings on the host": (
        "test_inputs_on_the_host_change_nothing", "test_the_embedding_table_on_the_host_changes_no_number",
    ),
    "one wait a step": ("test_a_step_waits_for_the_card_once",),
    "the longest row is tried": ("test_the_longest_row_is_tried_under_a_cap",),
    "forecast of four wide layers": ("test_the_forecast_is_the_measured_peak",),
    "deterministic runs repeat, and resume exactly": (
        "test_a_deterministic_run_repeats_itself_and_resumes_exactly",
    ),
}  # fmt: skip
HERE = "benchmarks.proof.right"
KILLS = 5
COST = "steps of 7B, {}"
PLAIN, DETERMINISTIC = COST.format("as they come"), COST.format("deterministic")
WORDS = (
    "model.path=Qwen/Qwen2.5-7B", "memory.kept_layers=14", "memory.offload=false", "memory.embeddings=device",
    "memory.tokens_per_row=4096", "train.pairs_per_step=16",
)  # fmt: skip


def items(options: Options, records: Records) -> Iterator[Item]:
    for shows, tests in GROUPS.items():
        yield Item(1, shows, HERE, "tests", {**options.job, "tests": list(tests)}, expected_s=45)
    yield Item(1, "killed, and resumed to the same bytes", HERE, "kills", options.job, expected_s=120, limit_s=400)
    for name, deterministic in ((PLAIN, False), (DETERMINISTIC, True)):
        job = {
            "words": list(WORDS), "card_gib": None, "steps": 3, "longest": 4096, "context_gib": None,
            "deterministic": deterministic,
        }  # fmt: skip
        yield Item(1, name, "benchmarks.proof.bench_job", "bench", {**options.job, **job}, expected_s=60)


def tests(job: dict[str, Any]) -> dict[str, Any]:
    """Runs these tests by pytest. Raises: Failed with the names of those that fail; NotApplicable without CUDA."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        names = [f"tests/test_gpu.py::{name}" for name in job["tests"]]
        # Warnings of other versions of the libraries than those that the suite is held to are no result.
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, f"--junitxml={report}", *names], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True,
            text=True,
        )  # fmt: skip
        if not report.exists():
            raise Failed(f"pytest wrote no report: {(done.stdout + done.stderr)[-600:]}", {})
        cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    print(done.stdout[-6000:])
    skipped = [case for case in cases if case.find("skipped") is not None]
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    counts = {"tests": len(cases), "passed": len(cases) - len(skipped) - len(bad), "skipped": len(skipped)}
    if bad or not cases or done.returncode not in (0, 5):
        why = [f"{case.get('name')}: {_message(case)}" for case in bad] or [done.stdout[-600:]]
        raise Failed("; ".join(why), {**counts, "failed": [case.get("name") for case in bad]})
    if len(skipped) == len(cases):
        reason = skipped[0].find("skipped")
        raise NotApplicable(str(reason.get("message") if reason is not None else "skipped"))
    return counts


def _message(case: Any) -> str:
    part = case.find("failure") if case.find("failure") is not None else case.find("error")
    return str(part.get("message"))[:300]


def kills(job: dict[str, Any]) -> dict[str, Any]:
    """A run that is killed again and again must end with the bytes of one that nobody killed: scripts/soak."""
    number = 1 if job["tiny"] else KILLS
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "soak.json"
        words = ["--device", job["device"], "--kills", str(number), "--write", str(written)]
        words += ["--at", "save:", "--dtype", "fp32"] if job["tiny"] else ["--seed", "3"]
        done = subprocess.run(
            [sys.executable, "scripts/soak", *words], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        print(done.stdout)
        found = json.loads(written.read_text(encoding="utf-8")) if written.exists() else {}
    if done.returncode != 0:
        what = str(found.get("differences") or (done.stdout + done.stderr)[-800:])
        raise Failed(what, {"kills": len(found.get("kills", []))})
    return {"kills": len(found["kills"]), "differences": len(found["differences"])}


def verdicts(results: Sequence[Result], options: Options) -> list[Verdict]:
    """Everything that does not apply here aside, each must have passed."""
    found = []
    for result in results:
        met = None if result.status == NOT_APPLICABLE else met_or_unknown(result, options, met=result.status == OK)
        found.append(Verdict(result.item, said(result), met))
    return found


def table(results: Sequence[Result], records: Records) -> list[str]:
    lines = []
    for result in results:
        counts = ", ".join(f"{value} {name}" for name, value in result.values.items() if isinstance(value, int))
        lines.append(f"{result.item:52}{said(result)}" + (f"  ({counts})" if "tests" in result.values else ""))
    speeds = {one.item: one.values["tokens_per_s"] for one in results if "tokens_per_s" in one.values}
    if PLAIN in speeds and DETERMINISTIC in speeds:
        lines.append(f"train.deterministic costs {speeds[PLAIN] / speeds[DETERMINISTIC] - 1:+.1%} of the time")
    return lines
