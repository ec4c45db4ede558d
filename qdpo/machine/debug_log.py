"""Writes debug.log: tracebacks of errors that ended a command, without access tokens or the home folder's name."""

import datetime
import re
import traceback
from pathlib import Path

from qdpo.errors import DiskError
from qdpo.run import disk

# Access tokens of the Hub, of GitHub, and in an Authorization header.
SECRETS = re.compile(r"\b(hf_|ghp_|gho_|github_pat_)\w{8,}|(?<=Bearer )\S+")


def note(folder: Path, error: BaseException, words: list[str]) -> Path | None:
    """Append the error's traceback and the command to `folder`/debug.log; None if it cannot be written."""
    path = folder / "debug.log"
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    text = "".join(traceback.format_exception(error))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        disk.append_text(path, redact(f"--- {now} qdpo {' '.join(words)}\n{text}\n"))
    except (OSError, DiskError):
        return None
    return path


def redact(text: str) -> str:
    """The text without access tokens, and with ~ for the user's home folder."""
    return SECRETS.sub("[token]", text).replace(str(Path.home()), "~")
