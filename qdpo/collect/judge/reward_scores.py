"""Loads a reward model (a sequence classifier with one label, 4-bit except for its head) and computes its scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from qdpo.errors import ConfigError
from qdpo.model.base import quant
from qdpo.model.base.finite import check_finite
from qdpo.model.base.foreign import reading
from qdpo.model.base.headers import AGAIN
from qdpo.model.base.load import loading
from qdpo.model.device import DTYPES
from qdpo.run.watcher import Say


def check_reward_config(config: Mapping[str, Any], owner: str) -> None:
    """Raises: ConfigError unless `config` (config.json) is a one-label classifier's; `owner` opens the message."""
    kinds = config.get("architectures") or []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise ConfigError(
            f"{owner} is {' and '.join(kinds) or 'of no named architecture'}, but a reward model is a "
            "…ForSequenceClassification with one label. A chat model can judge on a server: `--by openai:URL`."
        )
    labels = config.get("num_labels", len(config.get("id2label") or "ab"))  # transformers' default is two
    if labels != 1:
        raise ConfigError(f"{owner} has {labels} labels; a reward model has one label, the reward.")


def load_reward_model(
    folder: Path, *, quantization: str, dtype: str, device: torch.device, announce: Say
) -> torch.nn.Module:
    """Load the model onto its device, in evaluation mode; its head computes in float32.

    Raises: ConfigError for a folder whose weights lack the head, which transformers would initialise at random.
    """
    arguments = loading(folder, quantization, double_quant=True, dtype=dtype, device=device, announce=announce)
    if "state_dict" in arguments:
        raise ConfigError(
            f"The reward model in {folder} is stored in FP8 or MXFP4, and of reward models qdpo reads those of 16 bits "
            "and of 4-bit bitsandbytes. Use a 16-bit copy of it."
        )
    with reading(f"transformers cannot load the reward model in {folder}", AGAIN):
        model, about = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True, **arguments)
    if about["missing_keys"]:
        raise ConfigError(
            f"The weights in {folder} lack {', '.join(sorted(about['missing_keys'])[:3])}, which would be random: this "
            "is not a trained reward model."
        )
    check_finite(model, folder)
    model.requires_grad_(False)
    model.eval()
    if quant.settle(model, DTYPES[dtype]) == 0 and quantization != "none":
        raise ConfigError(f"No linear layer of {folder} became 4-bit. Use --quantization none for this architecture.")
    head = getattr(model, "score", None)
    if type(head) is not torch.nn.Linear:  # 4-bit layers are a subclass
        raise ConfigError(f"The reward model in {folder} ({type(model).__name__}) has no plain linear head `score`.")
    # A bf16 product would round a reward near 10 to steps of 1/16, so close answers would be ranked by chance.
    head.float()
    head.register_forward_pre_hook(lambda _head, inputs: (inputs[0].float(),))
    found: torch.nn.Module = model
    return found


def rewards(model: Any, rows: Sequence[Sequence[int]]) -> list[float]:
    """The reward of each row of token ids, in one batch."""
    config = model.config.get_text_config()
    own = config.pad_token_id
    width, ends = max(map(len, rows)), {row[-1] for row in rows}
    # The classifier reads the last token that is not padding. Without a pad token, any token serves that ends no row.
    pad = own if own is not None else next(token for token in range(len(ends) + 1) if token not in ends)
    token_BT = torch.full((len(rows), width), pad)
    mask_BT = torch.zeros_like(token_BT)
    for place, row in enumerate(rows):
        token_BT[place, : len(row)] = torch.tensor(row)
        mask_BT[place, : len(row)] = 1
    config.pad_token_id = pad
    try:
        with torch.no_grad():
            score_B1 = model(token_BT.to(model.device), attention_mask=mask_BT.to(model.device), use_cache=False).logits
    finally:
        config.pad_token_id = own
    return [float(score) for score in score_B1[:, 0]]
