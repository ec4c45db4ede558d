"""Plain weights from the FP8 or MXFP4 of a folder, a few rows at a time: bit for bit what transformers makes of them.

Shapes: E experts or other matrices of a stack · N rows · K columns · R, C blocks of rows and of columns · G groups of
32 codes · B bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from qdpo.errors import ConfigError
from qdpo.families.stored_form import FP8, stored_form
from qdpo.model.base.folder import read_json
from qdpo.model.base.headers import HeaderEntry
from qdpo.model.base.originals import GROUP_BYTES, Packed, dtype_of, packed_weights, plain_headers
from qdpo.model.base.tensor_files import NAMES, Stored, stored_tensors

# Codes dequantised at a time; their float32 values take four times the bytes, MXFP4's eight times.
TILE = 2**21
# The value of each code of E2M1: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, 5.3.3).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
STATED = {"bfloat16": torch.bfloat16, "float16": torch.float16}
AGAIN = "Copy or download the model again."


@dataclass(frozen=True, kw_only=True)
class Dequantised:
    """A weight that is stored as codes and scales, read as a plain one.

    Its values are exact products in float32; `dtype` is the type in which a plain folder would hold them.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    codes: Stored
    scales: Stored
    method: str
    block: tuple[int, int]

    @property
    def bytes(self) -> int:
        """Size in a plain file."""
        return prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[Tensor]:
        """The whole weight, flat and in order, in pieces of float32.

        Raises: ConfigError for a scale or a product that is not finite.
        """
        scale = self._scale()
        for tile in self._eights(scale) if self.method == FP8 else self._fours(scale):
            if not bool(torch.isfinite(tile).all()):
                raise ConfigError(
                    f"{self.codes.path} (from model.path): the weight {self.codes.name!r} with its scales gives NaN or "
                    f"infinite values, so nothing can be calculated with this model. {AGAIN}"
                )
            yield tile.reshape(-1)

    def whole(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight in `dtype`, each value rounded once."""
        found, at = torch.empty(prod(self.shape), dtype=dtype), 0
        for piece in self.pieces():
            found[at : at + len(piece)] = piece
            at += len(piece)
        self._check_range(found, dtype)
        return found.view(self.shape)

    def _check_range(self, found: Tensor, dtype: torch.dtype) -> None:
        if dtype != torch.float32 and not bool(torch.isfinite(torch.stack(torch.aminmax(found))).all()):
            raise ConfigError(
                f"{self.codes.path} (from model.path): the weight {self.codes.name!r} has values that "
                f"{str(dtype).removeprefix('torch.')} does not hold. Use `model.dtype=bf16`."
            )

    def _scale(self) -> Tensor:
        """The scales in float32."""
        stored = self.scales.whole()
        if stored.dtype in (torch.uint8, torch.float8_e8m0fnu):
            # A byte is the exponent of a float32: 0 is 2^-127, which has no implicit 1; 255 is NaN, and infinite here.
            power = stored.view(torch.uint8).to(torch.int32)
            scale = torch.where(power > 0, power << 23, 1 << 22).view(torch.float32)
        else:
            scale = stored.float()
        sound = torch.isfinite(scale) & (scale >= 0)
        if not bool(sound.all()):
            raise ConfigError(
                f"{self.scales.path} (from model.path): the scales {self.scales.name!r} hold "
                f"{float(scale[~sound][0])}, and a scale is finite and not negative. {AGAIN}"
            )
        if not bool(scale.any()):
            raise ConfigError(
                f"{self.scales.path} (from model.path): the scales {self.scales.name!r} are all 0, which leaves "
                f"nothing of the weight. {AGAIN}"
            )
        return scale

    def _eights(self, scale: Tensor) -> Iterator[Tensor]:
        """FP8, rows of one block at a time: (rows, K)."""
        rows, columns = self.shape[-2:]
        high, wide = self.block
        grid = (-(-rows // high), -(-columns // wide))
        scale_ERC = scale.reshape(-1, *grid) if scale.numel() > 1 else scale.view(1, 1, 1)
        for matrix in range(prod(self.shape[:-2])):
            scale_RK = scale_ERC[matrix % len(scale_ERC)].repeat_interleave(wide, dim=1)[:, :columns]
            for block, scale_K in enumerate(scale_RK):
                for first, count in _tiles(block * high, min(rows, (block + 1) * high), columns):
                    codes = self.codes.part((matrix * rows + first) * columns, count * columns)
                    yield codes.float().view(count, columns).mul_(scale_K)

    def _fours(self, scale: Tensor) -> Iterator[Tensor]:
        """MXFP4, one expert at a time: (32·G, N), the inputs first."""
        experts, inputs, rows = self.shape
        groups = inputs // (2 * GROUP_BYTES)
        scale_ENG = scale.view(experts, rows, groups)
        for expert in range(experts):
            found_KN = torch.empty(inputs, rows)
            for first, count in _tiles(0, rows, inputs // 2):
                place = (expert * rows + first) * inputs // 2
                pair_NB = _pairs()[self.codes.part(place, count * inputs // 2).int()]
                tile_NG = (
                    pair_NB.view(count, groups, 2 * GROUP_BYTES) * scale_ENG[expert, first : first + count, :, None]
                )
                found_KN[:, first : first + count] = tile_NG.view(count, inputs).T
            yield found_KN


@cache
def _pairs() -> Tensor:
    """The two values of every byte, the low half first: (256, 2)."""
    value = torch.tensor(E2M1)
    byte = torch.arange(256)
    return torch.stack([value[byte & 15], value[byte >> 4]], dim=1)


def _tiles(first: int, end: int, columns: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each tile."""
    step = max(1, TILE // columns)
    for row in range(first, end, step):
        yield row, min(step, end - row)


def plain_tensors(folder: Path) -> dict[str, Stored | Dequantised]:
    """Every tensor that a plain folder of the same model would hold, by name; of a plain folder, its own.

    Raises: ConfigError as `packed_weights` and `stored_tensors` do.
    """
    stored, config = stored_tensors(folder), read_json(folder / "config.json")
    owner = f"The folder {str(folder)!r}"
    form = stored_form(config, owner)
    if form is None or not form.is_dequantised:
        return dict(stored)
    headers = {
        name: HeaderEntry(name, NAMES[one.dtype], one.shape, one.start, one.start + one.bytes)
        for name, one in stored.items()
    }
    packed = packed_weights(headers, form, owner)
    dtype = STATED.get(dtype_of(config) or "", torch.bfloat16)
    return {
        name: _plain(packed[name], stored, dtype, form.method) if name in packed else stored[name]
        for name in plain_headers(headers, packed)
    }


def _plain(one: Packed, stored: dict[str, Stored], dtype: torch.dtype, method: str) -> Dequantised:
    return Dequantised(
        name=one.name, dtype=dtype, shape=one.shape, codes=stored[one.codes], scales=stored[one.scales], method=method,
        block=one.block,
    )  # fmt: skip


class Lazily:
    """A tensor that is read when transformers takes it, as it takes a slice of a safetensors file: by `x[...]`.

    One thread reads at a time, so that no two weights are dequantised at once.
    """

    _ALONE = Lock()

    def __init__(self, tensor: Stored | Dequantised, dtype: torch.dtype):
        self._tensor, self._dtype = tensor, dtype

    def __getitem__(self, _all: Any) -> Tensor:
        with self._ALONE:
            return self._tensor.whole(self._dtype) if isinstance(self._tensor, Dequantised) else self._tensor.whole()


def state_dict_of(folder: Path, dtype: torch.dtype) -> dict[str, Lazily]:
    """The folder's plain tensors for `from_pretrained(None, state_dict=…)`: packed ones in `dtype`, others as stored.

    transformers loads one weight after another and quantises it before it takes the next, so the memory is that of the
    largest weight.
    """
    return {name: Lazily(one, dtype) for name, one in plain_tensors(folder).items()}
