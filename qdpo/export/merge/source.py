"""The input of a merge: the run's adapter, the base it was trained on, and the tensor of each module."""

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qdpo.errors import ConfigError
from qdpo.export.merge.lora import LoraLayer, read_lora
from qdpo.export.merge.shards import Stored, stored_tensors
from qdpo.families.config_fields import family_of, names_experts
from qdpo.model.base import fetch, quant, text_model
from qdpo.model.base.load import model_config
from qdpo.model.base.quant import FourBit
from qdpo.model.device import DTYPES
from qdpo.run import identity
from qdpo.run.finished import FinishedRun
from qdpo.run.folder import RunDir
from qdpo.run.record import FourBitMark, RunRecord
from qdpo.settings.schema import RunConfig


@dataclass(frozen=True, kw_only=True)
class MergeSource:
    """A finished run's adapter and base, checked."""

    run: RunDir
    folder: Path
    config: dict[str, Any]
    """The base's config.json."""
    compute: torch.dtype
    tensors: dict[str, Stored]
    deltas: dict[str, LoraLayer]
    """By the weight's name in the base's files, like the fields below."""
    marks: dict[str, FourBitMark | None]
    """Every weight that was 4-bit in the run; None if the run recorded no mark."""
    form: FourBit | None
    """The run's quantisation; None without quantisation, or if the base is stored in 4 bits."""
    trained_on: str
    """The device of the run, as recorded."""
    device: torch.device
    """The device that made the run's 4-bit weights, or the CPU."""

    @property
    def is_stored_four_bit(self) -> bool:
        return "quantization_config" in self.config

    @property
    def transposed(self) -> bool:
        family = family_of(self.config)
        return family is not None and family.transposed

    def shape(self, key: str) -> tuple[int, ...]:
        """The weight's shape, which a 4-bit tensor itself does not record."""
        for name, stored in self.companions(key).items():
            if name.startswith(quant.STATE):
                return tuple(json.loads(bytes(stored.whole().tolist()))["shape"])
        return self.tensors[key].shape

    def companions(self, key: str) -> dict[str, Stored]:
        """The tensors stored with a 4-bit weight, by the ends of their names."""
        start = f"{key}."
        return {name.removeprefix(start): one for name, one in self.tensors.items() if name.startswith(start)}


def open_source(finished: FinishedRun, say: Callable[[str], None]) -> MergeSource:
    """Reads the headers and the adapter, but no weight of the base.

    Raises: ConfigError if the base is not the one that the run was trained on, or the adapter does not fit it.
    """
    run, record, settings = finished.run, finished.record, finished.config()
    place = _locate(finished, settings, say)
    deltas = read_lora(run.adapter).layers
    tensors = stored_tensors(place)
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    compute = DTYPES[record.found.dtype]
    if names_experts(tensors):
        raise ConfigError(
            f"The base in {place} is a mixture of experts, whose weights are not stored in the shapes in which they "
            "are used. Only dense models can be merged; serve the adapter with the base instead."
        )
    form = None
    if settings.model.quantization != "none" and "quantization_config" not in config:
        form = FourBit(settings.model.quantization, settings.model.double_quant, compute)
    marks = _marks(record, config, tensors, form, place, say)
    keys = weight_keys({*marks, *deltas}, tensors, place)
    by_key = {keys[name]: delta for name, delta in deltas.items()}
    source = MergeSource(
        run=run, folder=place, config=config, compute=compute, tensors=tensors, deltas=by_key,
        marks={keys[name]: one for name, one in marks.items()}, form=form, trained_on=finished.environment.device,
        device=_device(finished.environment.device, say) if form else torch.device("cpu"),
    )  # fmt: skip
    _check_shapes(source)
    return source


def _locate(finished: FinishedRun, settings: RunConfig, say: Callable[[str], None]) -> Path:
    place = fetch.locate_base(
        str(settings.model.path),
        revision=finished.record.base.commit or settings.model.revision,
        cache_dir=finished.cache,
        announce=say,
    )
    own = {name: file for name, file in finished.record.files.items() if Path(name).parent == place.folder}
    identity.check_files(own, finished.run)
    return place.folder


def _marks(
    record: RunRecord,
    config: dict[str, Any],
    tensors: Collection[str],
    form: FourBit | None,
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, FourBitMark | None]:
    """The run's 4-bit layers by module name, each with its mark."""
    if record.four_bit is not None:
        return dict(record.four_bit)
    if "quantization_config" in config:
        ends = f".{quant.STATE}"
        return {name.partition(".weight" + ends)[0]: None for name in tensors if ends in name}
    if form is None:
        return {}
    say("note: only the comparison can prove the 4-bit weights equal (this run recorded no checksums of them)")
    return dict.fromkeys(
        quant.four_bit_names(text_model.skeleton(text_model.text_model_of(model_config(folder))), form)
    )


def _device(trained_on: str, say: Callable[[str], None]) -> torch.device:
    if not trained_on.startswith("cuda"):
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    say("note: the CPU reproduces the 4-bit weights (the run was trained on a CUDA device, and there is none here)")
    return torch.device("cpu")


def weight_keys(modules: Iterable[str], keys: Collection[str], folder: Path) -> dict[str, str]:
    """Each module's weight name in the base's files.

    Usually that is the module's name and ".weight". If transformers renames on loading, one prefix is replaced by
    another, the same for all modules: gpt2's files lack "transformer.", others have "language_model.".
    Raises: ConfigError if no replacement, or more than one, finds a name for every module.
    """
    found = {module: f"{module}.weight" for module in modules if f"{module}.weight" in keys}
    left = sorted(set(modules) - set(found))
    if not left:
        return found
    ways: dict[tuple[str, ...], None] = {}
    parts = left[0].split(".")
    for cut in range(len(parts)):
        tail = ".".join(parts[cut:]) + ".weight"
        old = left[0].removesuffix(tail.removesuffix(".weight"))
        for new in (key.removesuffix(tail) for key in keys if key == tail or key.endswith("." + tail)):
            way = tuple(new + module.removeprefix(old) + ".weight" for module in left)
            if all(module.startswith(old) for module in left) and all(key in keys for key in way):
                ways[way] = None
    if len(ways) != 1:
        problem = "have several candidates for" if ways else "do not hold"
        raise ConfigError(
            f"The files of the base in {folder} {problem} weights that the adapter or the run names: {left[0]}.weight"
            + (f" and {len(left) - 1} more" if len(left) > 1 else "")
            + ". The adapter belongs to another base, or this architecture stores its weights in another form."
        )
    return found | dict(zip(left, next(iter(ways)), strict=True))


def _check_shapes(source: MergeSource) -> None:
    for key, delta in source.deltas.items():
        shape = source.shape(key)
        expected = shape[::-1] if source.transposed else shape
        if expected != delta.shape:
            raise ConfigError(
                f"The adapter in {source.run.adapter} belongs to another base: for {key} it has "
                f"{delta.shape[0]}x{delta.shape[1]}, but {source.folder} has {'x'.join(map(str, shape))}."
            )
