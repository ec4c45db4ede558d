"""What `qdpo data check` holds in memory: an index of the pairs, and never the rows."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import NOUNS, ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc"),
]
CHECK = """
import atexit, sys
from pathlib import Path

peak = Path(sys.argv.pop())
atexit.register(lambda: peak.write_text(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]))
from qdpo.cli.main import main
main()
"""


def write_rows(path: Path, mib: int) -> int:
    """Pairs of some 0.4 kB beside 4 kB in a column that no one reads, as data sets carry; how many."""
    draw, count, written = random.Random(0), 0, 0
    pool = [" ".join(draw.choices(NOUNS, k=15)) for _ in range(50)]
    notes = " ".join(draw.choices(NOUNS, k=600))
    with path.open("w", encoding="utf-8") as file:
        while written < mib * 2**20:
            row = {
                "prompt": f"{count}: {draw.choice(pool)}?",
                "chosen": f"Yes, {count}.",
                "rejected": draw.choice(pool),
            }
            written += file.write(json.dumps({**row, "notes": notes}) + "\n")
            count += 1
    return count


def peak_mib(path: Path) -> float:
    """Peak resident memory of a check of this file."""
    peak = path.with_suffix(".peak")
    done = subprocess.run(
        [sys.executable, "-c", CHECK, "data", "check", str(path), "preset=demo", str(peak)],
        cwd=path.parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return int(peak.read_text()) / 2**10


def test_ten_times_the_rows_take_little_more_memory(tmp_path: Path) -> None:
    """Measured: 370 to 450 bytes a pair (place, lengths, digest against duplicates), whatever the rows hold."""
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    more = write_rows(large, 300) - write_rows(small, 30)
    growth = peak_mib(large) - peak_mib(small)
    assert growth < 120 and growth * 2**20 < 1000 * more, f"{growth:.0f} MiB for {more} more pairs"
