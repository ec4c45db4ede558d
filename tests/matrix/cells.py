"""The columns of the matrix: what each part of a row shows, in a word, and the reason where it falls short."""

import json
import re
from pathlib import Path
from typing import Any

from tests.matrix.exact import OUTSIDE, ROUTERS, kind_of, kinds_of
from tests.matrix.processes import Ended, one_line
from tests.matrix.rows import Cell

# The bounds that this project sets its forecast.
LOWEST, HIGHEST = -0.03, 0.05
LONGEST = 300
CONVERTER = "convert_hf_to_gguf.py"
ROUNDS = "in bf16, the rounding of a random model of this width is beyond the proof's bounds; in fp32 it is proved"
EXPERT = re.compile(r"(^|\.)experts(\.|$)")
# What LoRA is for; anything else may be left out without a word.
ADAPTED = re.compile(
    r"(^|[._])(q|k|v|o|qkv|out|gate|up|down|gate_up|in|q_a|q_b|kv_a|kv_b)_proj|in_proj_\w+|w[123]$|fc[12]$|c_(fc|proj)$"
)


def loads(weights: Ended) -> Cell:
    if weights.found is None:
        return _no(weights.why)
    return Cell(True, "yes")


def trains(ended: Ended, run: Path) -> Cell:
    if ended.code:
        return _no(f"exit code {ended.code}: {ended.why}")
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    if len(losses) < 2 or not all(0 < loss < 10 for loss in losses):
        return _no(f"losses of {losses}")
    return Cell(True, "yes")


def attention(ended: Ended) -> Cell:
    line = _said(ended, "attention")
    if not line:
        return Cell(None, "–", "the run ends before it is chosen")
    path, _, refused = line.partition("; refused: ")
    if "with its own copy" in path:
        return Cell(True, "separate", _short(refused))
    way = "a mask" if "and a mask" in path else "scored" if "score" in path else ""
    return Cell(True, "shared" + f" ({way})" * bool(way), _short(refused))


def fast_parts(ended: Ended) -> Cell:
    line = _said(ended, "fast parts")
    if not line:
        return Cell(None, "–", "the run ends before they are checked")
    found, *left = line.split("; ")
    short = found.removesuffix(" checked against their plain twins").replace("adapter linear", "lin")
    return Cell(found != "none", short.replace("gated MLP", "mlp"), _short("; ".join(left)))


def four_bit(weights: Ended) -> Cell:
    found = weights.found
    if found is None:
        return Cell(None, "–", "it is not loaded")
    share = found["four_bit"] / found["body"]
    text, notes = f"{share:.0%}", []
    if found["experts"] > found["experts_four_bit"]:
        text += f", experts {found['experts'] / found['body']:.0%}"
        notes.append("stacked experts are not linear layers, and stay in 16 bits")
    if found["outside"]:
        text += f", outside the decoder {found['outside'] / found['body']:.0%}"
        notes.append("the tower or the projector is loaded too")
    if share < 0.9 and not notes:
        notes.append("weights that are not linear layers of torch stay in 16 bits")
    return Cell(share >= 0.9 and not found["outside"], text, "; ".join(notes))


def lora(trained: Ended, weights: Ended, exact: Ended, run: Path) -> Cell:
    """What the run adapted: nothing that decides a route or is outside the decoder, nothing dead, nothing forgotten."""
    file = run / "adapter" / "adapter_model.safetensors"
    if trained.code or not file.is_file():
        return Cell(None, "–", "it does not train")
    shapes = _header(file)
    names = sorted({re.sub(r"\.lora_[AB].*", "", name).removeprefix("base_model.model.") for name in shapes})
    numbers = sum(_product(shape) for shape in shapes.values())
    faults = []
    if wrong := [name for name in names if ROUTERS.search(kind_of(name)) and not EXPERT.search(kind_of(name))]:
        faults.append(f"routers and gates have LoRA: {_list(wrong)}")
    if stacked := [name for name in names if re.search(r"(^|\.)experts(\.base_layer)?$", name)]:
        faults.append(f"stacked experts have LoRA unasked: {_list(stacked)}")
    if outside := [name for name in names if OUTSIDE.search(name)]:
        faults.append(f"{len(outside)} layers outside the decoder have LoRA")
    if exact.found and (dead := [name for name in exact.found["dead"] if not OUTSIDE.search(name)]):
        faults.append(f"LoRA without a gradient: {_list(dead)}")
    left = weights.found["left"] if weights.found else {}
    known = {name for of_role in left.values() for name in of_role}
    if weights.found and (lost := sorted({*_forgotten(weights.found["linear"], names)} - known)):
        faults.append(f"without LoRA: {_list(lost)}")
    alone = ", ".join(f"{role} ({_list(of_role)})" for role, of_role in left.items())
    kinds = sorted({kind_of(name).rpartition(".")[2] for name in names}, key=_place)
    text = " ".join(kind.removesuffix("_proj") for kind in kinds)
    return Cell(not faults, f"{text}: {numbers:,}", "; ".join(faults) or f"left alone: {alone}" * bool(alone))


def _place(name: str) -> tuple[int, str]:
    """Attention first, then the MLP, in the order of their computation."""
    order = [f"{part}_proj" for part in "qkv q q_a q_b kv_a_with_mqa kv_b k v o in out gate_up gate up down".split()]
    return (order.index(name) if name in order else len(order), name)


def exact(ended: Ended) -> Cell:
    found = ended.found
    if found is None:
        return _no(ended.why)
    nats = max(found["on_nats"], found["off_nats"], found["whole_nats"] or 0.0)
    faults = []
    if not nats <= found["nats_allowed"]:
        faults.append(
            f"log-probs differ by {found['on_nats']:.1e} nats with the adapter, {found['off_nats']:.1e} without, "
            f"{found['whole_nats'] or 0:.1e} from the whole class"
        )
    if not found["gradient"] <= found["gradient_allowed"]:
        faults.append(f"gradients differ by {found['gradient']:.1e} of the largest, at {found['gradient_of']}")
    if not found["effect"] > 0.01:
        faults.append(f"the adapter changes no log-prob by more than {found['effect']:.1e} nats: nothing is compared")
    note = f"not against the whole class: {found['whole_why']}" if found["whole_why"] else ""
    return Cell(not faults, f"{nats:.0e} nats, {found['gradient']:.0e}", "; ".join(faults) or _short(note))


def forecast(ended: Ended) -> Cell:
    if ended.found is None:
        return _no(ended.why)
    error = ended.found["forecast"] / ended.found["traced"] - 1
    good = LOWEST <= error <= HIGHEST
    return Cell(good, f"{error:+.1%}", "" if good else f"beyond {LOWEST:+.0%} … {HIGHEST:+.0%} of the traced step")


def merge(ended: Ended, in_fp32: Ended | None) -> Cell:
    """`in_fp32`: a second try, where the proof of a merge in bf16 found more rounding than it allows."""
    if in_fp32 is not None and in_fp32.code == 0:
        kept = merge(in_fp32, None)
        return Cell(kept.good, f"{kept.text} (fp32)", ROUNDS)
    if ended.code:
        return _no(ended.why)
    report = json.loads(next(line for line in reversed(ended.text.splitlines()) if line.startswith("{")))
    found = report["verification"][0]
    good = found["fault"] is None
    return Cell(good, f"KL {found['distance']['kl']:.0e}", "" if good else _short(found["fault"]))


def served(exported: Ended, loaded: Ended | None) -> Cell:
    if loaded is None:
        return _no(f"export: {exported.why}")
    found = loaded.found
    if found is None:
        return _no(loaded.why)
    if "cannot" in found:
        return Cell(None, "–", f"{found['kind']} cannot be built here: {_short(found['cannot'])}")
    good = found["found"] == found["all"] and found["effect"] != 0
    why = "" if good else f"{found['kind']} receives {found['found']} of {found['all']} matrices, and says nothing"
    return Cell(good, f"{found['found']} of {found['all']}", why)


def names_converter(ended: Ended, merged: Cell) -> bool:
    """True if there is a merged model for which qdpo names llama.cpp's own converter, as one that knows it."""
    return bool(ended.code and merged.good and CONVERTER in ended.why)


def gguf(ended: Ended, merged: Cell, converted: Ended | None) -> Cell:
    """`converted`: llama.cpp's converter on the merged model, where it was tried."""
    if ended.code == 0:
        return Cell(True, "qdpo")
    if not merged.good:
        return _no("there is no merged model")
    if not names_converter(ended, merged):
        return Cell(None, "–", _short(ended.why)) if "llama.cpp's" in ended.why else _no(ended.why)
    if converted is None:
        return Cell(None, "llama.cpp", "by its converter, which was not tried")
    if converted.found is None:
        return Cell(None, "llama.cpp", _short(f"its converter does not take the tiny model: {converted.why}"))
    return Cell(True, f"llama.cpp: {converted.found['tensors']}")


def _no(why: str) -> Cell:
    return Cell(False, "no", _short(why))


def _short(why: str) -> str:
    text = one_line(why)
    return text if len(text) <= LONGEST else text[: LONGEST - 2] + " …"


def _said(ended: Ended, topic: str) -> str:
    lines = [line for line in ended.text.splitlines() if line.startswith(f"{topic}: ")]
    return lines[-1].removeprefix(f"{topic}: ") if lines else ""


def _forgotten(linear: list[str], adapted: list[str]) -> list[str]:
    """Layers that LoRA is for, and that have none."""
    have = set(adapted)
    return [
        name
        for name in linear
        if name not in have
        and ADAPTED.search(name.rpartition(".")[2])
        and not OUTSIDE.search(name)
        and not EXPERT.search(name)
        and not ROUTERS.search(kind_of(name).removesuffix("gate_proj"))
    ]


def _list(names: list[str]) -> str:
    return ", ".join(kinds_of(names))


def _header(file: Path) -> dict[str, list[int]]:
    with file.open("rb") as handle:
        header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def _product(shape: list[Any]) -> int:
    total = 1
    for length in shape:
        total *= int(length)
    return total
