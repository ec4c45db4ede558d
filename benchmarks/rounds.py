"""Sides of a comparison in processes of their own, of which one works at a time: the parent grants each round.

Two processes with a thread for each core stall each other's matrix products, so a side that has no round sleeps.
Every message is one line of JSON: first the job, down to the side; then one answer to each line from the parent.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
# The same for every side: no hub, no telemetry, few words; and small caches of compiled bf16 products, as `qdpo` sets.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
    "LRU_CACHE_CAPACITY": "16",
    # Packages that were brought along may be on it.
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
}


class SideFailed(Exception):
    """A side ended without an answer; the message holds the end of what it printed."""


class Side:
    """A running side, seen from the parent. Leaving the `with` block ends the process."""

    def __init__(
        self, name: str, python: str, module: str, job: dict[str, Any], log: Path, threads: int | None = None,
        **environment: str,
    ) -> None:  # fmt: skip
        """Starts `python -m module`; with `threads` torch uses that many."""
        self.name, self._log = name, log
        limited = environment if threads is None else {"OMP_NUM_THREADS": str(threads), **environment}
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [python, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env={**os.environ, **ENVIRONMENT, **limited},
            )  # fmt: skip
        self.opening = self._ask(json.dumps(job))
        """The first answer: what the side found when it had everything loaded."""

    def round(self) -> dict[str, Any]:
        """Grants one round, and waits for its answer."""
        return self._ask("go")

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the empty answer below says it
        answer = self._process.stdout.readline()
        if not answer:
            tail = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            raise SideFailed(f"{self.name} ended without an answer:\n" + "\n".join(tail))
        received: dict[str, Any] = json.loads(answer)
        return received

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()


class Parent:
    """The parent, seen from a side. What libraries print to standard output goes to standard error from here on."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self.job: dict[str, Any] = json.loads(sys.stdin.readline())

    def answer(self, **values: Any) -> None:
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()

    def wait(self) -> None:
        """Sleeps until the parent grants a round; ends the process if the parent is gone."""
        if not sys.stdin.readline():
            sys.exit()
