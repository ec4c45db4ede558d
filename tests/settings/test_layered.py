"""Settings: four layers, their origins, and every problem in one answer, fast."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qdpo.data.tokens.store import TokenPair, save_pairs
from qdpo.errors import ConfigError
from qdpo.forecast.plan import make_plan
from qdpo.forecast.preset_table import preset_table
from qdpo.run.identity import config_toml, run_folder
from qdpo.settings import layered, unknown_name
from tests.conftest import qdpo

ANSWERED = ["model.path=base", "data.path=pairs.jsonl"]
EXPECTED = (
    "demo 1b-6gb 3b-8gb 4b-8gb 7b-8gb 7b-12gb 7b-16gb 7b-24gb 9b-12gb 9b-16gb 9b-24gb 13b-12gb 13b-16gb 13b-24gb "
    "20b-moe-16gb 30b-moe-24gb 32b-24gb"
).split()


def problems(*arguments: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        layered.resolve(list(arguments))
    return caught.value.problems


def test_all_presets_ship_in_order() -> None:
    assert layered.preset_names() == EXPECTED


@pytest.mark.parametrize("name", EXPECTED)
def test_a_preset_alone_is_a_complete_run(name: str) -> None:
    resolved = layered.resolve([f"preset={name}"])
    assert resolved.config.model.path and resolved.config.data.path
    assert resolved.config.model.quantization == "nf4" and resolved.config.loss.beta == 0.1
    assert tomllib.loads(layered.preset_text(name))["about"]


@pytest.mark.parametrize("name", EXPECTED)
def test_every_line_of_a_preset_has_a_comment(name: str) -> None:
    for line in layered.preset_text(name).splitlines():
        if "=" in line and not line.startswith("#"):
            assert re.search(r"  # \w", line), line


def test_later_layers_win_and_origins_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[train]\nseed = 5\nlearning_rate = 5e-7\n")
    resolved = layered.resolve(["preset=demo", str(file), "train.seed=9"])
    assert resolved.config.train.seed == 9 and resolved.origins["train.seed"] == "the command line"
    assert resolved.config.train.learning_rate == 5e-7 and resolved.origins["train.learning_rate"] == str(file)
    assert resolved.config.loss.beta == 0.1 and resolved.origins["loss.beta"] == "preset demo"
    assert "loss.label_smoothing" not in resolved.origins


def test_the_resolved_settings_are_toml_that_resolves_to_the_same(tmp_path: Path) -> None:
    first = layered.resolve(["preset=7b-24gb", "data.columns.chosen=good", "adapter.targets=q_proj+v_proj"])
    file = tmp_path / "config.toml"
    file.write_text(config_toml(first, {}), encoding="utf-8")
    assert layered.resolve([str(file)]).config == first.config


def test_a_start_adapter_drops_the_size_of_the_presets_new_one() -> None:
    resolved = layered.resolve(["preset=7b-12gb", "adapter.start=folder"])
    assert resolved.config.adapter.start == "folder"
    assert not {"adapter.rank", "adapter.alpha"} & resolved.origins.keys()
    assert layered.resolve(["preset=32b-24gb", "adapter.start=none"]).config.adapter.rank == 8


def test_other_data_drops_what_belonged_to_the_presets_data() -> None:
    resolved = layered.resolve(["preset=7b-24gb", "data.path=mine.jsonl", "data.limit=7"])
    assert resolved.config.data.split is None and resolved.config.data.eval_split is None
    assert resolved.config.data.limit == 7 and resolved.config.data.max_tokens == 2048


def test_steps_replace_the_presets_hours() -> None:
    resolved = layered.resolve(["preset=7b-24gb", "train.steps=7"])
    assert resolved.config.train.steps == 7 and resolved.config.train.hours is None


def test_every_problem_is_reported_at_once() -> None:
    settings = ["train.learningrate=3", "loss.beta=-1", "data.max_drop_fraction=2", "loss.name=sigmod"]
    found = problems("preset=7b-24g", *settings, "foo", "beta=1")
    text = "\n".join(found)
    assert "Did you mean '7b-24gb'?" in text
    assert "Did you mean 'train.learning_rate'?" in text
    assert "loss.beta=-1 (from the command line) is not a number above 0" in text
    assert "data.max_drop_fraction=2 (from the command line) is not a number at least 0.0 and at most 1.0" in text
    assert "loss.name=sigmod (from the command line): allowed are sigmoid, sigmoid_norm, hinge, " in text
    assert ", cpo. Did you mean 'sigmoid'?" in text
    assert "'foo'" in text and "Did you mean 'loss.beta'?" in text
    assert len(found) == 7


def test_settings_that_contradict_each_other() -> None:
    base = ("model.path=m", "data.path=d")
    assert "train.hours" in problems(*base, "train.steps=3", "train.hours=2")[0]
    assert "adapter.rank" in problems(*base, "adapter.start=folder", "adapter.rank=8")[0]
    assert "adapter.start" in problems(*base, "adapter.reference=start")[0]
    assert "no room" in problems(*base, "data.max_tokens=64", "data.max_prompt_tokens=64")[0]


def test_wrong_settings_are_answered_without_heavy_imports(tmp_path: Path) -> None:
    script = (
        "import sys; from qdpo import errors; from qdpo.cli import main; from qdpo.settings import layered\n"
        "try: layered.resolve(['nonsense=1'])\nexcept errors.ConfigError: pass\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'peft', 'numpy') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_exit_code_and_message_of_a_wrong_setting(tmp_path: Path) -> None:
    answer = qdpo("run", "preset=demo", "train.epoch=2", cwd=tmp_path)
    assert answer.returncode == 2 and "Did you mean 'train.epochs'?" in answer.stderr
    assert "Traceback" not in answer.stderr and list(tmp_path.iterdir()) == []


def test_presets_are_listed_and_shown(tmp_path: Path) -> None:
    listed = qdpo("presets", cwd=tmp_path)
    assert listed.returncode == 0 and all(name in listed.stdout for name in EXPECTED)
    shown = qdpo("presets", "7b-24gb", cwd=tmp_path)
    assert shown.stdout.strip() == layered.preset_text("7b-24gb").strip()


def test_the_table_does_not_depend_on_runs_that_lie_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After scripts/demo, its run has prepared shorter pairs than the preset allows."""
    before = preset_table()
    monkeypatch.chdir(tmp_path)
    folder = run_folder(layered.resolve(["preset=demo"]))
    folder.train_pairs.parent.mkdir(parents=True)
    ids = np.arange(5, dtype=np.int32)
    for path in (folder.train_pairs, folder.held_out_pairs):
        save_pairs(path, [TokenPair(ids, ids, ids + 1, 1)])
    assert make_plan(layered.resolve(["preset=demo"])).known.lengths.longest == 15
    assert preset_table() == before


def test_the_readme_shows_the_presets_as_they_are() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert "\n".join(preset_table()) in readme


def test_dry_run_prints_origins_and_makes_nothing(tmp_path: Path) -> None:
    answer = qdpo("run", "preset=demo", "train.seed=3", "--dry-run", cwd=tmp_path)
    assert answer.returncode == 0 and "seed = 3  # the command line" in answer.stdout
    assert "beta = 0.1  # preset demo" in answer.stdout and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["loss.name=exo_pair"], "exo_pair needs loss.label_smoothing (the assumed share of swapped labels) above 0"),
        (["loss.name=robust"], "robust needs loss.label_smoothing (the assumed share of swapped labels) above 0"),
        (["loss.name=sigmoid+sigmoid"], "names a loss twice"),
        (["loss.name=sigmoid+sft", "loss.weights=1"], "loss.weights has 1 numbers for 2 losses (sigmoid+sft)"),
        (["loss.name=hinge", "loss.label_smoothing=0.1"], "hinge has no term for swapped labels"),
        (["loss.name=bco_pair", "loss.divergence=forward_kl"], "bco_pair does not compare two scores"),
        (["loss.name=sigmoid+bco_pair", "loss.divergence=forward_kl"], "Remove one of the two"),
        (["loss.name=aot", "loss.wpo=true"], "aot sorts the answers of a step"),
        (["loss.name=ipo", "loss.length_normalized=true"], "normalised by length already"),
        (["loss.name=simpo", "loss.ld_alpha=0.5"], "simpo has no sum of log-ratios"),
        (["loss.name=orpo", "loss.beta=0.3"], "orpo has no beta"),
        (["loss.discopop_tau=0.1"], "loss.discopop_tau has no effect with loss.name=sigmoid"),
        (["loss.divergence_alpha=0.3"], "has an effect only with loss.divergence=alpha_divergence"),
        (["loss.name=cpo", "adapter.start=x", "adapter.reference=start"], "loss.name=cpo uses no reference"),
        (["loss.weights=a+b"], "loss.weights=a+b (from the command line) is not a list of numbers"),
    ],
)
def test_settings_of_a_loss_that_have_no_meaning_together(given: list[str], said: str) -> None:
    assert any(said in problem for problem in problems("preset=demo", *given)), problems("preset=demo", *given)


def test_a_list_of_losses_and_a_name_from_elsewhere() -> None:
    mpo = layered.resolve(["preset=demo", "loss.name=sigmoid+bco_pair+sft", "loss.weights=0.8+0.2+1"]).config.loss
    assert mpo.name == ["sigmoid", "bco_pair", "sft"] and mpo.weights == [0.8, 0.2, 1.0]
    renamed = layered.resolve(["preset=demo", "loss.name=aot_pair"])
    assert renamed.config.loss.name == ["aot_unpaired"]
    assert renamed.notes == ["loss aot_pair is called aot_unpaired here"]


def test_switches_of_a_template_have_names_of_their_own(tmp_path: Path) -> None:
    given = ["preset=demo", "data.template_options.enable_thinking=false", "data.template_options.level=3"]
    resolved = layered.resolve([*given, "data.template_options.mode=short"])
    switches = {"enable_thinking": False, "level": 3, "mode": "short"}
    assert resolved.config.data.template_options == switches
    file = tmp_path / "again.toml"
    file.write_text(config_toml(resolved))
    assert layered.resolve([str(file)]).config.data.template_options == switches
    unset = layered.resolve(
        ["preset=9b-12gb", "data.template_options.enable_thinking=", "data.template_options.level="]
    )
    assert unset.config.data.template_options == {}
    assert not any("template_options" in name for name in unset.origins)
    with pytest.raises(ConfigError, match=r"NAME= to unset one"):
        layered.resolve(["preset=9b-12gb", "data.template_options="])
    for wrong in ("data.template_options=x", "data.template_options.a.b=1"):
        with pytest.raises(ConfigError, match=r"data\.template_options"):
            layered.resolve(["preset=demo", wrong])
    file.write_text("[data.template_options]\nlevels = [1, 2]\n")
    with pytest.raises(ConfigError, match=r"levels=\[1, 2\].* is not a word, a number, true or false"):
        layered.resolve(["preset=demo", str(file)])


def test_another_loss_brings_its_own_beta() -> None:
    """A preset's beta belongs to the preset's loss."""
    assert layered.resolve(["preset=demo", "loss.name=simpo"]).config.loss.beta == 2.0
    assert layered.resolve(["preset=demo", "loss.name=simpo", "loss.beta=2.5"]).config.loss.beta == 2.5
    assert layered.resolve(["preset=demo", "loss.name=simpo+sigmoid"]).config.loss.beta == 0.1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = " + "[" * 100_000, "nested too deeply"),
        (".".join("a" * 5000) + " = 1", "nested too deeply"),
        (f"train.seed = {'9' * 5000}", "digits"),
        ('output.name = "a\\u0000b"', "output.name"),
        ("train.learning_rate = inf", "train.learning_rate"),
        ("loss.weights = [inf]", "loss.weights"),
    ],
)
def test_a_file_of_settings_that_no_one_could_mean_is_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "odd.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        layered.resolve([*ANSWERED, str(file)])
    assert said in str(refused.value) and "odd.toml" in str(refused.value)


@pytest.mark.parametrize(
    "build",
    [
        lambda path: path.mkdir(),
        lambda path: os.mkfifo(path),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path.name),
        lambda path: path.write_bytes(bytes(2 << 20)),
    ],
)
def test_only_a_regular_file_of_sensible_size_is_read(build: Callable[[Path], None], tmp_path: Path) -> None:
    build(tmp_path / "odd.toml")
    with pytest.raises(ConfigError, match="odd.toml"):
        layered.resolve([*ANSWERED, str(tmp_path / "odd.toml")])


def test_a_weight_that_no_list_of_pairs_could_hold_is_refused() -> None:
    assert "data.weights=1e308" in problems(*ANSWERED, "data.weights=1e308")[0]


def test_text_that_is_no_utf_8_is_refused() -> None:
    with pytest.raises(ConfigError, match="output.name .* not UTF-8"):
        layered.resolve([*ANSWERED, "output.name=a\udcff"])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("train.lr", "The setting for it is 'train.learning_rate'"),
        ("train.batch_size", "The setting for it is 'train.pairs_per_step'"),
        ("lora_alpha", "The setting for it is 'adapter.alpha'"),
        ("loss.type", "The setting for it is 'loss.name'"),
        ("model.name", "The setting for it is 'model.path'"),
        ("train.beta", "Did you mean 'loss.beta'"),
        ("name", "Did you mean 'loss.name' or 'output.name'"),
        ("train.weight_decays", "Did you mean 'train.weight_decay'"),
        ("adapter.dropout", "adapter has: rank, alpha, targets, "),
        ("samples.temperature", "samples has: count, prompts, "),
        ("qwerty", "--dry-run` lists every setting"),
    ],
)
def test_an_unknown_name_is_not_answered_with_an_unrelated_setting(given: str, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        layered.resolve(["preset=demo", f"{given}=1"])


def test_every_name_of_another_kit_leads_to_a_setting_and_is_none_itself() -> None:
    names = layered.setting_names()
    leaves = {name.rpartition(".")[2] for name in names}
    assert set(unknown_name.ELSEWHERE) <= set(names)
    assert not set(unknown_name.OURS) & (leaves | set(names))
    assert len(unknown_name.OURS) == sum(len(words.split()) for words in unknown_name.ELSEWHERE.values())
