"""Reads a TOML file that a user names: only a regular file of a sensible size."""

import stat
import tomllib
from pathlib import Path
from typing import Any

from qdpo.errors import ConfigError

MOST_BYTES = 2**20
# Of a nested name: Python's own limit is about 300 tables in tables.
DEEPEST = 20


def read_toml(path: Path) -> dict[str, Any]:
    """The file's table. Raises: ConfigError, naming the file."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{path} is not a regular file. Give a .toml file, or settings as key=value.")
        if found.st_size > MOST_BYTES:
            raise ConfigError(
                f"{path} has {found.st_size:,} bytes; a file of settings has at most {MOST_BYTES:,}. Is it another file?"
            )
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(
            f"No settings file {str(path)!r}. Give an existing .toml file, or settings as key=value."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}. Give another file, or settings as key=value."
        ) from error
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply to be settings, which have two levels.") from None
    except ValueError as error:  # of TOML, of UTF-8, or a number with too many digits
        raise ConfigError(f"{path} is not valid TOML: {error}.") from None
    if _depth(table) > DEEPEST:
        raise ConfigError(f"{path} is nested too deeply to be settings, which have two levels.")
    return table


def _depth(table: dict[str, Any]) -> int:
    """Levels of tables in tables, counted up to one above DEEPEST."""
    level, depth = [table], 0
    while level and depth <= DEEPEST:
        level = [value for inner in level for value in inner.values() if isinstance(value, dict)]
        depth += 1
    return depth
