"""The architecture as a test: imports point one way, each heavy library has its named importers, and what crosses from
room to room has a type."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
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
    "peft": {f"model/policy/{name}" for name in ("adapter", "lora_fit", "peft_names")}
    | {"export/proof/verify", "export/proof/served"},
}
# The same inside a room: a folder stands on those before it.
INSIDE = {
    "data": ["read", "layouts", "tokens"],
    "model": ["base", "fast", "policy", "generate", "trace"],
    "train": ["step", "keep", "policy", "watch", "start"],
    "report": ["screen", "page"],
    "collect": ["judge", "label"],
    "export": ["merge", "gguf", "proof"],
}
# Formats of other programs may stay as they are read: config.json, adapter_config.json, transformers' arguments, and
# the JSON that a browser sends.
FOREIGN = {
    "from_config",
    "config_of",
    "read_json",
    "loading",
    "check_adapter_folder",
    "full_config",
    "scale_of",
    "Labelling",
}
FOREIGN |= {"serving_of", "served_class", "forward_digest", "key_of", "finder", "read_config"}
UNTYPED = ("dict[str, Any]", "Mapping[str, Any]")
LONGEST = 330
WIDE = 7
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def name_of(path: Path) -> str:
    return ".".join(("qdpo", *path.relative_to(PACKAGE).with_suffix("").parts))


MODULES = {name_of(path): path for path in FILES if path.name != "__init__.py"}


def targets(path: Path) -> set[str]:
    """The modules of the package that a file imports."""
    found = set()
    for name in imports(path):
        found |= {name, name.rpartition(".")[0]} & MODULES.keys()
    return found - {name_of(path)}


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


def test_no_modules_import_each_other() -> None:
    try:
        list(TopologicalSorter({name: targets(path) for name, path in MODULES.items()}).static_order())
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_no_folders_of_a_room_import_each_other() -> None:
    """A folder and a file beside it count alike."""
    for home in LAYER:
        graph: dict[str, set[str]] = {}
        for name, path in MODULES.items():
            if room(path) == home:
                part = name.split(".")[2:3]
                inside = {target.split(".")[2] for target in targets(path) if target.startswith(f"qdpo.{home}.")}
                graph.setdefault("".join(part), set()).update(inside - set(part))
        try:
            list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            pytest.fail(f"{home}: {' → '.join(error.args[1])}")


@pytest.mark.parametrize("home", INSIDE)
def test_imports_point_one_way_inside_a_room(home: str) -> None:
    order = INSIDE[home]
    folders = {path.name for path in (PACKAGE / home).iterdir() if (path / "__init__.py").is_file()}
    assert folders == set(order), "name the new folder in INSIDE, behind those that it imports"
    for name, path in MODULES.items():
        part = name.split(".")[2:]
        if room(path) != home or part[0] not in order:
            continue
        for target in targets(path):
            its = target.split(".")[1:]
            if its[0] == home and len(its) == 3:
                assert order.index(its[1]) <= order.index(part[0]), f"{name} imports {target}"


def untyped(node: ast.AST) -> list[str]:
    """The parameters, fields and results of a function or class that are bare dictionaries."""
    found = []
    for one in ast.walk(node):
        if isinstance(one, ast.FunctionDef) and (not one.name.startswith("_") or one.name == "__init__"):
            every = [*one.args.posonlyargs, *one.args.args, *one.args.kwonlyargs]
            notes = [(argument.arg, argument.annotation) for argument in every] + [("result", one.returns)]
            found += [f"{one.name}: {name}" for name, note in notes if note is not None and is_bare(note)]
        elif isinstance(one, ast.AnnAssign) and isinstance(node, ast.ClassDef) and one in node.body:
            found += [ast.unparse(one.target)] if is_bare(one.annotation) else []
    return found


def is_bare(annotation: ast.expr) -> bool:
    return any(kind in ast.unparse(annotation) for kind in UNTYPED)


def test_what_crosses_rooms_has_a_type() -> None:
    used: dict[tuple[str, str], set[str]] = {}
    for path in FILES:
        modules = {name.rpartition(".")[2]: name for name in imports(path) if name in MODULES}
        for name in imports(path):
            module, _, thing = name.rpartition(".")
            used.setdefault((module, thing), set()).add(room(path))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                used.setdefault((modules[node.value.id], node.attr), set()).add(room(path))
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in FOREIGN:
                others = used.get((name, node.name), set()) - {room(path)}
                assert not (others and untyped(node)), f"{name}.{node.name} ({untyped(node)}) is used in {others}"


def test_a_type_has_one_meaning() -> None:
    homes: dict[str, list[str]] = {}
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            alias = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
            found = node.name if isinstance(node, ast.ClassDef) else alias.id if isinstance(alias, ast.Name) else ""
            if found[:1].isupper() and not found.isupper():
                homes.setdefault(found, []).append(name)
    assert not {found: where for found, where in homes.items() if len(where) > 1}


def test_wide_dataclasses_are_built_by_keyword() -> None:
    """Seven values in a row can be swapped without an error."""
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            marks = [ast.unparse(mark) for mark in getattr(node, "decorator_list", [])]
            if isinstance(node, ast.ClassDef) and any("dataclass" in mark for mark in marks):
                fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
                assert len(fields) < WIDE or any("kw_only=True" in mark for mark in marks), f"{path}: {node.name}"


def test_files_are_of_one_idea() -> None:
    for path in FILES:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= LONGEST, f"{path} has {len(lines)} lines: split it where its sentence has an 'and'"
        assert path.name != "__init__.py" or path.parent == PACKAGE or not lines, f"{path} is not empty"


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
