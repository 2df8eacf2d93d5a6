"""Every op as its formula, in plain tensor algebra: the definition the other backends are measured against.

Nothing here is fused, blocked or clever. In float64 these functions are the oracle of the tests and of
``fastgpt parity``; autograd through them gives the oracle's gradients. Arguments are those of the ops.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dropout import philox_keep_mask


def causal_mask(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """True where query i may see key j. The last query sees the last key: aligned to the bottom right."""
    i = torch.arange(n_queries, device=device)[:, None]
    j = torch.arange(n_keys, device=device)[None, :]
    return j <= i + (n_keys - n_queries)  # (Tq, Tk)


def attention(q, k, v, *, is_causal=True, scale=None, dropout_p=0.0, seed=None, first_row=0):
    """softmax(q k^T * scale + mask) v; a query that sees no key gives 0. (Vaswani et al. 2017, eq. 1)

    `first_row` is the row of the dropout mask for the first query, where q is a part of a larger call.
    """
    B, H, Tq, D = q.shape
    Tk = k.shape[2]
    group = H // k.shape[1]
    k = k.repeat_interleave(group, dim=1)  # (B, Hkv, Tk, D) -> (B, H, Tk, D)
    v = v.repeat_interleave(group, dim=1)
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    scores = (q @ k.transpose(-2, -1)) * scale  # (B, H, Tq, Tk)
    if is_causal:
        scores = scores.masked_fill(~causal_mask(Tq, Tk, q.device), -math.inf)
    if Tk == 0:
        return scores @ v
    largest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)  # -inf where no key is seen
    weights = torch.exp(scores - largest)
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    if dropout_p > 0.0:
        keep = philox_keep_mask(seed, dropout_p, B * H * Tq, Tk, q.device, first_row).view(B, H, Tq, Tk)
        weights = weights * keep / (1.0 - dropout_p)
    return weights @ v  # (B, H, Tq, D)


def layer_norm(x, weight, bias=None, eps=1e-5):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension. (Ba et al. 2016)"""
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    y = centred * torch.rsqrt(variance + eps) * weight
    return y if bias is None else y + bias


def add_layer_norm(x, residual, weight, bias=None, eps=1e-5, *, dropout_p=0.0, seed=None):
    """h = residual + dropout(x); returns (layer_norm(h), h)."""
    if dropout_p > 0.0:
        C = x.shape[-1]
        n_rows = x.numel() // C if C else 0
        x = x * philox_keep_mask(seed, dropout_p, n_rows, C, x.device).view(x.shape) / (1.0 - dropout_p)
    h = residual + x
    return layer_norm(h, weight, bias, eps), h


def activation(x, bias=None, *, kind="gelu"):
    """f(x + bias): gelu, its approximation by a tanh (Hendrycks and Gimpel 2016), relu, relu^2 (So et al. 2021)."""
    if bias is not None:
        x = x + bias
    if kind == "gelu":
        return 0.5 * x * torch.special.erfc(-x / math.sqrt(2.0))
    if kind == "gelu_tanh":
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    positive = torch.where(x > 0.0, x, 0.0)
    return positive if kind == "relu" else positive * positive


def embedding(tokens, token_table, position_table=None, *, position_offset=0):
    """token_table[tokens] + position_table[position_offset + t]: (B, T) -> (B, T, C)."""
    x = token_table[tokens.long()]
    if position_table is None:
        return x
    return x + position_table[position_offset : position_offset + tokens.shape[1]]


def cross_entropy(
    logits,
    targets,
    *,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    token_weight=None,
    return_accuracy=False,
):
    """-log softmax(logits)[target], with the weights and smoothing of torch.nn.functional.cross_entropy.

    With class weights w, smoothing s, z-loss z and the token's weight u, the loss of one row is
    u * ((1 - s) * w[t] * -log p[t] + s / C * sum_c w[c] * -log p[c] + z * logsumexp^2) (Chowdhery et al. 2022, PaLM);
    "mean" divides by the sum of u * w[t], NaN where that is 0. A softcap c replaces the logits x by c * tanh(x / c)
    first (Gemma Team 2024, Gemma 2). The accuracy is the share of targets whose logit is the largest of its row.
    """
    if logits.ndim == 1:
        logits, targets, was_one_row = logits[None], targets[None], True
        token_weight = None if token_weight is None else token_weight[None]
    else:
        was_one_row = False
    C = logits.shape[1]
    targets = targets.long()  # `ignore_index` may be outside the range of int32
    counted = targets != ignore_index
    x = logits.movedim(1, -1)  # (N, C, d1, ..., dk) -> (N, d1, ..., dk, C)
    x = x.masked_fill(~counted[..., None], 0.0)  # an ignored row counts for nothing, even where it is not finite
    t = torch.where(counted, targets, 0)
    correct = (x.argmax(-1) == t) & counted & ~x.isnan().any(-1)
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    largest = x.detach().amax(-1, keepdim=True)
    shifted = x - largest
    log_sum = shifted.exp().sum(-1, keepdim=True).log()
    log_p = shifted - log_sum
    w = torch.ones(C, dtype=x.dtype, device=x.device) if weight is None else weight
    u = torch.where(counted, 1.0 if token_weight is None else token_weight.to(x.dtype), 0.0)
    row_weight = torch.where(counted, w[t], 0.0)
    loss = -row_weight * log_p.gather(-1, t[..., None])[..., 0] * (1.0 - label_smoothing)
    if label_smoothing > 0.0:
        loss = loss - torch.where(counted, (log_p * w).sum(-1), 0.0) * (label_smoothing / C)
    if z_loss > 0.0:
        loss = loss + torch.where(counted, (largest + log_sum)[..., 0] ** 2, 0.0) * z_loss
    loss, row_weight = loss * u, row_weight * u
    accuracy = correct.float() if reduction == "none" else correct.float().sum() / counted.sum()
    if reduction == "none" and was_one_row:
        loss, accuracy = loss[0], accuracy[0]
    elif reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        weights = row_weight.sum()
        loss = torch.where(weights == 0.0, torch.nan, loss.sum() / weights)
    return (loss, accuracy) if return_accuracy else loss


def linear(x, weight, bias=None):
    """x weight^T + bias: x (..., K), weight (N, K), bias (N)."""
    y = x @ weight.t()
    return y if bias is None else y + bias


def linear_cross_entropy(
    x,
    weight,
    targets,
    *,
    bias=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    token_weight=None,
    return_accuracy=False,
):
    """cross_entropy(x weight^T + bias, targets): x (..., C), weight (V, C), targets (...)."""
    loss, accuracy = cross_entropy(
        linear(x.reshape(-1, x.shape[-1]), weight, bias),
        targets.reshape(-1),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        token_weight=None if token_weight is None else token_weight.reshape(-1),
        return_accuracy=True,
    )
    if reduction == "none":
        loss, accuracy = loss.reshape(targets.shape), accuracy.reshape(targets.shape)
    return (loss, accuracy) if return_accuracy else loss


def linear_log_probs(x, weight, targets, *, bias=None, softcap=None):
    """log softmax(x weight^T + bias)[target], with the softcap of cross_entropy: x (..., C), weight (V, C)."""
    logits = linear(x, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    shifted = logits - logits.detach().amax(-1, keepdim=True)
    log_p = shifted - shifted.exp().sum(-1, keepdim=True).log()
    return log_p.gather(-1, targets.long()[..., None])[..., 0]
