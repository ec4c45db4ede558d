"""The model card beside a finished adapter: what it is, from what, how it was trained, what it scored."""

from pathlib import Path
from typing import Any

from qdpo import __version__, presets, rundir
from qdpo.config import LossConfig
from qdpo.loss_rules import RULES, needs_reference
from qdpo.presets import Resolved
from qdpo.rundir import RunDir


def write_card(run: RunDir, resolved: Resolved) -> None:
    """Writes README.md into the run folder and its adapter folder, from run.json and result.json."""
    text = card_text(rundir.read_json(run.record), rundir.read_json(run.result), presets.flat(resolved.config))
    rundir.write_text(run.card, text)
    rundir.write_text(run.adapter / "README.md", text)


def card_text(record: dict[str, Any], result: dict[str, Any], settings: dict[str, Any]) -> str:
    """The card in the hub's format. Paths of this machine are left out."""
    base, data, found = record["base"], record["data"], record["found"]
    before, after = result["before"], result["after"]
    names = {"base": _public(base["name"], base["source"]), "data": _public(data["source"], data["source"])}
    commit = f" at commit {base['commit']}" if base["commit"] else ""
    start = ", or with its start adapter" if settings["adapter.start"] else ""
    header = ["---", "library_name: peft", "pipeline_tag: text-generation", "tags: [dpo, qlora, lora, qdpo]"]
    if base["commit"]:
        header.append(f"base_model: {base['name']}")
    if base.get("license"):
        header.append(f"license: {base['license']}")
    if data["revision"]:
        header.append(f"datasets: [{data['source'].partition(':')[0].partition('@')[0]}]")
    rows = "\n".join(
        f"| {label} | {before[name]:.4f} | {after[name]:.4f} |"
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
            *_loss_settings(settings), "train.learning_rate", "train.pairs_per_step", "train.steps", "train.schedule",
            "train.warmup_steps", "train.optimizer", "train.seed", "adapter.rank", "adapter.alpha",
            "model.quantization", "model.dtype",
            "data.max_tokens",
        )
    )  # fmt: skip
    losses = "; ".join(f"{name} ({RULES[name].source})" for name in settings["loss.name"])
    reference = (
        f"The reference is the base with the adapter off{start}." if needs_reference(settings["loss.name"]) else ""
    )
    return (
        "\n".join(header)
        + f"""
---
# LoRA adapter, preference-tuned

A LoRA adapter over {names["base"]}{commit}, trained by qdpo {__version__} on {data["train_pairs"]} preference pairs
of {names["data"]} ({data["dropped"]} rows could not be used). Loss: {losses}. The base was quantised during
training: {settings["model.quantization"]}. {reference}

## Held-out pairs ({data["held_out_pairs"]})
| | before | after |
|---|---|---|
{rows}

## Settings
| | |
|---|---|
{used}

## Use
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({names["base"]!r})
model = PeftModel.from_pretrained(base, "path/to/this/adapter")
```
Chosen answers often become less likely in absolute terms while margins rise: most losses train the difference.
"""
    )


def _loss_settings(settings: dict[str, Any]) -> list[str]:
    """The settings of [loss] that act: its names, its beta if it has one, and what is not at its default."""
    default = LossConfig().model_dump()
    return [
        f"loss.{field}"
        for field in default
        if field == "name"
        or settings[f"loss.{field}"] != default[field]
        or (field == "beta" and any("beta" in RULES[name].takes for name in settings["loss.name"]))
    ]


def _public(name: str, source: str) -> str:
    """A name that tells nothing of this machine: hub ids and pypi: sources whole, local paths by their last part."""
    if source.startswith(("pypi:", "bundled:")):
        return source.partition("#")[0]
    return Path(name).name if Path(name).is_absolute() or name.startswith(("~", ".")) or Path(name).exists() else name
