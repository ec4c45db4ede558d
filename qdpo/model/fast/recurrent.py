"""Recurrent layers over rows of [prompt chosen rejected | …]: both answers continue from their prompt's state.

Such a layer has a causal convolution, a scan over tokens, or both, each a function of its module's code with a known
signature. The layer's own forward is run with two functions in their place: a convolution in which each answer begins
with its prompt's last taps, and a scan in which it begins with the state that its prompt has left, gradient included.
So a prompt is computed once, and neither answer sees the other. Projections, gates and norms stay the layer's own.

The scans are gated delta rules (arXiv 2412.06464), Kimi's delta attention (2510.26692) and Mamba 2 (2405.21060).

Letters: C channels of the convolution · K its taps · T tokens of the row.
"""

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from qdpo.model.fast import row_scan
from qdpo.model.fast.attention import PairSpans
from qdpo.model.fast.row_scan import BATCH, LOOP, VARLEN, Scan, ScanNames

# The most of a chunk, within which a plain scan keeps a number for every token by every other; and of a scan whose
# decay differs by channel, which keeps a vector for them.
CHUNK, CHUNK_OF_VECTORS = 64, 16
_SCANS = (
    ScanNames("initial_state", "output_final_state", always=True, varlen=True),
    ScanNames("initial_states", "return_final_states", always=False, varlen=False),
)


def scan_names(function: Any) -> ScanNames | None:
    """The names of a chunked scan that can begin with a state and return one; None for any other function."""
    names = _parameters(function)
    if "chunk_size" not in names or {"weight", "outproj_weight"} & names:
        return None
    return next((scan for scan in _SCANS if {scan.initial, scan.final} <= names), None)


def is_convolution(function: Any) -> bool:
    """True for a causal convolution over a whole sequence, which takes (B, C, T), weight (C, K) and bias."""
    names = _parameters(function)
    return {"weight", "bias", "activation"} <= names and not {"conv_state", "A", "dt"} & names


def _parameters(function: Any) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()


def kernel_of(function: Any) -> Any | None:
    """The kernel package's function behind a scan of transformers; None where plain PyTorch runs."""
    while function is not None:
        code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None) or ()
        held = dict(zip(code.co_freevars, cells, strict=True)) if code is not None else {}
        if "is_new_implementation" in held and "implementation" in held:
            is_kernel = held["is_new_implementation"].cell_contents
            return held["implementation"].cell_contents if is_kernel else None
        function = getattr(function, "__wrapped__", None)
    return None


class RowForward:
    """The forward of one recurrent layer, which computes rows of pairs as well.

    `way` is one of LOOP, BATCH and VARLEN; None: LOOP for plain PyTorch, VARLEN for a kernel that divides a row by
    `cu_seqlens`, and BATCH for any other kernel.
    Raises: ValueError if the layer's code has no convolution and no scan of a known form.
    """

    def __init__(self, module: nn.Module, *, way: str | None = None):
        self._plain: Callable[..., Any] = module.forward
        code, places = _places(type(module))
        if code is None or not places:
            raise ValueError(f"the code of {type(module).__name__} has no convolution or scan of a known form")
        self._spans: PairSpans | None = None
        self.way = LOOP
        around = {}
        for name, function in places.items():
            if (names := scan_names(function)) is None:
                around[name] = self._convolution(function)
                continue
            kernel = kernel_of(function)
            takes = kernel is not None and names.varlen and "cu_seqlens" in _parameters(kernel)
            self.way = way or (VARLEN if takes else BATCH if kernel is not None else LOOP)
            around[name] = self._scan(function, names, cap=kernel is None)
        row = FunctionType(
            code.__code__, {**code.__globals__, **around}, code.__name__, code.__defaults__, code.__closure__
        )
        row.__kwdefaults__ = code.__kwdefaults__
        self._row = row.__get__(module)
        # As attention in a compiled layer: every row's spans would compile it again.
        self._in_row = torch.compiler.disable(self._compute_row)  # type: ignore[no-untyped-call]

    def __call__(self, *args: Any, pair_spans: PairSpans | None = None, **kwargs: Any) -> Any:
        if pair_spans is None:
            return self._plain(*args, **kwargs)
        return self._in_row(pair_spans, *args, **kwargs)

    def _compute_row(self, pair_spans: PairSpans, *args: Any, **kwargs: Any) -> Any:
        pair_spans.paths.add(self.way)
        self._spans = pair_spans
        try:
            return self._row(*args, **kwargs)
        finally:
            self._spans = None

    @property
    def _row_spans(self) -> PairSpans:
        assert self._spans is not None
        return self._spans

    def _convolution(self, plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        signature = inspect.signature(plain)
        first = next(iter(signature.parameters))

        def convolution(*args: Any, **kwargs: Any) -> Tensor:
            given = signature.bind(*args, **kwargs).arguments
            rest = given.pop("kwargs", {})
            x_BCT, weight_CK = given.pop(first), given.pop("weight")
            return row_scan.convolution(plain, self._row_spans, x_BCT, weight_CK, **given, **rest)

        return convolution

    def _scan(self, plain: Callable[..., Any], names: ScanNames, *, cap: bool) -> Callable[..., Any]:
        signature = inspect.signature(plain)
        chunk = signature.parameters["chunk_size"].default

        def scan(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            rest = given.pop("kwargs", {})
            given = {**given, **rest}
            # A kernel has other names for what is given by position.
            first = tuple(signature.parameters)[: len(args)]
            for name in (names.initial, names.final, "cu_seqlens"):
                given.pop(name, None)
            size = given.get("chunk_size", chunk)
            if cap and isinstance(size, int):
                decay = given.get("g")
                by_channel = isinstance(decay, Tensor) and decay.dim() > 3
                given["chunk_size"] = min(size, CHUNK_OF_VECTORS if by_channel else CHUNK)
            found = row_scan.WAYS[self.way](Scan(plain, names, given, first), self._row_spans)
            return (found, None) if names.always else found

        return scan


def _places(kind: type) -> tuple[FunctionType | None, dict[str, Any]]:
    """A layer's forward without its decorators, and the convolution and the scan that it calls, by name."""
    function: Any = kind.forward if hasattr(kind, "forward") else None
    while function is not None:
        if isinstance(function, FunctionType):
            around = function.__globals__
            called = {name: around[name] for name in function.__code__.co_names if callable(around.get(name))}
            found = {
                name: value
                for name, value in called.items()
                if not isinstance(value, type) and (is_convolution(value) or scan_names(value) is not None)
            }
            if found:
                return function, found
        function = getattr(function, "__wrapped__", None)
    return None, {}


def has_recurrence(kind: type) -> bool:
    """True if a layer of this class calls a convolution or a scan that a row can be put through."""
    return bool(_places(kind)[1])
