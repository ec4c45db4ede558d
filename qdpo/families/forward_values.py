"""The values of a model's config that a forward pass may depend on, as one digest. No torch."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# Fields that no log-prob depends on; a field that is not listed counts. `pad_token_id` does: RoBERTa's relatives number
# their positions by it.
NAMES = {"_name_or_path", "architectures", "auto_map", "transformers_version", "id2label", "label2id", "problem_type"}
# The compute type is part of a reference's identity by itself, and 4-bit weights are, as loaded.
ELSEWHERE = {"dtype", "torch_dtype", "quantization_config"}
# Generation and output; scoring uses no cache and reads the last hidden states.
OUTPUT = {
    "bos_token_id", "eos_token_id", "use_cache", "return_dict", "output_attentions", "output_hidden_states",
    "output_router_logits",
}  # fmt: skip
# Training by others: first weights, dropout (a policy is in evaluation mode), losses of routers. Not their noise:
# `router_jitter_noise` is a threshold in PhiMoE's forward pass.
TRAINING = {
    "initializer_range", "initializer_factor", "init_std", "activation_dropout", "attention_dropout",
    "attention_probs_dropout_prob", "attn_pdrop", "classifier_dropout", "dropout", "embd_pdrop", "hidden_dropout",
    "hidden_dropout_prob", "resid_pdrop", "router_aux_loss_coef",
}  # fmt: skip
WITHOUT_EFFECT = NAMES | ELSEWHERE | OUTPUT | TRAINING


def forward_digest(config: Mapping[str, object]) -> str:
    """sha256 (hex) over a config's values, those of its parts included, without the fields that have no effect.

    `config` is a transformers config's `to_dict`: with the defaults that the file leaves out, which other versions of
    transformers may set otherwise.
    """
    return hashlib.sha256(json.dumps(_counted(config), sort_keys=True, default=str).encode()).hexdigest()


def _counted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _counted(part) for name, part in value.items() if name not in WITHOUT_EFFECT}
    return [_counted(part) for part in value] if isinstance(value, list | tuple) else value
