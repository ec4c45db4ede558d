"""Contributors' pages name only files, functions, tests, links and scripts that exist; issue forms are complete."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

PAGES = ("docs/architecture.md", "CONTRIBUTING.md", "tests/README.md", "examples/README.md")
FORMS = ROOT / ".github" / "ISSUE_TEMPLATE"
# A word in code that begins like this is a path of this repository.
PATH = re.compile(r"^(?:(?:qdpo|tests|scripts|docs|examples|benchmarks|presets|\.ci|\.github)/|[A-Z]+\.md$|pyproject)")
NOUNS = ("RunConfig", "Pair", "TokenPair", "PairRow", "Policy", "TokenScores", "StepReport")
PROMISES = 36


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def code(text: str) -> Iterator[str]:
    """The words in code: those between backticks, and those of fenced blocks."""
    for fence in re.findall(r"^```.*?^```", text, re.DOTALL | re.MULTILINE):
        yield from fence.split()
    for span in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)):
        yield from span.split()


@cache
def names_of(path: Path) -> frozenset[str]:
    """Top-level functions, classes and constants of a Python file; methods and fields as Class.name."""
    found = set()

    def add(body: list[ast.stmt], before: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(before + node.name)
            elif isinstance(node, ast.Assign):
                found.update(before + part.id for target in node.targets for part in ast.walk(target)
                             if isinstance(part, ast.Name))  # fmt: skip
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(before + node.target.id)
            if isinstance(node, ast.ClassDef):
                add(node.body, f"{before}{node.name}.")

    add(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return frozenset(found)


def missing(word: str) -> str | None:
    """The fault of a path, or path::name; None if it exists."""
    place, _, name = word.rstrip(",.;:)").partition("::")
    if "*" in place:
        return None if any(ROOT.glob(place)) else f"nothing fits {place}"
    if not (ROOT / place).exists():
        return f"{place} does not exist"
    return f"{place} has no {name}" if name and name not in names_of(ROOT / place) else None


@pytest.mark.parametrize("page", PAGES)
def test_every_path_and_name_exists(page: str) -> None:
    words = [word for word in code(read(page)) if PATH.match(word)]
    assert words
    assert [fault for word in words if (fault := missing(word))] == []


def test_what_does_not_exist_is_found() -> None:
    assert missing("qdpo/train/step/step.py::train_step") is None
    assert missing("qdpo/model/policy/adapter.py::Policy.reference") is None
    assert missing("presets/*.toml") is None
    assert missing("qdpo/train/gone.py") == "qdpo/train/gone.py does not exist"
    assert missing("qdpo/train/step/step.py::gone") == "qdpo/train/step/step.py has no gone"
    assert missing("presets/*.gone") == "nothing fits presets/*.gone"


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if target.startswith("http"):
            continue
        place, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / place).resolve() if place else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), target


def test_the_seven_nouns_are_classes() -> None:
    rows = re.findall(r"^\| (\w+) \| `(qdpo/[\w/]+\.py)::(\w+)` \|", read("docs/architecture.md"), re.MULTILINE)
    assert tuple(noun for noun, _file, _name in rows) == NOUNS
    for noun, file, name in rows:
        assert noun == name and noun in names_of(ROOT / file)


def test_every_promise_names_tests() -> None:
    table = read("tests/README.md").partition("## Promises")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= PROMISES
    for row in rows:
        assert re.search(r"`tests/[\w/]+\.py::test_\w+`", row), row


def test_ten_questions() -> None:
    table = read("tests/README.md").partition("## Ten questions of a newcomer")[2]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 10 and all("?" in row and "`qdpo/" in row for row in rows)


def test_every_script_is_named() -> None:
    scripts = {path.name for path in (ROOT / "scripts").iterdir() if path.is_file()}
    assert {"check", "lint", "test"} <= scripts
    table = read("CONTRIBUTING.md").partition("| in `scripts/` |")[2].partition("\n\n")[0]
    assert scripts <= set(re.findall(r"`(\w+)`", table))


def test_check_is_lint_and_test_and_ci_calls_it() -> None:
    check = read("scripts/check")
    assert "\nscripts/lint\n" in check and 'scripts/test "$@"' in check
    assert "\nscripts/check\n" in read(".ci/run") and "\nscripts/test -m slow" in read(".ci/run")


@pytest.mark.parametrize("form", ["bug", "feature"])
def test_issue_forms_are_read_by_github(form: str) -> None:
    """The fields that GitHub refuses a form without, and identifiers that are unique."""
    content = yaml.safe_load((FORMS / f"{form}.yml").read_text(encoding="utf-8"))
    assert content["name"] and content["description"] and content["body"]
    fields = [field for field in content["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} <= {"textarea", "input", "dropdown", "checkboxes"}
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_a_bug_report_asks_for_what_is_needed_and_warns() -> None:
    content = yaml.safe_load((FORMS / "bug.yml").read_text(encoding="utf-8"))
    labels = {field["id"]: field["attributes"]["label"] for field in content["body"] if "id" in field}
    required = {field.get("id") for field in content["body"] if field.get("validations", {}).get("required")}
    assert "qdpo doctor" in labels["doctor"] and "run.json" in labels["run"] and "debug.log" in labels["log"]
    assert {"command", "doctor"} <= required
    assert "local paths" in content["body"][0]["attributes"]["value"]
    assert yaml.safe_load((FORMS / "config.yml").read_text(encoding="utf-8"))["blank_issues_enabled"] is True


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "qdpo" / "py.typed").is_file()
