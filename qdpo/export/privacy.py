"""Keeps traces of this machine out of uploaded files: paths, the home folder, access tokens."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdpo.errors import VerificationError
from qdpo.export.trained import TrainedRun
from qdpo.machine.debug_log import SECRETS

NEUTRAL = "a local file"
# Keys under which libraries record a model's origin; the hub needs none of them.
ORIGINS = ("_name_or_path", "name_or_path", "_model_name_or_path")
CHUNK = 2**22


@dataclass(frozen=True)
class Privacy:
    """Texts that must not appear in any file; each is a path of this machine."""

    places: tuple[str, ...]

    @classmethod
    def of(cls, trained: TrainedRun) -> "Privacy":
        """The home folder, and every folder and file that the run used."""
        record = trained.record
        paths = [Path(record.base.folder), trained.run.path.resolve(), Path.cwd(), trained.finished.cache]
        paths += [Path(name) for name in record.files]
        for value in (record.base.source, record.data.source, record.settings.get("adapter.start")):
            if value and Path(str(value)).is_absolute():
                paths.append(Path(str(value)))
        folders = [path if path.suffix == "" else path.parent for path in paths]
        texts = {str(path) for path in [*paths, *folders] if len(path.parts) > 2}
        # A home such as /root may be a word in a vocabulary; with the separator it is a path.
        return cls(tuple(sorted({*texts, f"{Path.home()}/", f"{Path.home()}\\"})))

    def cleaned(self, content: Any) -> Any:
        """JSON content with every text that holds a local path replaced, and without records of a model's origin."""
        if isinstance(content, dict):
            return {key: self.cleaned(value) for key, value in content.items() if key not in ORIGINS}
        if isinstance(content, list):
            return [self.cleaned(value) for value in content]
        if isinstance(content, str) and any(place in f"{content}/" for place in self.places):
            return NEUTRAL
        return content

    def require_none(self, name: str, file: Path | bytes) -> None:
        """Raises: VerificationError if a file holds a path of this machine, or a text file holds an access token."""
        pattern = re.compile(b"|".join(re.escape(place.encode()) for place in self.places))
        longest = max(len(place.encode()) for place in self.places)
        for piece in _pieces(file, longest):
            found = pattern.search(piece)
            if found:
                raise VerificationError(
                    f"{name} holds {found[0].decode()!r}, a path of this machine. Nothing was uploaded. Remove it from "
                    "the file, and push again."
                )
        if isinstance(file, bytes) and SECRETS.search(file.decode()):
            raise VerificationError(f"{name} appears to hold an access token. Nothing was uploaded.")


def _pieces(file: Path | bytes, overlap: int) -> Iterator[bytes]:
    """A file's content in overlapping pieces, so that a text across a boundary is found."""
    if isinstance(file, bytes):
        yield file
        return
    with file.open("rb") as opened:
        kept = b""
        while piece := opened.read(CHUNK):
            yield kept + piece
            kept = (kept + piece)[-overlap:]
