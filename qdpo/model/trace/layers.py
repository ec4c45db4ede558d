"""Traces each kind of layer of a model on fake tensors, for a forecast of the whole: seconds, and no weights.

The model is built by transformers' own class without memory. Of its layers one of each kind stays, and gets our
adapter, attention and fast parts as in a run. At several row sizes a forward and a backward pass tell what each layer
leaves behind, and the most that it needs meanwhile: once with all layers recomputed, once with all kept.
"""

import contextlib
import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.utils import logging as transformers_logging

from qdpo.families import traced
from qdpo.families.traced import LayerKind, Moments, TracedShape, Traces
from qdpo.model.base.folder import check_config
from qdpo.model.base.foreign import reading
from qdpo.model.base.text_model import TextModel, config_of_json, decoder_of, text_model_of
from qdpo.model.fast.attention import PairSpans
from qdpo.model.fast.logps import Head
from qdpo.model.fast.recurrent import RowForward
from qdpo.model.policy import adapter, choose_attention, install, recompute
from qdpo.model.policy.adapter import Policy
from qdpo.model.policy.forward import response_hidden
from qdpo.model.policy.targets import ALL_LINEAR, lora_targets
from qdpo.model.trace import kinds
from qdpo.model.trace.fake_base import bare_base, filled_base, no_fake
from qdpo.model.trace.live import LiveBytes, as_on_cuda, short_loops
from qdpo.model.trace.rows import even_row

DEVICE, DTYPE = torch.device("cpu"), torch.bfloat16
# With more and shorter pairs the bytes of a row differ by less than this share where the length of a sequence does not
# matter.
SAME = 0.01
# Chunks that recurrent layers may compute in; a length of whole chunks; tokens fewer than any chunk.
CHUNKS = (32, 64, 128, 256)
WHOLE, FEW = 1024, 16


def read_config(config: Mapping[str, Any], source: str) -> Any:
    """The transformers config of a config.json's content. Raises: ConfigError if transformers does not know it."""
    check_config(dict(config), source, source)
    with reading(f"transformers cannot read the config of {source}", "A newer transformers may know it."):
        return config_of_json(config)


def trace_layers(config: Any, key: str, source: str) -> TracedShape:
    """The traced shape of a transformers config, under the name `key`. Raises: ConfigError if it cannot be traced."""
    way_out = "Set memory.tokens_per_row and memory.kept_layers by hand."
    with _quietly(), reading(f"There is no forecast for {source}: tracing one of its layers failed", way_out):
        return _trace(text_model_of(config), key)


def _trace(text: TextModel, key: str) -> TracedShape:
    whole, config = bare_base(text, DTYPE), text.config.get_text_config()
    layers = recompute.decoder_layers(decoder_of(whole))
    alike = kinds.kinds_of(layers)
    places = sorted(set(alike))
    tables = kinds.tables_of(whole)
    targets = {id(whole.get_submodule(name)): size for name, size in lora_targets(whole).adapted.items()}
    weights = [kinds.weights_of(layers[place], targets) for place in places]
    inside = {id(parameter) for parameter in [*layers.parameters(), *tables, whole.get_output_embeddings().weight]}
    outside = kinds.weights_of(whole, targets, without=inside)
    names = [_name(layers[place], config, place) for place in places]
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as count, as_on_cuda():
        rig = _Rig(bare_base(text, DTYPE), places, count)
        with short_loops():
            chunks = rig.chunks()
            recomputed, kept = rig.traces(0, chunks), rig.traces("all", chunks)
        products = rig.products()
    return TracedShape(
        key=key,
        kinds=tuple(
            LayerKind(name=name, weights=one, products=product, kept=after, recomputed=again)
            for name, one, product, after, again in zip(
                names, weights, products, kept[1:-1], recomputed[1:-1], strict=True
            )
        ),
        order=tuple(places.index(place) for place in alike),
        shared=rig.policy.shared,
        states=rig.has_states or not rig.policy.shared,
        hidden=int(config.hidden_size),
        vocabulary=int(whole.get_output_embeddings().weight.shape[0]),
        tied=bool(getattr(text.config, "tie_word_embeddings", False)),
        tables=sum(table.numel() for table in tables),
        outside=outside,
        before=kept[0],
        after=kept[-1],
        after_recomputed=recomputed[-1],
    )


def _name(layer: nn.Module, config: Any, place: int) -> str:
    types = getattr(config, "layer_types", None)
    return f"{types[place]} ({type(layer).__name__})" if types else type(layer).__name__


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the warnings of libraries about a model that nobody will use."""
    verbosity, disabled = transformers_logging.get_verbosity(), logging.root.manager.disable
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        transformers_logging.set_verbosity(verbosity)


class _Slope(torch.autograd.Function):
    """Stands for the head: keeps a slope as large as its input, and hands back a gradient of that size."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(hidden_ND))
        return hidden_ND.new_empty(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (slope_ND,) = ctx.saved_tensors
        return torch.mul(slope_ND, gradients[0])


@contextlib.contextmanager
def _before_each_module(hook: Any) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class _Rig:
    """One layer of each kind as a policy on fake tensors, with marks where one layer ends and the next begins."""

    def __init__(self, model: Any, places: list[int], count: LiveBytes):
        self._count = count
        layers = recompute.decoder_layers(decoder_of(model))
        chosen = [layers[place] for place in places]
        del layers[:]
        layers.extend(chosen)
        config = model.config.get_text_config()
        types = list(getattr(config, "layer_types", None) or [])
        left = [types[place] for place in places] + types[len(places) :] if types else []
        if left != types:  # Falcon-H1's cannot be set: its layers are all alike
            config.layer_types = left
        base = filled_base(model, quantization="nf4", double_quant=True, dtype=DTYPE, device=DEVICE)
        with no_fake():
            peft = adapter.new_adapter(
                base, rank=traced.RANK, alpha=traced.RANK, targets=[ALL_LINEAR], rslora=False, seed=0
            )
        for module in peft.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.requires_grad:
                    fake = nn.Parameter(torch.empty_like(parameter))
                    fake.grad = torch.empty_like(fake)
                    setattr(module, name, fake)
        causal = peft.get_base_model()
        self.policy = Policy(peft, decoder_of(causal), Head.of(causal), DEVICE, "spans", 128)
        choose_attention.choose_unseen(self.policy)
        with no_fake():
            install.install(peft, DEVICE, weightless=True)
        self.has_states = any(isinstance(one.forward, RowForward) for one in self.policy.backbone.modules())
        self._layers = recompute.Layers(decoder_of(causal), layers=chosen)
        self._number = len(chosen)
        self._marks: list[tuple[str, float, float]] = []
        self._awaits_end = False
        causal.get_input_embeddings().register_forward_hook(lambda _m, _a, output: output.requires_grad_())
        for number, layer in enumerate(chosen):
            layer.register_forward_pre_hook(lambda *_: self._mark("begin"))
            layer.register_forward_hook(self._after_layer(number))

    def _mark(self, name: str) -> None:
        self._marks.append((name, self._count.live, self._count.peak))
        self._count.peak = self._count.live

    def _after_layer(self, number: int) -> Any:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden.register_hook(lambda _gradient: self._mark("gradient"))
            self._awaits_end = number == self._number - 1

        return hook

    def _before_module(self, _module: nn.Module, _arguments: Any) -> None:
        """Marks the end of the layers at the module behind them: only there is the last layer's input gone."""
        if self._awaits_end:
            self._awaits_end = False
            self._mark("end")

    def chunks(self) -> list[int]:
        """The chunk that each part fills up; 1 without chunks, and where rows are shared.

        Told by what a kept layer leaves, which grows evenly with the tokens but for its chunks: of sequences that are
        shorter than whole chunks, the first to save more than its tokens do has lost a chunk.
        """
        found = [1] * (self._number + 2)
        if self.policy.shared:
            return found
        self._layers.keep("all")
        whole, half, less = (self._left(tokens) for tokens in (WHOLE, WHOLE // 2, WHOLE - FEW))
        shorter: dict[int, list[float]] = {}
        for place, full in enumerate(whole):
            mean, token = (full - half[place]) / (WHOLE - WHOLE // 2), (full - less[place]) / FEW
            if mean - token < SAME * mean:
                continue
            for chunk in CHUNKS:
                shorter[chunk] = shorter.get(chunk) or self._left(WHOLE - chunk)
                if full - shorter[chunk][place] > chunk * (mean + token) / 2:
                    found[place] = chunk
                    break
        return found

    def _left(self, tokens: int) -> list[float]:
        return [moments.stays for moments in self._row(tokens, 0, 1)]

    def traces(self, kept: int | str, chunks: Sequence[int]) -> list[Traces]:
        """The traces before the layers, of each kind of layer, and behind them."""
        self._layers.keep(kept)
        sizes = traced.TOKENS if self.policy.shared else traced.SEQUENCES
        if self.policy.shared and self.has_states:
            sizes = traced.TOKENS[:-1]  # a scan grows evenly, and is slow to trace
        shares = traced.SHARES if self.policy.shared else traced.SHARES[:1]
        pairs = traced.PAIRS if self.policy.shared and self._length_matters() else traced.PAIRS[:1]
        found: dict[tuple[int, float, int], list[Moments]] = {}
        for tokens, share, number in itertools.product(sizes, shares, pairs):
            found[tokens, share, number] = self._row(tokens, int(tokens * share), number)
        token = [traced.NOTHING] * len(chunks)
        if max(chunks) > 1:
            both = zip(self._row(WHOLE, 0, 1), self._row(WHOLE - FEW, 0, 1), strict=True)
            token = [full.plus(*less.times(-1).values).times(1 / FEW) for full, less in both]
        return [
            Traces(
                tuple(
                    tuple(tuple(found[tokens, share, number][place] for number in pairs) for share in shares)
                    for tokens in sizes
                ),
                sizes,
                chunk,
                token[place] if chunk > 1 else traced.NOTHING,
            )
            for place, chunk in enumerate(chunks)
        ]

    def _length_matters(self) -> bool:
        one, more = (self._row(2048, 1024, pairs) for pairs in traced.PAIRS)
        same = 2 * SAME if self.has_states else SAME  # every answer's first state is one more
        return any(
            abs(a - b) > same * max(a, b)
            for first, second in zip(one, more, strict=True)
            for a, b in zip(vars(first).values(), vars(second).values(), strict=True)
        )

    def _row(self, tokens: int, prompts: int, pairs: int) -> list[Moments]:
        self._run(tokens, prompts, pairs)
        return _moments(self._marks, self._number)

    def _run(self, tokens: int, prompts: int, pairs: int) -> None:
        """The forward and backward pass of one row, or of one sequence."""
        self._marks = []
        self._count.peak = self._count.live
        self._mark("start")
        with _before_each_module(self._before_module):
            hidden = self._forward(tokens, prompts, pairs)
        if self._awaits_end:  # nothing is behind the layers
            self._awaits_end = False
            self._mark("end")
        slope: Any = _Slope.apply(hidden)  # type: ignore[no-untyped-call]
        del hidden
        self._mark("head")
        torch.autograd.backward(slope)
        self._mark("done")

    def _forward(self, tokens: int, prompts: int, pairs: int) -> Tensor:
        if self.policy.shared:
            row = even_row(tokens, prompts, pairs, DEVICE)
            spans = row.spans
            assert isinstance(spans, PairSpans)
            spans.sequences(DEVICE)
            return response_hidden(self.policy, row.token_T, row.position_T, row.source_N, spans)
        ids = torch.ones(1, tokens, dtype=torch.int64, device=DEVICE)
        hidden: Tensor = self.policy.backbone(input_ids=ids, use_cache=False).last_hidden_state[0]
        return hidden

    def products(self) -> list[float]:
        """Multiplications per token in the forward pass of each kind of layer."""
        tokens = 1024
        found = []
        self._layers.keep("all")
        before = self._count.products
        seen: list[int] = []
        for layer in self._layers.modules:
            layer.register_forward_pre_hook(lambda *_: seen.append(self._count.products))
            layer.register_forward_hook(lambda *_: seen.append(self._count.products))
        del before
        self._run(tokens, tokens // 2, 1)
        found = [(end - begin) / tokens for begin, end in zip(seen[::2], seen[1::2], strict=True)]
        return found


def _moments(marks: list[tuple[str, float, float]], layers: int) -> list[Moments]:
    """The moments of each part, from the live bytes at its borders and the peaks between them."""
    names = [name for name, _live, _peak in marks]
    expected = ["start", *["begin"] * layers, "end", "head", *["gradient"] * layers, "done"]
    if names != expected:
        raise NotImplementedError(f"its layers do not follow each other: {names}")
    live, peak = [mark[1] for mark in marks], [mark[2] for mark in marks]
    found = [Moments(live[1] - live[0], peak[1] - live[0], 0.0)]
    for number in range(layers):
        here, back = number + 1, len(marks) - 1 - number
        found.append(Moments(live[here + 1] - live[here], peak[here + 1] - live[here], peak[back] - live[here]))
    end = layers + 1
    found.append(Moments(live[end + 1] - live[end], peak[end + 1] - live[end], peak[end + 2] - live[end]))
    return found
