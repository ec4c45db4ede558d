"""The file of results: rewritten whole after each item, so that a killed script has lost nothing but its last one."""

import hashlib
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.proof.items import Result
from benchmarks.rounds import ROOT
from qdpo.run import disk

SOURCES = ("qdpo/**/*.py", "benchmarks/**/*.py", "scripts/*", "tests/test_gpu.py")
# An item's results of this commit and of the one before are kept.
KEPT_COMMITS = 2


class Records:
    """All results; those that were only tried out, on a CPU or with tiny shapes, are in a file of their own."""

    def __init__(self, folder: Path, *, real: bool, commit: str) -> None:
        self.real = real
        self.path = folder / ("gpu-proof.json" if real else "gpu-proof-tried-out.json")
        self.commit = commit
        self._about: dict[str, Any] = {}
        self._verdicts: dict[str, list[dict[str, Any]]] = {}
        self._results: list[Result] = []
        if self.path.exists():
            whole = disk.read_json(self.path)
            self._about, self._verdicts = whole["about"], whole["verdicts"]
            self._results = [Result(**one) for one in whole["results"]]

    def of_stage(self, stage: int) -> list[Result]:
        """The newest result of each item, in the order in which items were first measured."""
        newest = {one.item: one for one in self._results if one.stage == stage}
        return list(newest.values())

    def now(self, stage: int, item: str) -> Result | None:
        """The item's result of this commit."""
        found = [one for one in self._results if (one.stage, one.item, one.commit) == (stage, item, self.commit)]
        return found[-1] if found else None

    def before(self, result: Result) -> Result | None:
        """The last result of the same item, of another commit."""
        others = [
            one
            for one in self._results
            if (one.stage, one.item) == (result.stage, result.item) and one.commit != result.commit
        ]
        return others[-1] if others else None

    def add(self, result: Result, about: dict[str, Any]) -> None:
        """Puts the result in place of an older one of the same commit, and writes the file."""
        same = [one for one in self._results if (one.stage, one.item) == (result.stage, result.item)]
        commits = list(dict.fromkeys(one.commit for one in same if one.commit != result.commit))
        gone = {*commits[: max(0, len(commits) - KEPT_COMMITS + 1)], result.commit}
        place = next((self._results.index(one) for one in same if one.commit == result.commit), len(self._results))
        self._results.insert(place, result)
        self._results = [one for one in self._results if one is result or one not in same or one.commit not in gone]
        self._about = about
        self._write()

    def write_verdicts(self, stage: int, verdicts: list[dict[str, Any]]) -> None:
        """Puts a stage's verdicts beside the results."""
        self._verdicts[str(stage)] = verdicts
        self._write()

    def _write(self) -> None:
        results = [asdict(one) for one in self._results]
        whole = {"about": self._about, "verdicts": dict(sorted(self._verdicts.items())), "results": results}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        disk.write_json(self.path, whole)


def source_mark() -> str:
    """The commit that is measured; with changed sources also their digest, and the digest alone where git is not."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    short = digest.hexdigest()[:8]
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", *(f":(glob){pattern}" for pattern in SOURCES))
    except (OSError, subprocess.CalledProcessError):
        return f"sources {short}"
    return f"{commit}+{short}" if changed else commit


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
