"""Hints for a setting that does not exist: the one that other kits call so, one spelt alike, or all of its section."""

import difflib
from collections.abc import Sequence

ELSEWHERE = {
    "model.path": "model_name_or_path base_model model_name model_id pretrained model.name model.id",
    "model.dtype": "bf16 fp16 torch_dtype precision",
    "model.quantization": "load_in_4bit load_in_8bit quant bits",
    "adapter.rank": "r lora_r lora_rank peft_r",
    "adapter.alpha": "lora_alpha",
    "adapter.targets": "target_modules lora_target_modules lora_target",
    "adapter.start": "adapter_name_or_path resume_from_adapter lora_model_dir adapter.path",
    "data.path": "dataset dataset_name dataset_path datasets train_file data_file data_files train_path data.file",
    "data.eval_path": "eval_dataset eval_file test_file test_path val_path data.eval data.test",
    "data.eval_fraction": "val_size val_set_size test_size eval_ratio",
    "data.max_tokens": "max_length max_seq_length max_seq_len sequence_len cutoff_len max_len context_length",
    "data.max_prompt_tokens": "max_prompt_length",
    "data.template": "chat_template",
    "loss.name": "loss_type rl pref_loss loss.type",
    "loss.beta": "pref_beta dpo_beta",
    "train.pairs_per_step": "batch_size train_batch_size per_device_train_batch_size micro_batch_size "
    "gradient_accumulation_steps grad_accum global_batch_size",
    "train.epochs": "num_train_epochs num_epochs",
    "train.steps": "max_steps num_steps iters",
    "train.learning_rate": "lr peak_lr",
    "train.schedule": "lr_scheduler lr_scheduler_type scheduler",
    "train.warmup_steps": "warmup_ratio warmup",
    "train.optimizer": "optim",
    "train.save_every": "save_steps checkpoint_every",
    "train.eval_every": "eval_steps",
    "train.keep_checkpoints": "save_total_limit",
    "train.seed": "random_seed",
    "memory.kept_layers": "gradient_checkpointing activation_checkpointing",
    "output.dir": "output_dir out_dir save_dir output.path",
    "output.name": "run_name",
    "track.to": "report_to wandb",
}
"""Settings, and the names that TRL, PEFT, Axolotl, LLaMA-Factory and others give to what each decides."""
OURS = {theirs: name for name, words in ELSEWHERE.items() for theirs in words.split()}


def hint(name: str, known: Sequence[str]) -> str:
    """A sentence for an unknown setting. Sections share their name's beginning, so last parts are compared alone."""
    section, _, leaf = name.rpartition(".")
    if theirs := OURS.get(name) or OURS.get(leaf):
        return f"The setting for it is {theirs!r}."
    same = [setting for setting in known if setting.rpartition(".")[2] == leaf]
    if same:
        return f"Did you mean {' or '.join(map(repr, same))}?"
    siblings = [setting for setting in known if setting.rpartition(".")[0] == section]
    by_leaf = {setting.rpartition(".")[2]: setting for setting in reversed(siblings or known)}
    if close := difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.65):
        return f"Did you mean {by_leaf[close[0]]!r}?"
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.85):
        return f"Did you mean {close[0]!r}?"
    if siblings:
        return f"{section} has: {', '.join(setting.rpartition('.')[2] for setting in siblings)}."
    return "`qdpo run preset=demo --dry-run` lists every setting."
