"""What `qdpo plan` promises: causes that add up, ways out that work, lengths as prepared; and that it loads nothing."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import CONFIG_MAPPING
from typer.testing import CliRunner

from qdpo.cli.main import app
from qdpo.data.tokens.sieve import TokenPair, save_pairs
from qdpo.errors import ConfigError
from qdpo.families import known, traced
from qdpo.families.shapes import known_shape
from qdpo.families.traced import TracedShape
from qdpo.forecast import memory
from qdpo.forecast.choose import least, smaller
from qdpo.forecast.memory import GIB, MemorySettings
from qdpo.forecast.plan import Plan, make_plan
from qdpo.model.trace.store import finder
from qdpo.run import identity
from qdpo.settings import layered
from tests.conftest import qdpo, tiny_rows, write_jsonl

FIXED = ("memory.tokens_per_row=4096", "memory.kept_layers=4", "memory.offload=false", "memory.embeddings=device")
SEVEN = "model.path=Qwen/Qwen2.5-7B-Instruct"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder without runs: one that has prepared its pairs would be found."""
    monkeypatch.chdir(tmp_path)


def plan(*words: str, **options: Any) -> Plan:
    return make_plan(layered.resolve(list(words)), **options)


def long_rows() -> list[dict[str, str]]:
    """Answers of up to 3,000 tokens at four characters a token, after prompts of 25 to 600."""
    return [
        {"prompt": f"{n:0{100 + n * 23 % 2300}}", "chosen": "c" * (400 + n * 170 % 11_600), "rejected": "r" * (n + 400)}
        for n in range(200)
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised with gptq"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised with awq"),
        ({"model_type": "foo"}, "is of model_type 'foo', which transformers"),
        ({"model_type": "foo", "auto_map": {"AutoModel": "foo.Foo"}}, "needs custom Python code"),
        ({"model_type": None}, "model_type in config.json is None, not a name"),
    ],
)
def test_what_a_run_refuses_by_its_config_is_not_planned(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    content = known.config_of("Qwen/Qwen2.5-7B-Instruct")
    (folder / "config.json").write_text(json.dumps({**content, **changes}))
    with pytest.raises(ConfigError, match=said):
        words = (f"model.path={folder}", "data.path=bundled:demo-train.jsonl")
        plan(*words, trace=finder(tmp_path / "cache", lambda line: None), gpu_gib=24)


@pytest.mark.parametrize("name", ["google/gemma-4-E4B-it", "google/gemma-3-4b-it", "Qwen/Qwen3.5-4B"])
def test_a_text_part_under_another_family_s_name_is_not_planned(name: str, tmp_path: Path) -> None:
    content = known.config_of(name)
    content["text_config"]["model_type"] = "llama"
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"text_config is 'llama', but transformers builds '\w+_text'"):
        plan(f"model.path={tmp_path}", "data.path=bundled:demo-train.jsonl", gpu_gib=24)


def test_text_types_that_are_known_are_those_that_transformers_builds() -> None:
    outer = {one.removesuffix("_text") for one in known.text_types() if one.endswith("_text")}
    assert {"gemma3", "gemma4", "qwen3_5"} <= outer
    for one in outer:
        assert CONFIG_MAPPING[one].sub_configs["text_config"].model_type == f"{one}_text"


def test_fit_lists_a_model_whose_trace_a_plan_has_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace that ships is taken away and kept in the cache instead, as `plan` keeps one that does not ship."""
    name = "openai/gpt-oss-20b"
    key = traced.key_of(known.config_of(name))
    kept = traced.shipped(key)
    assert kept is not None
    monkeypatch.setattr(traced, "shipped", lambda key: None)
    monkeypatch.setenv("QDPO_CACHE", str(tmp_path / "cache"))
    before = json.loads(CliRunner().invoke(app, ["fit", "--gpu-gib", "80", "--json"]).output)
    (tmp_path / "cache" / "forecast").mkdir(parents=True)
    (tmp_path / "cache" / "forecast" / f"{key}.json").write_text(traced.to_text(kept))
    after = json.loads(CliRunner().invoke(app, ["fit", "--gpu-gib", "80", "--json"]).output)
    assert [one["model"] for one in after if one not in before] == [name]


def test_it_says_that_a_preset_fits_and_why_and_loads_no_torch(tmp_path: Path) -> None:
    words = ("plan", "preset=7b-24gb", "data.path=bundled:demo-train.jsonl")
    text = qdpo(*words, cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    numbers = json.loads(qdpo(*words, "--json", cwd=tmp_path).stdout)
    imported = {line.rpartition("|")[2].strip() for line in text.stderr.splitlines()}
    assert text.returncode == 0 and "qdpo.forecast.plan" in imported and not imported & {"torch", "transformers"}
    causes = numbers["by_cause_bytes"]
    assert {"4-bit base", "optimizer", "kept layers", "CUDA context"} <= causes.keys()
    for name, value in causes.items():
        assert (f"{name:28} {value / GIB:7.2f} GiB" in text.stdout) == (value >= 0.005 * GIB), name
    assert sum(causes.values()) == pytest.approx(numbers["peak_bytes"])
    assert numbers["fits"] and f"\nFITS: {numbers['peak_bytes'] / GIB:.1f} GiB at the peak" in text.stdout
    assert [path.name for path in tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", layered.preset_names())
def test_every_preset_fits_its_card(name: str) -> None:
    found = plan(f"preset={name}")
    assert found.fits and found.ways == []
    assert found.card_gib == layered.card_gib(name) or found.card == "cpu"


@pytest.mark.parametrize(
    ("gib", "words"),
    [
        (6.5, ()),
        (7, ("memory.kept_layers=all", "memory.offload=false", "memory.embeddings=device")),
        (7.5, ("memory.kept_layers=all", "memory.head_tile_mib=16")),
        (12, ("model.quantization=none", "memory.tokens_per_row=4096")),
        (8, ("adapter.rank=256",)),
        (6.5, ("data.path=long.jsonl", "data.max_tokens=16384")),
        (6.5, ("data.path=long.jsonl", "data.max_tokens=16384", "memory.tokens_per_row=8192")),
    ],
    ids=str,
)
def test_each_way_out_is_one(gib: float, words: tuple[str, ...]) -> None:
    write_jsonl(Path("long.jsonl"), long_rows())
    found = plan("preset=7b-24gb", *words, gpu_gib=gib)
    assert not found.fits and 1 <= len(found.ways) <= 3
    for way in found.ways:
        assert way.peak <= found.limit
        changed = dict(word.split("=", 1) for word in (*words, *way.change.split()))
        again = plan("preset=7b-24gb", *(f"{name}={value}" for name, value in changed.items()), gpu_gib=gib)
        assert again.fits, way.change


def test_no_is_an_answer(tmp_path: Path) -> None:
    done = qdpo("plan", "preset=7b-24gb", "--gpu-gib", "6.5", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    assert re.search(r"DOES NOT FIT: .* GiB at the least, .* What fits: data\.max_tokens=\d+ \(", done.stdout)


def test_below_the_named_memory_nothing_runs() -> None:
    """The number in the message is the border: just above it there is a plan."""
    message = r"4 GiB less 0.7 GiB .* at least (\d+\.\d) GiB before its first token\. .*`qdpo fit --gpu-gib 4` lists"
    with pytest.raises(ConfigError, match=message) as error:
        plan("preset=7b-24gb", gpu_gib=4)
    named = re.search(message, str(error.value))
    assert named is not None
    border = float(named[1]) / 0.96
    assert not plan("preset=7b-24gb", gpu_gib=border + 0.1, others_gib=0).fits
    with pytest.raises(ConfigError, match="first token"):
        plan("preset=7b-24gb", gpu_gib=border - 0.1, others_gib=0)


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (["preset=7b-24gb"], {"card": "rtx-409"}, r"--card=rtx-409 is not known\. Did you mean 'rtx-4090'\?"),
        ([SEVEN, "data.path=pairs.jsonl"], {}, r"Give --gpu-gib=N, --card=NAME, or a preset"),
        (["preset=7b-24gb", "model.path=some/one"], {}, r"No config.json of model.path=some/one is on this machine"),
        (["preset=7b-24gb", "model.path=models/my model"], {}, r"No config.json of model.path=models/my model"),
        (["preset=7b-24gb", "model.path=new"], {}, r"no forecast for model_type='new' of .*without a trace"),
        (["preset=7b-24gb", "data.path=absent.jsonl"], {}, r"data.path=absent.jsonl is not on this machine"),
    ],
    ids=["card", "no card", "model", "no hub name", "family", "data"],
)
def test_what_it_cannot_know_is_asked_for(words: list[str], options: dict[str, Any], message: str) -> None:
    write_jsonl(Path("pairs.jsonl"), tiny_rows(10))
    Path("new").mkdir()
    Path("new/config.json").write_text('{"model_type": "new"}')
    with pytest.raises(ConfigError, match=message):
        plan(*words, **options)


def test_a_card_or_its_memory_is_enough() -> None:
    write_jsonl(Path("pairs.jsonl"), tiny_rows(50))
    named, sized = (plan(SEVEN, "data.path=pairs.jsonl", **given) for given in ({"card": "rtx-3090"}, {"gpu_gib": 24}))
    assert named == sized and named.card_gib == 24 and named.known.pairs == 48
    assert named.steps == 3 and named.limit == pytest.approx((24 - 0.7) * 0.96 * GIB)
    limited = plan("preset=7b-24gb", "memory.limit_gib=12", others_gib=0)
    assert limited.limit == pytest.approx(12 * 0.96 * GIB)


def test_prepared_pairs_are_used_as_they_are() -> None:
    resolved = layered.resolve(["preset=7b-24gb"])
    assert make_plan(resolved).known.how.startswith("assumed: pairs up to 4,096 tokens")
    sizes = [(100, 20, 30), (7, 300, 400), (50, 1, 2)] * 11 + [(7, 500, 300)]
    pairs = [TokenPair(*(np.arange(n, dtype=np.int32) for n in parts), row) for row, parts in enumerate(sizes)]
    run = identity.run_folder(resolved)
    save_pairs(run.train_pairs, pairs[:30])
    save_pairs(run.held_out_pairs, pairs[30:])
    found = make_plan(resolved)
    assert found.known.how == f"exact: the pairs that {run.path} has prepared"
    lengths = found.known.lengths
    assert (lengths.longest, lengths.longest_prompt, found.known.pairs) == (807, 7, 30)
    assert lengths.mean == pytest.approx(sum(map(sum, sizes)) / len(sizes))
    assert found.steps == math.ceil(30 / 16) and found.tokens == pytest.approx(30 * lengths.mean)


@pytest.mark.parametrize(("name", "least"), [("7b-24gb", 7), ("13b-12gb", 12)])
def test_more_memory_never_takes_longer(name: str, least: int) -> None:
    """On one card; within half a percent, for settings are compared by a full row on another."""
    found = [plan(f"preset={name}", gpu_gib=float(gib), card="rtx-4090") for gib in range(least, 33)]
    seconds = [sum(one.seconds.values()) for one in found if one.fits and one.seconds]
    assert len(seconds) == 33 - least and seconds[-1] < 0.95 * seconds[0]
    assert all(more <= 1.005 * less for less, more in zip(seconds, seconds[1:], strict=False))


def test_a_larger_rank_takes_more_memory() -> None:
    ranks = (1, 4, 8, 16, 64, 256)
    peaks = [plan("preset=7b-24gb", *FIXED, f"adapter.rank={rank}").chosen.peak for rank in ranks]
    assert peaks == sorted(set(peaks))


def test_an_original_in_fp8_is_downloaded_in_fewer_bytes() -> None:
    """Of the maker's own repository; copies of others may be in any form."""
    paths = (f"model.path={account}/Ministral-3-8B-Instruct-2512" for account in ("mistralai", "unsloth"))
    own, copied = (plan("preset=7b-16gb", path, like="mistral").disk["model download"] for path in paths)
    assert 0.5 < own / copied < 0.6


def test_every_table_of_a_model_is_downloaded() -> None:
    """Gemma 4's table of inputs per layer is larger than its embeddings."""
    Path("new").mkdir()
    Path("new/config.json").write_text(json.dumps({**known.config_of("openai/gpt-oss-20b"), "model_type": "new"}))
    shape = known_shape("openai/gpt-oss-20b")
    assert isinstance(shape, TracedShape)
    more = replace(shape, tables=shape.tables + GIB)
    found = [
        plan("preset=7b-24gb", "model.path=new", gpu_gib=80, trace=lambda *_, one=one: one) for one in (shape, more)
    ]
    assert found[1].disk["model download"] - found[0].disk["model download"] == 2 * GIB
    assert found[1].causes["embeddings and head"] - found[0].causes["embeddings and head"] == 2 * GIB


def test_experts_are_planned_in_four_bits_or_as_the_settings_say() -> None:
    """20.9 billion numbers, 91 % of them of experts (research on families): 11.7 GiB with the tables in 16 bits."""
    shape, run = known_shape("openai/gpt-oss-20b"), MemorySettings()
    four = memory.fixed(shape, run)
    assert four["experts in 4 bits"] / GIB == pytest.approx(9.18, abs=0.01)
    assert sum(four[one] for one in ("4-bit base", "experts in 4 bits", "embeddings and head")) / GIB == pytest.approx(
        11.7, abs=0.1
    )
    sixteen = memory.fixed(shape, replace(run, quantised=False))
    assert "experts in 4 bits" not in sixteen and sixteen["experts in 16 bits"] / GIB == pytest.approx(35.6, abs=0.1)


def test_experts_that_no_form_of_four_bits_holds_are_named() -> None:
    """Llama 4's: the same numbers as gpt-oss's, in 16 bits."""
    shape = known_shape("openai/gpt-oss-20b")
    assert isinstance(shape, TracedShape)
    kinds = tuple(
        replace(
            kind,
            weights=replace(
                kind.weights, stacks=(), dense=kind.weights.dense + numbers, experts=numbers,
            ),
        )
        for kind in shape.kinds
        for numbers in [sum(stack.experts * stack.numbers for stack in kind.weights.stacks)]
    )  # fmt: skip
    dense = replace(shape, kinds=kinds)
    assert re.search(r"37\.\d GiB before its first token \(35\.6 of it experts, which", least(dense, MemorySettings()))
    assert smaller(dense, 24).startswith("Choose a dense model (`qdpo fit")
    assert "experts" not in least(shape, replace(MemorySettings(), quantised=False))
    assert smaller(shape, 24).startswith("Choose a smaller model")


def test_the_time_grows_with_the_experts_that_are_met() -> None:
    shape = known_shape("Qwen/Qwen3-30B-A3B")
    few, many = shape.met_weights(1), shape.met_weights(10_000)
    assert few / many == pytest.approx(8 / 128) and many == pytest.approx(shape.expert_weights)
    assert shape.expert_weights == 48 * 128 * 3 * 768 * 2048


def test_fit_says_which_models_need_kernels(tmp_path: Path) -> None:
    said = qdpo("fit", "--gpu-gib", "8", cwd=tmp_path).stdout.splitlines()
    (line,) = [line for line in said if line.startswith("* with the packages of GPU kernels")]
    assert "Qwen/Qwen3.5-9B" in line and "gemma" not in line


def test_a_known_model_is_planned_with_its_facts(tmp_path: Path) -> None:
    words = ("plan", "preset=7b-16gb", "model.path=unsloth/Qwen3-8B-unsloth-bnb-4bit")
    line = "Apache-2.0; context 32,768 tokens; thoughts: enable_thinking of its chat template"
    assert line in qdpo(*words, cwd=tmp_path).stdout
    assert json.loads(qdpo(*words, "--json", cwd=tmp_path).stdout)["facts"]["name"] == "Qwen/Qwen3-8B"
    Path("unsloth/Qwen3-8B-unsloth-bnb-4bit").mkdir(parents=True)
    Path(words[2].removeprefix("model.path="), "config.json").write_text(
        json.dumps({**known.config_of("Qwen/Qwen3-4B"), "max_position_embeddings": 4096})
    )
    of_folder = plan("preset=7b-16gb", words[2])
    assert of_folder.facts is None and of_folder.notes == () and of_folder.causes["4-bit base"] < 2 * GIB


@pytest.mark.parametrize(
    ("name", "is_refused"),
    [
        ("Qwen/Qwen3-8B-AWQ", True), ("bartowski/Qwen_Qwen3-8B-GGUF", True), ("RedHatAI/Qwen3-8B-FP8-dynamic", True),
        ("mlx-community/Qwen3-8B-4bit", True), ("RedHatAI/Qwen3-8B-quantized.w4a16", True),
        ("unsloth/Qwen3-8B-bnb-4bit", False), ("Qwen/Qwen3-8B-FP8", False), ("Qwen/Qwen3-8B", False),
    ],
)  # fmt: skip
def test_a_copy_that_no_run_reads_is_named(name: str, is_refused: bool) -> None:
    notes = plan("preset=7b-16gb", f"model.path={name}").notes
    assert [note for note in notes if "refuses; take model.path=Qwen/Qwen3-8B" in note] == list(notes)
    assert bool(notes) == is_refused


def test_a_name_without_its_account_is_completed() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean openai/gpt-oss-20b\?"):
        plan("preset=7b-16gb", "model.path=gpt-oss-20b")


def test_a_plan_of_a_known_model_imports_nothing_heavy() -> None:
    script = (
        "import sys; from qdpo.forecast.plan import make_plan; from qdpo.settings import layered\n"
        "make_plan(layered.resolve(['preset=7b-24gb']))\n"
        "heavy = ('torch', 'transformers', 'datasets', 'peft', 'numpy', 'jinja2', 'httpx')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
