"""What is pushed, where to, and that nothing of this machine is in it; the hub is one on the loopback interface."""

import getpass
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from qdpo.settings import layered
from qdpo.train.loop import run_training
from tests.conftest import Quiet, arguments, qdpo, tiny_rows, tiny_tokenizer, write_jsonl
from tests.export.made import save_merged
from tests.export.push_server import Pushed, PushServer


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of 2 steps on a local base and local pairs."""
    place = tmp_path_factory.mktemp("trained")
    settings = {
        "model.path": str(tiny_base),
        "model.quantization": "none",
        "model.dtype": "fp32",
        "model.device": "cpu",
        "data.path": str(write_jsonl(place / "pairs.jsonl", tiny_rows(40))),
        "data.eval_fraction": "0.2",
        "train.steps": "2",
        "samples.count": "0",
        "output.dir": str(place),
        "output.name": "run",
        "cache.dir": str(place / "cache"),
    }
    run_training(layered.resolve(arguments(settings)), Quiet())
    return place / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def hub() -> Iterator[PushServer]:
    with PushServer() as server:
        yield server


def secrets(tmp_path: Path) -> list[bytes]:
    """Whatever would tell of this machine: the places, the home folder, and folders named after the user."""
    user = getpass.getuser()
    names = [
        str(tmp_path),
        str(tmp_path.parent),
        str(Path.home()) + "/",
        f"/{user}/",
        "pytest-of",
    ]
    return [name.encode() for name in names]


def test_an_adapter_is_pushed_privately_with_its_card(run: Path, hub: PushServer, tmp_path: Path) -> None:
    (run / "adapter" / "notes.log").write_text("mine")
    (run / "adapter" / ".hidden.json").write_text("{}")
    answer = qdpo("push", str(run), "ada/first", "--yes", cwd=tmp_path, **hub.environment)
    assert answer.returncode == 0, answer.stderr
    pushed = hub.repos["ada/first"]
    expected = {"README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"}
    assert pushed.private and set(pushed.files) == expected | {"tokenizer.json", "tokenizer_config.json"}
    assert "left out: notes.log" in answer.stdout and "adapter_model.safetensors" in answer.stdout
    weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert pushed.files["adapter_model.safetensors"] == weights and f"{len(weights):,} bytes" in answer.stdout
    assert f"{hub.url}/ada/first/commit/" in answer.stdout

    text = pushed.files["README.md"].decode()
    header = yaml.safe_load(re.match(r"---\n(.*?)\n---", text, re.S)[1])  # type: ignore[index]
    assert header["library_name"] == "peft" and {"dpo", "qlora", "qdpo"} <= set(header["tags"])
    assert "base_model" not in header, "a local base has no name that others could follow"
    result = json.loads((run / "result.json").read_text())
    assert f"{result['after']['loss']:.4f}" in text and "32 preference pairs" in text and "loss.beta | 0.1" in text
    for part in ("transformers 5", "torch 2", "peft 0", "Held-out pairs (8)", "'ada/first'", "licence of the base"):
        assert part in text, part
    config = json.loads(pushed.files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "a-local-path" and config["r"] == 16


def test_no_byte_that_leaves_tells_of_this_machine(run: Path, hub: PushServer, tmp_path: Path) -> None:
    base = Path(json.loads((run / "run.json").read_text())["base"]["folder"])
    save_merged(run / "merged", base, run / "adapter")
    note = {"base": {"folder": str(base), "steps": [1, {"log": f"read {tmp_path}/x"}]}, "kl": 0.001}
    (run / "merged" / "qdpo_verification.json").write_text(json.dumps(note))
    for repo, words in (("ada/adapter", []), ("ada/merged", ["--merged"])):
        answer = qdpo("push", str(run), repo, "--yes", *words, cwd=tmp_path, **hub.environment)
        assert answer.returncode == 0, answer.stderr
    assert len(hub.received) > 8
    for method, path, body in hub.received:
        for secret in secrets(tmp_path):
            assert secret not in body and secret.decode() not in path, f"{secret!r} in {method} {path}"
    for name, content in (hub.repos["ada/adapter"].files | hub.repos["ada/merged"].files).items():
        for secret in secrets(tmp_path):
            assert secret not in content, f"{secret!r} in {name}"
    merged = hub.repos["ada/merged"].files
    assert json.loads(merged["qdpo_verification.json"])["kl"] == 0.001
    assert b"library_name: transformers" in merged["README.md"] and b"# Merged model" in merged["README.md"]
    # What arrived is a model that loads.
    arrived = tmp_path / "arrived"
    arrived.mkdir()
    for name, content in merged.items():
        (arrived / name).write_bytes(content)
    assert load_file(arrived / "model.safetensors").keys() == load_file(run / "merged" / "model.safetensors").keys()


def test_a_file_with_a_local_path_is_not_pushed(run: Path, hub: PushServer, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = f"{{# from {tmp_path}/template #}}{tokenizer.chat_template}"
    tokenizer.save_pretrained(run / "adapter")
    answer = qdpo("push", str(run), "ada/first", "--yes", cwd=tmp_path, **hub.environment)
    assert answer.returncode == 7 and "chat_template.jinja holds" in answer.stderr, answer.stderr
    assert not hub.received


def test_nothing_is_sent_unasked_for(run: Path, hub: PushServer, tmp_path: Path) -> None:
    answer = qdpo("push", str(run), "first", cwd=tmp_path, **hub.environment)  # no answer on stdin
    assert answer.returncode != 0 and "Upload to ada/first (private)?" in answer.stdout and not hub.repos
    hub.repos["ada/open"] = Pushed(private=False)
    answer = qdpo("push", str(run), "ada/open", "--yes", cwd=tmp_path, **hub.environment)
    assert answer.returncode == 2 and "is public" in answer.stderr and not hub.repos["ada/open"].files
    answer = qdpo("push", str(run), "ada/open", "--yes", "--public", cwd=tmp_path, **hub.environment)
    assert answer.returncode == 0 and hub.repos["ada/open"].files


def test_each_refusal_says_what_to_do(run: Path, hub: PushServer, tmp_path: Path) -> None:
    home = {"HF_HOME": str(tmp_path / "hf")}

    def refused(*words: str, **environment: str) -> str:
        answer = qdpo("push", str(run), *words, "--yes", cwd=tmp_path, **{**hub.environment, **home, **environment})
        assert answer.returncode == 2 and "Traceback" not in answer.stderr, answer.stderr
        return answer.stderr

    assert "hf auth login" in refused("ada/x", HF_TOKEN="")
    assert "error 401" in refused("ada/x", HF_TOKEN="hf_wrong")
    assert "error 403" in refused("grace/x") and "HF_HUB_OFFLINE" in refused("ada/x", HF_HUB_OFFLINE="1")
    assert "is not a repository name" in refused("ada/x/y")
    assert "qdpo merge" in refused("ada/x", "--merged")
    assert "could not be reached" in refused("ada/x", HF_ENDPOINT="http://127.0.0.1:9")
    assert not any(repo.files for repo in hub.repos.values())
