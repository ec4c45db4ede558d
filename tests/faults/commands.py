"""Odd inputs to verbs other than `run`, and to the files that settings name."""

import random
from collections.abc import Iterator
from pathlib import Path

from tests.faults.base import REFUSED, SAME, Case, Good


def cases(rng: random.Random, good: Good) -> Iterator[Case]:
    def toml(path: Path) -> list[str]:
        (path / "odd.toml").write_bytes(b"\xff\xfe")
        return [*good.lay(path), "odd.toml"]

    yield Case("commands", "a TOML file that is not UTF-8", toml, REFUSED, "odd.toml")
    yield Case("commands", "nothing odd", good.lay, SAME)
    yield Case("commands", "runs", lambda path: ["runs", "runs"], REFUSED)
