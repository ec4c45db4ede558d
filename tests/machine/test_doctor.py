"""What the doctor sees: this machine, and machines made by taking things away."""

import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from qdpo.machine import doctor
from qdpo.model.base import quant
from tests.conftest import qdpo


def found(check: str) -> list[doctor.Check]:
    return [one for one in doctor.run_checks()[0] if one.name == check]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_from_the_command_line(tmp_path: Path) -> None:
    answer = qdpo("doctor", cwd=tmp_path)
    assert answer.returncode == 0, answer.stdout
    lines = answer.stdout.splitlines()
    assert all(len(line) > 18 for line in lines) and any("NF4 round trip" in line for line in lines)
    assert any(line.startswith("      demo        fits: forecast") for line in lines)
    assert "HF_HUB_OFFLINE is set" in answer.stdout and "Traceback" not in answer.stderr


def test_nf4_is_really_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0.05 < quant.round_trip_error(torch.device("cpu")) < 0.12
    assert found("4-bit")[0].mark == "ok"

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("library libbitsandbytes_cuda.so is missing\nmore")

    monkeypatch.setattr(quant.bnb.functional, "quantize_4bit", broken)
    (check,) = found("4-bit")
    assert check.mark == "bad" and "libbitsandbytes_cuda.so is missing" in check.line and "more" not in check.line


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_card_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found("card")[0].mark == "note"
    monkeypatch.setattr(doctor, "_driver", lambda: "NVIDIA GeForce RTX 4090, 550.54")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is a CPU build" in found("card")[0].text and found("card")[0].mark == "bad"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "update the driver" in found("card")[0].text


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = doctor.shutil.disk_usage("/")
    assert all(check.mark == "ok" for check in found("disk"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage._replace(free=2**30))
    assert [check.mark for check in found("disk")] == ["bad", "bad"]


def test_traps_of_wsl(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not found("WSL")
    monkeypatch.setattr(doctor.platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    monkeypatch.setattr(doctor.Path, "cwd", classmethod(lambda _: Path("/mnt/c/Users/me")))
    assert [".wslconfig" in check.text for check in found("WSL")] == [True, False]


@pytest.mark.parametrize(
    ("error", "mark"),
    [(None, "ok"), (urllib.error.HTTPError("", 403, "", {}, None), "ok"),  # type: ignore[arg-type]
     (urllib.error.URLError("no route"), "note")],
)  # fmt: skip
def test_the_hub(monkeypatch: pytest.MonkeyPatch, error: Exception | None, mark: str) -> None:
    class Answer:
        def __enter__(self) -> None:
            if error is not None:
                raise error

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Answer())
    (check,) = found("hub")
    assert check.mark == mark


def test_little_memory_is_held_against_the_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    from qdpo.cli.machine import _preset_here

    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=2**28))
    machine = doctor.run_checks()[1]
    if machine.device == "cpu":
        assert "does not fit" in _preset_here("demo", machine.device, machine.free_gib)
    assert "does not fit" in _preset_here("7b-24gb", "cuda", 4.0) and "fits:" in _preset_here("7b-24gb", "cuda", 23.5)
