"""Adapters of other kits as adapter.start, and a run's own adapter, with one thing odd."""

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.faults.base import DONE, REFUSED, Case, Good

KIND = "adapters"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Damage = Callable[[Path], object]
VERBS = {
    "eval": ["eval", "runs/run", "model.device=cpu"],
    "compare": ["compare", "runs/run", "model.device=cpu", "--n", "1", "--max-new-tokens", "2"],
    "chat": ["chat", "runs/run", "model.device=cpu", "--max-new-tokens", "2"],
    "merge": ["merge", "runs/run"],
    "export to peft": ["export", "runs/run", "--to", "peft"],
    "export to gguf-adapter": ["export", "runs/run", "--to", "gguf-adapter"],
}
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 3, 10**30, 0.5, -0.5, "", "x", "none", "all", "true", [], ["x"], [0], {}, {"x": 1},
    [[0, 2]], float("nan"), float("inf"), "\u202e", "a" * 5000, [[[]]], "lora_only",
]  # fmt: skip
# Each is on in some other kit.
KITS: dict[str, list[Any]] = {
    "init_lora_weights": ["olora", "pissa", "pissa_niter_4", "corda", "loftq", "lora_ga", "mica", "foo"],
    "use_dora": [True],
    "use_qalora": [True],
    "lora_bias": [True],
    "bias": ["all", "lora_only"],
    "modules_to_save": [["lm_head"], ["embed_tokens"]],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [1]}],
    "target_parameters": [["self_attn.q_proj.weight"], ["mlp.experts.gate_up_proj"]],
    "layer_replication": [[[0, 1], [0, 2]]],
    "layers_to_transform": [[0, 5], 9, [-1]],
    "layers_pattern": ["layers", ["h"]],
    "target_modules": [["q_proj", "lm_head"], ["q_proj", "v_prj"], ".*(", "(.*a?)+(.*b?)+$x", ["embed_tokens"]],
    "exclude_modules": [".*(", ".*", ["q_proj"]],
    "rank_pattern": [{"q_proj": 2}, {"(": 2}, {"q_proj": 10**9}],
    "alpha_pattern": [{"(": 2}, {"q_proj": 0}, {"q_proj": "2"}],
    "r": [1, 2, 10**6, 10**9],
    "alora_invocation_tokens": [[1]],
    "monteclora_config": [{"num_samples": 2}],
    "kasa_config": [{}, {"beta": 1.0}],
    "velora_config": [{"num_groups": 2}],
    "arrow_config": [{"top_k": 1}],
    "use_bdlora": [{"nblocks": 2, "target_modules_bd_a": ["q_proj"]}],
    "megatron_config": [{"x": 1}],
    "ensure_weight_tying": [True],
    "task_type": ["SEQ_CLS", "FEATURE_EXTRACTION"],
    "peft_type": ["LOHA", "IA3", "PROMPT_TUNING", "VERA", None],
    "base_model_name_or_path": ["meta-llama/Llama-3.1-8B", "/gone/base", 5],
    "later_field": [True, {"on": True}],
}  # fmt: skip
# These change nothing, or another loader's view alone, so that the same command may also succeed.
HARMLESS: dict[str, list[Any]] = {
    "kasa_config": [{}],
    "base_model_name_or_path": ["meta-llama/Llama-3.1-8B", "/gone/base"],
}


def cases(rng: random.Random, good: Good) -> Iterator[Case]:
    drawn = [*_kits(good), *_fields(rng, good), *_texts(rng, good), *_tensors(rng, good), *_runs(rng, good)]
    rng.shuffle(drawn)
    yield from drawn


def _start(good: Good, name: str, damage: Damage, right: frozenset[str], near: str | None) -> Case:
    def make(folder: Path) -> list[str]:
        words = good.lay(folder, adapter__start="start")
        place = folder / "start"
        place.mkdir()
        for file in (CONFIG, WEIGHTS):
            (place / file).write_bytes((good.run / "adapter" / file).read_bytes())
        damage(place)
        return words

    return Case(KIND, f"start: {name}", make, right, near)


def _edit(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8")) | changes
        (folder / CONFIG).write_text(json.dumps(content), encoding="utf-8")

    return damage


def _kits(good: Good) -> Iterator[Case]:
    yield _start(good, "untouched", lambda folder: None, DONE, None)
    for name, values in KITS.items():
        for value in values:
            harmless = value in HARMLESS.get(name, [])
            right = REFUSED | DONE if harmless else REFUSED
            yield _start(
                good,
                f"{name}={json.dumps(value)[:40]}",
                _edit(**{name: value}),
                right,
                CONFIG if not harmless else None,
            )


def _fields(rng: random.Random, good: Good) -> Iterator[Case]:
    """Any value in any field: refused, or trained as what it says."""
    names = sorted(json.loads((good.run / "adapter" / CONFIG).read_text(encoding="utf-8")))
    for number in range(25):
        name, value = rng.choice(names), rng.choice(ODD)
        yield _start(
            good, f"{number}: {name} is {json.dumps(value)[:30]}", _edit(**{name: value}), REFUSED | DONE, None
        )
    for name in rng.sample(["r", "lora_alpha", "target_modules", "peft_type"], 2):

        def without(folder: Path, name: str = name) -> None:
            content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            del content[name]
            (folder / CONFIG).write_text(json.dumps(content), encoding="utf-8")

        yield _start(good, f"without {name}", without, REFUSED, CONFIG)


def _texts(rng: random.Random, good: Good) -> Iterator[Case]:
    texts = {
        "empty": b"", "null": b"null", "a list": b"[]", "zeros": bytes(64), "deep": b'{"a":' * 50_000, "NaN": b"NaN",
        "UTF-16": '{"r": 8}'.encode("utf-16"), "twice": b'{"peft_type": "LORA", "peft_type": "LORA"}',
        "a huge number": b'{"r": ' + b"7" * 6000 + b"}", "a surrogate": b'{"\\ud800": 1, "peft_type": "LORA"}',
    }  # fmt: skip
    for name, content in texts.items():
        yield _start(good, f"config {name}", lambda f, c=content: (f / CONFIG).write_bytes(c), REFUSED, CONFIG)  # type: ignore[misc]
    for number in range(5):

        def cut(folder: Path, share: float = rng.random()) -> None:
            content = (folder / CONFIG).read_bytes()
            (folder / CONFIG).write_bytes(content[: int(len(content) * share)])

        yield _start(good, f"config cut {number}", cut, REFUSED, CONFIG)
    yield _start(good, "no config", lambda f: (f / CONFIG).unlink(), REFUSED, CONFIG)
    yield _start(good, "config is a folder", _folder(CONFIG), REFUSED, CONFIG)
    yield _start(good, "no weights", lambda f: (f / WEIGHTS).unlink(), REFUSED, WEIGHTS)
    yield _start(good, "weights are pickle", lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), REFUSED, WEIGHTS)
    yield _start(good, "weights are a folder", _folder(WEIGHTS), REFUSED, WEIGHTS)


def _folder(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def _tensors(rng: random.Random, good: Good) -> Iterator[Case]:
    for number in range(3):
        yield _start(good, f"weights cut {number}", _cut(rng.random()), REFUSED, WEIGHTS)
        yield _start(
            good, f"header of weights {number}", _flip_header(rng.random(), rng.randrange(8)), REFUSED | DONE, None
        )
    for what in ("nan", "inf", "lost", "renamed", "more", "shape", "dtype", "vector"):
        yield _start(good, f"a tensor: {what}", _tensor(what, rng.random()), REFUSED, WEIGHTS)
    yield _start(
        good, "a length of 2**62", lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 2**62)), REFUSED, WEIGHTS
    )


def _cut(share: float) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[: int(len(content) * share)])

    return damage


def _flip_header(share: float, bit: int) -> Damage:
    def damage(folder: Path) -> None:
        content = bytearray((folder / WEIGHTS).read_bytes())
        length = struct.unpack("<Q", content[:8])[0]
        content[8 + int(length * share)] ^= 1 << bit
        (folder / WEIGHTS).write_bytes(content)

    return damage


def _tensor(what: str, share: float) -> Damage:
    def damage(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        held = load_file(folder / WEIGHTS)
        name = sorted(held)[int(len(held) * share)]
        tensor = held.pop(name)
        if what in ("nan", "inf"):
            tensor[-1, -1] = float(what)
            held[name] = tensor
        elif what == "renamed":
            held[name.replace("layers", "blocks")] = tensor
        elif what == "more":
            held |= {name: tensor, "base_model.model.lm_head.weight": tensor.clone()}
        elif what == "shape":
            held[name] = torch.zeros(tensor.shape[0] + 1, tensor.shape[1] + 1)
        elif what == "dtype":
            held[name] = tensor.to(torch.int32)
        elif what == "vector":
            held[name] = tensor.reshape(-1)
        save_file(held, folder / WEIGHTS)

    return damage


def _runs(rng: random.Random, good: Good) -> Iterator[Case]:
    """The adapter of a finished run, damaged later: no verb may use it as if it were the trained one."""
    damages: dict[str, tuple[Damage, str]] = {
        "alpha": (_edit(lora_alpha=31), CONFIG), "rslora": (_edit(use_rslora=True), CONFIG),
        "olora": (_edit(init_lora_weights="olora"), CONFIG), "letters": (_edit(target_modules=[*"_q"]), CONFIG),
        "dora": (_edit(use_dora=True), CONFIG), "rank": (_edit(r=4), CONFIG), "null": (_edit(r=None), CONFIG),
        "nan": (_tensor("nan", rng.random()), WEIGHTS), "lost": (_tensor("lost", rng.random()), WEIGHTS),
        "shape": (_tensor("shape", rng.random()), WEIGHTS), "dtype": (_tensor("dtype", rng.random()), WEIGHTS),
        "cut": (_cut(rng.random()), WEIGHTS), "bit": (_bit(rng.random(), rng.randrange(8)), WEIGHTS),
        "a folder": (_folder(WEIGHTS), WEIGHTS), "gone": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS),
    }  # fmt: skip
    for what, (damage, near) in damages.items():
        for verb in rng.sample(sorted(VERBS), 2):

            def make(folder: Path, verb: str = verb, damage: Damage = damage) -> list[str]:
                good.lay_run(folder, good.run)
                damage(folder / "runs" / "run" / "adapter")
                return VERBS[verb]

            yield Case(
                KIND, f"{verb} after damage: {what}", make, REFUSED, near, typed="hello\n" if verb == "chat" else ""
            )


def _bit(share: float, bit: int) -> Damage:
    """One bit of a number; the file stays sound."""

    def damage(folder: Path) -> None:
        content = bytearray((folder / WEIGHTS).read_bytes())
        start = 8 + struct.unpack("<Q", content[:8])[0]
        content[start + int((len(content) - start) * share)] ^= 1 << bit
        (folder / WEIGHTS).write_bytes(content)

    return damage
