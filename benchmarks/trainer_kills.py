"""transformers' Trainer, killed while it saves: does the next start continue, and does it end where it would have?

A worker is `python -m benchmarks.trainer_kills FOLDER FILE COUNT`: it trains a random Llama of 2 layers for 6 steps in
fp32, saves after each (save_steps=1), continues with resume_from_checkpoint=True where there is a checkpoint, and is
killed when half the bytes of FILE are written for the COUNT-th time. Needs torch and transformers only.
"""

import collections
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
# In the order in which Trainer writes them.
FILES = (
    "model.safetensors",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)
STEPS = 6


def soak(work: Path, kills: int) -> dict[str, Any]:
    """Kills `kills` runs once each, inside saving, and starts each again; prints a line for each."""
    golden = _start(work / "golden", "nothing", 0)
    assert golden.returncode == 0, golden.stderr
    expected, whole = _digest(work / "golden"), _names(work / "golden" / "checkpoint-1")
    found: list[dict[str, Any]] = []
    for number in range(kills):
        file, step = FILES[number % len(FILES)], 2 + number // len(FILES) % (STEPS - 2)
        folder = work / f"run-{number + 1:03d}"
        killed = _start(folder, file, step)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        damaged = newest.name == f"checkpoint-{step}"
        lacks = sorted(whole - _names(newest))
        again = _start(folder, "nothing", 0)
        if again.returncode:
            outcome = "the next start fails"
        else:
            outcome = "equals the golden run" if _digest(folder) == expected else "ends with another model"
            outcome = f"starts from a damaged checkpoint, {outcome}" if damaged else outcome
        error = again.stderr.strip().splitlines()[-1][:160].replace(str(work), "…") if again.returncode else None
        entry = {"file": file, "step": step, "lacks": lacks, "outcome": outcome, "error": error}
        if again.returncode and number < len(FILES):  # by hand, once for each file
            shutil.rmtree(newest)
            by_hand = _start(folder, "nothing", 0)
            entry["without_that_folder"] = by_hand.returncode == 0 and _digest(folder) == expected
        found.append(entry)
        print(f"kill {number + 1:3}  {file} of checkpoint-{step} torn: {outcome}  {error or ''}", flush=True)
    outcomes = collections.Counter(entry["outcome"] for entry in found)
    control = _control(work / "control", expected)
    print(f"Trainer: {kills} kills inside saving: {dict(outcomes)}; killed between two saves: {control}")
    return {"golden": expected, "steps": STEPS, "outcomes": dict(outcomes), "between_saves": control, "kills": found}


def _control(folder: Path, expected: str) -> str:
    """What becomes of a run that is killed when no save is under way."""
    assert _start(folder, "step", 3).returncode == -signal.SIGKILL
    again = _start(folder, "nothing", 0)
    if again.returncode:
        return "the next start fails"
    return "equals the golden run" if _digest(folder) == expected else "ends with another model"


def _start(folder: Path, file: str, count: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.trainer_kills", str(folder), file, str(count)],
        cwd=Path(__file__).resolve().parents[1], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True,
    )  # fmt: skip


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "final" / "model.safetensors").read_bytes()).hexdigest()


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def work(folder: str, file: str, count: int) -> None:
    """The worker: trains, or continues, in `folder`."""
    left = count

    def reached(path: Any) -> bool:
        nonlocal left
        left -= Path(path).name == file
        return left == 0 and Path(path).name == file

    def tear(path: Any, content: bytes) -> None:
        Path(path).write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    import torch
    from safetensors import torch as safe

    real_save, real_safe = torch.save, safe.save_file

    def saving(value: Any, path: Any, *rest: Any, **options: Any) -> None:
        if reached(path):
            whole = io.BytesIO()
            real_save(value, whole)
            tear(path, whole.getvalue())
        real_save(value, path, *rest, **options)

    def safely(tensors: Any, path: Any, metadata: Any = None) -> None:
        if reached(path):  # safetensors 0.8 writes under such a name and renames
            tear(Path(path).with_name(".tmpSoaked"), safe.save(tensors, metadata))
        real_safe(tensors, path, metadata)

    torch.save, safe.save_file = saving, safely  # before transformers takes them by name
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainerState, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    real_json = TrainerState.save_to_json

    def state(self: Any, path: str) -> None:
        real_json(self, path)
        if reached(path):
            tear(path, Path(path).read_bytes())

    class AfterStep(TrainerCallback):
        """Ends the process after a step, before it is saved."""

        def on_step_end(self, *_words: Any, **_options: Any) -> None:
            if reached("step"):
                os.kill(os.getpid(), signal.SIGKILL)

    TrainerState.save_to_json = state
    torch.manual_seed(7)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=256,
        )
    )  # fmt: skip
    ids = torch.randint(256, (16, 32), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-3, save_steps=1, use_cpu=True,
        report_to="none", seed=0, logging_steps=1,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[AfterStep()])
    found = Path(folder).is_dir() and get_last_checkpoint(folder) is not None
    trainer.train(resume_from_checkpoint=True if found else None)
    trainer.save_model(str(Path(folder) / "final"))


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], int(sys.argv[3]))
