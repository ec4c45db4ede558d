"""The hub without the hub: a run whose model and pairs come from a server on the loopback interface."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import arguments, qdpo, tiny_rows, write_jsonl
from tests.hub_server import HubServer


@pytest.fixture
def hub_folder(tiny_base: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "hub"
    shutil.copytree(tiny_base, folder / "models" / "org" / "tiny")
    (folder / "models" / "org" / "tiny" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    shutil.copytree(tiny_base, folder / "models" / "org" / "closed")
    pairs = folder / "datasets" / "org" / "pairs"
    pairs.mkdir(parents=True)
    write_jsonl(pairs / "train.jsonl", tiny_rows(40))
    return folder


def words(settings: dict[str, str], **changes: str) -> list[str]:
    changes = {"model__path": "org/tiny", "data__path": "org/pairs", "train__steps": "4", **changes}
    return arguments(settings, **changes)


def test_a_run_from_hub_ids(hub_folder: Path, settings: dict[str, str], tmp_path: Path) -> None:
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    with HubServer(hub_folder, gated={"org/closed"}) as hub:
        online = {**home, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        first = qdpo("run", *words(settings), cwd=tmp_path, **online)
        assert first.returncode == 0, first.stderr
        run = Path(settings["output.dir"]) / "run"
        record = json.loads((run / "run.json").read_text())
        assert record["base"]["commit"] == hub.commit("models", "org/tiny")
        assert record["data"]["revision"] == hub.commit("datasets", "org/pairs")
        saved = json.loads((run / "adapter" / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == "org/tiny" and saved["revision"] == record["base"]["commit"]
        card = (run / "README.md").read_text()
        assert "base_model: org/tiny" in card and "datasets: [org/pairs]" in card and "license: apache-2.0" in card

        for path, named in (("org/closed", "hf auth login"), ("org/nothing", "org/nothing")):
            answer = qdpo("run", *words(settings, model__path=path, output__name="x"), cwd=tmp_path, **online)
            assert answer.returncode == 2 and named in answer.stderr and "Traceback" not in answer.stderr
        elsewhere = {**online, "HF_HOME": str(tmp_path / "empty")}
        answer = qdpo("run", *words(settings, memory__limit_gib="0.0001", output__name="z"), cwd=tmp_path, **elsewhere)
        assert answer.returncode == 5 and "Its weights were not downloaded" in answer.stderr, answer.stderr
        assert not list((tmp_path / "empty").rglob("*.safetensors")) and list((tmp_path / "empty").rglob("config.json"))
        answer = qdpo("run", *words(settings, data__path="org/nothing", output__name="y"), cwd=tmp_path, **online)
        assert answer.returncode == 3 and "org/nothing" in answer.stderr and "Traceback" not in answer.stderr

    # The hub is gone, and main has moved on: a stopped run goes on from the cache, at its pinned commit.
    expected = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints")
    rest = qdpo("run", *words(settings), cwd=tmp_path, HF_HUB_OFFLINE="1", **home)
    assert rest.returncode == 0, rest.stderr
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == expected
