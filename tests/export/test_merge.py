"""Merged = PEFT's own merge, on the very weights that were trained on; and every input that must be refused."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qdpo.errors import ConfigError, DiskError, QdpoError, VerificationError
from qdpo.export.merge import shards
from qdpo.export.merge.lora import read_lora
from qdpo.export.merge.merge import MergeReport, merge_run
from qdpo.model.base import tensor_files
from qdpo.run import disk
from qdpo.run.folder import RunDir
from tests.conftest import Quiet
from tests.export.runs import adapt, dense_weights, four_bit, logits_of, make_run, peft_merged, save_base
from tests.model.families import SHARED, SIZE, TARGETS
from tests.run.made import rewrite_json

Merge = Callable[..., MergeReport]
WIDE = {**SIZE, "hidden_size": 64, "vocab_size": 402}  # 4-bit blocks of 64 need rows of 64


def merge(run: RunDir, out: Path, **options: Any) -> MergeReport:
    return merge_run(run, out, **{"base": "dequantized", "dtype": None, "watcher": Quiet(), **options})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("llama") / "base", hf.LlamaConfig(**WIDE))


def worst_logit(run: RunDir, base: Path, out: Path) -> float:
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.dtype == torch.float32
    return float((logits_of(merged.eval()) - logits_of(peft_merged(run, base))).abs().max())


@pytest.mark.parametrize("three_files", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "lora",
    [
        {"r": 1},
        {"r": 8, "use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.*": 3}},
    ],
    ids=["rank 1", "rsLoRA", "patterns of a start adapter"],
)
def test_merged_equals_pefts_own_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, three_files: bool, tied: bool, lora: dict[str, Any]
) -> None:
    config = hf.LlamaConfig(**SIZE, tie_word_embeddings=tied)
    base = save_base(tmp_path / "base", config, shard="40KB" if three_files else "5GB")
    if three_files:
        monkeypatch.setattr(shards, "SHARD_BYTES", 40_000)
    run = make_run(tmp_path / "run", base, **lora)
    report = merge(run, tmp_path / "out")
    assert (len(report.files) >= 3) == three_files and report.dtype == "fp32" and report.dequantized == 0
    assert worst_logit(run, base, tmp_path / "out") <= 1e-4
    assert ("lm_head.weight" in json.dumps(sorted(tensor_files.stored_tensors(tmp_path / "out")))) != tied


@pytest.mark.parametrize("family", sorted(SHARED.keys() - {"llama"}))
def test_every_family_merges_under_its_own_names(tmp_path: Path, family: str) -> None:
    config = SHARED[family]()
    base = save_base(tmp_path / "base", config)
    lora = {"target_modules": TARGETS[config.model_type]} if config.model_type in TARGETS else {}
    run = make_run(tmp_path / "run", base, **lora)
    merge(run, tmp_path / "out")
    assert tensor_files.stored_tensors(base).keys() == tensor_files.stored_tensors(tmp_path / "out").keys()
    assert worst_logit(run, base, tmp_path / "out") <= 1e-4


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("kind", "dtype"), [("nf4", "bf16"), ("nf4", "fp32"), ("fp4", "fp16")])
def test_the_base_is_what_the_4_bit_layers_multiply_with(
    tmp_path: Path, llama: Path, kind: str, dtype: str, double_quant: bool
) -> None:
    run = make_run(tmp_path / "run", llama, quantization=kind, dtype=dtype, double_quant=double_quant)
    report = merge(run, tmp_path / "out", dtype="fp32")
    assert report.dequantized == report.proved == 14
    trained = dense_weights(four_bit(llama, kind, double_quant, dtype))
    merged, deltas = load_file(tmp_path / "out" / "model.safetensors"), read_lora(run.adapter).layers
    for name, weight in trained.items():
        delta = deltas[name.removesuffix(".weight")]
        expected = torch.addmm(weight, delta.b_NR, delta.a_RK)
        assert torch.equal(merged[name], expected), name
    original = load_file(llama / "model.safetensors")
    rest = merged.keys() - trained.keys()
    assert len(rest) == 7
    compute = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    assert all(torch.equal(merged[name], original[name].to(compute).float()) for name in rest)


def test_threads_do_not_matter(tmp_path: Path, llama: Path) -> None:
    """Double quantisation subtracts a mean whose rounding depends on the threads; the run's record has it."""
    run = make_run(tmp_path / "run", llama, quantization="nf4", dtype="bf16")
    kept = disk.read_json(run.record)
    name, mark = next(iter(kept["four_bit"].items()))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            merge(run, tmp_path / f"out{count}")
            found.append((tmp_path / f"out{count}" / "model.safetensors").read_bytes())
        assert found[0] == found[1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    rewrite_json(run.record, {**kept, "four_bit": {**kept["four_bit"], name: {**mark, "offset": mark["offset"] * 2}}})
    with pytest.raises(VerificationError, match=name):
        merge(run, tmp_path / "other")


def test_a_base_stored_in_4_bit_is_dequantised_from_what_it_stores(tmp_path: Path, llama: Path) -> None:
    stored = tmp_path / "stored"
    four_bit(llama, "nf4", True, "bf16").save_pretrained(stored)
    for file in llama.glob("tokenizer*"):
        shutil.copy(file, stored)
    run = make_run(tmp_path / "run", llama)  # only for its adapter
    kept = disk.read_json(run.record)
    settings = {**kept["settings"], "model.path": str(stored), "model.quantization": "nf4"}
    del kept["four_bit"]
    rewrite_json(
        run.record, {**kept, "settings": settings, "files": {}, "found": {**kept["found"], "model.dtype": "bf16"}}
    )
    with pytest.raises(ConfigError, match="stored in 4 bits, without its original weights"):
        merge(run, tmp_path / "out", base="original")
    report = merge(run, tmp_path / "out", dtype="fp32")
    assert report.dequantized == 14
    merged, deltas = load_file(tmp_path / "out" / "model.safetensors"), read_lora(run.adapter).layers
    for name, weight in dense_weights(four_bit(stored, "nf4", True, "bf16")).items():
        delta = deltas[name.removesuffix(".weight")]
        assert torch.equal(merged[name], torch.addmm(weight, delta.b_NR, delta.a_RK))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in written and written["dtype"] == "float32"
    assert not any("quant" in name or "absmax" in name for name in merged)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_run_without_recorded_checksums_gives_the_same_file(tmp_path: Path, llama: Path) -> None:
    run = make_run(tmp_path / "run", llama, quantization="nf4", dtype="bf16")
    merge(run, tmp_path / "proved")
    kept = disk.read_json(run.record)
    del kept["four_bit"]
    rewrite_json(run.record, kept)
    watcher = Quiet()
    report = merge(run, tmp_path / "out", watcher=watcher)
    assert report.dequantized == 14 and report.proved == 0 and "recorded no checksums" in watcher.text
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "proved/model.safetensors").read_bytes()


def test_the_original_base_keeps_its_own_weights(tmp_path: Path, llama: Path) -> None:
    run = make_run(tmp_path / "run", llama, quantization="nf4", dtype="bf16")
    merge(run, tmp_path / "out", base="original", dtype="fp32")
    assert worst_logit(run, llama, tmp_path / "out") <= 1e-4


def test_the_folder_is_complete_readable_and_of_the_type_asked_for(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", hf.LlamaConfig(**SIZE), dtype=torch.float16)
    (base / "LICENSE").write_text("free")
    run = make_run(tmp_path / "run", base, dtype="bf16")
    (run.path / ".tmp-merged-999999999").mkdir()
    watcher = Quiet()
    report = merge(run, run.merged, watcher=watcher)
    assert report.dtype == "fp16" and "in fp16, as the base's files are" in watcher.text
    assert watcher.stages == [("merging", report.tensors)]
    names = {path.name for path in run.merged.iterdir()}
    assert names == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "LICENSE",
    }  # fmt: skip
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in run.merged.iterdir()} == {0o666 & ~umask}
    assert not list(run.path.glob(".tmp-*"))
    assert AutoTokenizer.from_pretrained(run.merged).chat_template
    for dtype, expected in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        merge(run, tmp_path / dtype, dtype=dtype)
        assert AutoModelForCausalLM.from_pretrained(tmp_path / dtype, dtype="auto").dtype == expected


def edit_json(path: Path, **values: Any) -> None:
    write = rewrite_json if path.name == "run.json" else disk.write_json
    write(path, {**disk.read_json(path), **values})


def unfinished(run: RunDir, base: Path) -> None:
    run.result.unlink()


def no_run(run: RunDir, base: Path) -> None:
    run.record.unlink()


def changed_base(run: RunDir, base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    os.utime(base / "model.safetensors", (1, 1))


def missing_shard(run: RunDir, base: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (base / "model.safetensors").rename(base / "model-00001-of-00002.safetensors")
    edit_json(run.record, files={})
    disk.write_json(base / "model.safetensors.index.json", index)


def outside_shard(run: RunDir, base: Path) -> None:
    (base / "model.safetensors").rename(base / "a.safetensors")
    edit_json(run.record, files={})
    disk.write_json(base / "model.safetensors.index.json", {"weight_map": {"a": "../a.safetensors"}})


def torn_file(run: RunDir, base: Path) -> None:
    edit_json(run.record, files={})
    os.truncate(base / "model.safetensors", (base / "model.safetensors").stat().st_size - 100)


def other_shape(run: RunDir, base: Path) -> None:
    wider = hf.LlamaConfig(**{**SIZE, "intermediate_size": 96})
    adapt(AutoModelForCausalLM.from_config(wider)).save_pretrained(run.adapter)


def other_targets(run: RunDir, base: Path) -> None:
    adapt(AutoModelForCausalLM.from_config(hf.GPTNeoXConfig(**{**SIZE, "num_key_value_heads": 4}))).save_pretrained(
        run.adapter
    )


def dora(run: RunDir, base: Path) -> None:
    edit_json(run.adapter / "adapter_config.json", use_dora=True)


def embedding(run: RunDir, base: Path) -> None:
    model = AutoModelForCausalLM.from_config(hf.LlamaConfig(**SIZE))
    adapt(model, target_modules=["embed_tokens"]).save_pretrained(run.adapter, save_embedding_layers=False)


def exists(run: RunDir, base: Path) -> None:
    run.merged.mkdir()


BAD: list[tuple[Callable[[RunDir, Path], None], type[QdpoError], str]] = [
    (no_run, ConfigError, "is not a run: it has no run.json"),
    (unfinished, ConfigError, "is not finished: it has no result.json yet"),
    (changed_base, ConfigError, r"model\.safetensors has changed since the run .* was started: its contents differ"),
    (missing_shard, ConfigError, "lists 2 files, of which 1 are missing"),
    (outside_shard, ConfigError, "points outside its folder"),
    (torn_file, ConfigError, "it is truncated"),
    (other_shape, ConfigError, "belongs to another base: for .* it has 32x96, but .* has 32x64"),
    (other_targets, ConfigError, "do not hold weights that the adapter or the run names: gpt_neox"),
    (dora, ConfigError, "use_dora=True.* which is not supported"),
    (embedding, ConfigError, "which is not the A or B of a linear layer"),
    (exists, ConfigError, "exists already"),
]


@pytest.mark.parametrize(("damage", "error", "message"), BAD, ids=[damage.__name__ for damage, _, _ in BAD])
def test_what_cannot_be_merged_is_refused_and_nothing_is_left(
    tmp_path: Path, damage: Callable[[RunDir, Path], None], error: type[QdpoError], message: str
) -> None:
    base = save_base(tmp_path / "base", hf.LlamaConfig(**SIZE))
    run = make_run(tmp_path / "run", base)
    damage(run, base)
    before = sorted(run.path.iterdir())
    with pytest.raises(error, match=message) as caught:
        merge(run, run.merged)
    assert caught.value.exit_code == 2 and sorted(run.path.iterdir()) == before


def test_another_base_or_quantiser_is_told_by_the_checksums(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", hf.LlamaConfig(**WIDE))
    run = make_run(tmp_path / "run", base, quantization="nf4", dtype="bf16")
    edit_json(run.record, files={})  # as for a base from the hub
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 10
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"4-bit form of model\.layers\.1\.mlp\.up_proj\.weight") as caught:
        merge(run, run.merged)
    assert caught.value.exit_code == 7 and not run.merged.exists() and not list(run.path.glob(".tmp-*"))


def test_a_disk_without_room_is_said_first(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", llama)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    watcher = Quiet()
    with pytest.raises(DiskError, match="The merged model in fp32 needs 0.1 GiB") as caught:
        merge(run, run.merged, watcher=watcher)
    assert caught.value.exit_code == 6 and not run.merged.exists() and not watcher.stages
