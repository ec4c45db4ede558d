"""Plain weights from the FP8 or MXFP4 of a folder, a few rows at a time: bit for bit what transformers makes of them.

Shapes: E experts or other matrices of a stack · N rows · K columns · R, C blocks of rows and of columns · G groups of
32 codes · B bytes.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from qdpo.errors import ConfigError
from qdpo.families.stored_form import FP8, MXFP4, stored_form
from qdpo.model.base.finite import is_finite
from qdpo.model.base.folder import read_json
from qdpo.model.base.headers import HeaderEntry
from qdpo.model.base.originals import GROUP_BYTES, Packed, dtype_of, packed_weights, plain_headers
from qdpo.model.base.tensor_files import NAMES, Stored, stored_tensors

# Codes dequantised at a time.
TILE = 2**20
# The value of each code of E2M1: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, 5.3.3).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# Two bits of mantissa and the exponents of float32: bf16 holds each product of MXFP4. Those of FP8 need float32.
EXACT = {FP8: torch.float32, MXFP4: torch.bfloat16}
STATED = {"bfloat16": torch.bfloat16, "float16": torch.float16}
AGAIN = "Copy or download the model again."


@dataclass(frozen=True, kw_only=True)
class Dequantised:
    """A weight that is stored as codes and scales, read as a plain one.

    Raises: ConfigError for a scale or a product that is not finite.
    """

    name: str
    dtype: torch.dtype
    """The type in which a plain folder would hold it."""
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
        """The whole weight, flat and in order, in pieces of a type that holds each product: see EXACT."""
        for matrix in range(prod(self.shape[:-2])):
            if self.method == MXFP4:
                turned = torch.empty(self.shape[-2:], dtype=EXACT[MXFP4])
                self._fill(turned, matrix)
                yield turned.view(-1)
            else:
                yield from (tile.reshape(-1) for _rows, tile in self._tiles(matrix))

    def whole(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in `dtype`, each product rounded once; None for a type that holds them."""
        found = torch.empty(self.shape, dtype=dtype or EXACT[self.method])
        for number, part in enumerate(found.view(-1, *self.shape[-2:])):
            self._fill(part, number)
        return self._checked(found, dtype)

    def matrix(self, number: int, dtype: torch.dtype | None = None) -> Tensor:
        """One of the matrices of a stack, by its number; otherwise as `whole`."""
        found = torch.empty(self.shape[-2:], dtype=dtype or EXACT[self.method])
        self._fill(found, number)
        return self._checked(found, dtype)

    def _checked(self, found: Tensor, dtype: torch.dtype | None) -> Tensor:
        if not is_finite(found):
            raise ConfigError(
                f"{self.codes.path} (from model.path): the weight {self.codes.name!r} has values that "
                f"{str(dtype).removeprefix('torch.')} does not hold. Use `model.dtype=bf16`."
            )
        return found

    def _fill(self, part: Tensor, matrix: int) -> None:
        """Writes one matrix of the plain weight; that of MXFP4 is stored transposed."""
        place = part.T if self.method == MXFP4 else part
        for rows, tile in self._tiles(matrix):
            place[rows] = tile

    def _tiles(self, matrix: int) -> Iterator[tuple[slice, Tensor]]:
        """Some rows of a stored matrix at a time: which, and their products."""
        for rows, tile in self._fours(matrix) if self.method == MXFP4 else self._eights(matrix):
            if not is_finite(tile):
                raise ConfigError(
                    f"{self.codes.path} (from model.path): the weight {self.codes.name!r} with its scales gives NaN or "
                    f"infinite values, so nothing can be calculated with this model. {AGAIN}"
                )
            yield rows, tile

    def _eights(self, matrix: int) -> Iterator[tuple[slice, Tensor]]:
        """FP8: rows of one block at a time."""
        rows, columns = self.shape[-2:]
        high, wide = self.block
        for block, scale_C in enumerate(self._scale(matrix, -(-rows // high), -(-columns // wide))):
            scale_K = scale_C.repeat_interleave(wide)[:columns]
            for some in _slices(block * high, min(rows, (block + 1) * high), columns):
                tile = self.codes.part((matrix * rows + some.start) * columns, (some.stop - some.start) * columns)
                yield some, tile.float().view(-1, columns).mul_(scale_K)

    def _fours(self, matrix: int) -> Iterator[tuple[slice, Tensor]]:
        """MXFP4: some rows, of any block."""
        columns, rows = self.shape[-2:]
        size = columns // 2  # bytes of a row
        scale_NG = self._scale(matrix, rows, size // GROUP_BYTES).to(EXACT[MXFP4])
        for some in _slices(0, rows, columns):
            byte_B = self.codes.part((matrix * rows + some.start) * size, (some.stop - some.start) * size)
            tile = _pairs().index_select(0, byte_B.int()).view(EXACT[MXFP4])
            yield (
                some,
                tile.view(-1, size // GROUP_BYTES, 2 * GROUP_BYTES).mul_(scale_NG[some, :, None]).view(-1, columns),
            )

    def _scale(self, matrix: int, rows: int, columns: int) -> Tensor:
        """The scales of one matrix in float32, by blocks of rows and of columns."""
        size = min(rows * columns, prod(self.scales.shape))  # one for all, where there is one
        first = matrix * size if prod(self.scales.shape) > size else 0
        stored = self.scales.part(first, size)
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
                f"{self.scales.path} (from model.path): the scales {self.scales.name!r} are 0 for a whole matrix, "
                f"which leaves nothing of it. {AGAIN}"
            )
        return scale.view(rows, columns) if size > 1 else scale.view(1, 1)


@cache
def _pairs() -> Tensor:
    """The two values of every byte, the low half first, as the bits of one number: (256,)."""
    value, byte = torch.tensor(E2M1, dtype=EXACT[MXFP4]), torch.arange(256)
    return torch.stack([value[byte & 15], value[byte >> 4]], dim=1).view(torch.int32).view(-1)


def _slices(first: int, end: int, columns: int) -> Iterator[slice]:
    """Some rows each, of at most TILE codes."""
    step = max(1, TILE // columns)
    for row in range(first, end, step):
        yield slice(row, min(row + step, end))


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


def state_dict_of(folder: Path, dtype: torch.dtype, without: Collection[str] = ()) -> dict[str, Lazily]:
    """The folder's plain tensors for `from_pretrained(None, state_dict=…)`: packed ones in `dtype`, others as stored.

    Those named in `without` are left out. transformers loads one weight after another and quantises it before it takes
    the next, so the memory is that of the largest weight.
    """
    return {name: Lazily(one, dtype) for name, one in plain_tensors(folder).items() if name not in without}
