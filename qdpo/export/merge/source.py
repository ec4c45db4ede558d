"""The input of a merge: the run's adapter, the base it was trained on, and the tensor of each module."""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from qdpo.errors import ConfigError, VerificationError
from qdpo.export.merge.lora import LoraLayer, read_lora
from qdpo.families.config_fields import family_of
from qdpo.families.stored_form import StoredForm, stored_form
from qdpo.model.base import fetch, quant
from qdpo.model.base.dequantise import Dequantised, plain_tensors
from qdpo.model.base.expert_files import ExpertSource, expert_sources
from qdpo.model.base.quant import FourBit
from qdpo.model.base.tensor_files import Stored
from qdpo.model.base.text_model import model_config, skeleton
from qdpo.model.base.weight_names import FolderNames, float32_parameters, folder_names
from qdpo.model.device import DTYPES
from qdpo.model.policy.lora_fit import check_part
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
    tensors: dict[str, Stored | Dequantised]
    """Of a base in FP8 or MXFP4, those of the same model with plain weights."""
    deltas: dict[str, LoraLayer]
    """By the weight's name in the base's files, like the fields below."""
    marks: dict[str, FourBitMark | None]
    """Every weight that was 4-bit in the run; None if the run recorded no mark."""
    experts: dict[str, tuple[ExpertSource, FourBitMark]]
    """The stack of experts that each tensor belongs to, where the run had it in 4 bits, and its mark."""
    untouched: frozenset[str]
    """Tensors that are copied byte for byte: of other parts of the checkpoint, or kept in float32 by the model."""
    others: tuple[str, ...]
    """Tensors of the files that the trained model does not have."""
    packed: frozenset[str]
    """Weights that the files hold in 4 bits, with their scales next to them."""
    form: FourBit | None
    """The run's quantisation; None without quantisation, or if the base is stored in 4 bits."""
    trained_on: str
    """The device of the run, as recorded."""
    device: torch.device
    """The device that made the run's 4-bit weights, or the CPU."""

    @property
    def stored_as(self) -> StoredForm | None:
        """The form of the base's files; None if they are plain."""
        return stored_form(self.config, f"The folder {str(self.folder)!r}")

    @property
    def is_stored_four_bit(self) -> bool:
        return self.stored_as is not None and not self.stored_as.is_dequantised

    @property
    def transposed(self) -> bool:
        family = family_of(self.config)
        return family is not None and family.transposed

    def shape(self, key: str) -> tuple[int, ...]:
        """The weight's shape, which a 4-bit tensor itself does not record."""
        if key in self.packed:
            for name, stored in self.companions(key).items():
                if name.startswith(quant.STATE):
                    return tuple(json.loads(bytes(stored.whole().tolist()))["shape"])
        return self.tensors[key].shape

    def prove(self, key: str, made: str, recorded: str) -> None:
        """Raises: VerificationError if the digest of a 4-bit weight is not the one that the run recorded."""
        if made != recorded:
            raise VerificationError(
                f"The 4-bit form of {key} made here is not the one that {self.run.path} was trained on (sha256 "
                f"{made[:12]}…, recorded {recorded[:12]}…). CPUs and CUDA devices may quantise differently: merge on "
                f"the device of the run ({self.trained_on}). Otherwise the base in {self.folder} has changed: put it "
                "back."
            )

    def companions(self, key: str) -> dict[str, Stored | Dequantised]:
        """The tensors stored with a 4-bit weight, by the ends of their names."""
        start = f"{key}."
        return {name.removeprefix(start): one for name, one in self.tensors.items() if name.startswith(start)}


def open_source(finished: FinishedRun, say: Callable[[str], None]) -> MergeSource:
    """Reads the headers and the adapter, but no weight of the base.

    Raises: ConfigError if the base is not the one that the run was trained on, or the adapter does not fit it.
    """
    run, record, settings = finished.run, finished.record, finished.config()
    place = _locate(finished, settings, say)
    check_part(model_config(place), run.adapter)
    deltas = read_lora(run.adapter).layers
    tensors = plain_tensors(place)
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    compute = DTYPES[record.found.dtype]
    names = folder_names(place, tensors)
    model = skeleton(names.text)
    packed = frozenset(key for key in tensors if f"{key}.absmax" in tensors)
    stored_as, form = stored_form(config, f"The folder {str(place)!r}"), None
    if settings.model.quantization != "none" and (stored_as is None or stored_as.is_dequantised):
        form = FourBit(settings.model.quantization, settings.model.double_quant, compute)
    marks = _marks(record, names, packed, form, model, say)
    stacks = {name: one for name, one in marks.items() if one is not None and one.experts is not None}
    marks = {name: one for name, one in marks.items() if name not in stacks}
    keys = names.in_files({*marks, *deltas})
    source = MergeSource(
        run=run, folder=place, config=config, compute=compute, tensors=tensors,
        deltas={keys[name]: delta for name, delta in deltas.items()},
        marks={keys[name]: one for name, one in marks.items()},
        experts=_experts(names, model, tensors, stacks),
        untouched=_untouched(model, names, compute), others=names.trained.others, packed=packed,
        form=form, trained_on=finished.environment.device,
        device=_device(finished.environment.device, say) if form else torch.device("cpu"),
    )  # fmt: skip
    _check_shapes(source)
    return source


def _locate(finished: FinishedRun, settings: RunConfig, say: Callable[[str], None]) -> Path:
    finished.check_base()
    place = fetch.locate_base(
        str(settings.model.path),
        revision=finished.record.base.commit or settings.model.revision,
        cache_dir=finished.cache,
        announce=say,
    )
    finished.check_base_files(place.folder)
    return place.folder


def _marks(
    record: RunRecord,
    names: FolderNames,
    packed: Collection[str],
    form: FourBit | None,
    model: torch.nn.Module,
    say: Callable[[str], None],
) -> dict[str, FourBitMark | None]:
    """The run's 4-bit layers by module name, each with its mark."""
    if record.four_bit is not None:
        return dict(record.four_bit)
    if packed:
        return {module: None for module in names.trained.modules if names.trained.key(module) in packed}
    if form is None:
        return {}
    say("note: only the comparison can prove the 4-bit weights equal (this run recorded no checksums of them)")
    return dict.fromkeys(quant.four_bit_names(model, form))


def _experts(
    names: FolderNames, model: Any, tensors: dict[str, Stored | Dequantised], marks: dict[str, FourBitMark]
) -> dict[str, tuple[ExpertSource, FourBitMark]]:
    """By tensor of the files. Raises: ConfigError for a stack that the files do not hold, or of other experts."""
    sources = expert_sources(model, tensors, names.text.key_mapping) if marks else {}
    found: dict[str, tuple[ExpertSource, FourBitMark]] = {}
    for name, one in marks.items():
        source = sources.get(name)
        if source is None or len(one.experts or ()) != source.shape[0]:
            raise ConfigError(
                f"The run had the experts {name} in 4 bits, {len(one.experts or ())} of them, and the files in "
                f"{names.folder} do not hold them so. The run belongs to another base, or transformers "
                f"{transformers.__version__} reads these files otherwise than the one that the run was made with."
            )
        found |= dict.fromkeys(source.files, (source, one))
    return found


def _device(trained_on: str, say: Callable[[str], None]) -> torch.device:
    if not trained_on.startswith("cuda"):
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    say("note: the CPU reproduces the 4-bit weights (the run was trained on a CUDA device, and there is none here)")
    return torch.device("cpu")


def _untouched(model: Any, names: FolderNames, compute: torch.dtype) -> frozenset[str]:
    """Tensors of the files outside decoder and head, and those that the trained model keeps in float32."""
    head = [f"{name}." for name, module in model.named_modules() if module is model.get_output_embeddings()]
    inside = (f"{names.text.decoder}.", *head)
    kept = float32_parameters(model, compute)
    outside = [name for name in names.trained.sources if name in kept or not name.startswith(inside)]
    return frozenset([*names.trained.others, *(key for name in outside for key in names.trained.sources[name])])


def _check_shapes(source: MergeSource) -> None:
    for key, delta in source.deltas.items():
        shape = source.shape(key)
        expected = shape[::-1] if source.transposed else shape
        if expected != delta.shape:
            raise ConfigError(
                f"The adapter in {source.run.adapter} belongs to another base: for {key} it has "
                f"{delta.shape[0]}x{delta.shape[1]}, but {source.folder} has {'x'.join(map(str, shape))}."
            )
