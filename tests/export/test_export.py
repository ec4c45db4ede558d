"""`qdpo export` as a user meets it: what is written, what is refused, and nothing half done."""

import hashlib
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import transformers as hf
from typer.testing import CliRunner, Result

from qdpo.cli import ship
from qdpo.cli.main import app
from qdpo.errors import ConfigError, QdpoError
from qdpo.export import targets
from tests.conftest import qdpo
from tests.export.made import SHAPE, make_run, save_base
from tests.run.made import rewrite_json

Export = Callable[..., Result]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an rsLoRA adapter and a merged model."""
    place = tmp_path_factory.mktemp("made")
    save_base(place / "base", hf.LlamaConfig(**SHAPE))
    make_run(place / "a run", place / "base", merged=True, use_rslora=True)
    return place / "a run"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "a run")
    return tmp_path / "a run"


def export(run: Path, *words: str) -> Result:
    found = CliRunner().invoke(app, ["export", str(run), *words])
    if found.exception is not None and not isinstance(found.exception, QdpoError):
        raise found.exception
    return found


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_every_target(run: Path) -> None:
    assert tuple(targets.TARGETS) == ship.TARGETS
    out = run / "export"
    for to, written in (
        ("peft", "peft/adapter_config.json"),
        ("gguf-adapter", "adapter.gguf"),
        ("gguf", "model-bf16.gguf"),
        ("ollama", "ollama/Modelfile"),
    ):
        found = export(run, "--to", to)
        assert found.exit_code == 0, found.output
        assert (out / written).stat().st_mode & 0o044, "servers run as another user"
        again = export(run, "--to", to)
        assert isinstance(again.exception, ConfigError) and "--force" in str(again.exception)
        assert export(run, "--to", to, "--force").exit_code == 0
    assert everything(out / "ollama") == ["Modelfile", "model.gguf"]
    assert (
        "logits: read back by transformers, largest difference"
        in export(run, "other.gguf", "--to", "gguf", "--quant", "q8_0").output
    )
    Path("other.gguf").unlink()
    assert not list(run.rglob(".tmp*"))


def test_ollama_over_the_base(run: Path) -> None:
    assert export(run, "--to", "ollama", "--lora").exit_code == 0
    text = (run / "export" / "ollama" / "Modelfile").read_text()
    base = json.loads((run / "run.json").read_text())["base"]["folder"]
    assert f"FROM {base}\nADAPTER ./adapter.gguf\n" in text
    assert everything(run / "export" / "ollama") == ["Modelfile", "adapter.gguf"]


def test_vllm_commands(run: Path) -> None:
    merged = export(run, "--to", "vllm", "--name", "my model").output
    assert shlex.split(merged) == ["vllm", "serve", str(run / "merged"), "--served-model-name", "my model"]
    found = export(run, "--to", "vllm", "--lora")
    words = shlex.split(found.output.splitlines()[-1])
    # Its scale is rsLoRA's: the normalised adapter is written, and served in its place.
    assert words[-1] == f"a run={run}/export/peft" and words[words.index("--max-lora-rank") + 1] == "8"
    assert json.loads((run / "export" / "peft" / "adapter_config.json").read_text())["use_rslora"] is False
    again = export(run, "--to", "vllm", "--lora")  # a command that is printed can be printed twice
    assert again.output.splitlines()[-1] == found.output.splitlines()[-1]
    refused = str(export(run, "--to", "peft").exception)
    assert f"{run}/export/peft exists already" in refused and "`--to vllm --lora`" in refused
    assert f"`qdpo export {run} FOLDER --to peft`" in refused and "`--force`" in refused
    assert export(run, "--to", "peft", "--force").exit_code == 0


def test_layers_under_other_names_are_not_served_silently(run: Path, tmp_path: Path) -> None:
    """As of a text model whose checkpoint is a multimodal one's: vLLM would serve the bare base."""
    from safetensors.torch import load_file, save_file

    record = json.loads((run / "run.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(record["base"]["folder"], other)
    tensors = load_file(other / "model.safetensors")
    renamed = {name.replace("model.", "model.language_model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, other / "model.safetensors", metadata={"format": "pt"})
    record["base"]["folder"] = str(other)
    rewrite_json(run / "run.json", record)
    for words in (("--to", "vllm", "--lora"), ("--to", "peft"), ("--to", "gguf-adapter")):
        found = export(run, *words)
        assert isinstance(found.exception, ConfigError) and "do not hold weights" in str(found.exception)
    assert not (run / "export").exists()


def test_another_family_names_llama_cpps_command(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", hf.GPTNeoXConfig(**{**SHAPE, "num_key_value_heads": None}))
    make_run(tmp_path / "run", base, merged=True)
    run = tmp_path / "run"
    for words, tool in (
        (("--to", "gguf"), f"python convert_hf_to_gguf.py {run}/merged --outfile {run}/export/model-bf16.gguf"),
        (("--to", "gguf-adapter"), f"python convert_lora_to_gguf.py --base {base}"),
    ):
        found = export(run, *words)
        assert isinstance(found.exception, ConfigError) and tool in str(found.exception)
    assert not (run / "export").exists()
    found = export(run, "--to", "ollama", "--lora")
    assert isinstance(found.exception, ConfigError)
    assert f"--outfile {run}/export/adapter.gguf {run}/adapter" in str(found.exception)
    # Ollama may convert the folder itself.
    found = export(run, "--to", "ollama")
    assert found.exit_code == 0 and "leaves the conversion to Ollama" in found.output
    assert "write `FROM ./model.gguf` in" in found.output.replace("\n", " ")
    assert f"--outfile {run}/export/ollama/model.gguf" in found.output and ".tmp-" not in found.output
    assert f"FROM {run}/merged\n" in (run / "export" / "ollama" / "Modelfile").read_text()


def test_a_base_that_came_from_gguf_lends_its_tokenizer_fields(run: Path, tmp_path: Path) -> None:
    source = tmp_path / "base.gguf"
    assert export(run, str(source), "--to", "gguf", "--quant", "f32").exit_code == 0
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    record = json.loads((run / "run.json").read_text())
    kept = shutil.copytree(record["base"]["folder"], tmp_path / f"base-{digest[:12]}")
    record["base"] |= {"folder": str(kept), "source": str(source)}
    rewrite_json(run / "run.json", record)
    assert "tokenizer fields of base.gguf" in export(run, "--to", "gguf").output
    source.write_bytes(b"another file")
    assert "is missing or has changed" in export(run, "--to", "gguf", "--force").output


def test_bad_input_is_refused_and_writes_nothing(run: Path, tmp_path: Path) -> None:
    before = everything(tmp_path)

    def refused(folder: Path, *words: str) -> str:
        found = export(folder, *words)
        assert isinstance(found.exception, ConfigError), found.output
        return str(found.exception)

    assert "Choose one of peft" in refused(run, "--to", "onnx") and "Choose one of peft" in refused(run)
    assert "is not a run" in refused(tmp_path, "--to", "peft")
    assert "llama-quantize" in refused(run, "--to", "gguf", "--quant", "q4_k_m")
    assert "Choose one of f32, f16, bf16, q8_0" in refused(run, "--to", "gguf", "--quant", "q3")
    assert "Choose one of f32, f16" in refused(run, "--to", "gguf-adapter", "--quant", "bfloat")
    assert "--to vllm prints" in refused(run, "out.sh", "--to", "vllm")
    for to in ("ollama", "peft"):
        for folder in ("adapter", "merged", "."):
            assert "does not replace" in refused(run, str(run / folder), "--to", to, "--force")
    assert "no merged model in" in refused(run, "--to", "gguf", "--merged", str(tmp_path / "nothing"))
    assert everything(tmp_path) == before

    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    for change, named in (({"use_dora": True}, "use_dora"), ({"modules_to_save": ["lm_head"]}, "modules_to_save")):
        (run / "adapter" / "adapter_config.json").write_text(json.dumps(config | change))
        for words in (("--to", "peft"), ("--to", "gguf-adapter"), ("--to", "vllm", "--lora")):
            assert named in refused(run, *words)
    shutil.rmtree(run / "merged")
    for words in (("--to", "gguf"), ("--to", "ollama"), ("--to", "vllm")):
        assert "qdpo merge" in refused(run, *words)
    (run / "adapter" / "adapter_config.json").unlink()
    assert "its adapter is missing" in refused(run, "--to", "peft")
    (run / "result.json").unlink()
    assert "no result.json yet" in refused(run, "--to", "peft")
    assert not (run / "export").exists()


def test_an_export_that_fails_midway_leaves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    for to in ("gguf", "gguf-adapter", "ollama"):
        found = export(run, "--to", to)
        assert isinstance(found.exception, QdpoError) and found.exception.exit_code == 6, found.output
    assert not [path for path in (run / "export").rglob("*") if path.is_file()]


def test_a_base_that_has_changed_is_named(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", hf.LlamaConfig(**SHAPE))
    make_run(tmp_path / "run", base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}), encoding="utf-8")
    for to in ("peft", "gguf-adapter"):
        found = export(tmp_path / "run", "--to", to)
        assert isinstance(found.exception, ConfigError), found.output
        assert "config.json has changed since the run" in str(found.exception)
    assert not (tmp_path / "run" / "export").exists()


def test_a_refusal_is_a_message_and_an_exit_code(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "merged")
    for words, message in ((["--to", "onnx"], "Choose one of"), (["--to", "gguf"], "Run `qdpo merge")):
        found = qdpo("export", str(run), *words, cwd=tmp_path)
        assert found.returncode == 2 and found.stderr.startswith("qdpo: ") and message in found.stderr, found.stderr
