"""TRL's side of scripts/compare_trl and scripts/gpu_proof, run by the Python of TRL's own environment.

The job: `folder` of the base · `pairs`, each [prompt, chosen, rejected] as text, in the order of training · `arguments`
of DPOConfig. To train, also: `adapter`, a PEFT folder with the initial weights · `dtype` · `nf4`, whether the base is
quantised · `rounds`, the number of steps of each · `response_head`, whether only response positions go through the
output head: TRL does that on CUDA, and has no switch for it on the CPU. Without `adapter` the answer is TRL's ids.
Optional: `device`, cpu by default · `shape`, a folder with the config of which a base with random weights is built (the
one use of qdpo here; `folder` then holds the tokenizer alone, and the adapter is PEFT's own fresh one) · `allowed_gib`,
what torch's allocator may take.
"""

import resource
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, load_peft_weights, set_peft_model_state_dict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer
from trl.trainer import utils

from benchmarks.rounds import Parent

PACKAGES = ("trl", "torch", "transformers", "peft", "bitsandbytes", "accelerate")


class Counting(DPOTrainer):
    """Counts the positions of every training batch, and the seconds of the reference."""

    positions = 0
    reference_s = 0.0

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        self.positions += inputs["input_ids"].numel()
        return super().compute_loss(model, inputs, *arguments, **named)

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        begun = time.monotonic()
        result = super().compute_ref_log_probs(model, inputs)
        self.reference_s += time.monotonic() - begun
        return result


class Rounds(TrainerCallback):
    """Holds the training before each round, and answers after it with what was logged."""

    def __init__(self, parent: Parent, trainer: Counting, rounds: list[int]):
        self.parent, self.trainer, self.left = parent, trainer, [*rounds]
        self.logged: list[dict[str, float]] = []
        self.answered = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if not self.logged:
            self.parent.wait()
            if torch.cuda.is_available() and not self.answered:
                torch.cuda.reset_peak_memory_stats()
            wait_for_device()
            self.begun, self.trainer.positions = time.monotonic(), 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **others: Any) -> None:
        if "loss" not in logs:
            return
        self.logged.append(logs)
        if len(self.logged) == self.left[0]:
            wait_for_device()
            seconds = time.monotonic() - self.begun
            self.answered = True
            self.parent.answer(
                seconds=seconds, positions=self.trainer.positions, records=self.logged, peak_gib=peak_gib()
            )
            self.logged = []
            self.left.pop(0)


def wait_for_device() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_gib() -> float:
    """Peak memory so far, in GiB: of torch's allocator since training began, or resident memory of the process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "linux":  # getrusage would hand on the peak of the parent
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def make_trainer(kind: type[DPOTrainer], job: dict[str, Any], model: Any, lora: LoraConfig, folder: str) -> Any:
    columns = zip(*job["pairs"], strict=True)
    return kind(
        model=model,
        args=DPOConfig(
            output_dir=folder,
            use_cpu=job.get("device", "cpu") == "cpu",
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            train_sampling_strategy="sequential",
            dataloader_pin_memory=False,
            **job["arguments"],
        ),  # fmt: skip
        train_dataset=Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected"), map(list, columns), strict=True))),
        processing_class=AutoTokenizer.from_pretrained(job["folder"], local_files_only=True),
        peft_config=lora,
    )


def tokenise(parent: Parent, folder: str) -> None:
    """Answers with the ids that the trainer makes of the texts; its model has no part in them, so it is a tiny one."""
    size = len(AutoTokenizer.from_pretrained(parent.job["folder"], local_files_only=True))
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, num_key_value_heads=1, **shape))
    trainer = make_trainer(DPOTrainer, parent.job, model, LoraConfig(r=1, target_modules=["q_proj"]), folder)
    rows = trainer.train_dataset
    parent.answer(ids=[[row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]] for row in rows])


def load(job: dict[str, Any]) -> Any:
    """The base: from its folder, or of a shape with random weights."""
    dtype = getattr(torch, job["dtype"])
    if "shape" in job:
        from qdpo.measure import random_base

        torch.manual_seed(0)
        return random_base.random_base(
            AutoConfig.from_pretrained(job["shape"], local_files_only=True), quantization="nf4", double_quant=True,
            dtype=dtype, device=torch.device(job["device"]),
        )  # fmt: skip
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=dtype, device_map={"": "cpu"}, local_files_only=True,
        **({"quantization_config": quantised} if job["nf4"] else {}),
    )  # fmt: skip


def train(parent: Parent, folder: str) -> None:
    job = parent.job
    if job.get("allowed_gib") is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(job["allowed_gib"] * 2**30 / total, 0)
    model = load(job)
    for layer in model.modules():
        # Otherwise the reference pass repacks 4-bit weights on some CPUs, and training gets no gradient (bitsandbytes
        # 0.50, AVX512-BF16).
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    if job["response_head"]:
        utils._use_triton = lambda device: True
    if job["adapter"] is None:
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    else:
        lora = LoraConfig.from_pretrained(job["adapter"])
        lora.inference_mode = False
    trainer = make_trainer(Counting, job, model, lora, folder)
    if job["adapter"] is not None:
        set_peft_model_state_dict(trainer.model, load_peft_weights(job["adapter"], device="cpu"))
    trainer.add_callback(Rounds(parent, trainer, job["rounds"]))
    trained = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
    parent.answer(
        versions={name: metadata.version(name) for name in PACKAGES},
        reference_s=trainer.reference_s,
        adapter_dtype=" ".join(sorted(str(kind).removeprefix("torch.") for kind in trained)),
    )
    trainer.train()


def main() -> None:
    parent = Parent()
    with tempfile.TemporaryDirectory() as folder:
        (train if "adapter" in parent.job else tokenise)(parent, folder)


if __name__ == "__main__":
    main()
