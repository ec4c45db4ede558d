"""Weights that a folder stores in FP8 or MXFP4: which tensors belong together, from the headers alone.

A packed weight is two tensors, its codes and its scales. The names are transformers' and the makers':

- fp8: `x.weight` and `x.weight_scale_inv`, by which the codes are multiplied in spite of its name. An
  `activation_scale` or `input_scale` is for arithmetic in FP8, and not read.
- mxfp4: `x_blocks` of shape (E, N, G, 16), two codes in a byte, and `x_scales` (E, N, G): one exponent for 32 codes.
  The plain weight `x` is (E, 32·G, N): experts, inputs, outputs, as gpt-oss multiplies by it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qdpo.errors import ConfigError
from qdpo.families.stored_form import KEY, MXFP4, StoredForm, stored_form
from qdpo.model.base.folder import read_json, weight_files
from qdpo.model.base.headers import HeaderEntry, tensors_of

BLOCKS, SCALES, SCALE_INV = "_blocks", "_scales", "_scale_inv"
ABSMAX = ".absmax"  # bitsandbytes' scales of a 4-bit weight
UNUSED = ("activation_scale", "input_scale")
CODES = "F8_E4M3"
FP8_SCALES = ("F32", "BF16", "F16", "F8_E8M0")
MXFP4_SCALES = ("U8", "F8_E8M0")
INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "F4")
GROUP_BYTES = 16
AGAIN = "Copy or download the model again."


@dataclass(frozen=True)
class Packed:
    """A weight that is stored as codes and scales."""

    name: str
    """Of the plain weight."""
    shape: tuple[int, ...]
    """Of the plain weight."""
    codes: str
    scales: str
    block: tuple[int, int]
    """Rows and columns of the codes that share a scale; those at the edges may have fewer."""


def packed_weights(stored: Mapping[str, HeaderEntry], form: StoredForm | None, owner: str) -> dict[str, Packed]:
    """The packed weights by their plain names, each with its scales; none where the folder is plain.

    `owner` opens the message: "The folder …".
    Raises: ConfigError for codes without scales, scales without codes, sizes that do not belong together, and a
    config.json that says otherwise than the files.
    """
    return _Headers(stored, form, owner).packed()


def plain_folder(folder: Path) -> dict[str, HeaderEntry]:
    """The tensors of a folder as if it were plain. Raises: ConfigError as `as_plain` and `tensors_of` do."""
    return as_plain(folder, tensors_of(folder, weight_files(folder)))


def as_plain(folder: Path, stored: Mapping[str, HeaderEntry]) -> dict[str, HeaderEntry]:
    """The same, where the headers are read already. Raises: ConfigError as `packed_weights` and `stored_form` do."""
    owner = f"The folder {str(folder)!r}"
    return plain_headers(stored, packed_weights(stored, stored_form(read_json(folder / "config.json"), owner), owner))


def plain_names(folder: Path, stored: Collection[str]) -> list[str]:
    """The names of the tensors that a plain folder would hold, where the headers are not there yet."""
    form = stored_form(read_json(folder / "config.json"), f"The folder {str(folder)!r}")
    if form is None or not form.is_dequantised:
        return list(stored)
    if form.method == MXFP4:
        return [name.removesuffix(BLOCKS) for name in stored if not name.endswith(SCALES)]
    return [name for name in stored if not name.endswith((SCALE_INV, *UNUSED))]


def plain_headers(stored: Mapping[str, HeaderEntry], packed: Mapping[str, Packed]) -> dict[str, HeaderEntry]:
    """The tensors that a plain folder of the same model would hold; a packed one has the bytes of its codes."""
    gone = {part for one in packed.values() for part in (one.codes, one.scales)}
    found = {name: entry for name, entry in stored.items() if name not in gone and not name.endswith(UNUSED)}
    for name, one in packed.items():
        codes = stored[one.codes]
        found[name] = HeaderEntry(name, codes.dtype, one.shape, codes.start, codes.end)
    return found if packed else dict(stored)


class _Headers:
    def __init__(self, stored: Mapping[str, HeaderEntry], form: StoredForm | None, owner: str):
        self.stored, self.form, self.owner = stored, form, owner

    def packed(self) -> dict[str, Packed]:
        blocks = {name.removesuffix(BLOCKS) for name, one in self.stored.items() if self._is_blocks(name, one)}
        eights = [name for name, one in self.stored.items() if self._is_codes(name, one)]
        method = self.form.method if self.form and self.form.is_dequantised else None
        for names, wanted in ((sorted(name + BLOCKS for name in blocks), MXFP4), (sorted(eights), "fp8")):
            if names and method != wanted:
                self._refuse_unstated(names[0], wanted)
        is_there = bool(blocks or eights) if method else any(name.endswith(ABSMAX) for name in self.stored)
        if self.form is None:
            return {}
        if not is_there:
            raise ConfigError(
                f"{self.owner} (from model.path): {KEY} in config.json says {self.form.method}, but no tensor of the "
                f"files is stored so: weights and config.json are of different copies of the model. If the weights are "
                f"plain, remove {KEY} from config.json; otherwise copy both from the model's source."
            )
        if method is None:
            return {}
        found = [self._blocks(name) for name in sorted(blocks)] if method == MXFP4 else []
        found += [self._eight(name) for name in sorted(eights)] if method != MXFP4 else []
        for one in found:
            module = one.name.removesuffix(".weight")
            if self.form.keeps(module):
                raise ConfigError(
                    f"{self.owner} (from model.path): {KEY} in config.json names {module!r} among the modules that are "
                    f"not quantised, but the files hold it as {self.stored[one.codes].dtype} with scales. Weights and "
                    f"config.json are of different copies of the model, or damaged. {AGAIN}"
                )
        self._no_scale_is_left({one.scales for one in found})
        self._no_other_code_is_left({one.codes for one in found})
        return {one.name: one for one in found}

    def _is_blocks(self, name: str, one: HeaderEntry) -> bool:
        return name.endswith(BLOCKS) and one.dtype == "U8" and len(one.shape) == 4

    def _is_codes(self, name: str, one: HeaderEntry) -> bool:
        return one.dtype.startswith("F8_") and not name.endswith((SCALE_INV, SCALES, "scale"))

    def _refuse_unstated(self, name: str, form: str) -> NoReturn:
        said = "has no quantization_config" if self.form is None else f"says {self.form.method}"
        raise ConfigError(
            f"{self.owner} (from model.path): the files hold {name!r} in a form of {form}, but config.json {said}, so "
            "what its numbers mean is unknown. Copy config.json from the model's source."
        )

    def _no_scale_is_left(self, used: set[str]) -> None:
        ends = (SCALES,) if self.form and self.form.method == MXFP4 else (SCALE_INV,)
        left = sorted(name for name in self.stored if name.endswith(ends) and name not in used)
        if left:
            self._refuse(left[0], f"is a scale, but no tensor in {self._form} belongs to it")

    def _no_other_code_is_left(self, used: set[str]) -> None:
        for name, one in self.stored.items():
            if name.endswith("weight") and one.dtype in INTEGERS and name not in used:
                self._refuse(name, f"holds codes of the type {one.dtype}, which are not of the form {self._form}")

    @property
    def _form(self) -> str:
        return self.form.method if self.form else "plain numbers"

    def _scales_of(self, codes: str, name: str, dtypes: tuple[str, ...]) -> HeaderEntry:
        scales = self.stored.get(name)
        if scales is None:
            self._refuse(codes, f"is stored in {self._form}, but its scales {name!r} are missing")
        if scales.dtype not in dtypes:
            self._refuse(name, f"holds scales of the type {scales.dtype}, and {' or '.join(dtypes)} is read")
        return scales

    def _blocks(self, name: str) -> Packed:
        codes = self.stored[name + BLOCKS]
        scales = self._scales_of(codes.name, name + SCALES, MXFP4_SCALES)
        experts, rows, groups, wide = codes.shape
        if wide != GROUP_BYTES or scales.shape != codes.shape[:3] or 0 in codes.shape:
            self._refuse(
                codes.name,
                f"has the shape {list(codes.shape)} and its scales {list(scales.shape)}, which is not one scale for "
                f"each {GROUP_BYTES} bytes",
            )
        return Packed(name, (experts, 2 * GROUP_BYTES * groups, rows), codes.name, scales.name, (1, GROUP_BYTES))

    def _eight(self, name: str) -> Packed:
        codes = self.stored[name]
        if codes.dtype != CODES:
            self._refuse(name, f"is of the type {codes.dtype}; of FP8 weights qdpo reads {CODES}")
        scales = self._scales_of(name, name + SCALE_INV, FP8_SCALES)
        if len(codes.shape) not in (2, 3) or 0 in codes.shape:
            self._refuse(name, f"has the shape {list(codes.shape)} and is stored in FP8, which a matrix is")
        *stack, rows, columns = codes.shape
        said = self.form.block if self.form else None
        high, wide = said or (rows, columns)
        fits = scales.shape == (*stack, -(-rows // high), -(-columns // wide))
        if said is None:
            # One scale for all in any number of brackets; one for each matrix of a stack, or for its gate and its up.
            fits |= scales.elements == 1 or bool(stack) and scales.shape == tuple(stack)
            if stack and scales.shape == (*stack, 2, 1) and rows % 2 == 0:
                fits, high = True, rows // 2
        if not fits:
            blocks = f"weight_block_size {list(said)}" if said else "no weight_block_size"
            self._refuse(
                scales.name,
                f"has the shape {list(scales.shape)}, which does not fit a weight of {list(codes.shape)} and {blocks}",
            )
        return Packed(name, codes.shape, name, scales.name, (high, wide))

    def _refuse(self, name: str, what: str) -> NoReturn:
        raise ConfigError(f"{self.owner} (from model.path): the tensor {name!r} {what}. {AGAIN}")


def dtype_of(config: Any) -> str | None:
    """The type that config.json states for plain weights: bfloat16, float16, …, or None."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            if isinstance(value := part.get(key), str):
                return value.removeprefix("torch.")
    return None
