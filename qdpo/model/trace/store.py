"""Finds the traced shape of a config: in the cache folder, among those that ship, or by a trace that is then kept."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qdpo.errors import ConfigError, DiskError
from qdpo.families import traced
from qdpo.families.shapes import FindTrace
from qdpo.families.traced import TracedShape
from qdpo.run import disk
from qdpo.run.watcher import Say

PLACE = "forecast"


def finder(cache: Path, say: Say) -> FindTrace:
    """A function that finds traced shapes, with new ones kept in the cache folder and said aloud."""

    def find(config: Mapping[str, Any], source: str) -> TracedShape:
        return _find(config, source, cache / PLACE, say)

    return find


def kept_finder(cache: Path) -> FindTrace:
    """A function that finds the traces that earlier plans and runs kept; it makes none, and raises ConfigError."""
    return lambda config, source: _kept(config, source, cache / PLACE)


def _kept(config: Mapping[str, Any], source: str, place: Path) -> TracedShape:
    found = _stored(traced.key_of(config), place)
    if found is None:
        raise ConfigError(f"No trace of {source} is kept in {place}. `qdpo plan` makes it.")
    return found


def _find(config: Mapping[str, Any], source: str, place: Path, say: Say) -> TracedShape:
    key = traced.key_of(config)
    found = _stored(key, place)
    if found is not None:
        return found
    from qdpo.model.trace.layers import read_config, trace_layers  # imports torch, for a model that nobody has traced

    built = read_config(config, source)
    full = traced.key_of(built.to_dict())
    found = traced.shipped(full) or _stored(full, place)
    if found is None:
        say(f"forecast: tracing one layer of each kind, from {source}; this takes from seconds to a minute, once")
        found = trace_layers(built, full, source)
    for name in {key, full}:
        try:
            disk.write_text(place / f"{name}.json", traced.to_text(found))
        except DiskError as error:
            say(f"forecast: the trace is not kept, and will be made again. {error}")
            break
    return found


def _stored(key: str, place: Path) -> TracedShape | None:
    """The kept trace of this name; None if there is none that can be read."""
    try:
        return traced.from_text((place / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
