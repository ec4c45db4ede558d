"""What a merge is compared with, seen to pass on the trained model and to fail on any other."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qdpo.cli.main import app
from qdpo.errors import ConfigError, VerificationError
from qdpo.export.merge.merge import merge_run
from qdpo.export.proof import verify
from qdpo.export.proof.distance import TIE, DistanceTally, distance
from qdpo.export.proof.prove import MergeOptions, check_again, merge_proved
from qdpo.run import disk
from qdpo.run.folder import RunDir
from qdpo.settings import layered
from qdpo.train.loop import run_training
from tests.conftest import Quiet, save_tiny_base, tiny_rows, write_jsonl
from tests.run.made import rewrite_json


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A tiny run on an NF4 base, 6 steps."""
    folder = tmp_path_factory.mktemp("verified")
    words = [
        f"model.path={save_tiny_base(folder / 'base')}", "model.device=cpu", "model.dtype=fp32", "samples.count=0",
        f"data.path={write_jsonl(folder / 'pairs.jsonl', tiny_rows(40))}", "data.eval_fraction=0.2", "train.steps=6",
        "train.learning_rate=1e-3", "train.pairs_per_step=4", f"output.dir={folder}", "output.name=run",
        f"cache.dir={folder / 'cache'}",
    ]  # fmt: skip
    run_training(layered.resolve(words), Quiet())
    return RunDir(folder / "run")


def test_a_trained_run_is_merged_proved_and_told(run: RunDir) -> None:
    shown = CliRunner().invoke(app, ["merge", str(run.path), "--compare", "--pairs", "5", "--json"])
    assert shown.exit_code == 0, shown.output
    result = json.loads(shown.stdout.splitlines()[-1])
    assert result["merged"]["proved"] == result["merged"]["dequantized"] == 14
    ours, original = result["verification"]
    assert ours["base"] == "dequantized" and ours["pairs"] == 5 and ours["enforced"] and ours["fault"] is None
    assert ours["distance"]["kl"] < 1e-5 and ours["distance"]["top1"] == 1
    assert ours["distance"]["share"] == pytest.approx(1, abs=1e-3)
    for name in ("margin", "accuracy", "perplexity_chosen"):
        assert ours["merged"][name] == pytest.approx(ours["trained"][name], rel=1e-3)
    assert original["base"] == "original" and original["distance"]["kl"] > 100 * ours["distance"]["kl"]
    assert not original["enforced"] and "not the model that was trained" in original["verdict"]
    assert json.loads((run.merged / verify.FILE).read_text()) == ours
    assert not list(run.path.glob("*compare*"))
    margins = [json.loads(line)["after"]["margin"] for line in run.eval_pairs.read_text().splitlines()]
    assert min(margins) <= ours["trained"]["margin"] <= max(margins)


@pytest.fixture(scope="module")
def trained(run: RunDir) -> verify.TrainedScores:
    return verify.score_trained(run, None, 5, Quiet())


def test_a_tampered_file_is_another_model(
    run: RunDir, trained: verify.TrainedScores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_run(run, tmp_path / "out", base="dequantized", dtype="bf16", watcher=Quiet())
    monkeypatch.setattr(verify, "score_trained", lambda *words: trained)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["lm_head.weight"][7] *= 3
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="not the trained one: KL .* nats a token") as caught:
        check_again(run, tmp_path / "out", MergeOptions(), Quiet())
    assert caught.value.exit_code == 7 and not (tmp_path / "out" / verify.FILE).exists()


def test_a_merge_of_the_untouched_base_is_told_from_the_trained_model(
    run: RunDir, trained: verify.TrainedScores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control, by itself: the other bounds are lifted."""
    untrained = RunDir(tmp_path / "run")
    shutil.copytree(run.path, untrained.path)
    tensors = load_file(untrained.adapter / "adapter_model.safetensors")
    save_file({name: tensor * 0 for name, tensor in tensors.items()}, untrained.adapter / "adapter_model.safetensors")
    result = {**disk.read_json(untrained.result), "adapter_weights": None}  # as of a run that recorded no digest
    rewrite_json(untrained.result, result)
    monkeypatch.setattr(verify, "score_trained", lambda *words: trained)
    monkeypatch.setattr(verify, "LARGEST_KL", 100.0)
    monkeypatch.setattr(verify, "LEAST_TOP1", 0.0)
    with pytest.raises(VerificationError, match=r"has -?\d% .* of the adapter's effect: it is closer to the base"):
        merge_proved(untrained, tmp_path / "out", MergeOptions(), Quiet())
    assert not list(tmp_path.glob("*out*"))


def test_files_that_transformers_cannot_load_are_refused(
    run: RunDir, trained: verify.TrainedScores, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(VerificationError, match="transformers could not load and run the merged model"):
        verify.verify(trained, tmp_path, base="dequantized", dtype="bf16", watcher=Quiet())


def test_options_that_contradict_each_other(run: RunDir, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["merge", str(run.path), "--no-verify", "--compare"])
    assert isinstance(shown.exception, ConfigError) and "--compare and --check need the verification" in str(
        shown.exception
    )
    with pytest.raises(ConfigError, match="holds no merged model"):
        check_again(run, tmp_path, MergeOptions(), Quiet())


def test_distance_equals_its_definition() -> None:
    torch.manual_seed(0)
    trained_NV, other_NV, base_NV = torch.randn(3, 50, 11)
    merged_NV = trained_NV + 0.1 * other_NV
    label_N = torch.randint(0, 11, (50,))
    tally = DistanceTally([])
    for part in (slice(0, 20), slice(20, 50)):
        tally.add(trained_NV[part].clone(), merged_NV[part].clone(), label_N[part])

    def logp(logit_NV: torch.Tensor) -> torch.Tensor:
        return logit_NV.log_softmax(-1).gather(1, label_N[:, None])[:, 0]

    found = distance(tally, logp(base_NV), logp(trained_NV))
    expected = torch.nn.functional.kl_div(
        merged_NV.log_softmax(-1), trained_NV.log_softmax(-1), reduction="batchmean", log_target=True
    )
    assert found.kl == pytest.approx(float(expected), rel=1e-5)
    gap_N = trained_NV.amax(-1) - trained_NV.gather(1, merged_NV.argmax(-1, keepdim=True))[:, 0]
    assert found.top1 == int((gap_N <= TIE).sum()) / 50 < 1
    assert abs(found.share - 1) < 4 * found.share_error < 0.2
    nothing = dataclasses.replace(found, share=float("nan"))
    assert "no effect on these pairs" in str(verify._fault(nothing, enforced=False))
