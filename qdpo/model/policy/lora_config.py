"""Reads adapter_config.json: every field of PEFT's LoraConfig is either kept, known to change nothing, or must be off.

An adapter of another kit is trained only if plain PEFT gives it the same meaning over an unchanged base. A field that
is not listed here is refused where it is on, so a field of a later PEFT cannot change a run without a word.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from qdpo.errors import ConfigError
from qdpo.model.base.headers import keys_once

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LARGEST_CONFIG = 8 * 2**20
LARGEST_RANK = 2**20
# Ways to begin training that leave the base as it is: the file's weights replace what they draw.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# Ways that also change the base when the adapter is made, and most of them again whenever it is loaded.
CHANGE_BASE = ("olora", "pissa", "corda", "lora_ga", "loftq")


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return (is_whole(value) or isinstance(value, float)) and abs(value) < 1e30 and math.isfinite(value)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(is_text(one) and one for one in value)


def _rank(value: Any) -> bool:
    return is_whole(value) and 0 < value <= LARGEST_RANK


def _scale(value: Any) -> bool:
    return is_number(value) and value > 0


def _by_name(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(key and accepts(one) for key, one in value.items())


@dataclass(frozen=True)
class FieldRule:
    """The values of a field that are trained, in words; `keeps` is False where the field has no effect on them."""

    accepts: Callable[[Any], bool]
    wants: str
    keeps: bool = False
    optional: bool = True
    """null is accepted, as PEFT's own default."""

    def fits(self, value: Any) -> bool:
        return (value is None and self.optional) or bool(self.accepts(value))


NAMES = "a text, or a list of texts"
KEPT: dict[str, FieldRule] = {
    "r": FieldRule(_rank, "a whole number above 0", keeps=True, optional=False),
    "lora_alpha": FieldRule(_scale, "a number above 0", keeps=True, optional=False),
    "use_rslora": FieldRule(lambda v: isinstance(v, bool), "true or false", keeps=True),
    "target_modules": FieldRule(lambda v: is_text(v) or _texts(v), NAMES, keeps=True),
    "exclude_modules": FieldRule(lambda v: is_text(v) or _texts(v), NAMES, keeps=True),
    "layers_to_transform": FieldRule(
        lambda v: is_whole(v) or (isinstance(v, list) and all(map(is_whole, v))),
        "a whole number, or a list of whole numbers",
        keeps=True,
    ),
    "layers_pattern": FieldRule(lambda v: is_text(v) or _texts(v), NAMES, keeps=True),
    "rank_pattern": FieldRule(_by_name(_rank), "whole numbers above 0, by layer", keeps=True),
    "alpha_pattern": FieldRule(_by_name(_scale), "numbers above 0, by layer", keeps=True),
    "fan_in_fan_out": FieldRule(lambda v: isinstance(v, bool), "true or false", keeps=True),
    # Only where it names stacked experts, as PEFT itself does for mixtures of experts: see `lora_fit`.
    "target_parameters": FieldRule(_texts, "a list of texts", keeps=True),
    "base_model_name_or_path": FieldRule(is_text, "a text", keeps=True),
    "revision": FieldRule(is_text, "a text", keeps=True),
}
INERT: dict[str, FieldRule] = {
    "peft_type": FieldRule(lambda v: v == "LORA", "'LORA'", optional=False),
    "task_type": FieldRule(lambda v: v == "CAUSAL_LM", "'CAUSAL_LM' or null: the head of a language model"),
    "peft_version": FieldRule(is_text, "a text"),
    "inference_mode": FieldRule(lambda v: isinstance(v, bool), "true or false"),
    "init_lora_weights": FieldRule(
        lambda v: isinstance(v, bool) or v in PLAIN_STARTS[3:], "true, false, 'gaussian', 'eva' or 'orthogonal'"
    ),
    "lora_dropout": FieldRule(lambda v: is_number(v) and 0 <= v < 1, "a number from 0 up to 1"),
    "auto_mapping": FieldRule(lambda v: isinstance(v, dict), "an object"),
    "megatron_core": FieldRule(is_text, "a text"),
    "loftq_config": FieldRule(lambda v: isinstance(v, dict), "an object"),
    "eva_config": FieldRule(lambda v: isinstance(v, dict), "an object"),
    "corda_config": FieldRule(lambda v: isinstance(v, dict), "an object"),
    "lora_ga_config": FieldRule(lambda v: isinstance(v, dict), "an object"),
    "runtime_config": FieldRule(lambda v: isinstance(v, dict), "an object"),
    "qalora_group_size": FieldRule(is_whole, "a whole number"),
}
# Each is off by default; `bias` is "none". What it does, for the message.
OFF: dict[str, str] = {
    "bias": "trains biases of the base",
    "modules_to_save": "holds whole layers of the base",
    "trainable_token_indices": "trains rows of the embedding table",
    "use_dora": "rescales the base's weights (DoRA)",
    "use_qalora": "averages the layers' inputs (QALoRA)",
    "lora_bias": "adds a bias to each layer",
    "layer_replication": "repeats layers of the base",
    "megatron_config": "belongs to Megatron's layers",
    "velora_config": "compresses the inputs kept for gradients (VeLoRA)",
    "monteclora_config": "draws the weights at random (MonteCLoRA)",
    "kasa_config": "changes the base's weights at loading (KaSA)",
    "use_bdlora": "has block-diagonal matrices (BD-LoRA)",
    "arrow_config": "mixes several adapters (Arrow)",
    "alora_invocation_tokens": "is active only after certain tokens (aLoRA)",
    "ensure_weight_tying": "ties adapters of the embeddings and the head",
}
MERGE_FIRST = (
    "Merge the adapter into its base with the program that made it, and give the merged model as model.path; or train "
    "the adapter without this field."
)


def check_adapter_folder(folder: Path) -> dict[str, Any]:
    """The fields that give an adapter its meaning, checked strictly before PEFT reads them; all others are at default.

    Raises: ConfigError naming the file, the field and its value.
    """
    file = folder / CONFIG
    _check_files(folder)
    config = _read(file)
    if config.get("peft_type") != "LORA":
        raise ConfigError(
            f"{file} holds a {config.get('peft_type')!r} adapter (peft_type). Only LoRA adapters can be continued. "
            "Merge it into its base with PEFT (merge_and_unload), and give the merged model as model.path."
        )
    kept: dict[str, Any] = {}
    for name, value in config.items():
        rule = KEPT.get(name) or INERT.get(name)
        if name == "init_lora_weights" and value not in PLAIN_STARTS:
            _refuse_start(file, value)
        elif rule is not None:
            if not rule.fits(value):
                raise ConfigError(
                    f"{file} has {name}={_shown(value)}, but qdpo needs {rule.wants}. Save the adapter again."
                )
            if rule.keeps and value is not None:
                kept[name] = value
        elif name in OFF:
            if value != "none" if name == "bias" else value:
                raise ConfigError(
                    f"{file} has {name}={_shown(value)}: such an adapter {OFF[name]}, which is not supported. "
                    f"{MERGE_FIRST}"
                )
        elif value:
            _refuse_unknown(file, name, value, config.get("peft_version"))
    for name, rule in KEPT.items():
        if not rule.optional and name not in kept:
            raise ConfigError(f"{file} has no {name}, which says what the adapter is. Save the adapter again.")
    _check_pairs(file, kept)
    return kept


def _check_files(folder: Path) -> None:
    if not (folder / CONFIG).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []
        hint = "Give the folder that PEFT saved."
        if inside:
            hint = f"It holds {len(inside)} adapters: give one of its folders {', '.join(inside[:5])}."
        problem = f"it has no {CONFIG}" if folder.is_dir() else "there is no such folder"
        raise ConfigError(f"{folder} is not an adapter folder: {problem}. {hint}")
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(
            f"{folder} has no {WEIGHTS}. Only safetensors files are read; save the adapter again as safetensors."
        )


def _read(file: Path) -> dict[str, Any]:
    again = "Save or copy the adapter again."
    try:
        if file.stat().st_size > LARGEST_CONFIG:
            raise ConfigError(f"{file} has {file.stat().st_size} bytes, too many for an adapter's settings. {again}")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}. {again}") from error
    try:
        config = json.loads(text, object_pairs_hook=keys_once)
    except RecursionError as error:
        raise ConfigError(f"{file} is nested too deeply to be an adapter's settings. {again}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}. {again}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} holds a {type(config).__name__}, not an object with settings. {again}")
    return config


def _refuse_start(file: Path, value: Any) -> NoReturn:
    word = str(value).lower()
    if any(word.startswith(name) for name in CHANGE_BASE):
        raise ConfigError(
            f"{file} has init_lora_weights={value!r}: such an adapter belongs to a base that was changed when the "
            "adapter was made, so over model.path it is another model, and with the adapter off it is not the base. "
            "Save it again as plain LoRA: model.save_pretrained(FOLDER, path_initial_model_for_weight_conversion="
            "START) in PEFT, with START the adapter before its training. If model.path is the changed base itself, set "
            "init_lora_weights to true in the file."
        )
    raise ConfigError(
        f"{file} has init_lora_weights={_shown(value)}, which qdpo does not know. If A and B are plain LoRA over the "
        "unchanged base, set it to true in the file; else merge the adapter into its base and give that as model.path."
    )


def _refuse_unknown(file: Path, name: str, value: Any, version: Any) -> NoReturn:
    shown = name if name.isidentifier() else _shown(name)
    made = f"the file was written by PEFT {version}; " if is_text(version) else ""
    raise ConfigError(
        f"{file} has {shown}={_shown(value)}, a field that qdpo does not know ({made}installed: PEFT "
        f"{metadata.version('peft')}), and which may change what the adapter does. If it does not, remove it from the "
        "file; else merge the adapter into its base with the program that made it."
    )


def _check_pairs(file: Path, kept: dict[str, Any]) -> None:
    """Refuses combinations that PEFT refuses, or reads in another way than they look."""
    if not kept.get("target_modules") and not kept.get("target_parameters"):
        raise ConfigError(f"{file} has no target_modules, the names of its layers. Save the adapter again.")
    for name in ("layers_to_transform", "layers_pattern"):
        if is_text(kept.get("target_modules")) and kept.get(name) not in (None, []):
            raise ConfigError(
                f"{file} has {name}={_shown(kept[name])} next to target_modules={_shown(kept['target_modules'])}: PEFT "
                "takes it only with a list of names. Name the layers in the pattern, or list the modules."
            )
    if kept.get("layers_pattern") and kept.get("layers_to_transform") is None:
        raise ConfigError(
            f"{file} has layers_pattern={_shown(kept['layers_pattern'])} without layers_to_transform, which PEFT "
            "refuses. Remove it."
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}… ({len(text)} characters)"


def adapts_experts(folder: Path) -> bool:
    """True if an adapter changes stacked experts. Raises: ConfigError as `check_adapter_folder` does."""
    named = check_adapter_folder(folder).get("target_parameters") or []
    return any(not str(one).endswith(".weight") for one in named)
