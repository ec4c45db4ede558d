"""Settings of a measurement, for the device at hand; in a try-out, of a tiny shape and with short pairs."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.proof.items import NotApplicable
from qdpo.forecast.memory import GIB
from qdpo.settings import layered
from qdpo.settings.layered import Resolved

TINY_TOKENS = 64
TINY = {
    "model.dtype": "fp32", "data.max_tokens": TINY_TOKENS, "train.pairs_per_step": 4, "memory.embeddings": "auto",
}  # fmt: skip


def resolve(job: dict[str, Any], *words: str) -> Resolved:
    """The settings of `words`; nothing is read from data.path."""
    given = {word.partition("=")[0] for word in words}
    fixed = {} if "preset" in given else {"data.path": "none.jsonl"}
    more: dict[str, Any] = {**fixed, "model.device": job["device"]}
    if job["tiny"]:
        more |= {"model.path": tiny_shape(), **TINY}
        words = tuple(word for word in words if word.partition("=")[0] not in more)
    return layered.resolve([*words, *(f"{name}={value}" for name, value in more.items())])


def tiny_shape() -> Path:
    """A folder with the config of a Llama of three layers, and no weights."""
    folder = Path(tempfile.mkdtemp(prefix="qdpo-tiny-"))
    LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1000, tie_word_embeddings=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def check_card(job: dict[str, Any]) -> None:
    """Raises: NotApplicable if this GPU is smaller than the card that it is to stand for."""
    if job["device"] == "cuda" and job["card_gib"] is not None:
        total = torch.cuda.get_device_properties(device_of(job)).total_memory / GIB
        if total < 0.95 * job["card_gib"]:  # a card's full size is not all torch's to see
            raise NotApplicable(f"this GPU has {total:.1f} GiB, and cannot stand for one of {job['card_gib']:g}")


def device_of(job: dict[str, Any]) -> torch.device:
    if job["device"] == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
