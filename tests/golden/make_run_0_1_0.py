#!/usr/bin/env python3
"""Makes tests/golden/run-0.1.0 by version 0.1.0's own command line: tests/golden/make_run_0_1_0.py [--keep FOLDER]

Two kinds of runs of one random Llama (2 layers, 32 wide): `plain` (fp32 weights, AdamW) and `nf4` (4-bit base, 8-bit
AdamW, a loss list, one pair a row). Of each kind there is a run that SIGTERM stopped and one that nobody stopped; both
read one reference cache. about.json holds their settings, the environment, the versions, and how the machine rounds.

Settings hold relative paths only. The folder that the runs were made in is written as @HERE@: run.json names it to
notice changed files, adapter_config.json and the cache for people to read. No digest and no key depends on it.
Needs the tag v0.1.0 in this repository. Renew the fixture only if it does not hold what 0.1.0 writes: its purpose is to
stay as it is.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

ROOT = Path(__file__).resolve().parents[2]
TARGET = Path(__file__).resolve().parent / "run-0.1.0"
REV, ENTRY, HERE = "v0.1.0", "qdpo.cli", "@HERE@"
# What the numbers depend on, as alike as can be on other x86 CPUs; the capability is also part of a reference's name.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "HF_HUB_OFFLINE": "1",
    "COLUMNS": "120",
}  # fmt: skip
SETTINGS = {
    "model.path": "base", "model.dtype": "fp32", "model.device": "cpu", "data.path": "pairs.jsonl",
    "data.eval_fraction": "0.25", "train.pairs_per_step": "3", "train.epochs": "3", "train.learning_rate": "1e-3",
    "train.eval_every": "3", "train.save_every": "2", "memory.kept_layers": "1", "samples.count": "2",
    "samples.max_new_tokens": "8", "output.dir": "runs", "cache.dir": "cache",
}  # fmt: skip
KINDS = {
    "plain": {
        "model.quantization": "none", "train.optimizer": "adamw", "memory.tokens_per_row": "96", "adapter.rank": "4",
        "adapter.alpha": "8",
    },
    # 8-bit states begin at 4,096 numbers: A of down_proj has 64 x 64.
    "nf4": {
        "model.quantization": "nf4", "train.optimizer": "adamw8bit", "memory.tokens_per_row": "0",
        "adapter.rank": "64", "adapter.targets": "down_proj", "loss.name": "sigmoid+sft", "loss.weights": "1+0.1",
    },
}  # fmt: skip
STOPPED, FINISHED = {"train.keep_checkpoints": "2"}, {"train.keep_checkpoints": "1"}
STOP_AFTER = 4
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "tokenizers")
NOUNS = "river stone cloud garden letter window market engine forest candle bridge teacher".split()
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="work in this new folder, and leave it")
    options = parser.parse_args()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary) / "tree"
        git("worktree", "add", "--detach", str(tree), REV)
        try:
            work = (options.keep or Path(temporary) / "work").absolute()
            work.mkdir(parents=True)
            fill(work, tree)
            shutil.rmtree(TARGET, ignore_errors=True)
            shutil.copytree(work, TARGET)
            hide_places(TARGET, work, tree)
        finally:
            git("worktree", "remove", "--force", str(tree))
    size = sum(path.stat().st_size for path in TARGET.rglob("*") if path.is_file())
    print(f"{TARGET.relative_to(ROOT)}: {size / 1e6:.2f} MB")
    return 0


def git(*words: str) -> None:
    subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True)


def fill(work: Path, tree: Path) -> None:
    """Base, pairs, prompts, and the runs of every kind."""
    save_base(work / "base")
    write_pairs(work / "pairs.jsonl")
    (work / "prompts.txt").write_text("tell me about river stone\ntell me about cloud garden\n", encoding="utf-8")
    runs = {}
    for kind, settings in KINDS.items():
        for state, kept in (("stopped", STOPPED), ("finished", FINISHED)):
            name = f"{kind}-{state}"
            runs[name] = {**SETTINGS, **settings, **kept, "output.name": name}
            words = ["run", *(f"{key}={value}" for key, value in runs[name].items())]
            if state == "finished":
                step = qdpo(words, work, tree, stop_after=None)
            else:
                while (step := qdpo(words, work, tree, stop_after=STOP_AFTER)) is None:  # it was over too soon
                    shutil.rmtree(work / "runs" / name)
            print(f"{name}: {'finished' if step is None else f'stopped after step {step}'}")
    about = {
        "made_by": f"tests/golden/make_run_0_1_0.py with {REV}", "environment": ENVIRONMENT, "runs": runs,
        "packages": {name: metadata.version(name) for name in PACKAGES}, "python": platform.python_version(),
        "rounding": rounding(work / "base"),
    }  # fmt: skip
    (work / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def rounding(base: Path) -> str:
    """How this machine rounds, in the environment of the runs."""
    words = [sys.executable, str(ROOT / "tests" / "golden" / "rounding.py"), str(base / "model.safetensors")]
    return subprocess.run(
        words, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=True
    ).stdout.strip()


def qdpo(words: list[str], work: Path, tree: Path, *, stop_after: int | None) -> int | None:
    """Runs to the end (None), or sends SIGTERM when that step is printed; returns the step that was saved then."""
    process = subprocess.Popen(
        [sys.executable, "-m", ENTRY, *words], cwd=work, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(tree)},
    )  # fmt: skip
    assert process.stdout is not None
    lines, waits = [], stop_after is not None
    for line in process.stdout:
        lines.append(line)
        if waits and line.startswith(f"step {stop_after}/"):
            process.send_signal(signal.SIGTERM)
            waits = False  # a second signal would leave before the step is saved
    code, printed = process.wait(), "".join(lines)
    if code == 0:
        return None
    found = re.search(r"Stopped after step (\d+) of", printed)
    if code != 128 + signal.SIGTERM or found is None:
        sys.exit(f"exit code {code}:\n{printed}")
    return int(found[1])


def hide_places(folder: Path, work: Path, tree: Path) -> None:
    """Writes @HERE@ for the folder the runs were made in; removes what only tells of this machine."""
    for log in folder.rglob("debug.log"):  # tracebacks of the stop
        log.unlink()
    hidden = {str(work): HERE, platform.release(): "@KERNEL@"}
    for path in folder.rglob("*"):
        if path.suffix in {".json", ".jsonl", ".toml", ".md"}:
            text = path.read_text(encoding="utf-8")
            for place, name in hidden.items():
                text = text.replace(place, name)
            path.write_text(text, encoding="utf-8")
        elif path.suffix == ".sqlite":  # names the base, for people to read
            with contextlib.closing(sqlite3.connect(path)) as database:
                with database:
                    database.execute("UPDATE about SET description = replace(description, ?, ?)", (str(work), HERE))
                database.execute("VACUUM")
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for place in (*hidden, str(tree), str(ROOT), sys.prefix, str(Path.home())):
            if place.encode() in content:
                sys.exit(f"{path} names {place}")


def save_base(folder: Path) -> None:
    """A random Llama with grouped-query attention and a byte-level tokenizer of 400 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([" ".join(NOUNS), "user assistant system tell me about the, it is a"], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|end|>", extra_special_tokens=["<|im_start|>"]
    )
    wrapped.chat_template = CHATML
    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.2, vocab_size=len(wrapped), eos_token_id=wrapped.eos_token_id, bos_token_id=None,
        pad_token_id=wrapped.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)


def write_pairs(path: Path) -> None:
    """Twelve pairs of random nouns, the short answer preferred, and a tie, which the data report names."""
    rng = random.Random(0)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(NOUNS) for _ in range(rng.randint(low, high)))

    rows = [
        {"prompt": f"tell me about {words(2, 6)} {number}", "chosen": words(2, 6), "rejected": words(8, 16)}
        for number in range(12)
    ]
    rows.append({"prompt": "tell me about ties", "chosen": "stone", "rejected": "stone"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
