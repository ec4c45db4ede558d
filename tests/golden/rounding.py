"""Prints a digest of how this machine rounds: `python tests/golden/rounding.py MODEL.safetensors`

A forward and a backward pass through one layer of the fixture's base, and a step of AdamW, by torch alone. Two machines
with the same digest and the same packages train the fixture's runs to the same bytes.
"""

import hashlib
import sys

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

tensors = load_file(sys.argv[1])
layer = {name.removeprefix("model.layers.0."): value for name, value in tensors.items() if ".layers.0." in name}
trained = [value.requires_grad_() for value in layer.values()]
token_BT = torch.arange(120).reshape(3, 40)
hidden_BTD = F.embedding(token_BT, tensors["model.embed_tokens.weight"])
normed_BTD = F.rms_norm(hidden_BTD, hidden_BTD.shape[-1:], layer["input_layernorm.weight"], 1e-6)
query, key, value = (F.linear(normed_BTD, layer[f"self_attn.{name}_proj.weight"]) for name in "qkv")
heads = [part.reshape(3, 40, -1, 8).transpose(1, 2) for part in (query, key, value)]
mixed = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
hidden_BTD = hidden_BTD + F.linear(mixed, layer["self_attn.o_proj.weight"])
wide = F.silu(F.linear(hidden_BTD, layer["mlp.gate_proj.weight"])) * F.linear(hidden_BTD, layer["mlp.up_proj.weight"])
hidden_BTD = hidden_BTD + F.linear(wide, layer["mlp.down_proj.weight"])
logit_BTV = F.linear(hidden_BTD, tensors["lm_head.weight"])
loss = F.cross_entropy(logit_BTV[:, :-1].flatten(0, 1), token_BT[:, 1:].flatten())
F.softplus(loss + logit_BTV.logsumexp(-1).cos().mean()).backward()
torch.optim.AdamW([value for value in trained if value.grad is not None], lr=1e-3).step()
print(hashlib.sha256(b"".join(value.detach().numpy().tobytes() for value in trained)).hexdigest())
