"""Layers defaults ← preset ← file ← key=value, records the origin of each value, and refuses unknown names.

Imports only the standard library and pydantic, so that a wrong setting is reported in a fraction of a second.
"""

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from qdpo.errors import ConfigError
from qdpo.settings import unknown_name
from qdpo.settings.bad_value import explain
from qdpo.settings.loss_rules import RENAMED
from qdpo.settings.schema import RunConfig, Section, problems_across
from qdpo.settings.toml_file import read_toml

# The types of a setting's value, and settings by full name.
Value = str | int | float | bool | None | list[str] | list[float]
Values = dict[str, Value]

# Settings that are dropped when a later layer sets the key: those that describe one source or one loss, the size of a
# new adapter, and the other way to give the length of the run.
BELONG_TO = {
    "data.path": (
        "data.revision",
        "data.split",
        "data.limit",
        "data.eval_path",
        "data.eval_split",
        "data.columns.",
        "data.weights",
        "data.format",
    ),  # fmt: skip
    "model.path": ("model.revision",),
    "adapter.start": ("adapter.rank", "adapter.alpha", "adapter.targets", "adapter.rslora"),
    "loss.name": ("loss.",),
    "train.steps": ("train.hours",),
    "train.hours": ("train.steps",),
}
# Settings whose text may contain literal commas.
FREE_TEXT = ("data.system", "data.columns.", "output.", "cache.dir", "samples.prompts", "adapter.start")
# Settings that are tables of the user's own names.
OPEN_TABLES = ("data.template_options",)
# Entries of a preset file that describe it and are not settings.
DESCRIPTIVE = {"about", "card", "measured"}


@dataclass(frozen=True)
class Resolved:
    """A complete configuration, with the origin of each value."""

    config: RunConfig
    origins: dict[str, str]
    """Setting name → origin, for settings that some layer gives."""
    preset: str | None
    notes: list[str]
    """Lines for the user about values that were read as something else, such as an old name of a loss."""


def shipped_folder() -> Path:
    """Folder of the presets and bundled pairs: inside the installed package, or next to it in a clone."""
    package = Path(__file__).parents[1]
    packaged = package / "_shipped"
    return packaged if packaged.is_dir() else package.parent / "presets"


def preset_names() -> list[str]:
    """Names of the shipped presets: demo first, then by model size and memory."""

    def size(name: str) -> tuple[float, ...]:
        numbers = [float("".join(c for c in part if c.isdigit()) or 0) for part in name.split("-")]
        return tuple(numbers)

    return sorted((path.stem for path in shipped_folder().glob("*.toml")), key=size)


def preset_text(name: str) -> str:
    """The text of the preset's file, comments included. Raises: ConfigError with the nearest name."""
    if name not in preset_names():
        raise ConfigError(f"Unknown preset {name!r}. {nearest(name, preset_names())} `qdpo presets` describes them.")
    return (shipped_folder() / f"{name}.toml").read_text(encoding="utf-8")


def card_gib(name: str | None) -> float | None:
    """Memory of the card that a preset is made for; None for presets that need no card."""
    if name is None:
        return None
    number = re.match(r"(\d+) GB", tomllib.loads(preset_text(name))["card"])
    return float(number[1]) if number else None


def setting_names() -> dict[str, type[Section]]:
    """Every setting's full name, with the section class that owns it."""
    return {name: section for name, section, _field in _fields(RunConfig, "")}


def resolve(arguments: list[str]) -> Resolved:
    """Configuration from `preset=NAME`, `FILE.toml` and `key=value` arguments, in any order.

    Raises: ConfigError that lists all problems together.
    """
    problems: list[str] = []
    preset, files, overrides = _sort_arguments(arguments, problems)
    layers: list[tuple[str, dict[str, Any]]] = []
    if preset is not None:
        try:
            layers.append((f"preset {preset}", _flatten(_without_descriptions(tomllib.loads(preset_text(preset))))))
        except ConfigError as error:
            problems += error.problems
    for file in files:
        try:
            layers.append((str(file), _flatten(read_toml(Path(file)))))
        except ConfigError as error:
            problems += error.problems
    layers.append(("the command line", overrides))
    return _resolved(layers, preset, problems)


def resolve_over(settings: Values, origin: str, arguments: list[str]) -> Resolved:
    """Configuration from a finished run's settings (by full name), overridden by `key=value` arguments."""
    problems: list[str] = []
    preset, files, overrides = _sort_arguments(arguments, problems)
    problems += [f"{name} cannot be given here; only key=value settings can." for name in (preset, *files) if name]
    defaults = flat(RunConfig())
    settings = {name: value for name, value in settings.items() if name not in defaults or value != defaults[name]}
    return _resolved([(origin, settings), ("the command line", overrides)], None, problems)


def _resolved(layers: list[tuple[str, dict[str, Any]]], preset: str | None, problems: list[str]) -> Resolved:
    values, origins = _merge(layers, problems)
    notes = _rename(values)
    config = _validate(values, origins, problems)
    if config is not None and not any("Unknown preset" in problem for problem in problems):
        problems += problems_across(config, {name for name, origin in origins.items() if values[name] is not None})
    if problems or config is None:
        raise ConfigError(problems)
    return Resolved(config, origins, preset, notes)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"train.seed": 1} → {"train": {"seed": 1}}."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *sections, field = name.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[field] = value
    return tree


def flat(config: RunConfig) -> Values:
    """Every setting's value by full name, in the order of declaration."""
    return _flatten(config.model_dump())


def nearest(name: str, known: list[str]) -> str:
    """A sentence with the closest known name, or with all known names when none is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.55)
    if close:
        return f"Did you mean {close[0]!r}?"
    return (
        f"Known: {', '.join(known)}." if len(known) <= 16 else "`qdpo run preset=demo --dry-run` lists every setting."
    )


def comma_values(argument: str) -> list[str]:
    """One argument for each comma-separated value; the argument unchanged where a comma is part of the value."""
    name, equals, value = argument.partition("=")
    plain = name.removeprefix("--").startswith(FREE_TEXT) or "," not in value or Path(value).expanduser().exists()
    return [argument] if plain or not equals else [f"{name}={part.strip()}" for part in value.split(",")]


def _sort_arguments(arguments: list[str], problems: list[str]) -> tuple[str | None, list[str], dict[str, Any]]:
    presets: list[str] = []
    files: list[str] = []
    overrides: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not equals:
            if argument.endswith(".toml"):
                files.append(argument)
            else:
                problems.append(
                    f"Cannot read {argument!r}. Settings are written key=value; a settings file ends in .toml."
                )
        elif len(comma_values(argument)) > 1:
            problems.append(
                f"{argument} has a comma. `qdpo sweep` trains once for each value; a list is joined with +."
            )
        elif key == "preset":
            presets.append(value)
        elif key in overrides:
            problems.append(f"{key} is given twice on the command line. Keep one.")
        else:
            overrides[key] = value
    if len(presets) > 1:
        problems.append(f"Two presets, {presets[0]!r} and {presets[1]!r}. Keep one.")
    return (presets[0] if presets else None), files, overrides


def _merge(layers: list[tuple[str, dict[str, Any]]], problems: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    known = setting_names()
    sections = {name.rpartition(".")[0] for name in known}
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        for source in BELONG_TO.keys() & {name for name, value in layer.items() if str(value).lower() != "none"}:
            for name in [name for name in values if name.startswith(BELONG_TO[source])]:
                del values[name], origins[name]
        for name, value in layer.items():
            if fault := no_text(name) or no_text(value):
                problems.append(f"{name} (from {origin}) {fault}, which no setting takes. Write it without.")
            elif name in known and name not in OPEN_TABLES:
                values[name] = _from_text(name, value, known[name]) if isinstance(value, str) else value
                origins[name] = origin
            elif name.startswith(tuple(f"{table}." for table in OPEN_TABLES)) and name.count(".") == 2:
                if value == "":  # "none" may be a value of the user's own name
                    values.pop(name, None)
                    origins.pop(name, None)
                elif isinstance(value, bool | int | float | str):
                    values[name] = _plain_value(value)
                    origins[name] = origin
                else:
                    problems.append(f"{name}={value} (from {origin}) is not a word, a number, true or false.")
            elif name in sections or name in OPEN_TABLES:
                unset = f", or {name}.NAME= to unset one" if name in OPEN_TABLES else ""
                problems.append(f"{name} is a group of settings (from {origin}). Write {name}.NAME=value{unset}.")
            else:
                problems.append(f"Unknown setting {name!r} (from {origin}). {unknown_name.hint(name, list(known))}")
    return values, origins


def _plain_value(value: bool | int | float | str) -> bool | int | float | str:
    """A value of an open table: true, false or a number if the text says so."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    return int(value) if re.fullmatch(r"[+-]?\d{1,15}", value) else value


def in_open_table(name: str) -> bool:
    """True if the setting's name was given by the user."""
    return name.rpartition(".")[0] in OPEN_TABLES


def no_text(value: Any) -> str | None:
    """The fault of a value that is not a text which can be stored and name a file, as a clause; None if it has none."""
    if isinstance(value, list):
        return next((fault for part in value if (fault := no_text(part))), None)
    if isinstance(value, str) and "\0" in value:
        return "has a NUL character"
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        return "has bytes that are not UTF-8"
    return None


def _rename(values: dict[str, Any]) -> list[str]:
    """Replace old names in loss.name by the current ones; return a note for each."""
    names = values.get("loss.name")
    if names is None:
        return []
    names = [names] if isinstance(names, str) else list(names)
    values["loss.name"] = [RENAMED.get(name, name) for name in names]
    return [f"loss {name} is called {RENAMED[name]} here" for name in names if name in RENAMED]


def _from_text(name: str, text: str, section: type[Section]) -> Any:
    annotation = section.model_fields[name.rpartition(".")[2]].annotation
    options = get_args(annotation)
    if NoneType in options and text.lower() == "none":
        return None
    if any(getattr(option, "__origin__", None) is list for option in (annotation, *options)):
        return [part for part in text.split("+") if part]
    return text


def _validate(values: dict[str, Any], origins: dict[str, str], problems: list[str]) -> RunConfig | None:
    try:
        return RunConfig.model_validate(nested(values))
    except ValidationError as error:
        reported = set()
        for detail in error.errors():
            name = ".".join(str(part) for part in detail["loc"])
            name = next(known for known in setting_names() if name == known or name.startswith(known + "."))
            if name not in reported:
                reported.add(name)
                field = setting_names()[name].model_fields[name.rpartition(".")[2]]
                problems.append(explain(name, values[name], origins[name], field))
        return None


def _without_descriptions(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key not in DESCRIPTIVE}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            values |= _flatten(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values


def _fields(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[Section], Any]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", section, field  # type: ignore[misc]
