"""Odd values in a model's config.json and generation_config.json."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.faults.base import DONE, NOT_FINITE, REFUSED, Case, Good

KIND = "config_values"
ANY = REFUSED | DONE | NOT_FINITE
HUGE = 10**30
ODD: list[Any] = [
    None, True, False, 0, -1, -(2**31), 1, 3, 7, 100_000, 2**31, 2**63, HUGE, 0.5, -0.0, 1e308, float("nan"),
    float("inf"),
    "", "64", "x", "x" * 100_000, [], [1], [[1]], [None], {}, {"a": 1}, "\ud800", "../x",
]  # fmt: skip
WRONG_SIZE: list[Any] = [0, -1, -64, 2**40, HUGE, "64", "", [64], {"a": 64}, True, 0.5, float("nan"), 100_000]
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
GENERATION = ("eos_token_id", "pad_token_id", "temperature", "top_p", "top_k", "do_sample", "max_length", "num_beams",
              "transformers_version", "stop_strings", "forced_eos_token_id")  # fmt: skip
QUANTISED: list[Any] = [
    [], "x", 7, True, {}, {"quant_method": 7}, {"quant_method": ["bitsandbytes"]}, {"load_in_4bit": "x"},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": 7},
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "x"},
]  # fmt: skip
TYPES: list[Any] = [
    [],
    ["llama"],
    {},
    7,
    None,
    "",
    "x",
    "llama\0",
    "gpt2",
    "bert",
    "t5",
    "whisper",
    "LLAMA",
    "../llama",
]
DTYPES: list[Any] = [
    "float31",
    "int8",
    "float8_e4m3fn",
    7,
    [],
    {},
    "torch.float32x",
    "complex64",
    "",
    "os",
    "nn",
    "bool",
]
ROPE: list[Any] = [
    [], 7, "x", {}, {"rope_type": "x"}, {"rope_type": 7}, {"rope_type": "yarn"}, {"rope_type": "linear", "factor": "x"},
    {"rope_type": "linear", "factor": 0}, {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]},
    {"rope_type": "llama3", "factor": float("nan")}, {"rope_theta": "x"}, {"rope_theta": 0, "rope_type": "default"},
]  # fmt: skip


def cases(rng: random.Random, good: Good) -> Iterator[Case]:
    known = sorted(json.loads((good.model / "config.json").read_text()))
    for key in SIZES:
        for value in WRONG_SIZE:
            yield _case(good, "config.json", key, value, REFUSED, near="config.json")
    for key, values in {"model_type": TYPES, "dtype": DTYPES, "quantization_config": QUANTISED}.items():
        for value in values:
            is_sound = key == "model_type" and value in ("gpt2", "bert", "t5", "whisper")
            yield _case(good, "config.json", key, value, ANY if is_sound else REFUSED)
    for key in ("rope_parameters", "rope_scaling"):
        for value in ROPE:
            yield _case(good, "config.json", key, value, ANY)
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_key_value_heads", "head_dim"):
        for factor in (0.5, 2, 3):
            yield _case(good, "config.json", key, factor, REFUSED, scaled=True)
    for _ in range(150):
        yield _case(good, "config.json", rng.choice(known), rng.choice(ODD), ANY)
    for _ in range(40):
        yield _case(good, "generation_config.json", rng.choice(GENERATION), rng.choice(ODD), ANY)
    for name, text in TEXTS.items():
        for file in ("config.json", "generation_config.json"):
            right = REFUSED if file == "config.json" else ANY
            yield Case(KIND, f"{file} is {name}", _writer(good, file, text), right, file if right == REFUSED else None)


TEXTS = {
    "deep lists": '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
    "deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "rather deep": '{"a":' * 500 + "1" + "}" * 500, "a list": "[]", "a text": '"x"', "null": "null", "empty": "",
    "cut": '{"model_type": "lla', "a long number": '{"model_type": "llama", "hidden_size": ' + "9" * 5000 + "}",
}  # fmt: skip


def _writer(good: Good, file: str, text: str) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        words = good.lay(folder)
        (folder / "base" / file).write_text(text)
        return words

    return make


def _case(
    good: Good,
    file: str,
    key: str,
    value: Any,
    right: frozenset[str],
    *,
    near: str | None = None,
    scaled: bool = False,
) -> Case:
    def make(folder: Path) -> list[str]:
        words = good.lay(folder)
        path = folder / "base" / file
        config = json.loads(path.read_text())
        config[key] = int((config.get(key) or 16) * value) if scaled else value
        path.write_text(json.dumps(config))
        return words

    shown = f"{value!r:.40}" + f" of {len(str(value))}" * (len(str(value)) > 40)
    return Case(KIND, f"{file}: {key} {'×' if scaled else '='} {ascii(shown)[1:-1]}", make, right, near)
