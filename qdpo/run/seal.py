"""The sha256 of a JSON record, kept in the record itself, so that one rename replaces content and digest together."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qdpo.errors import DiskError

KEY = "sha256"


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with its digest."""
    return {**content, KEY: digest(content)}


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the content in canonical JSON, without the digest itself."""
    bare = {name: value for name, value in content.items() if name != KEY}
    return hashlib.sha256(json.dumps(bare, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def opened(content: Mapping[str, Any], *, due: bool) -> dict[str, Any]:
    """The content without its digest. Raises: ValueError if the digest differs, or is missing although it is due."""
    if KEY not in content and due:
        raise ValueError("its sha256 is missing")
    if KEY in content and content[KEY] != digest(content):
        raise ValueError("its contents do not match its sha256, so it was changed after qdpo wrote it")
    return {name: value for name, value in content.items() if name != KEY}


def damaged(path: Path, problem: str) -> DiskError:
    """The error for a file of a run that is not as qdpo wrote it."""
    return DiskError(
        f"{path} cannot be read: {problem}. Put the file back from a copy, or start the run again with `--fresh` (the "
        "old run is kept aside)."
    )
