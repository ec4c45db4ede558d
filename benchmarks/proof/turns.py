"""qdpo and TRL in turns on one device: loads all sides at once, then grants rounds one after the other."""

import random
import statistics
import string
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.environment import CannotInstall, trl_python
from benchmarks.proof import settings
from benchmarks.proof.items import Failed, NotMeasured
from benchmarks.proof.lengths import PROFILES, lengths_of, tiny
from benchmarks.proof.runtime import driver_says
from benchmarks.rounds import Side, SideFailed
from benchmarks.tiny import save_tiny_base
from qdpo.forecast import memory
from qdpo.forecast.memory import GIB
from qdpo.forecast.plan import OTHERS_GIB
from qdpo.measure import random_base
from qdpo.run import disk

TRL_VERSION = "1.16.0"
ROUNDS = (1, 1, 1, 1)  # the first warms up
PAIRS_PER_STEP = 16  # as the presets have it
QDPO = "qdpo, settings found by auto"


def trl_sides(pairs_per_step: int) -> dict[str, dict[str, Any]]:
    """Flags that are good on a GPU; the fastest that fits counts."""
    found: dict[str, dict[str, Any]] = {}
    for batch, recomputed in ((1, False), (1, True), (4, True), (8, True)):
        if pairs_per_step % batch == 0:
            how = "checkpointing" if recomputed else "all kept"
            found[f"TRL, {how}, batches of {batch}"] = {
                "per_device_train_batch_size": batch, "gradient_accumulation_steps": pairs_per_step // batch,
                "gradient_checkpointing": recomputed,
            }  # fmt: skip
    return found


def turns(job: dict[str, Any]) -> dict[str, Any]:
    """Pairs a second of each side, round by round, and the ratio of medians to TRL's fastest."""
    python = find_trl(job["python"])
    profile = PROFILES[job["lengths"]]
    profile = tiny(profile) if job["tiny"] else replace(profile, pairs_per_step=PAIRS_PER_STEP)
    work = Path(tempfile.mkdtemp(prefix="qdpo-turns-"))
    shape = settings.tiny_shape() if job["tiny"] else work / "shape"
    if not job["tiny"]:
        random_base.config_of(job["model"]).save_pretrained(shape)
    tokenizer = save_tiny_base(work / "tokenizer")
    size = profile.pairs_per_step
    texts = [
        [_letters(length, 3 * row + part) for part, length in enumerate(parts)]
        for row, parts in enumerate(lengths_of(profile, sum(ROUNDS) * size))
    ]
    common = {"folder": str(tokenizer), "pairs": texts, "device": job["device"]}
    arguments = {"max_length": 4 * profile.most}
    with Side("TRL's ids", python, "benchmarks.trl_side", {**common, "arguments": arguments}, work / "ids.log") as side:
        ids = side.opening["ids"]
    allowed = allowed_gib(job)
    others = trl_sides(size)
    if allowed is not None and (total := driver_says("memory.total") / GIB) < (needed := allowed * (1 + len(others))):
        raise NotMeasured(f"all sides together take {needed:.0f} GiB, and this GPU has {total:.0f}")
    ours = {"words": _words(job, size), "shape": str(shape), "ids": ids, "allowed_gib": allowed, "rounds": ROUNDS}
    theirs = {
        **common, "shape": str(shape), "adapter": None, "dtype": "bfloat16" if allowed is not None else "float32",
        "nf4": True, "response_head": False, "rounds": ROUNDS, "allowed_gib": allowed,
    }  # fmt: skip
    starts = {QDPO: (sys.executable, "benchmarks.proof.random_side", ours)}
    for title, flags in others.items():
        whole = {**arguments, **flags, **_trl_arguments(job["device"] == "cuda")}
        starts[title] = (python, "benchmarks.trl_side", {**theirs, "arguments": whole})
    sides = compete(starts, work, size, threads=None if allowed is not None else 1)
    best = [side["median_pairs_per_s"] for title, side in sides.items() if title != QDPO and "error" not in side]
    if "error" in sides[QDPO]:
        raise Failed(f"{QDPO}: {sides[QDPO]['error']}", {"sides": sides, "ratio": None})
    ratio = sides[QDPO]["median_pairs_per_s"] / max(best) if best else None
    versions = [side["opening"]["versions"] for title, side in sides.items() if title != QDPO and "opening" in side]
    return {"sides": sides, "ratio": ratio, "pairs_per_step": size, "allowed_gib": allowed, "versions": versions[:1]}


def _trl_arguments(cuda: bool) -> dict[str, Any]:
    """What all of TRL's sides have: 8-bit AdamW, references computed before, as qdpo has them."""
    return {
        "bf16": cuda, "optim": "paged_adamw_8bit" if cuda else "adamw_8bit", "precompute_ref_log_probs": True,
        "beta": 0.1, "max_steps": sum(ROUNDS), "learning_rate": 1e-5, "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
    }  # fmt: skip


def compete(
    starts: dict[str, tuple[str, str, dict[str, Any]]], work: Path, size: int, *, threads: int | None
) -> dict[str, dict[str, Any]]:
    """What each side took. One that fails to load, or in a round, is out and says why; the others go on."""
    found: dict[str, dict[str, Any]] = {}
    with ExitStack() as running:
        sides: dict[str, Side] = {}
        with ThreadPoolExecutor(len(starts)) as pool:
            loading: dict[str, Future[Side]] = {
                title: pool.submit(Side, title, *start, work / f"{number}.log", threads)
                for number, (title, start) in enumerate(starts.items())
            }
        for title, future in loading.items():
            try:
                sides[title] = running.enter_context(future.result())
                found[title] = {"opening": sides[title].opening, "pairs_per_s": [], "positions": 0}
            except SideFailed as error:
                found[title] = {"error": why(error)}
        for number, count in enumerate(ROUNDS):
            for title in list(sides):
                try:
                    answer = sides[title].round()
                except SideFailed as error:
                    found[title] = {"error": why(error)}
                    del sides[title]
                    continue
                if number > 0:
                    found[title]["pairs_per_s"].append(count * size / answer["seconds"])
                    found[title]["positions"] += answer["positions"]
                found[title]["peak_gib"] = answer["peak_gib"]
    for side in found.values():
        if "error" not in side:
            side["median_pairs_per_s"] = statistics.median(side["pairs_per_s"])
            side["computed_tokens_per_pair"] = side.pop("positions") / (sum(ROUNDS[1:]) * size)
    return found


def why(error: SideFailed) -> str:
    """ "out of memory", or the end of what the side printed."""
    text = str(error)
    if "OutOfMemoryError" in text or "out of memory" in text:
        return "out of memory"
    return text.splitlines()[-1][:300]


def allowed_gib(job: dict[str, Any]) -> float | None:
    """What of the card is left to torch's allocator beside a desktop and the runtime; None on a CPU."""
    if job["device"] != "cuda":
        return None
    context = memory.CONTEXT / GIB if job["context_gib"] is None else job["context_gib"]
    return float(job["card_gib"]) - OTHERS_GIB - context


def find_trl(given: str | None) -> str:
    """A Python that can import TRL: the given one, this one, or that of an environment made for it."""
    for python in [given] if given else [sys.executable]:
        if subprocess.run([python, "-c", "import trl, datasets"], capture_output=True).returncode == 0:
            return python
    if given:
        raise NotMeasured(f"--trl-python={given} cannot import trl and datasets")
    try:
        return str(trl_python(TRL_VERSION, disk.cache_folder(None)))
    except CannotInstall as error:
        raise NotMeasured(f"TRL is not here, and cannot be installed: {error}") from error


def _words(job: dict[str, Any], size: int) -> list[str]:
    words = {
        "model.path": job["model"], "model.device": job["device"], "data.path": "none.jsonl", "adapter.rank": 16,
        "adapter.alpha": 32, "train.pairs_per_step": size, "memory.head_tile_mib": 192,
    }  # fmt: skip
    if job["tiny"]:
        words["model.dtype"] = "fp32"
    return [f"{name}={value}" for name, value in words.items()]


def _letters(length: int, seed: int) -> str:
    """One token each."""
    return "".join(random.Random(seed).choices(string.ascii_lowercase, k=length))
