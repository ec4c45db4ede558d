"""Run folders as training leaves them, for tiny models of many families, without the training."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, trainers

from qdpo.export.gguf.sentencepiece import LEGACY, SPACE
from qdpo.export.gguf.vocabulary import PROBES
from qdpo.export.trained import TrainedRun, trained_run
from qdpo.run.folder import RunDir
from qdpo.run.record import FileRecord, file_record
from tests.conftest import CHATML, tiny_tokenizer
from tests.model.families import SIZE, build
from tests.run.made import write_records

SHAPE = {**SIZE, "vocab_size": 400, "max_position_embeddings": 512}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Each way in which a family's GGUF differs from the others'.
WRITABLE: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**SHAPE),
    "llama-tied-linear": lambda: hf.LlamaConfig(
        **SHAPE,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    ),
    "llama3-rope": lambda: hf.LlamaConfig(**{**SHAPE, "num_attention_heads": 2}, rope_parameters=LLAMA3_ROPE),
    "mistral-window": lambda: hf.MistralConfig(**SHAPE, head_dim=16, sliding_window=256),
    "qwen2": lambda: hf.Qwen2Config(**SHAPE),
    "qwen3": lambda: hf.Qwen3Config(**SHAPE, head_dim=16),
    "gemma": lambda: hf.GemmaConfig(**SHAPE, head_dim=16),
    "gemma2": lambda: hf.Gemma2Config(**SHAPE, **GEMMA),
    "gemma3": lambda: hf.Gemma3TextConfig(**{**SHAPE, "num_hidden_layers": 7}, **GEMMA),
    "phi3": lambda: hf.Phi3Config(**SHAPE, original_max_position_embeddings=512),
}


def save_base(folder: Path, config: Any) -> Path:
    """A random model whose norms and biases are not at their defaults, with a tokenizer, as a hub folder is."""
    model = build(config, None)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def save_adapter(folder: Path, base: Path, **changes: Any) -> Path:
    """An adapter over `base` whose B is not zero, written by PEFT."""
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    torch.manual_seed(6)
    peft = get_peft_model(load(base), LoraConfig(**settings))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    peft.save_pretrained(folder, save_embedding_layers=False)
    return folder


def save_merged(folder: Path, base: Path, adapter: Path) -> Path:
    """The adapter merged into the base by PEFT, in float32."""
    PeftModel.from_pretrained(load(base), adapter).merge_and_unload().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 400, (1, 100), generator=torch.Generator().manual_seed(0))
    found: torch.Tensor = model(ids).logits[0].float()
    return found


def make_run(folder: Path, base: Path, *, merged: bool = False, **adapter: Any) -> TrainedRun:
    """A finished run over `base`; its records hold what exports and cards read."""
    save_adapter(folder / "adapter", base, **adapter)
    tiny_tokenizer().save_pretrained(folder / "adapter")
    if merged:
        save_merged(folder / "merged", base, folder / "adapter")
    pairs = folder.parent / "pairs.jsonl"
    data = FileRecord(bytes=0, mtime_ns=0, sha256="")
    files = {str(base / "config.json"): file_record(base / "config.json"), str(pairs): data}
    words = [f"data.path={pairs}", f"cache.dir={folder.parent / 'cache'}"]
    write_records(RunDir(folder), base, words, files=files, data=str(pairs))
    return trained_run(folder)


def pieces_tokenizer(kind: str) -> Any:
    """A tokenizer of about 700 pieces: as Llama 2's file is (legacy), as transformers makes it (first), or Gemma's.

    Every way to join a piece is a merge, in the order of the pieces' ranks, as converted tokenizers have them.
    """
    texts = [text.replace(" ", SPACE) for text in PROBES]
    learned = Tokenizer(models.BPE())
    alphabet = sorted({character for text in texts for character in text if ord(character) < 0x2FF} | {SPACE})
    learned.train_from_iterator(
        texts * 3,
        trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, limit_alphabet=150, show_progress=False),
    )
    ranked = sorted(learned.get_vocab(), key=learned.get_vocab().get)  # type: ignore[arg-type]
    special = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    words = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *ranked]
    vocab = {word: index for index, word in enumerate(words)}
    merges = [
        (word[:cut], word[cut:])
        for word in ranked
        for cut in range(1, len(word))
        if word[:cut] in ranked and word[cut:] in ranked
    ]
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    extra = {"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    if kind == "gemma":
        tokenizer = hf.GemmaTokenizer(vocab=vocab, merges=merges, **names, **extra)
    elif kind == "first":
        tokenizer = hf.LlamaTokenizer(vocab=vocab, merges=merges, **names, **extra)
    else:
        made = hf.LlamaTokenizer(vocab=vocab, merges=merges, **names, **extra)
        content = json.loads(made.backend_tokenizer.to_str()) | {"normalizer": LEGACY, "pre_tokenizer": None}
        backend = Tokenizer.from_str(json.dumps(content))
        tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend, **names, **extra)
    tokenizer.chat_template = CHATML
    return tokenizer
