"""Sends the records of metrics.jsonl to a tracker as well, through accelerate; the run does not depend on it."""

import json
import math
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from typing import Any

from qdpo.diagnose.course import Record
from qdpo.errors import ConfigError, DiskError
from qdpo.run import disk
from qdpo.run.folder import RunDir
from qdpo.settings.layered import Values

PROJECT = "qdpo"


def check_package(to: str) -> None:
    """Raises: ConfigError if the tracker's package is not installed."""
    if to == "none":
        return
    try:
        metadata.distribution(to)
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"track.to={to} needs the package {to}, which is not installed. Run `pip install 'qdpo[{to}]'`, or leave "
            "out track.to: metrics.jsonl holds the same numbers."
        ) from None


class Tracker:
    """Sends every record once, under the names of metrics.jsonl; does nothing with track.to=none.

    track.json in the run folder names the tracker's run, and the last training step and evaluation sent. It is written
    before the record is sent: a kill in between loses one record there, and no record is ever sent twice.
    """

    def __init__(self, to: str, run: RunDir, settings: Values, say: Callable[[str], None]):
        self._to, self._run, self._settings, self._say = to, run, settings, say
        self._tracker: Any = None
        self._handed: dict[str, Any] = {}

    def begin(self, kept: Sequence[Record]) -> None:
        """Opens the tracker, or its earlier run, and sends the `kept` records that it lacks."""
        if self._to == "none":
            return
        path = self._run.tracked
        known = disk.read_json(path) if path.exists() else {}
        is_new = known.get("to") != self._to
        self._handed = {"to": self._to, "id": secrets.token_hex(4), "train": -1, "eval": -1} if is_new else known
        self._guarded(lambda: self._open(is_new))
        for record in kept:
            self.record(record)

    def record(self, record: Record) -> None:
        """Sends one record, unless it was sent before the run was stopped."""
        kind = "eval" if "eval_loss" in record else "train"
        if self._tracker is None or record["step"] <= self._handed[kind]:
            return
        self._handed[kind] = record["step"]
        with suppress(DiskError):  # reported where the run's own files are written
            disk.write_json(self._run.tracked, self._handed)
        numbers = {
            name: value for name, value in record.items() if name not in ("step", "schema") and math.isfinite(value)
        }
        self._guarded(lambda: self._tracker.log(numbers, step=record["step"]))

    def close(self) -> None:
        """Sends the remaining records."""
        if self._tracker is not None:
            self._guarded(lambda: self._tracker.finish())
        self._tracker = None

    def _open(self, is_new: bool) -> None:
        from accelerate import PartialState, tracking

        PartialState()  # accelerate's trackers log through it; only the tensorboard tracker creates it itself
        name, run_id = self._run.path.name, f"{self._run.path.name}-{self._handed['id']}"
        if self._to == "tensorboard":
            self._tracker = tracking.TensorBoardTracker("tensorboard", logging_dir=self._run.path)
        elif self._to == "wandb":
            self._tracker = tracking.WandBTracker(
                PROJECT, name=name, id=run_id, resume="allow", dir=str(self._run.path)
            )
        else:
            self._tracker = tracking.TrackioTracker(PROJECT, name=run_id, resume="allow")
        self._tracker.start()
        if is_new:
            plain = (bool, int, float, str)
            self._tracker.store_init_configuration(
                {
                    key: v if isinstance(v, plain) else json.dumps(v)
                    for key, v in self._settings.items()
                    if v is not None
                }
            )

    def _guarded(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # from a foreign library and its network: training continues whatever it is
            self._tracker = None
            what = (str(error).splitlines() or [""])[0]
            self._say(
                f"warning: track.to={self._to} failed ({type(error).__name__}: {what}) and is not used from here on. "
                "Training continues; metrics.jsonl holds every number."
            )
