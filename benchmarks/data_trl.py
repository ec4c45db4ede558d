"""TRL's side of scripts/bench_data: its trainer's own preparation of the same file, on one process or several."""

import time
from tempfile import TemporaryDirectory

import datasets
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOTrainer

from benchmarks.rounds import Parent
from benchmarks.trl_side import make_trainer, peak_gib


def main() -> None:
    parent = Parent()
    job = parent.job
    datasets.disable_caching()  # a second round would find the first one's ids
    size = len(AutoTokenizer.from_pretrained(job["folder"], local_files_only=True))
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, num_key_value_heads=1, **shape))
    some = {"folder": job["folder"], "pairs": [["q", "a", "b"]], "arguments": {"max_length": job["max_tokens"]}}
    with TemporaryDirectory() as folder:
        trainer = make_trainer(DPOTrainer, some, model, LoraConfig(r=1, target_modules=["q_proj"]), folder)
        trainer.args.dataset_num_proc = job["processes"]
        parent.answer(peak_gib=peak_gib())
        while True:
            parent.wait()
            with TemporaryDirectory() as cache:
                begun = time.monotonic()
                rows = datasets.load_dataset("json", data_files=job["file"], split="train", cache_dir=cache)
                done = trainer._prepare_dataset(rows, trainer.processing_class, trainer.args, "train")
                seconds = time.monotonic() - begun
                pairs = len(done)
                del rows, done
            parent.answer(seconds=seconds, pairs=pairs, peak_gib=peak_gib())


if __name__ == "__main__":
    main()
