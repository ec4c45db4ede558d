"""Damaged model folders, tokenizers and GGUF headers are refused before anything is built, with the file's name."""

import json
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from qdpo.errors import ConfigError
from qdpo.model.base.config_values import check_values
from qdpo.model.base.expected import check_folder
from qdpo.model.base.foreign import reading
from qdpo.model.base.gguf_header import check_gguf_header
from qdpo.model.base.headers import read_header, tensors_of
from qdpo.model.base.load import load_base
from qdpo.model.base.text_model import text_model_of
from qdpo.model.base.tokenizer import load_tokenizer
from tests.conftest import save_tiny_base
from tests.faults import config_values, folders, headers, tokenizers
from tests.faults.base import REFUSED, Good


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Good:
    folder = tmp_path_factory.mktemp("good")
    model = save_tiny_base(folder / "base")
    (folder / "pairs.jsonl").write_text("")
    return Good(folder, model, folder / "pairs.jsonl", folder, folder, folder)


def open_model(folder: Path) -> None:
    check_folder(folder)
    load_tokenizer(folder)
    load_base(
        folder, quantization="none", double_quant=True, dtype="fp32", device=torch.device("cpu"),
        attention_name=None, announce=lambda line: None,
    )  # fmt: skip


def test_sound_folder_passes(good):
    open_model(good.model)


@pytest.mark.parametrize("kind", [headers, folders, config_values, tokenizers], ids=lambda kind: kind.KIND)
def test_generated_faults_are_refused_by_name_or_do_no_harm(kind, good, tmp_path):
    """A sample of the generator's cases that must be refused, in this process: one costs milliseconds."""
    found = [case for case in kind.cases(random.Random(18), good) if case.right == REFUSED]
    for number, case in enumerate(random.Random(4).sample(found, min(20, len(found)))):
        folder = tmp_path / str(number)
        folder.mkdir()
        case.make(folder)
        with pytest.raises(ConfigError) as caught:
            open_model(folder / "base")
        assert (case.near or "") in str(caught.value), case.name
        shutil.rmtree(folder)


def test_weights_that_are_not_finite_are_named(good, tmp_path):
    shutil.copytree(good.model, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][5, 7] = float("nan")
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' holds NaN"):
        open_model(tmp_path / "base")


def test_hub_snapshot_of_links_into_its_own_cache_passes_and_others_do_not(good, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in good.model.iterdir():
        shutil.copy(path, blobs / f"x{path.name}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"x{path.name}")
    open_model(snapshot)
    other = tmp_path / "models--c--d" / "blobs"
    other.mkdir(parents=True)
    (snapshot / "config.json").unlink()
    shutil.copy(good.model / "config.json", other)
    (snapshot / "config.json").symlink_to(other / "config.json")
    with pytest.raises(ConfigError, match=r"config\.json .*link out of its folder"):
        check_folder(snapshot)


def test_headers_of_a_sound_file_are_read(good):
    weights = load_file(good.model / "model.safetensors")
    found = {tensor.name: tensor.shape for tensor in read_header(good.model / "model.safetensors")}
    assert found == {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert tensors_of(good.model, ["model.safetensors"]).keys() == weights.keys()


class PanicException(BaseException):
    """As pyo3 names it."""


def test_panic_of_rust_is_the_files_fault_and_other_ends_are_not():
    with pytest.raises(ConfigError, match="x: PanicException: index out of bounds. Again."), reading("x", "Again."):
        raise PanicException("index out of bounds")
    for end in (KeyboardInterrupt, SystemExit, MemoryError):
        with pytest.raises(end), reading("x", "Again."):
            raise end


def gguf_header(*, version=3, tensors=1, keys=1, name=b"general.architecture", kind=8, value=None, rest=b"") -> bytes:
    value = struct.pack("<Q", 5) + b"llama" if value is None else value
    key = struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value
    tensor = struct.pack("<Q", 1) + b"w" + struct.pack("<IQQIQ", 2, 8, 8, 0, 0)
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + key + (rest or tensor) + bytes(512)


def test_sound_gguf_header_passes(tmp_path):
    (tmp_path / "x.gguf").write_bytes(gguf_header())
    check_gguf_header(tmp_path / "x.gguf")


@pytest.mark.parametrize("changes", [
    {"version": 1}, {"version": 2**31}, {"tensors": 2**63}, {"tensors": 2**40}, {"keys": 2**63}, {"keys": 2**20},
    {"kind": 99}, {"kind": 9, "value": struct.pack("<IQ", 4, 2**60)},
    {"kind": 9, "value": struct.pack("<IQ", 8, 2**21)},
    {"kind": 9, "value": struct.pack("<IQ", 9, 1) * 50}, {"value": struct.pack("<Q", 2**63)},
    {"rest": struct.pack("<Q", 1) + b"w" + struct.pack("<I", 2**31)},
    {"rest": struct.pack("<Q", 1) + b"w" + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)},
    {"rest": struct.pack("<Q", 1) + b"w" + struct.pack("<IQQIQ", 2, 8, 8, 999, 0)},
    {"rest": struct.pack("<Q", 1) + b"w" + struct.pack("<IQQIQ", 2, 8, 8, 0, 2**60)},
    {"rest": struct.pack("<Q", 2**62)},
], ids=str)  # fmt: skip
def test_damaged_gguf_header_is_refused(tmp_path, changes):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_header(**changes))
    with pytest.raises(ConfigError, match=r"x\.gguf.* is truncated or damaged"):
        check_gguf_header(path)


def test_cut_gguf_header_is_refused(tmp_path):
    path, whole = tmp_path / "x.gguf", gguf_header()[:-512]
    for length in range(4, len(whole), 7):
        path.write_bytes(whole)
        os.truncate(path, length)
        with pytest.raises(ConfigError, match=r"x\.gguf"):
            check_gguf_header(path)


def test_ids_and_types_of_a_tokenizer_are_named(good, tmp_path):
    shutil.copytree(good.model, tmp_path / "base")
    path = tmp_path / "base" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"][0]["id"] = 10**9
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"tokenizer\.json .*added_tokens\[0\]\.id is 1000000000"):
        load_tokenizer(tmp_path / "base")


def with_tensors(good: Good, folder: Path, *names: str, **fields: object) -> Path:
    """A copy with more tensors in the file and other values in config.json."""
    shutil.copytree(good.model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    more = {name: torch.ones(4) for name in names}
    save_file(load_file(folder / "model.safetensors") | more, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("stray", ["model.layers.0.self_attn.q_proj.bias", "layers.9.input_layernorm.weight"])
def test_tensors_of_the_text_model_that_its_config_does_not_describe_are_refused(stray, good, tmp_path):
    with pytest.raises(ConfigError, match=f"1 tensors of the text model have no place in it, such as {stray}"):
        open_model(with_tensors(good, tmp_path / "base", stray))


def test_a_tensor_under_two_names_is_refused(good, tmp_path):
    other = "layers.0.input_layernorm.weight"
    with pytest.raises(ConfigError, match=f"1 tensors of the text model twice, such as '{other}' and 'model.{other}'"):
        check_folder(with_tensors(good, tmp_path / "base", other))


def test_a_config_of_fewer_layers_is_refused(good, tmp_path):
    with pytest.raises(ConfigError, match=r"have no place in it, such as model\.layers\.1\."):
        open_model(with_tensors(good, tmp_path / "base", num_hidden_layers=1))


def test_layers_of_multi_token_prediction_and_old_buffers_are_skipped(good, tmp_path):
    ahead = ["model.layers.7.eh_proj.weight", "model.layers.7.enorm.weight", "model.layers.7.mlp.up_proj.weight"]
    old = [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.attn.bias",
        "model.layers.0.self_attn.k_scale",
    ]
    open_model(with_tensors(good, tmp_path / "base", *ahead, *old, "mtp.fc.weight", "model.mtp_layers.0.norm.weight"))


@pytest.mark.parametrize("chosen", [0, 5])
def test_experts_that_no_token_can_be_for_are_refused(chosen):
    text = {"num_experts": 4, "num_experts_per_tok": chosen}
    for config, where in ((text, ""), ({"text_config": text}, "text_config.")):
        with pytest.raises(ConfigError, match=f"x: {where}num_experts_per_tok in config.json is {chosen}, and"):
            check_values(config, "x")
    check_values({"num_experts": 4, "num_experts_per_tok": 4}, "x")
    check_values({"num_local_experts": 0, "num_experts_per_tok": 0}, "x")  # a dense member of a family with experts


def test_plain_weights_that_are_called_4_bit_are_refused(good, tmp_path):
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ConfigError, match="says bitsandbytes, but no tensor of the files is stored so"):
        open_model(with_tensors(good, tmp_path / "base", quantization_config=settings))


def test_a_model_that_fills_in_tokens_is_refused():
    config = hf.BertConfig(architectures=["BertForMaskedLM"], num_hidden_layers=1)
    with pytest.raises(ConfigError, match="BertForMaskedLM fills in tokens between others"):
        text_model_of(config)


def test_a_model_whose_attention_looks_ahead_is_refused():
    """As EmbeddingGemma's: the log-prob of a token that the model sees says nothing."""
    for fields in ({"use_bidirectional_attention": True}, {"use_bidirectional_attention": "all"}, {"is_causal": False}):
        with pytest.raises(ConfigError, match=f"by {next(iter(fields))} in its config.json its attention sees"):
            text_model_of(hf.LlamaConfig(num_hidden_layers=1, **fields))
    assert text_model_of(hf.LlamaConfig(num_hidden_layers=1, use_bidirectional_attention="vision"))
