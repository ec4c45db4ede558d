"""run.json and config.toml: what a run was started with, and whether the same command may continue it.

Imports nothing heavy, so that a finished run, or a changed setting, is answered at once.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qdpo.errors import ConfigError
from qdpo.run import disk
from qdpo.run.folder import RunDir
from qdpo.settings import layered
from qdpo.settings.layered import Resolved
from qdpo.settings.schema import NEUTRAL, NOT_TRAJECTORY


def trajectory_settings(resolved: Resolved) -> dict[str, Any]:
    """The settings that change the numbers of a run, as given."""
    return {name: value for name, value in layered.flat(resolved.config).items() if name not in NOT_TRAJECTORY}


def run_folder(resolved: Resolved) -> RunDir:
    """The run's folder: output.name, or the preset and 6 hex digits of the settings that change the numbers."""
    output = resolved.config.output
    text = json.dumps(trajectory_settings(resolved), sort_keys=True)
    name = output.name or f"{resolved.preset or 'run'}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    return RunDir(Path(output.dir) / name)


def check_unchanged(run: RunDir, resolved: Resolved) -> None:
    """Raises: ConfigError that lists settings and files that are not as at the run's first start."""
    record = disk.read_json(run.record)
    now, then = trajectory_settings(resolved), record["settings"]
    changed = [name for name in now if now[name] != then.get(name, now[name])]
    if changed:
        lines = "\n".join(f"  {name}: was {then[name]}, now {now[name]}" for name in changed)
        raise ConfigError(
            f"The run {run.path} was started with other settings:\n{lines}\n"
            "Give the old values to continue it, another output.name, or --fresh to start anew (the old run is "
            "kept aside)."
        )
    check_files(record["files"], run)


def check_files(files: dict[str, dict[str, Any]], run: RunDir) -> None:
    """Raises: ConfigError naming a data or model file that is gone or has other contents than at the first start."""
    for name, then in files.items():
        path = Path(name)
        if not path.exists():
            problem = "is gone"
        elif path.stat().st_size != then["bytes"]:
            problem = f"has {path.stat().st_size} bytes and had {then['bytes']}"
        elif path.stat().st_mtime_ns != then["mtime_ns"] and file_record(path)["sha256"] != then["sha256"]:
            problem = "has other contents"
        else:
            continue
        raise ConfigError(
            f"{name} {problem} since the run {run.path} was started. Put the file back to continue, or start "
            "anew with --fresh."
        )


def file_record(path: Path) -> dict[str, Any]:
    """Size, time and sha256 of a file, by which a change is noticed."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    status = path.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": digest}


def model_files(folder: Path) -> list[Path]:
    """The files of a model folder that decide what is loaded."""
    wanted: Iterable[Path] = (
        path for path in folder.iterdir() if path.suffix in {".safetensors", ".json", ".model", ".jinja"}
    )
    return sorted(path for path in wanted if path.is_file())


def config_toml(resolved: Resolved, found: dict[str, Any]) -> str:
    """All settings as TOML, each with its origin as a comment; `found` holds the values that `auto` settings took."""
    lines, section = ["# Settings of this run. Each value's origin is behind it."], None
    for name, value in layered.flat(resolved.config).items():
        table, _, field = name.rpartition(".")
        if table != section:
            lines += ["", f"[{table}]"]
            section = table
        origin = resolved.origins.get(name, "default")
        if name in found:
            value, origin = found[name], f"{origin}; found at the first start"
        lines.append(f"# {field} is not set" if value is None else f"{field} = {toml_value(value)}  # {origin}")
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """A setting's value in TOML syntax (JSON's syntax for strings, numbers, booleans and lists is TOML's as well)."""
    return json.dumps(value, ensure_ascii=False)


def take_neutral(run: RunDir, now: dict[str, Any]) -> None:
    """Lets settings that change no number replace those of an earlier start, unless they are auto."""
    kept = disk.read_json(run.record)
    changed = {name: now[name] for name in NEUTRAL if now[name] not in ("auto", kept["settings"].get(name))}
    if changed:
        mark_state(run, settings={**kept["settings"], **changed}, found={**kept["found"], **changed})


def mark_state(run: RunDir, **values: Any) -> None:
    """Merges values into run.json, atomically."""
    disk.write_json(run.record, {**disk.read_json(run.record), **values})
