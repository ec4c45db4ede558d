"""The matrix of families: the file that is committed, and, slow, the rows that matter made again."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qdpo.errors import ConfigError
from tests.conftest import ROOT
from tests.matrix import cells, exact
from tests.matrix.members import MEMBERS, Member, save_member
from tests.matrix.processes import Ended, one_line, part
from tests.matrix.rows import COLUMNS, Cell, Row, read_rows, write_rows
from tests.matrix.served import load_on_served_class
from tests.matrix.table import markdown, wrong

FILE = ROOT / "benchmarks" / "families.json"
PAGE = ROOT / "docs" / "models.md"
# One of each way through the code: every multimodal folder, and text models of each kind of layer.
TRIED = [
    "text llama", "text qwen3", "text gemma3 (text)", "text phi3", "text ministral3", "text olmo3",
    "text qwen3_5 (text)", "text qwen3_moe", "text glm4_moe_lite", "text gpt_oss", "text gemma4 (text, experts)",
    "text gemma4 (text, shared K and V)", "text llama4 (text)", "text granitemoehybrid", "text lfm2",
    "text nemotron_h", "text falcon_h1", "text olmo_hybrid", "text deepseek_v32", "text nanochat",
    *(member.key for member in MEMBERS if member.kind == "folder"),
]  # fmt: skip


def script() -> ModuleType:
    """scripts/families as a module."""
    loader = SourceFileLoader("families_script", str(ROOT / "scripts" / "families"))
    spec = importlib.util.spec_from_loader("families_script", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def made_up(**changed: Cell) -> Row:
    found = {name: Cell(True, "yes") for name in COLUMNS}
    return Row("text", "llama", "llama", cells={**found, **changed})


# --- what is committed


def test_the_file_has_every_family_and_every_column() -> None:
    rows = read_rows(FILE)
    assert list(rows) == [member.key for member in MEMBERS]
    for row in rows.values():
        assert tuple(row.cells) == COLUMNS, row.key


def test_every_cross_of_the_file_has_its_reason_and_nothing_is_wrong() -> None:
    faults = {row.key: found for row in read_rows(FILE).values() if (found := wrong(row))}
    assert faults == {}


def test_the_page_is_that_of_the_file() -> None:
    assert markdown(list(read_rows(FILE).values())) in PAGE.read_text(encoding="utf-8"), "scripts/docs writes it"


def test_the_file_holds_no_place_of_a_machine() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert not [part for part in ("/tmp/", "/home/", "/work/", "/root/", ROOT.as_posix()) if part in text]


# --- how it is made


@pytest.mark.parametrize("member", MEMBERS[::7], ids=lambda member: member.key)
def test_a_tiny_model_is_one_with_which_a_fault_shows(member: Member, tmp_path: Path) -> None:
    """Its own class reads it back with nothing missing; norms are not 1, biases and sinks are not 0."""
    name = save_member(member, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    for key, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16 and tensor.isfinite().all(), key
        if key.endswith(("norm.weight", "proj.bias", "sinks")):
            assert tensor.float().std() > 0.02, key
    assert name.endswith(("ForCausalLM", "ForConditionalGeneration"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert tokenizer.chat_template and tokenizer.eos_token_id is not None
    assert tokenizer.decode(tokenizer.encode("tell me about it", add_special_tokens=False)) == "tell me about it"


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    row = replace(made_up(merge=Cell(False, "no", "why")), bugs=["run: a bug"], seconds=1.5)
    write_rows(tmp_path / "rows.json", [row], {"command": "scripts/families"})
    assert read_rows(tmp_path / "rows.json") == {"text llama": row} and read_rows(tmp_path / "none.json") == {}


def test_what_is_wrong_without_a_word_is_seen() -> None:
    assert wrong(made_up()) == [] == wrong(made_up(merge=Cell(False, "no", "refused")))
    assert wrong(replace(made_up(), bugs=["run: a bug"])) == ["exit code 1: run: a bug"]
    assert wrong(made_up(merge=Cell(False, "no"))) == ["merge: ✘ without a reason"]
    assert "it trains and is not exact" in wrong(made_up(exact=Cell(False, "1e-1 nats", "differs")))[0]
    assert wrong(made_up(served=Cell(False, "0 of 30", "X receives 0 of 30 matrices, and says nothing")))


def test_reasons_are_numbered_once() -> None:
    rows = [made_up(merge=Cell(False, "no", "a <b>|c")), made_up(merge=Cell(False, "no", "a <b>|c"))]
    text = markdown(rows)
    assert text.count("| ✘ [1] |") == 2 and text.count("1. a &lt;b>\\|c") == 1


def test_rows_of_an_older_version_are_marked() -> None:
    row = replace(made_up(), commit="a" * 40)
    assert "°" not in markdown([row]) and f"| {row.name} ° |" in markdown([row, replace(row, commit="")])
    assert "The 1 rows with a °" in markdown([row, replace(row, commit="")])


def test_rows_are_chosen_by_name_or_part() -> None:
    chosen = script().chosen
    assert [member.key for member in chosen(["text qwen3"])] == ["text qwen3"]
    assert len(chosen([])) == len(MEMBERS) and not chosen(["nonsense"])
    assert {member.kind for member in chosen(["folder "])} == {"folder"}
    assert [member.key for member in chosen(["qwen3_5"])] == ["folder qwen3_5"]  # a whole name wins over a part
    assert {"text gemma4 (text)", "folder gemma4_unified"} <= {member.key for member in chosen(["gemma4", "emma4"])}


def test_a_reason_names_no_folder() -> None:
    assert one_line("cannot read /tmp/x-y/base/config.json\n in  /work/a.b/c") == "cannot read config.json in c"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "base"
    save_member(next(member for member in MEMBERS if member.key == "text llama"), folder)
    return folder


def ended(found: Any) -> Ended:
    return Ended(0, "", 0.0, found)


@pytest.mark.parametrize("fault", [None, "log-prob", "gradient"])
def test_a_difference_from_plain_transformers_is_seen(
    fault: str | None, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = exact.row_scores

    def wrong_scores(*words: Any, **options: Any) -> Any:
        found = scores(*words, **options)
        logp = found.logp * 1.0001 if fault == "log-prob" else found.logp
        detached = logp[:20].detach() * 0.01
        # The same numbers with other slopes.
        logp = torch.cat([logp[:20] * 0.99 + detached, logp[20:]]) if fault == "gradient" else logp
        return replace(found, logp=logp)

    monkeypatch.setattr(exact, "row_scores", wrong_scores)
    cell = cells.exact(ended(exact.differences(llama, tmp_path / "adapter")))
    assert cell.good is (fault is None)
    assert {"log-prob": "log-probs differ by", "gradient": "gradients differ by", None: ""}[fault] in cell.why


@pytest.mark.parametrize("renamed", [False, True])
def test_matrices_that_do_not_arrive_are_counted(renamed: bool, llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    peft.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    if renamed:
        save_file({name.replace("layers", "language_model.layers"): one for name, one in load_file(file).items()}, file)
    cell = cells.served(ended(None), ended(load_on_served_class(llama, file.parent)))
    assert (cell.good, cell.text) == (not renamed, "0 of 8" if renamed else "8 of 8")
    assert ("receives 0 of 8 matrices" in cell.why) == renamed


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12, for this process's threads
def test_a_part_that_fails_stops_nothing_and_says_why(tmp_path: Path) -> None:
    def refused() -> None:
        raise ConfigError("model.path names nothing. Give another.")

    assert part(lambda: {"a": 1}, tmp_path / "good.txt").found == {"a": 1}
    failed = part(refused, tmp_path / "bad.txt")
    assert (failed.code, failed.found, failed.why) == (1, None, "model.path names nothing. Give another.")
    ended_by = part(lambda: os.kill(os.getpid(), signal.SIGKILL), tmp_path / "killed.txt")
    assert ended_by.code == -9 and ended_by.why.startswith("ended by SIGKILL")
    late = part(lambda: time.sleep(60), tmp_path / "late.txt", limit_s=0.2)
    assert late.code == -9 and late.seconds < 20


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """The rows of TRIED, made anew by the script."""
    file = tmp_path_factory.mktemp("matrix") / "rows.json"
    words = ["scripts/families", "--no-forecast", "--write", str(file), "--only", ";".join(TRIED)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return read_rows(file)


@pytest.mark.slow
@pytest.mark.parametrize("key", TRIED)
def test_a_family_does_what_the_table_says(key: str, again: dict[str, Row]) -> None:
    expected, found = read_rows(FILE)[key].cells, again[key].cells
    names = [name for name in COLUMNS if name != "forecast"]
    if expected["GGUF"].text.startswith("llama.cpp"):  # its sources are not here: that qdpo names it is all
        names.remove("GGUF")
        assert found["GGUF"].text == "llama.cpp"
    assert {name: found[name] for name in names if found[name].good != expected[name].good} == {}
