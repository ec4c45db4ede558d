"""The model card of a finished adapter: its base and data, the training settings, and its scores."""

import json
from dataclasses import dataclass
from pathlib import Path

from qdpo import __version__
from qdpo.errors import ConfigError
from qdpo.families.stored_form import FP8, MXFP4, StoredForm, stored_form
from qdpo.report.accuracy import accuracy_text
from qdpo.run import disk
from qdpo.run.finished import FinishedRun
from qdpo.run.record import Environment
from qdpo.settings import layered
from qdpo.settings.loss_rules import RULES, needs_reference
from qdpo.settings.schema import LossConfig

# The hub's licence names that are in use for open models.
LICENSES = {
    "afl-3.0", "apache-2.0", "artistic-2.0", "bigscience-openrail-m", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "cc-by-sa-4.0", "cc0-1.0", "gemma", "gpl-3.0", "llama2", "llama3", "llama3.1", "llama3.2",
    "llama3.3", "llama4", "mit", "openrail", "unlicense",
}  # fmt: skip

TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def write_card(finished: FinishedRun) -> None:
    """Write README.md into the run folder and its adapter folder, from run.json and result.json."""
    run, text = finished.run, card_text(finished)
    disk.write_text(run.card, text)
    disk.write_text(run.adapter / "README.md", text)


def card_text(
    finished: FinishedRun, *, repo: str | None = None, is_merged: bool = False, is_served: bool = False
) -> str:
    """The card in the hub's format, without paths of this machine.

    `repo` is the repository that the card is pushed to; such a card does not even name local files. `is_merged`: the
    card describes the merged model, not the adapter. `is_served`: the adapter has the names of the class that servers
    load, not those of the class that was trained.
    """
    record = finished.record
    base, data, found, config = record.base, record.data, record.found.settings(), finished.config()
    settings = layered.flat(config)
    before, after = finished.result.before, finished.result.after
    hide, pairs = repo is not None, data.held_out_pairs
    what = "A LoRA adapter, merged into" if is_merged else "A LoRA adapter over"
    names = {"base": public_name(base.name, base.source, hide=hide)}
    names["data"] = public_name(data.source, data.source, hide=hide)
    commit = f" at commit {base.commit}" if base.commit else ""
    start = ", or with its start adapter" if config.adapter.start else ""
    header = ["---", f"library_name: {'transformers' if is_merged else 'peft'}", "pipeline_tag: text-generation"]
    header.append("tags: [dpo, qlora, lora, qdpo]")
    if base.commit:
        header += [f"base_model: {base.name}", f"base_model_relation: {'finetune' if is_merged else 'adapter'}"]
    if base.license:
        header += _license_lines(base.license)
    if data.revision:
        header.append(f"datasets: [{data.source.partition(':')[0].partition('@')[0]}]")
    rows = "\n".join(
        f"| {label} | {_figure(name, before[name], pairs)} | {_figure(name, after[name], pairs)} |"
        for label, name in (
            ("loss", "loss"),
            ("reward accuracy", "rewards/accuracies"),
            ("reward margin", "rewards/margins"),
            ("log-prob of chosen", "logps/chosen"),
            ("log-prob of rejected", "logps/rejected"),
        )
    )
    used = "\n".join(
        f"| {name} | {settings[name] if name not in found else found[name]} |"
        for name in (
            *_loss_settings(config.loss), "train.learning_rate", "train.pairs_per_step", "train.steps",
            "train.schedule", "train.warmup_steps", "train.optimizer", "train.seed", "adapter.rank", "adapter.alpha",
            "model.quantization", "model.dtype",
            "data.max_tokens",
        )
    )  # fmt: skip
    losses = "; ".join(f"{name} ({RULES[name].source})" for name in config.loss.name)
    reference = f"The reference is the base with the adapter off{start}." if needs_reference(config.loss.name) else ""
    return (
        "\n".join(header)
        + f"""
---
# {"Merged model" if is_merged else "LoRA adapter"}, preference-tuned

{what} {names["base"]}{commit}, trained by qdpo {__version__} on {data.train_pairs} preference pairs
of {names["data"]} ({data.dropped} rows could not be used). Loss: {losses}. The base was quantised during
training: {config.model.quantization}. {reference}

## Held-out pairs ({data.held_out_pairs})
| | before | after |
|---|---|---|
{rows}

## Settings
| | |
|---|---|
{used}

## Versions
{_versions(finished.environment)}. The licence of the base ({base.license or "not stated there"}) holds for this, too.

## Use
```python
{_usage(finished, repo, is_merged, is_served)}
```
Chosen answers often become less likely in absolute terms while margins rise: most losses train the difference.
"""
    )


def _figure(name: str, value: float, pairs: int) -> str:
    return accuracy_text(value, pairs) if name == "rewards/accuracies" else f"{value:.4f}"


def _loss_settings(loss: LossConfig) -> list[str]:
    """The settings of [loss] with an effect: names, beta if used, and settings that are not at their defaults."""
    default, given = LossConfig().model_dump(), loss.model_dump()
    return [
        f"loss.{field}"
        for field in default
        if field == "name"
        or given[field] != default[field]
        or (field == "beta" and any("beta" in RULES[name].takes for name in loss.name))
    ]


def _license_lines(name: str) -> list[str]:
    """Front matter for a licence; the hub has a closed list of names, and takes any other licence as "other"."""
    if name in LICENSES:
        return [f"license: {name}"]
    return ["license: other", f"license_name: {json.dumps(name)}"]


def _versions(environment: Environment) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in sorted(environment.packages.items()))
    return f"Python {environment.python}, {packages}; trained on {environment.device}"


def _usage(finished: FinishedRun, repo: str | None, is_merged: bool, is_served: bool) -> str:
    """Python code that loads the model that the card describes: the base in the form that the adapter was trained over.

    The base is a hub id with its commit, or a placeholder.
    """
    record, model = finished.record, finished.config().model
    part = _text_part(Path(record.base.folder))
    if is_merged:
        auto = "AutoModelForCausalLM" if part is None else part.whole
        return f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained({repo or 'path/to/this/model'!r})"
    dtype = f"torch.{TORCH_NAMES[record.found.dtype]}"
    where = [repr(record.base.name if record.base.commit else "path/to/its/base")]
    where += [f"revision={record.base.commit!r}"] if record.base.commit else []
    cls = "AutoModelForCausalLM" if part is None else part.whole if is_served else part.cls
    classes, before = [cls], []
    stored = _stored_form(Path(record.base.folder))
    # Marks that were not recorded leave the setting to tell.
    in_4_bits = model.quantization != "none" and record.four_bit != {}
    if stored is not None and stored.is_dequantised:  # transformers has one quantiser a model
        classes.append({FP8: "FineGrainedFP8Config", MXFP4: "Mxfp4Config"}[stored.method])
        where.append(f"quantization_config={classes[-1]}(dequantize=True)")
        before = _over_dequantised(model.quantization, stored.method) if in_4_bits else []
    elif in_4_bits and stored is None:  # a folder that is 4-bit already brings its own settings
        classes.append("BitsAndBytesConfig")
        where.append("quantization_config=in_4_bits")
        before = [
            f"# The adapter was trained over the base in {model.quantization.upper()}. Over the base in 16 bits it is "
            "another model;",
            "# `qdpo merge` makes one model of both, without 4-bit weights.",
            "in_4_bits = BitsAndBytesConfig(",
            f"    load_in_4bit=True, bnb_4bit_quant_type={model.quantization!r},",
            f"    bnb_4bit_use_double_quant={model.double_quant}, bnb_4bit_compute_dtype={dtype},",
            ")",
        ]
    if part is not None and cls != part.whole:
        classes.insert(0, "AutoConfig")
        config = f"AutoConfig.from_pretrained({', '.join(where[: 1 + bool(record.base.commit)])})"
        before += [
            f"# The adapter's names are those of the text class. For {part.whole}, which servers load,",
            "# `qdpo export --to peft` writes them.",
            *(
                [f"config = {config}.text_config"]
                if stored is None
                else [f"whole = {config}", "config = whole.text_config"]
            ),
            f"config.tie_word_embeddings = {part.tied}",
        ]
        if stored is not None:
            kept = f" | {{'llm_int8_skip_modules': {part.kept}}}" if part.kept else ""
            before += [f"config.quantization_config = whole.quantization_config{kept}"]
        where += ["config=config", f"key_mapping={part.key_mapping}"]
    return "\n".join(
        [
            "import torch",
            "from peft import PeftModel",
            f"from transformers import {', '.join(classes)}",
            "",
            *before,
            f"base = {cls}.from_pretrained(",
            f"    {', '.join([*where, f'dtype={dtype}'])},",
            ")",
            f"model = PeftModel.from_pretrained(base, {repo or 'path/to/this/adapter'!r}).eval()",
        ]
    )


@dataclass(frozen=True)
class _TextPart:
    """The names of a multimodal checkpoint's classes, and what it takes to load the text class from it."""

    cls: str
    whole: str
    key_mapping: dict[str, str]
    tied: bool
    kept: list[str]
    """Layers of a 4-bit folder that are plain, besides the head."""


def _text_part(base: Path) -> _TextPart | None:
    """None for a base that is a text model, or has gone since the run."""
    try:
        if not isinstance(json.loads((base / "config.json").read_text(encoding="utf-8")).get("text_config"), dict):
            return None
        from qdpo.model.base.load import kept_plain
        from qdpo.model.base.text_model import text_model

        text = text_model(base)
        kept = kept_plain(text, base) if text.is_part and _is_four_bit(base) else []
    except (OSError, ValueError, ConfigError):
        return None
    tied = bool(getattr(text.config, "tie_word_embeddings", False))
    if not text.is_part:
        return None
    kept = [] if kept == ["lm_head"] else kept  # by default transformers leaves the head, and tied tables
    return _TextPart(text.cls.__name__, text.whole.__name__, text.key_mapping, tied, kept)


def _over_dequantised(quantization: str, method: str) -> list[str]:
    return [
        f"# The adapter was trained over {quantization.upper()} made of the base's {method.upper()}. Over 16 bits made",
        "# of that it is another model; `qdpo merge` makes one model of both, in 16 bits.",
    ]


def _is_four_bit(base: Path) -> bool:
    stored = _stored_form(base)
    return stored is not None and not stored.is_dequantised


def _stored_form(base: Path) -> StoredForm | None:
    try:
        return stored_form(json.loads((base / "config.json").read_text(encoding="utf-8")), f"The folder {str(base)!r}")
    except (OSError, ValueError, ConfigError):  # the base has changed or gone since the run
        return None


def public_name(name: str, source: str, *, hide: bool = False) -> str:
    """A name that reveals nothing about this machine: hub ids and pypi: sources in full, the last part of local paths.

    With `hide`, local paths are not named at all.
    """
    if source.startswith(("pypi:", "bundled:")):
        return source.partition("#")[0]
    local = Path(name).is_absolute() or name.startswith(("~", ".")) or Path(name).exists()
    if not local and not Path(source).is_absolute():
        return name
    return "a-local-path" if hide else Path(name).name
