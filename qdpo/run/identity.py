"""The identity of a run, by which a command continues it: its folder, the settings that change its numbers, its files.

Imports nothing heavy, so that a finished run or a changed setting is reported at once.
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from qdpo.errors import ConfigError
from qdpo.run import disk
from qdpo.run.folder import RunDir
from qdpo.run.record import FileRecord, FoundValues, file_record, read_record, write_record
from qdpo.settings import layered
from qdpo.settings.layered import Resolved, Value, Values, in_open_table
from qdpo.settings.schema import NEUTRAL, NOT_TRAJECTORY, RunConfig

# Bytes of a file that is read although its time is the same: archives, images and mounts may give all files one time.
READ_ANYWAY = 64 * 2**20


def trajectory_settings(resolved: Resolved) -> Values:
    """The settings that change the numbers of a run, as given."""
    return {name: value for name, value in layered.flat(resolved.config).items() if name not in NOT_TRAJECTORY}


def run_folder(resolved: Resolved) -> RunDir:
    """The run's folder: output.name, or the preset and 6 hex digits of the settings that change the numbers."""
    output = resolved.config.output
    text = json.dumps(trajectory_settings(resolved), sort_keys=True)
    name = output.name or f"{resolved.preset or 'run'}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    return RunDir(Path(output.dir) / name)


def check_unchanged(run: RunDir, resolved: Resolved) -> None:
    """Raises: ConfigError that lists the settings and files that have changed since the run's first start."""
    record = read_record(run)
    now, then = trajectory_settings(resolved), record.settings
    changed = [name for name in now if now[name] != then.get(name, None if in_open_table(name) else now[name])]
    changed += [name for name in then if in_open_table(name) and name not in now]
    if changed:
        lines = "\n".join(f"  {name}: was {then.get(name)}, now {now.get(name)}" for name in changed)
        raise ConfigError(
            f"The run {run.path} was started with other settings:\n{lines}\n"
            "Give the old values to continue it, choose another `output.name`, or start again with `--fresh` (the old "
            "run is kept aside)."
        )
    check_files(record.files, run)


def check_files(files: Mapping[str, FileRecord], run: RunDir) -> None:
    """Raises: ConfigError naming a data or model file that is missing or has changed since the first start."""
    for name, then in files.items():
        path = Path(name)
        if not path.exists():
            problem = "it is missing"
        elif not path.is_file():
            problem = "it is not a file"
        elif path.stat().st_size != then.bytes:
            problem = f"it has {path.stat().st_size} bytes instead of {then.bytes}"
        elif _may_differ(path, then) and file_record(path).sha256 != then.sha256:
            problem = "its contents differ"
        else:
            continue
        raise ConfigError(
            f"{name} has changed since the run {run.path} was started: {problem}. Put the file back to go on, or "
            "train again with `--fresh`."
        )


def _may_differ(path: Path, then: FileRecord) -> bool:
    """A large file of the same time is not read; weights have a checksum of their own, as loaded."""
    return then.bytes <= READ_ANYWAY or path.stat().st_mtime_ns != then.mtime_ns


def config_toml(resolved: Resolved, found: FoundValues | None = None) -> str:
    """All settings as TOML, each with its origin as a comment; `found` holds the values chosen for `auto` settings."""
    lines, section = ["# Settings of this run. Each value is followed by its origin."], None
    settled = found.settings() if found else {}
    for name, value in layered.flat(resolved.config).items():
        table, _, field = name.rpartition(".")
        if table != section:
            lines += ["", f"[{table}]"]
            section = table
        origin = resolved.origins.get(name, "default")
        if name in settled:
            value, origin = settled[name], f"{origin}; found at the first start"
        lines.append(f"# {field} is not set" if value is None else f"{field} = {toml_value(value)}  # {origin}")
    return "\n".join(lines) + "\n"


def is_config(path: Path) -> bool:
    """True if the file is there and is TOML. Raises: DiskError if it is not a file."""
    try:
        tomllib.loads(disk.read_bytes(path).decode())
    except (OSError, ValueError):
        return False
    return True


def toml_value(value: Value) -> str:
    """A setting's value in TOML syntax (JSON's syntax for strings, numbers, booleans and lists is TOML's as well)."""
    return json.dumps(value, ensure_ascii=False)


def take_neutral(run: RunDir, config: RunConfig) -> None:
    """Replaces the settings of an earlier start that change no number by the current ones, unless they are auto."""
    now, kept = layered.flat(config), read_record(run)
    changed = {name: now[name] for name in NEUTRAL if now[name] not in ("auto", kept.settings.get(name))}
    if changed:
        found = FoundValues.of_json({**kept.found.to_json(), **changed})
        write_record(run, replace(kept, settings={**kept.settings, **changed}, found=found))
