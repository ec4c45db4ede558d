"""Merges a run's adapter into its base, tensor by tensor: needs no GPU, and only the memory of a few tensors.

The adapter was trained not on the weights on disk, but on the result of dequantising their 4-bit form. Those weights
are reproduced, proved equal by the checksums that the run recorded, and become the base of the merged model.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import Tensor

from qdpo.errors import ConfigError, VerificationError
from qdpo.export.merge import shards
from qdpo.export.merge.experts import ExpertMatrices
from qdpo.export.merge.shards import PlannedTensor
from qdpo.export.merge.source import MergeSource, open_source
from qdpo.families.stored_form import without_settings
from qdpo.model.base import quant
from qdpo.model.base.dequantise import Dequantised
from qdpo.model.base.folder import weight_files
from qdpo.model.base.tensor_files import Stored
from qdpo.model.base.tokenizer_files import stated_ends
from qdpo.model.device import DTYPES
from qdpo.run import disk
from qdpo.run.finished import finished_run
from qdpo.run.folder import RunDir
from qdpo.run.record import FourBitMark
from qdpo.run.watcher import Watcher
from qdpo.train.start.tokenizer import RunTokenizer, put_conversation, shipped_otherwise, tokenizer_of

BaseWeights = Literal["dequantized", "original"]
# Files of the base that are copied to a merged model. No adapter_*: transformers would attach the adapter again.
COPIED = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "tekken.json", "*.model", "*.jinja", "LICENSE*", "NOTICE*", "*processor_config.json", "chat_template.json",
)  # fmt: skip

# Modules that predict further tokens, which transformers does not load (multi-token prediction).
DRAFTS = ("mtp", "mtp_layers", "nextn")


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """The merge result: `adapted` weights received the adapter; `dequantized` weights went through 4 bits and back."""

    folder: str
    base: BaseWeights
    dtype: str
    tensors: int
    adapted: int
    dequantized: int
    proved: int
    """Dequantised weights whose 4-bit form matches the run's checksum."""
    bytes: int
    files: list[str]
    seconds: float


def merge_run(
    run: RunDir,
    out: Path,
    *,
    base: BaseWeights,
    dtype: str | None,
    watcher: Watcher,
    check: Callable[[Path, MergeReport], None] = lambda folder, report: None,
) -> MergeReport:
    """Writes the merged model into the new folder `out`, whole or not at all.

    `dtype` is bf16, fp16 or fp32; None for the type of the base's files if that has 16 bits, else of the run. `check`
    receives the finished files before they get their final name, and may raise.
    Raises: ConfigError for a run, base or adapter that cannot be merged; DiskError; VerificationError if a 4-bit weight
    differs from the weight that the run was trained on.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already. Remove it, or name another folder: `qdpo merge {run.path} FOLDER`.")
    finished = finished_run(run.path)
    source = open_source(finished, watcher.say)
    if base == "original" and source.is_stored_four_bit:
        raise ConfigError(
            f"--base original: the base in {source.folder} is stored in 4 bits, without its original weights. "
            "Use `--base dequantized`."
        )
    chosen = DTYPES[dtype] if dtype else default_dtype(source)
    name = next(name for name, one in DTYPES.items() if one == chosen)
    job = _Merge(source, base, chosen)
    total = sum(tensor.bytes for tensor in job.planned)
    watcher.say(f"merging into the {base} base, in {name}{'' if dtype else _why(source)}: {_size(source, total)}")
    for line in others_told(source.others):
        watcher.say(line)
    disk.need_space(out.parent, total + 64 * 2**20, f"The merged model in {name}")
    _clear_leftovers(out)
    report: list[MergeReport] = []

    def fill(folder: Path) -> None:
        begun = time.monotonic()
        watcher.begin("merging", len(job.planned), "tensor")

        def produce(tensor: PlannedTensor) -> Iterator[Tensor]:
            yield from job.pieces(tensor)
            watcher.advance(1)

        files = shards.write_shards(folder, job.planned, produce)
        _copy_other_files(source, chosen, folder)
        _put_conversation(tokenizer_of(finished, source.folder), folder)
        watcher.finish()
        report.append(
            MergeReport(
                folder=str(out),
                base=base,
                dtype=name,
                tensors=len(job.planned),
                adapted=len(source.deltas),
                dequantized=job.dequantized,
                proved=job.proved,
                bytes=total,
                files=files,
                seconds=time.monotonic() - begun,
            )
        )
        check(folder, report[0])

    disk.write_folder(out, fill)
    return report[0]


def others_told(others: Sequence[str]) -> list[str]:
    """Lines on the parts of a checkpoint that are not trained and are copied byte for byte."""
    parts = dict.fromkeys(_part_of(name) for name in others if not name.partition(".weight.")[2])
    drafts = [part for part in parts if part in DRAFTS or part.startswith("layers.")]
    towers = [part for part in parts if part not in drafts]
    lines = [f"copied as they are (not trained): {', '.join(towers)}"] if towers else []
    if drafts:
        lines.append(
            f"copied as they are: {', '.join(drafts)} (heads that draft tokens; they were made for the base's answers, "
            "so drafts are accepted less often)"
        )
    return lines


def _part_of(name: str) -> str:
    """The beginning of a tensor's name that says which part it belongs to: vision_tower, mtp, layers.61."""
    names = name.split(".")
    start = 1 if names[0] in ("model", "language_model") and len(names) > 1 else 0
    return ".".join(names[start : start + 2]) if names[start] == "layers" else names[start]


def _clear_leftovers(out: Path) -> None:
    """Removes the files of killed merges into `out`."""
    for path in out.parent.glob(f".tmp-{out.name}-*"):
        if not psutil.pid_exists(int(path.name.rpartition("-")[2])):
            shutil.rmtree(path)


def default_dtype(source: MergeSource) -> torch.dtype:
    """The type of most of the base's weights if that has 16 bits, else the run's compute type."""
    sizes: dict[torch.dtype, int] = {}
    for key, stored in source.tensors.items():
        if stored.dtype.is_floating_point and key.endswith("weight"):
            sizes[stored.dtype] = sizes.get(stored.dtype, 0) + stored.bytes
    common = max(sizes, key=lambda dtype: sizes[dtype])
    return common if common.itemsize == 2 and not source.is_stored_four_bit else source.compute


def _why(source: MergeSource) -> str:
    return ", the run's compute type" if default_dtype(source) == source.compute else ", as the base's files are"


def _size(source: MergeSource, total: int) -> str:
    """The size on disk; of a base that is smaller because it is stored in fewer bits, that too."""
    size = f"{total / 2**30:.2f} GiB"
    if source.stored_as is None:
        return size
    stored = sum((source.folder / name).stat().st_size for name in weight_files(source.folder))
    return f"{size} (the base, stored in {source.stored_as.words}, takes {stored / 2**30:.2f} GiB)"


class _Merge:
    """Produces the merged tensors, one at a time."""

    def __init__(self, source: MergeSource, base: BaseWeights, dtype: torch.dtype):
        self.source, self.base, self.dtype = source, base, dtype
        self.dequantized = self.proved = 0
        self._experts = ExpertMatrices(source)
        companions = {f"{key}.{name}" for key in source.packed for name in source.companions(key)}
        self.planned = [
            PlannedTensor(key, self._type(stored), source.shape(key))
            for key, stored in source.tensors.items()
            if key not in companions
        ]

    def _type(self, stored: Stored | Dequantised) -> torch.dtype:
        is_weight = stored.dtype.is_floating_point and stored.name not in self.source.untouched
        return self.dtype if is_weight or stored.name in self.source.packed else stored.dtype

    def pieces(self, tensor: PlannedTensor) -> Iterator[Tensor]:
        """The merged tensor in order, in pieces."""
        stored = self.source.tensors[tensor.name]
        if self.base != "original" and tensor.name in self.source.experts:
            for values, is_first in self._experts.of(tensor.name):
                self.dequantized += is_first
                self.proved += is_first
                yield values.to(tensor.dtype)
            return
        delta = self.source.deltas.get(tensor.name)
        if delta is None and not self._is_dequantized(tensor.name):
            as_is = tensor.name in self.source.untouched
            for piece in stored.pieces():
                yield (piece if as_is else self._as_loaded(piece)).to(tensor.dtype)
            return
        weight_NK = self._weight(stored)
        if delta is not None and self.source.transposed:
            merged_NK = torch.cat(list(delta.added_to(weight_NK, tensor.dtype)))
            yield merged_NK.T
        elif delta is not None:
            yield from delta.added_to(weight_NK, tensor.dtype)
        else:
            yield (weight_NK.T if self.source.transposed else weight_NK).to(tensor.dtype)

    def _is_dequantized(self, key: str) -> bool:
        return key in self.source.packed or (self.base != "original" and key in self.source.marks)

    def _as_loaded(self, values: Tensor) -> Tensor:
        """Rounds to the run's compute type, as the run's weights were; leaves the original base unchanged."""
        if self.base == "original" or not values.is_floating_point():
            return values
        return values.to(self.source.compute)

    def _weight(self, stored: Stored | Dequantised) -> Tensor:
        """The weight that the adapter is added to, (N, K)."""
        source, key = self.source, stored.name
        whole = stored.whole()
        dense = whole.T if source.transposed else whole
        if not self._is_dequantized(key):
            return self._as_loaded(dense)
        recorded = source.marks.get(key)
        if key in source.packed:
            parts = {name: one.whole() for name, one in source.companions(key).items()}
            weight_NK, made = quant.stored_weight(whole, parts)
        else:
            assert source.form is not None
            offset = recorded.offset if recorded else None
            weight_NK, made = quant.round_trip(dense, source.form, source.device, offset)
        self._prove(key, made, recorded)
        return weight_NK

    def _prove(self, key: str, made: FourBitMark, recorded: FourBitMark | None) -> None:
        self.dequantized += 1
        if recorded is not None:
            self.source.prove(key, made.sha256, recorded.sha256)
            self.proved += 1


def _copy_other_files(source: MergeSource, dtype: torch.dtype, folder: Path) -> None:
    """config.json, and the base's generation settings, tokenizer and licence."""
    name = str(dtype).removeprefix("torch.")
    config = {
        key: value
        for key, value in without_settings(source.config).items()
        if key not in ("_name_or_path", "transformers_weights")
    }
    text = config.get("text_config")
    for part in (config, *([text] if isinstance(text, dict) else [])):  # other parts keep their weights, and their type
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = name
    if "torch_dtype" not in config:
        config["dtype"] = name
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for pattern in COPIED:
        for path in source.folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _put_conversation(found: RunTokenizer, folder: Path) -> None:
    """The run's chat template and end tokens, in the place of the base's where they differ; read back.

    Raises: VerificationError if the folder, read by transformers, says otherwise.
    """
    put_conversation(found, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if not set(found.ends.trained) <= set(stated_ends(folder, path.name)):
        every = list(found.ends.every)
        ends = every[0] if len(every) == 1 else every
        inner = [part for part in (config.get("text_config"),) if isinstance(part, dict) and "eos_token_id" in part]
        for part in (config, *inner):
            part["eos_token_id"] = ends
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if wrong := shipped_otherwise(found, folder):
        raise VerificationError(
            f"The merged model's {' and '.join(wrong)}, read back by transformers, is not what the run trained. "
            "Please report this, with the tokenizer files of the base."
        )
