"""A tiny chat model in a folder, pairs to train it on, and ways to run qdpo: in this process, or as a user would."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qdpo.data.tokens.sieve import TokenPair
from qdpo.model.policy.adapter import Policy
from qdpo.run.record import Result
from qdpo.settings import layered
from qdpo.settings.schema import RunConfig
from qdpo.train.loop import run_training
from qdpo.train.policy.build import load_policy, probe_pairs

ROOT = Path(__file__).resolve().parents[1]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NOUNS = "river stone cloud garden letter window market engine forest candle bridge teacher".split()
# Threads that spin beside those of another process can stall a matrix product: one each where the tests are shared out.
IS_SHARED_OUT = "PYTEST_XDIST_WORKER" in os.environ
if IS_SHARED_OUT:
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
torch.set_num_threads(1 if IS_SHARED_OUT else 2)
AS_USER = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "PYTHONPATH": str(ROOT)}


class Quiet:
    """A Watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.stages: list[tuple[str, int]] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def begin(self, what: str, total: int, unit: str) -> None:
        self.stages.append((what, total))

    def advance(self, units: int) -> None:
        pass

    def finish(self) -> None:
        pass

    def step(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(NOUNS), "user assistant system tell me about the, it is a"], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|end|>", extra_special_tokens=["<|im_start|>"]
    )
    wrapped.chat_template = CHATML
    return wrapped


def save_tiny_base(folder: Path, **shape: Any) -> Path:
    """A random Llama of 2 layers, 64 wide, with grouped-query attention, saved as a hub folder is."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(7)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
        **shape,
    }
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def untouched_policy(base: Path, pairs: Sequence[TokenPair]) -> Policy:
    """The base in fp32 on the CPU, nothing quantised, with a new adapter."""
    config = RunConfig.model_validate({"model": {"quantization": "none"}})
    device, probe = torch.device("cpu"), probe_pairs(pairs)
    return load_policy(config, base, device=device, dtype="fp32", probe_with=probe, say=lambda line: None).policy


def tiny_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompts with a short and a long answer of random nouns; the short one is preferred."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(NOUNS) for _ in range(rng.randint(low, high)))

    return [
        {"prompt": f"tell me about {words(2, 6)} {number}", "chosen": words(2, 6), "rejected": words(8, 16)}
        for number in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "pairs.jsonl", tiny_rows(40))


@pytest.fixture
def settings(tiny_base: Path, pairs_file: Path, tmp_path: Path) -> dict[str, str]:
    """Settings of a short run of the tiny model: fp32, nothing quantised, 4 pairs a step."""
    return {
        "model.path": str(tiny_base),
        "model.quantization": "none",
        "model.dtype": "fp32",
        "model.device": "cpu",
        "data.path": str(pairs_file),
        "data.eval_fraction": "0.2",
        "train.pairs_per_step": "4",
        "train.learning_rate": "1e-3",
        "train.optimizer": "adamw",
        "samples.count": "0",
        "output.dir": str(tmp_path / "runs"),
        "output.name": "run",
        "cache.dir": str(tmp_path / "cache"),
    }


def arguments(settings: dict[str, str], **changes: str) -> list[str]:
    """key=value arguments; `changes` are written with __ for the dot."""
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{name}={value}" for name, value in {**settings, **changed}.items()]


@pytest.fixture
def train(settings: dict[str, str]) -> Callable[..., tuple[Result, Quiet]]:
    """Runs training in this process: train(train__steps="3") → (result, what was said)."""

    def run(**changes: str) -> tuple[Result, Quiet]:
        watcher = Quiet()
        return run_training(layered.resolve(arguments(settings, **changes)), watcher), watcher

    return run


def qdpo(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line, in a process of its own, in an environment without a hub."""
    return subprocess.run(
        [sys.executable, "-m", "qdpo", *words],
        cwd=cwd,
        env={**AS_USER, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def start_qdpo(*words: str, cwd: Path) -> subprocess.Popen[str]:
    """The same, not waited for, and in a process group of its own, as a terminal starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "qdpo", *words], cwd=cwd, env=AS_USER, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
