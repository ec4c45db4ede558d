"""llama.cpp itself computes what was trained: logits of every family, with and without --lora, token ids, and text."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from peft import PeftModel
from tokenizers import Tokenizer, models, trainers

from qdpo.export.gguf.adapter import write_gguf_adapter
from qdpo.export.gguf.model import write_gguf
from qdpo.export.gguf.vocabulary import BYTES, PROBES, SPLITS, TAKES_WORDS_WHOLE
from qdpo.export.trained import trained_run
from qdpo.model.base import fetch
from qdpo.model.base.load import load_tokenizer
from qdpo.run.disk import cache_folder
from qdpo.run.folder import RunDir
from qdpo.settings.layered import resolve
from qdpo.settings.schema import RunConfig
from tests.conftest import tiny_tokenizer
from tests.export.made import WRITABLE, load, logits, pieces_tokenizer, save_adapter, save_base
from tests.export.native import ask, installed
from tests.run.made import write_records

pytestmark = pytest.mark.slow
PROMPTS = (
    "What is the capital of France?",
    "Write two lines about rain.",
    "How much is 12 * 7?",
    "List three fruits.",
    "Why is the sky blue?",
)
TEXTS = (
    *PROBES,
    *PROMPTS,
    "<|im_start|>user\nhi 12345<|im_end|>\n<|im_start|>assistant\n",
    "".join(chr(code) for code in range(33, 0x250)),
    "1.2.3 v10.20 2026-11-22T23:59:59Z $1,234.56 -7% 0x1F 1e-5",
)
NEW_TOKENS = 24
# Where the two best logits are nearer than this, another order of additions may choose the other.
CLOSE = 0.05


@pytest.fixture(scope="module")
def tools() -> Path:
    return installed()


@pytest.mark.parametrize("name", WRITABLE)
def test_logits_of_every_family_with_and_without_the_adapter(name: str, tools: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", WRITABLE[name]())
    adapter = save_adapter(tmp_path / "adapter", base, use_rslora=True, rank_pattern={"o_proj": 2})
    write_gguf(base, tmp_path / "model.gguf", quant="f32", name="tiny", base_gguf=None)
    write_gguf_adapter(adapter, base, tmp_path / "lora.gguf", quant="f32", name="tiny")
    ids = torch.randint(3, 400, (1, 100), generator=torch.Generator().manual_seed(0))[0].tolist()
    plain, adapted = logits(load(base)), logits(PeftModel.from_pretrained(load(base), adapter))
    assert (plain - adapted).abs().max() > 0.5
    for expected, lora in ((plain, None), (adapted, tmp_path / "lora.gguf")):
        answer = ask(tools, gguf=tmp_path / "model.gguf", lora=lora, ids=[ids], texts=PROBES)
        assert np.abs(np.array(answer["logits"][0]) - expected.numpy()).max() < 5e-3, lora
    assert answer["template"] == tiny_tokenizer().chat_template


@pytest.mark.parametrize("pre", SPLITS)
def test_token_ids_under_every_rule(pre: str, tools: Path, tmp_path: Path) -> None:
    """With merges learned under the rule, which stay within its pieces, and with merges that do not."""
    base = save_base(tmp_path / "base", WRITABLE["llama"]())
    for learned in (SPLITS[pre], {**BYTES, "use_regex": False}):
        tokenizer = trained_tokenizer(pre, learned)
        resize(base, tokenizer)
        write_gguf(base, tmp_path / "model.gguf", quant="f32", name="tiny", base_gguf=None)
        expected = [load_tokenizer(base)(text, add_special_tokens=False).input_ids for text in TEXTS]
        found = ask(tools, gguf=tmp_path / "model.gguf", texts=TEXTS)["tokens"]
        for text, ours, theirs in zip(TEXTS, expected, found, strict=True):
            assert theirs == ours, f"{pre}: {text!r}"


@pytest.mark.parametrize("kind", ["legacy", "first", "gemma"])
def test_token_ids_of_pieces(kind: str, tools: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", WRITABLE["gemma2" if kind == "gemma" else "mistral-window"]())
    tokenizer = pieces_tokenizer(kind)
    resize(base, tokenizer)
    write_gguf(base, tmp_path / "model.gguf", quant="f32", name="tiny", base_gguf=None)
    # A chat begins with a special token; where only the very first text gets a space, such texts are the same.
    texts = [f"<|im_start|>{text}<|im_end|>\n{text}" for text in TEXTS] + ([] if kind == "first" else [*TEXTS])
    expected = [load_tokenizer(base)(text, add_special_tokens=False).input_ids for text in texts]
    found = ask(tools, gguf=tmp_path / "model.gguf", texts=texts)["tokens"]
    for text, ours, theirs in zip(texts, expected, found, strict=True):
        assert theirs == ours, f"{kind}: {text!r}"


def trained_tokenizer(pre: str, learned: dict[str, Any]) -> Any:
    """A byte-level BPE of 700 tokens, its merges learned under one rule, used under that of `pre`."""
    whole = pre in TAKES_WORDS_WHOLE
    content = json.loads(Tokenizer(models.BPE(ignore_merges=whole)).to_str())
    content |= {"pre_tokenizer": learned, "decoder": {**BYTES}}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    alphabet = tiny_tokenizer().backend_tokenizer.get_vocab()
    special = ["<|end|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        initial_alphabet=[t for t in alphabet if len(t) == 1],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS] * 3, trainer)
    content = json.loads(tokenizer.to_str()) | {"pre_tokenizer": SPLITS[pre]}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|im_end|>", pad_token="<|end|>"
    )


def resize(base: Path, tokenizer: Any) -> None:
    model = load(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path | None]:
    """SmolLM2 of the demo with an adapter merged into it, in float32, and the GGUF file that it came from."""
    model: RunConfig = resolve(["preset=demo"]).config
    cache = cache_folder(None)
    base = fetch.locate_base(str(model.model.path), revision=None, cache_dir=cache, announce=print).folder
    folder = tmp_path_factory.mktemp("smol")
    adapter = save_adapter(folder / "adapter", base, r=8, target_modules=["q_proj", "k_proj", "down_proj"])
    tensors = PeftModel.from_pretrained(load(base), adapter)
    for name, parameter in tensors.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.02  # enough to change what is said, and it is still language
    tensors.merge_and_unload().save_pretrained(folder / "merged")
    load_tokenizer(base).save_pretrained(folder / "merged")
    write_records(RunDir(folder), base, ["data.path=pairs.jsonl"], source=model.model.path)
    return folder / "merged", trained_run(folder).base_gguf(print)


def test_smollm2_says_the_same_in_llama_cpp(merged: tuple[Path, Path | None], tools: Path, tmp_path: Path) -> None:
    folder, base_gguf = merged
    assert base_gguf is not None
    written = write_gguf(folder, tmp_path / "m.gguf", quant="f32", name="SmolLM2", base_gguf=base_gguf)
    assert "tokenizer fields of" in written.vocabulary
    tokenizer, model = load_tokenizer(folder), load(folder)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True).input_ids
        for text in PROMPTS
    ]
    answer = ask(tools, gguf=tmp_path / "m.gguf", texts=TEXTS, greedy=[[ids, NEW_TOKENS] for ids in prompts])
    for text, theirs in zip(TEXTS, answer["tokens"], strict=True):
        assert theirs == tokenizer(text, add_special_tokens=False).input_ids, text
    assert answer["template"] == tokenizer.chat_template
    for prompt, theirs in zip(prompts, answer["greedy"], strict=True):
        require_same_choice(model, tokenizer, prompt, theirs)


@torch.no_grad()
def require_same_choice(model: Any, tokenizer: Any, prompt: list[int], theirs: list[int]) -> None:
    """Each of their tokens is transformers' choice after what stands before it, or all but."""
    found = model(torch.tensor([prompt + theirs])).logits[0, len(prompt) - 1 : -1]
    gap = found.max(-1).values - found.gather(1, torch.tensor(theirs)[:, None])[:, 0]
    same = (gap == 0).sum().item()
    assert gap.max() < CLOSE and same >= len(theirs) - 1, (tokenizer.decode(theirs), gap)
    assert len(theirs) == NEW_TOKENS or theirs[-1] == tokenizer.eos_token_id
