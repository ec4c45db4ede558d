"""The architecture as a test: imports point one way, and each heavy library has its named importers."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "qdpo"
# Each room stands on those of lower rank.
LAYER = {"__init__": 0, "errors": 0, "diagnose": 0, "settings": 1, "families": 2, "run": 3, "data": 4, "model": 4}
LAYER |= {"forecast": 5, "train": 6, "measure": 7, "review": 7, "machine": 7, "report": 8, "collect": 8, "export": 9}
LAYER |= {"api": 10, "cli": 10, "__main__": 11}
IMPORTERS = {
    "typer": {f"cli/{name}" for name in "main common data collect forecast train review ship machine".split()},
    "datasets": {"data/read/hub"},
    "bitsandbytes": {"model/base/quant", "train/step/optimizer"},
    "peft": {"model/policy/adapter", "export/proof/verify", "export/merge/lora"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[str]:
    """Every imported module; `from qdpo.data import pack` counts as qdpo.data.tokens.pack."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    home = room(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "qdpo" or parts[1] not in LAYER:
            continue
        assert parts[1] == home or LAYER[parts[1]] < LAYER[home], f"{home} imports {name}"


@pytest.mark.parametrize("library", IMPORTERS)
def test_heavy_libraries_have_named_importers(library: str) -> None:
    found = {
        str(path.relative_to(PACKAGE).with_suffix(""))
        for path in FILES
        if any(n.split(".")[0] == library for n in imports(path))
    }
    assert found <= IMPORTERS[library] and found


def test_no_pickle_is_read_or_written() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "torch.load" not in text and "torch.save" not in text and "import pickle" not in text, path
