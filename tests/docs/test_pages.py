"""README and docs: generated blocks are current, links resolve, nothing is left out, and every command runs.

A command in a fenced block of sh, bash or console is read by the verb's own parser and settings. Then its block runs,
in order, in a folder that holds a trained run and the files that the pages name, unless NOT_RUN gives a reason.
"""

import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from qdpo.cli.main import app
from qdpo.errors import Interrupted, QdpoError
from qdpo.settings import layered
from qdpo.train.loop import run_training
from tests.conftest import AS_USER, ROOT, Quiet, arguments, qdpo, start_qdpo, tiny_rows, write_jsonl

SHELL = ("sh", "bash", "console", "shell")
README_LINES = 130
RUNS = ("demo-1a2b3c", "a", "b")
# Commands that cannot run here, and what tries them instead.
NOT_RUN = {
    "pip install .": "changes the environment and needs a package index",
    "pip install .[report]": "changes the environment and needs a package index",
    "pip install .[report,tensorboard]": "changes the environment and needs a package index",
    "scripts/demo": "downloads a model and trains for minutes",
    "scripts/demo train.learning_rate=5e-5": "downloads a model and trains for minutes",
    "scripts/test": "is this suite",
    "scripts/soak --kills 50": "takes 8 minutes; tests/train/test_soak.py kills fewer",
    "scripts/gpu_proof --device cpu --tiny": "takes minutes; tests/scripts/test_gpu_proof.py tries every stage",
    "scripts/compare_trl": "installs TRL; tests/scripts/test_compare_trl.py tries what needs none",
    "scripts/compare_trl --speed": "installs TRL; tests/scripts/test_compare_trl.py tries what needs none",
    "qdpo run preset=7b-24gb": "downloads a 7B model and needs a card",
    "qdpo bench preset=7b-24gb --limit-gib 24": "needs a GPU; tests/measure/test_bench.py runs a tiny shape",
    "qdpo judge candidates.jsonl --by openai:http://localhost:8000/v1 --judge-model NAME --out picked.jsonl": (
        "asks a server; tests/collect/test_judge_server.py has one"
    ),
    "qdpo push runs/demo-1a2b3c my-name/my-adapter": "uploads; tests/export/test_push.py has a hub of its own",
    "ollama create demo -f runs/demo-1a2b3c/export/ollama/Modelfile": "needs Ollama",
    "ollama create demo-1a2b3c -f runs/demo-1a2b3c/export/ollama/Modelfile": "needs Ollama",
}
# Verbs that answer without loading a model: their blocks are in the default suite.
FAST = {"plan", "fit", "presets", "metrics", "runs", "report", "cache", "data show", "data convert", "data split"}
# Verbs whose settings are laid over those of a run, and verbs that take settings and no model.
OF_A_RUN = {"compare", "chat", "eval"}
WITHOUT_A_MODEL = {("data", "show"), ("data", "convert"), ("data", "split")}
# What makes a documented command small enough to run: the tiny model on the CPU, four short steps.
TINY = {
    "model.quantization": "none",
    "model.dtype": "fp32",
    "model.device": "cpu",
    "train.steps": "4",
    "train.pairs_per_step": "4",
    "train.optimizer": "adamw",
    "samples.count": "1",
    "samples.max_new_tokens": "4",
}


@dataclass(frozen=True)
class Fence:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command, comments left out; none unless it is a block of shell commands."""
        if self.language not in SHELL:
            return []
        lines = self.text.replace("\\\n", " ").split("\n")
        found = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
        return [words for words in found if words]


def load_script() -> ModuleType:
    """scripts/docs as a module."""
    loader = SourceFileLoader("docs_script", str(ROOT / "scripts" / "docs"))
    spec = importlib.util.spec_from_loader("docs_script", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def fences(page: Path) -> list[Fence]:
    found = []
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        found.append(Fence(page, text.count("\n", 0, match.start()) + 1, match[1], match[2]))
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


SCRIPT = load_script()
PAGES: list[Path] = SCRIPT.pages()
FENCES = [fence for page in PAGES for fence in fences(page)]
COMMANDS = [(fence, words) for fence in FENCES for words in fence.commands]
ALL_TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def leaves(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every verb of the command line, as words and click's command."""
    if not hasattr(command, "commands"):
        yield words, command
        return
    for name, child in command.commands.items():
        yield from leaves(child, (*words, name))


VERBS = dict(leaves(typer.main.get_command(app)))


def verb_of(words: list[str]) -> tuple[str, ...]:
    """The verb that the words of a command begin with. Raises: AssertionError if there is none."""
    found = [verb for verb in VERBS if tuple(words[1 : 1 + len(verb)]) == verb]
    assert found, f"{shlex.join(words)}: there is no such verb"
    return found[0]


# --- what the pages hold


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_blocks_are_current(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- generated: ") == len(SCRIPT.BLOCK.findall(text))
    assert text.count("<!-- end -->") == text.count("<!-- generated: ") + text.count("<!-- made by ")
    assert SCRIPT.stale(text) == [], "scripts/docs writes them"


def test_check_names_a_stale_block_and_writes_nothing(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    blocks = ("exit-codes -->\nold", "help run -->")
    page.write_text("# A page\n" + "".join(f"<!-- generated: {block}\n<!-- end -->\n" for block in blocks))
    before = page.read_bytes()
    script = [sys.executable, str(ROOT / "scripts" / "docs"), str(page)]
    checked = subprocess.run([*script, "--check"], capture_output=True, text=True, env=AS_USER)
    assert checked.returncode == 1 and page.read_bytes() == before
    assert "page.md: exit-codes is not current" in checked.stdout and "help run is not" in checked.stdout
    assert subprocess.run(script, env=AS_USER, stdout=subprocess.DEVNULL).returncode == 0
    assert SCRIPT.stale(page.read_text(encoding="utf-8")) == [] and page.read_text().startswith("# A page\n<!-- gen")
    checked = subprocess.run([*script, "--check"], capture_output=True, text=True, env=AS_USER)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_an_unknown_block_is_an_error() -> None:
    for what in ("nonsense", "settings nonsense", "help data nonsense", "losses x"):
        with pytest.raises(SCRIPT.UnknownBlock):
            SCRIPT.made(what)


def test_the_readme_is_short_and_has_two_pictures() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    assert PAGES[0].name == "README.md" and text.count("\n") <= README_LINES
    assert text.count("![") == 2


def test_every_setting_is_in_a_table() -> None:
    missing = [name for name in layered.setting_names() if f"\n| `{name}` |" not in ALL_TEXT]
    assert missing == []


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_has_its_help_on_one_page(verb: tuple[str, ...]) -> None:
    assert ALL_TEXT.count(f"<!-- generated: help {' '.join(verb)} -->") == 1
    help_text = SCRIPT.help_text(*verb)
    assert "\x1b" not in help_text and f"Usage: qdpo {' '.join(verb)}" in help_text
    assert max(map(len, help_text.split("\n"))) <= SCRIPT.HELP_COLUMNS + 20  # a word is not broken


def test_every_exit_code_is_explained() -> None:
    errors = [QdpoError]
    for error in errors:
        errors += error.__subclasses__()
    codes = {one.exit_code for one in errors if one is not Interrupted} | {0, 128 + signal.SIGINT, 128 + signal.SIGTERM}
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert [code for code in codes if f"| `{int(code)}` |" not in page] == []


def test_every_verb_with_json_is_named() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = {" ".join(verb) for verb, command in VERBS.items() if any("--json" in one.opts for one in command.params)}
    listed = page.partition("These verbs take it:")[2].partition("```")[0]
    assert set(re.findall(r"`qdpo ([\w ]+)`", listed)) == named


# --- links


def slugs(page: Path) -> set[str]:
    """The anchors that a page's headings make."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


def links(page: Path) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_and_anchors_resolve(page: Path) -> None:
    for link in links(page):
        if "://" in link:
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link} leaves the repository"
        assert not anchor or anchor in slugs(target), f"{page.name}: {link}"


def test_every_page_is_linked() -> None:
    linked = {
        (page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in links(page) if "://" not in link
    }
    assert [page.name for page in PAGES[1:] if page not in linked] == []


# --- commands, read


def resolve_settings(verb: tuple[str, ...], given: dict[str, Any]) -> None:
    """Resolves a command's settings as its verb would. Raises: ConfigError."""
    settings = list(given.get("settings") or [])
    if verb[0] == "data":
        settings.append(f"data.path={given['path']}")
    if verb[0] in OF_A_RUN or verb in WITHOUT_A_MODEL or given.get("adapter"):
        named = {setting.removeprefix("--").partition("=")[0] for setting in settings}
        settings += [f"{name}=x" for name in ("model.path", "data.path") if name not in named]
    for combination in itertools.product(
        *(layered.comma_values(one) if verb == ("sweep",) else [one] for one in settings)
    ):
        layered.resolve(list(combination))


def read_qdpo(words: list[str]) -> None:
    """Lets the verb's own parser and the settings read a command. Raises what they raise."""
    if words[1:] in (["--version"], ["--help"]):
        return
    verb = verb_of(words)
    context = VERBS[verb].make_context(" ".join(["qdpo", *verb]), words[1 + len(verb) :])
    if "settings" in context.params:
        resolve_settings(verb, context.params)


def read_script(words: list[str]) -> None:
    path = ROOT / words[0]
    assert path.is_file() and os.access(path, os.X_OK), f"{words[0]} is not a script"
    text = path.read_text(encoding="utf-8")
    for word in words[1:]:
        if word.startswith("--"):
            assert word.partition("=")[0] in text, f"{words[0]} has no option {word}"
        elif "=" in word:
            layered.resolve(["preset=demo", word])


def read_pip(words: list[str]) -> None:
    assert words[:2] == ["pip", "install"] and len(words) == 3
    match = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[2])
    assert match, f"{words[2]}: qdpo is installed from its clone"
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set((match[1] or "report").split(",")) <= known.keys()


@pytest.mark.parametrize(
    "words", [pytest.param(words, id=f"{fence.name} {shlex.join(words)}") for fence, words in COMMANDS]
)
def test_a_command_reads(words: list[str]) -> None:
    assert not {"|", "&&", ";", ">", "<", "&"} & set(words), "one command a line, without the shell's help"
    assert "…" not in "".join(words), "a command must be complete"
    if words[0] == "qdpo":
        read_qdpo(words)
    elif words[0].startswith("scripts/"):
        read_script(words)
    elif words[0] == "pip":
        read_pip(words)
    else:
        assert " ".join(words) in NOT_RUN, f"{words[0]} is not known here"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_prose_and_help_name_what_exists(page: Path) -> None:
    """`qdpo …` between backquotes, and the examples of help texts."""
    text = page.read_text(encoding="utf-8")
    for span in re.findall(r"`(qdpo [a-z][^`\n]*)`", prose(page)):
        words = shlex.split(span)
        if words[1] in {verb[0] for verb in VERBS if len(verb) > 1} and len(words) == 2:
            continue  # a group of verbs
        command = VERBS[verb_of(words)]
        options = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= options, f"{page.name}: {span}"
    for example in re.findall(r"^  Example: (qdpo .+(?:\n  \S.*)*)", text, re.MULTILINE):
        read_qdpo(shlex.split(" ".join(example.split())))


def test_no_command_hides_in_another_kind_of_block() -> None:
    for fence in FENCES:
        if fence.language not in SHELL:
            hidden = re.findall(r"^(?:\$ )?(?:qdpo|scripts/|pip|ollama) .*", fence.text, re.MULTILINE)
            assert hidden == [], fence.name


def test_reasons_are_of_commands_that_are_there() -> None:
    assert NOT_RUN.keys() - {" ".join(words) for _fence, words in COMMANDS} == set()


# --- commands, run


def to_run(fence: Fence) -> list[list[str]]:
    return [words for words in fence.commands if " ".join(words) not in NOT_RUN]


def is_fast(words: list[str]) -> bool:
    if words[0] != "qdpo":
        return False
    verb = verb_of(words)
    return "--dry-run" in words or verb[0] in FAST or " ".join(verb) in FAST


def runnable() -> list[Any]:
    found = []
    for fence in FENCES:
        commands = to_run(fence)
        if commands:
            marks = () if all(map(is_fast, commands)) else (pytest.mark.slow,)
            found.append(pytest.param(fence, id=fence.name, marks=marks))
    return found


@pytest.fixture(scope="module")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny model."""
    folder = tmp_path_factory.mktemp("docs")
    settings = {
        "model.path": str(tiny_base),
        "data.path": str(write_jsonl(folder / "pairs.jsonl", tiny_rows(40))),
        "data.eval_fraction": "0.2",
        "train.learning_rate": "1e-3",
        "output.dir": str(folder),
        "output.name": "run",
        "cache.dir": str(folder / "cache"),
        **TINY,
    }
    run_training(layered.resolve(arguments(settings)), Quiet())
    return folder / "run"


@pytest.fixture
def world(fence: Fence, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with what the block names: pairs, prompts, and runs."""
    for name in RUNS:
        if f"runs/{name}" in fence.text:
            shutil.copytree(request.getfixturevalue("finished"), tmp_path / "runs" / name)
    for number, name in enumerate(("pairs.jsonl", "a.jsonl", "b.jsonl", "other.jsonl")):
        write_jsonl(tmp_path / name, tiny_rows(60, seed=number))
    for name in ("prompts.txt", "more.txt"):
        (tmp_path / name).write_text("".join(f"tell me about {row['prompt']}\n" for row in tiny_rows(6, seed=9)))
    return tmp_path


def as_run(words: list[str], base: Path) -> list[str]:
    """The command with the tiny model and a short run in the place of what the page names; the rest as it is."""
    context = VERBS[verb_of(words)].make_context("qdpo", words[1 + len(verb_of(words)) :])
    loads = verb_of(words) in (("run",), ("sweep",), ("sample",), ("data", "check")) and "--dry-run" not in words
    if not loads or context.params.get("adapter"):
        return words
    wanted = {"model.path": str(base), **TINY, "output.name": "docs", "data.eval_limit": "8"}
    if verb_of(words) == ("sweep",):
        del wanted["output.name"]
    given = {word.partition("=")[0] for word in words}
    kept = [word for word in words if not word.startswith("model.path=")]
    return kept + [f"{name}={value}" for name, value in wanted.items() if name == "model.path" or name not in given]


def serve_until_ctrl_c(words: list[str], world: Path) -> None:
    """Starts `qdpo label`, waits for its page's address, and ends it as a user does."""
    process = start_qdpo(*words[1:], cwd=world)
    assert process.stdout is not None and process.stderr is not None
    with process:
        line = ""
        while "http://" not in line:
            line = process.stdout.readline()
            assert line, process.stderr.read()
        with urllib.request.urlopen(line.split()[-1].partition("#")[0], timeout=60) as page:  # it serves by then
            assert page.status == 200
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize("fence", runnable())
def test_the_commands_of_a_block_run(fence: Fence, world: Path, tiny_base: Path) -> None:
    for words in to_run(fence):
        if words[0] != "qdpo":
            script = [sys.executable, *words]  # env's python3 may be another
            done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, env=AS_USER)
        elif words[1] == "label":
            serve_until_ctrl_c(words, world)
            continue
        else:
            sent = as_run(words, tiny_base)
            done = run_in(world, sent, "hello\n" if words[1] == "chat" else "")
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def run_in(world: Path, words: list[str], said: str) -> "subprocess.CompletedProcess[str]":
    """The command, in an environment without a hub and with a cache of its own."""
    environment = {**AS_USER, "QDPO_CACHE": str(world / "cache")}
    return subprocess.run(
        [sys.executable, "-m", "qdpo", *words[1:]],
        cwd=world, env=environment, input=said, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("fence", [pytest.param(one, id=one.name) for one in FENCES if one.language == "json"])
def test_an_example_of_data_is_read(fence: Fence, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in fence.text.strip().split("\n")]
    shown = qdpo("data", "show", str(write_jsonl(tmp_path / "rows.jsonl", rows)), cwd=tmp_path)
    assert shown.returncode == 0 and rows[0]["chosen"] in shown.stdout


@pytest.mark.parametrize("fence", [pytest.param(one, id=one.name) for one in FENCES if one.language == "python"])
def test_an_example_in_python_runs(fence: Fence, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", fence.text], cwd=tmp_path, env=AS_USER, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
