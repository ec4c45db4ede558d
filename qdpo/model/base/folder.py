"""Checks that a folder can be the base of a run: safetensors only, no custom code, in a form that can be read.

A folder passes when transformers can build the model from it without pickle, remote code or a second checkpoint.
"""

from collections.abc import Set
from pathlib import Path, PurePosixPath
from typing import Any

from qdpo.errors import ConfigError
from qdpo.families.config_fields import json_object
from qdpo.families.stored_form import stored_form
from qdpo.model.base.headers import AGAIN

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
TOKENIZER_FILES = {"tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json"}
READ = (".json", ".safetensors", ".model", ".txt", ".jinja", ".tiktoken")
LONGEST_JSON = 64 * 2**20  # bytes; the tokenizer.json of a vocabulary of 256,000 takes 33 MB
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


def check_files(folder: Path) -> list[str]:
    """Names of the weight files. Raises: ConfigError if a file is missing, they are pickle, or it is an adapter."""
    names = {entry.name for entry in folder.iterdir()}
    for name in sorted(names):
        if name.endswith(READ):
            check_regular(folder / name)
    complaint = complaint_about(names)
    if complaint:
        listing = ", ".join(sorted(names)[:20]) or "nothing"
        base = _adapter_base(folder) if "adapter_config.json" in names else ""
        raise ConfigError(f"The folder {str(folder)!r} (from model.path) {complaint}{base} It holds: {listing}.")
    if "adapter_config.json" in names:
        raise ConfigError(
            f"The folder {str(folder)!r} (from model.path) holds a model and an adapter_config.json, and transformers "
            "would attach that adapter to the model. Move adapter_config.json and adapter_model.safetensors elsewhere."
        )
    return weight_files(folder)


def weight_files(folder: Path) -> list[str]:
    """Names of the files that transformers takes the weights from.

    Raises: ConfigError if they are not safetensors files in this folder.
    """
    names = {entry.name for entry in folder.iterdir()}
    named = read_json(folder / "config.json").get("transformers_weights")
    weights = _weights_file(folder, names) if named is None else named
    if not isinstance(weights, str) or not weights.endswith((".safetensors", ".safetensors.index.json")):
        raise ConfigError(
            f"{folder}/config.json (from model.path) names the weights {weights!r:.80}, which are not safetensors. "
            "Save the model as safetensors."
        )
    if weights not in names:
        raise ConfigError(
            f"{folder}/config.json (from model.path) names the weights {weights!r:.80} (transformers_weights), which "
            "are not in the folder. Copy or download the model again."
        )
    return _shards(folder / weights, names) if weights.endswith(".index.json") else [weights]


def check_regular(path: Path) -> None:
    """Raises: ConfigError unless this is a regular file of its folder, or of the hub cache around the folder."""
    if path.is_symlink():
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"{path} (from model.path) is a link to nothing: {error}. Copy the file.") from error
        folder = path.parent.resolve()
        in_cache = folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"
        if target.parent != folder and not in_cache:
            raise ConfigError(
                f"{path} (from model.path) is a link out of its folder, to {target}. Copy that file into the folder, "
                "or pass the folder that holds it."
            )
    if not path.is_file():
        raise ConfigError(f"{path} (from model.path) is not a regular file. Copy or download it again.")


def complaint_about(names: Set[str]) -> str:
    """The reason why these file names are not a model, as the end of a sentence; empty if they are."""
    weights = [
        name for name in names if name.endswith(".safetensors") and not name.startswith(("adapter_", "consolidated"))
    ]
    if not weights and "adapter_config.json" in names:
        return "is an adapter, not a base model. Pass it as adapter.start=, with model.path= its base."
    missing = [] if "config.json" in names else ["config.json"]
    missing += [] if weights else ["*.safetensors"]
    missing += [] if names & TOKENIZER_FILES else ["tokenizer (tokenizer.json or tokenizer.model)"]
    if not missing:
        return ""
    return f"has no {' and no '.join(missing)}. {_way_out(names, bool(weights))}"


def _way_out(names: Set[str], has_weights: bool) -> str:
    if has_weights:
        return "Copy the missing files from the model's source."
    if any(name.endswith(".gguf") for name in names):
        return "Pass the path of the .gguf file itself."
    if any(name.endswith(PICKLE_SUFFIXES) for name in names):
        return (
            "Its weights are pickle files, which qdpo does not read: loading one can run any code. Convert it with "
            "safetensors where you trust it: from_pretrained(…), then save_pretrained(…), in transformers."
        )
    return "Pass a folder written by transformers' save_pretrained."


def _adapter_base(folder: Path) -> str:
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    return f" Its base is {base!r}." if base else " It does not name its base."


def _weights_file(folder: Path, names: Set[str]) -> str:
    for name in (WEIGHTS, WEIGHTS_INDEX):
        if name in names:
            return name
    raise ConfigError(
        f"The folder {str(folder)!r} (from model.path) has safetensors files, but neither {WEIGHTS} nor "
        f"{WEIGHTS_INDEX}, where transformers looks for weights. Copy the missing file from the model's source."
    )


def _shards(index: Path, names: Set[str]) -> list[str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise ConfigError(
            f"{index} (from model.path): weight_map is not an object from tensors to file names. Copy or download it "
            "again."
        )
    shards = sorted(set(places.values()))
    unsafe = [shard for shard in shards if leaves_folder(shard)]
    if unsafe:
        raise ConfigError(
            f"{index} (from model.path) points outside its folder, to {unsafe[0]!r}. Do not use this model."
        )
    other = [shard for shard in shards if not shard.endswith(".safetensors")]
    if other:
        raise ConfigError(
            f"{index} (from model.path) names {other[0]!r:.80}, which is not a safetensors file. qdpo reads no pickle. "
            "Save the model as safetensors."
        )
    missing = [shard for shard in shards if shard not in names]
    if missing or not shards:
        raise ConfigError(
            f"{index} (from model.path) lists {len(shards)} files, of which {len(missing)} are missing: "
            f"{', '.join(missing[:5])}. Copy or download the model again."
        )
    return shards


def leaves_folder(name: str) -> bool:
    """True if a file name from an archive or an index points outside its folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or ":" in name


def check_config(config: dict[str, Any], owner: str, name: str) -> None:
    """Raises: ConfigError for a model quantised by other tools, or of a type that transformers does not have built in.

    `owner` opens the message: "The folder …" or "The repository …"; `name` is the repository's or the folder's.
    """
    stored_form(config, owner, name)
    # Imported late: it takes three seconds, and the other checks do not need it.
    import transformers

    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError(
            f"{owner} (from model.path): model_type in config.json is {model_type!r:.60}, not a name. Copy config.json "
            "from the model's source."
        )
    if model_type in transformers.CONFIG_MAPPING:
        return
    if "auto_map" in config:
        raise ConfigError(
            f"{owner} (from model.path) needs custom Python code (auto_map in config.json; model_type "
            f"{model_type!r}), but qdpo runs no code from a checkpoint. Choose a model that transformers has built in."
        )
    raise ConfigError(
        f"{owner} (from model.path) is of model_type {model_type!r}, which transformers {transformers.__version__} "
        "does not know. Upgrade transformers, or choose another model."
    )


def license_of(folder: Path) -> str | None:
    """The licence in the front matter of the folder's README.md, or None if there is none."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub import metadata_load

    try:
        card = metadata_load(readme) or {}
    except (ValueError, yaml.YAMLError):  # a card for people; nothing else depends on it
        return None
    name = card.get("license_name") if card.get("license") == "other" else card.get("license")
    return ", ".join(name) if isinstance(name, list) else name


def read_json(path: Path) -> dict[str, Any]:
    """The object in a model's JSON file. Raises: ConfigError if the file does not hold a JSON object."""
    check_regular(path)
    size = path.stat().st_size
    if size > LONGEST_JSON:
        raise ConfigError(f"{path} (from model.path) has {size:,} bytes; {LONGEST_JSON:,} are the most. {AGAIN}")
    return json_object(path, AGAIN)
