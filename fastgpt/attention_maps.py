"""Which tokens a head attends to: its softmax weights, which no attention kernel keeps.

They are computed here a second time, from the q and k of the running model. The weights times v are what the attention
op gave, which the tests compare.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import ops
from .model import GPT, CausalSelfAttention
from .ops.attention import split_heads
from .ops.reference import causal_mask


@torch.no_grad()
def capture(model: GPT, idx: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each layer: weights (1, H, T, T), v (1, H, T, D), and the attention op's output (1, H, T, D). idx: (1, T)."""
    found = []
    for qkv in _projections(model, idx, range(model.cfg.n_layer)):
        q, k, v = split_heads(qkv, model.cfg.n_head)  # (1, H, T, D) each
        out = ops.attention(q, k, v, is_causal=model.cfg.is_causal)
        found.append((probabilities(q, k, model.cfg.is_causal), v, out))
    return found


@torch.no_grad()
def weights_of_head(model: GPT, idx: Tensor, layer: int, head: int) -> Tensor:
    """(T, T), float32, on the CPU: row i has the shares of its attention that token i gives. idx: (1, T) int64.

    Layers and heads are counted from 1. Only this head's weights are held. Raises ValueError naming the argument.
    """
    for name, value, n in (("layer", layer, model.cfg.n_layer), ("head", head, model.cfg.n_head)):
        if not 1 <= value <= n:
            raise ValueError(f"{name}: the model has {name}s 1 to {n}, got {value}")
    (qkv,) = _projections(model, idx, [layer - 1])
    q, k, _ = (x[:, head - 1 : head].float() for x in split_heads(qkv, model.cfg.n_head))
    return probabilities(q, k, model.cfg.is_causal)[0, 0].cpu()


def probabilities(q: Tensor, k: Tensor, is_causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask): (B, H, T, D) twice -> (B, H, T, T)."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if is_causal:
        scores = scores.masked_fill(~causal_mask(q.shape[2], k.shape[2], q.device), -math.inf)
    return torch.softmax(scores, dim=-1)


def _projections(model: GPT, idx: Tensor, layers: Any) -> list[Tensor]:
    """The q, k and v (1, T, 3 C) of these layers, counted from 0, as the model computes them without dropout."""
    found: list[Tensor] = []
    attentions = [module for module in model.modules() if isinstance(module, CausalSelfAttention)]
    hooks = [
        attentions[layer].qkv.register_forward_hook(lambda module, inputs, output: found.append(output))
        for layer in layers
    ]
    was_training = model.training
    try:
        model.eval()
        model.hidden(idx.to(model.token_embedding.weight.device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return found
