"""`qdpo label` in a process of its own, as a user starts it, and what it wrote."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from qdpo.collect.decisions import journal_of
from tests.conftest import ROOT

WORDS = ("good", "fair", "poor")


def candidates(count: int, answers: int = 3) -> list[dict[str, Any]]:
    return [
        {"prompt": f"question {n}", "answers": [
            {"text": f"{word} {n}", "tokens": 2, "from": {"model": "tiny"}, **({"cut": True} if word == "poor" else {})}
            for word in WORDS[:answers]
        ]}
        for n in range(count)
    ]  # fmt: skip


class Label:
    """The running command; `address` is what it printed."""

    def __init__(self, folder: Path, *words: str):
        self.out = folder / "pairs.jsonl"
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "qdpo.cli", "label", "c.jsonl", "--no-open", *words],
            cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        self.said = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if found := re.search(r"page: (http://127\.0\.0\.1:(\d+)/#token=(\S+))", line):
                self.address, self.port, self.token = found[1], int(found[2]), found[3]
                break
        else:
            raise AssertionError(self.said)

    def pairs(self) -> list[tuple[str, str, str]]:
        lines = self.out.read_text(encoding="utf-8").split("\n")[:-1]
        return [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in map(json.loads, lines)]

    def kinds(self) -> list[str]:
        lines = journal_of(self.out).read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line)["kind"] for line in lines]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def stop(self) -> str:
        """Ctrl-C; what it said at the end."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.stdout is not None
        return self.process.stdout.read()
