"""Decides before a base is loaded whether the adapter that the settings name can be trained over it."""

import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from qdpo.errors import ConfigError
from qdpo.model.base.fetch import BaseFolder
from qdpo.model.base.folder import read_json
from qdpo.model.base.load import model_config
from qdpo.model.policy import lora_fit
from qdpo.model.policy.adapter import CONFIG, check_adapter_folder, choose_targets
from qdpo.model.policy.lora_file import idle_layers, module_of, tensor_forms
from qdpo.model.policy.peft_names import peft_names
from qdpo.model.policy.targets import ALL_LINEAR, LoraTargets, sentence, unusual
from qdpo.run.watcher import Say

# Endings of the same model's name in other forms, as of Unsloth's and others' copies.
COPIES = re.compile(
    r"([-_.](unsloth|bnb|4bit|8bit|int4|int8|nf4|fp4|fp8|fp16|bf16|fp32|awq|gptq|gguf|hf|mlx|dynamic))+$"
)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def check_adapter(
    start: str | None, targets: list[str], base: BaseFolder, say: Say, *, rank: int | None = None, first: bool = True
) -> list[str] | None:
    """Checks adapter.start, or adapter.targets, against the base's config; loads no weights.

    Returns the layers of a new adapter of `rank` and says which they are; None without a rank, with adapter.start, or
    where `first` is False: the run goes on with the base and the layers that it began with.
    Raises: ConfigError for an adapter that cannot be trained, or of another base.
    """
    if start is not None:
        folder = Path(start)
        fields = check_adapter_folder(folder)
        if first and (note := _compare(fields.get("base_model_name_or_path"), base, folder)):
            say(note)
        lora_fit.check_fit(model_config(base.folder), folder)
        if first and rank is not None:
            _say_start(folder, base, say)
        return None
    if not first or (rank is None and targets == [ALL_LINEAR]):
        return None
    bare = lora_fit.skeleton(model_config(base.folder))
    chosen = choose_targets(bare, targets)
    if rank is None:
        return None
    peft_names(bare, chosen.adapted)  # the saved adapter must be readable by plain PEFT
    say(chosen.sentence(rank))
    for label, why in unusual(bare, chosen).items():
        say(f"warning: adapter.targets={'+'.join(targets)} adapts what is left alone by default ({label}): {why}")
    return list(chosen.adapted)


def _say_start(folder: Path, base: BaseFolder, say: Say) -> None:
    """Says which layers adapter.start adapts, and what follows. Raises: ConfigError if some cannot learn."""
    forms = tensor_forms(folder)
    layers = list(dict.fromkeys(module_of(name) for name in forms))
    say(sentence(layers, sum(math.prod(form.shape) for form in forms.values())) + ", as in adapter.start")
    if idle := idle_layers(folder):
        raise ConfigError(
            f"adapter.start={folder}: A and B of {len(idle)} of its {len(layers)} layers are 0, such as {idle[0]}. No "
            "gradient reaches such a layer, so it would learn nothing. Leave adapter.start out to begin with a new "
            "adapter, or give an adapter of which B alone is 0."
        )
    bare = lora_fit.skeleton(model_config(base.folder))
    for label, why in unusual(bare, LoraTargets(dict.fromkeys(layers, (0, 0)))).items():
        say(f"warning: adapter.start adapts what is left alone by default ({label}): {why}")
    try:
        peft_names(bare, layers)
    except ConfigError:
        say(
            "warning: this run's adapter cannot be exported for other programs (`--to peft`): the installed PEFT takes "
            "the names of these layers for others. It can be merged, or train a new adapter, without adapter.start"
        )


def _compare(named: str | None, base: BaseFolder, folder: Path) -> str | None:
    """A note where the adapter's base cannot be told from this one. Raises: ConfigError where it is another model."""
    if not named:
        return (
            f"adapter.start: {folder / CONFIG} does not name the base that it was trained over; only names and shapes "
            f"of its layers were compared with {base.name}"
        )
    place = Path(named).expanduser()
    if place.is_dir():
        return _compare_folders(place, base, folder)
    given = _hub_id(named)
    ours = {_hub_id(base.name) or base.name, *_other_names(base)}
    if given is None:
        if model_name(named) in {model_name(one) for one in ours}:
            return None
        return (
            f"warning: adapter.start was trained over {named}, which is not on this machine (base_model_name_or_path); "
            f"only names and shapes of its layers were compared with {base.name}. Be sure that it is the same model"
        )
    if given.casefold() in {one.casefold() for one in ours}:
        return None
    if model_name(given) in {model_name(one) for one in ours}:
        return (
            f"warning: adapter.start was trained over {given}, and this run's base is {base.name}: taken as the same "
            "model in another form, since the names differ in owner and form alone"
        )
    if _hub_id(base.name) is None:
        return (
            f"warning: adapter.start was trained over {given}, which cannot be compared with the folder {base.name}; "
            "only names and shapes of its layers were. Be sure that it is the same model"
        )
    raise _other(given, base, folder)


def _compare_folders(place: Path, base: BaseFolder, folder: Path) -> str | None:
    if place.resolve() == base.folder.resolve():
        return None
    same = _same_weights(place, base.folder)
    if same is False:
        raise _other(str(place), base, folder)
    if same:
        return None
    return (
        f"warning: adapter.start was trained over {place}, whose weights cannot be compared with those of {base.name}; "
        "only names and shapes of its layers were. Be sure that it is the same model"
    )


def _other(named: str, base: BaseFolder, folder: Path) -> ConfigError:
    return ConfigError(
        f"The adapter in {folder} (adapter.start) was trained over {named}, and model.path is another model, "
        f"{base.name}: over it, the adapter means something else. Give model.path={named}. If you know that it is the "
        f"same model, correct base_model_name_or_path in {folder / CONFIG}."
    )


def _hub_id(name: str) -> str | None:
    """The repository that a name or a folder of the hub's cache refers to; None for any other path."""
    if cached := CACHED.search(name):
        return f"{cached[1]}/{cached[2]}"
    return name if HUB_ID.fullmatch(name) and not name.startswith(".") else None


def _other_names(base: BaseFolder) -> list[str]:
    stated = read_json(base.folder / "config.json").get("_name_or_path")
    return [stated] if isinstance(stated, str) and stated else []


def model_name(name: str) -> str:
    """A model's own name, without its owner and the words for its form, for comparison."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].casefold().removeprefix("meta-")
    return COPIES.sub("", last)


def _same_weights(one: Path, two: Path) -> bool | None:
    """True if the first rows of all tensors that both folders hold in one form are equal; None if there are none."""
    try:
        first, second = _stored(one), _stored(two)
        names = [name for name in first.keys() & second.keys() if first[name][1:] == second[name][1:]]
        same = all(torch.equal(_rows(first[name][0], name), _rows(second[name][0], name)) for name in names)
        matrices = [name for name in names if len(first[name][2]) > 1]
    except (SafetensorError, OSError, RuntimeError):
        return None
    return same if matrices else None


def _stored(folder: Path) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name.startswith(("adapter_", "consolidated")):
            continue
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                found[name] = (path, part.get_dtype(), tuple(part.get_shape()))
    return found


def _rows(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as opened:
        part = opened.get_slice(name)
        rows = part[:2] if part.get_shape() else opened.get_tensor(name)
        found: torch.Tensor = rows.contiguous().reshape(-1).view(torch.uint8)
    return found
