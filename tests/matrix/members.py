"""A tiny model of each family as a folder that a hub would hold: weights with which a fault shows, and a tokenizer."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers as hf
from safetensors.torch import save_file

from tests.matrix.configs import TEXT, TINY, Size, text_config
from tests.matrix.folders import FOLDERS
from tests.matrix.tokenizers import ids_of, tokenizer_of

Kind = Literal["text", "folder"]
# Its tower is built by another library (timm), which is not a dependency: its files are made without its class.
WITHOUT_CLASS = {"gemma3n"}


@dataclass(frozen=True)
class Member:
    """A row of the matrix: a family's text model, or a multimodal model as its maker ships it."""

    kind: Kind
    name: str

    @property
    def key(self) -> str:
        return f"{self.kind} {self.name}"

    @property
    def model_type(self) -> str:
        return TEXT[self.name].model_type if self.kind == "text" else self.name.partition(" ")[0]

    def config(self, size: Size, **ids: int) -> Any:
        """The transformers config of this size."""
        if self.kind == "text":
            return text_config(TEXT[self.name], size, **ids)
        return FOLDERS[self.name](size, ids)


MEMBERS = [*(Member("text", name) for name in TEXT), *(Member("folder", name) for name in FOLDERS)]


def save_member(member: Member, folder: Path) -> str:
    """Writes the tiny model of a family in bf16, with its tokenizer; returns the name of its class."""
    tokenizer = tokenizer_of(member.model_type)
    config = member.config(TINY, **ids_of(tokenizer))
    torch.manual_seed(1)
    if member.name in WITHOUT_CLASS and member.kind == "folder":
        name = _save_nested(config, folder)
    else:
        make: Any = hf.AutoModelForCausalLM if member.kind == "text" else hf.AutoModelForImageTextToText
        model = make.from_config(config, dtype=torch.float32)
        randomise(model)
        model.to(torch.bfloat16).save_pretrained(folder)
        name = type(model).__name__
    tokenizer.save_pretrained(folder)
    if member.kind == "folder":
        processor = {"processor_class": member.model_type, "image_seq_length": 4}
        (folder / "processor_config.json").write_text(json.dumps(processor) + "\n", encoding="utf-8")
    return name


def _save_nested(config: Any, folder: Path) -> str:
    """The text model's tensors under the names of the whole class, and a tower that is only tensors."""
    text = hf.AutoModelForCausalLM.from_config(config.get_text_config(), dtype=torch.float32)
    randomise(text)
    tied = {"lm_head.weight"} if config.get_text_config().tie_word_embeddings else set()
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor.to(torch.bfloat16).contiguous()
        for name, tensor in text.state_dict().items()
        if name not in tied
    }
    tensors["model.vision_tower.timm_model.conv_stem.conv.weight"] = torch.randn(8, 3, 3, 3).to(torch.bfloat16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    name = type(config).__name__.replace("Config", "ForConditionalGeneration")
    config.architectures = [name]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    return str(name)


@torch.no_grad()
def randomise(model: Any) -> None:
    """Weights with which a fault shows: wide matrices, norms that are not 1, biases and sinks that are not 0."""
    generator = torch.Generator().manual_seed(1)

    def noise(tensor: torch.Tensor, std: float) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator) * std

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        last = name.rpartition(".")[2]
        if last == "e_score_correction_bias" or (last == "bias" and name.endswith("gate.bias")):
            tensor.copy_(noise(tensor, 0.05))
        elif not isinstance(tensor, torch.nn.Parameter):
            continue  # rotary frequencies and the like
        elif tensor.dim() > 1:
            tensor.copy_(noise(tensor, 0.1))
        elif not tensor.isfinite().all() or tensor.abs().max() > 1e3 or not tensor.any() or last == "sinks":
            tensor.copy_(noise(tensor, 0.5))  # where all are 0, whole branches would be idle
        elif "norm" in name or "bias" in last:
            tensor.add_(noise(tensor, 0.2 if "norm" in name else 0.1))
