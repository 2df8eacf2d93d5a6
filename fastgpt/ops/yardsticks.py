"""The yardstick of each op: PyTorch's own op, whose error in the same dtype is what ours is compared with.

`fastgpt parity` and the self-test before a kernel's first use (self_test.py) measure by the same yardsticks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from . import reference
from .dropout import philox_keep_mask


def _sdpa(q, k, v, *, is_causal=True, scale=None, dropout_p=0.0, seed=None, first_row=0):
    """scaled_dot_product_attention; with dropout, whose mask it does not take, its steps with float32 scores."""
    B, H, Tq, D = q.shape
    Tk = k.shape[2]
    mask = reference.causal_mask(Tq, Tk, q.device) if is_causal else None
    blind = max(Tq - Tk, 0) if is_causal else 0  # queries that see no key, whose result PyTorch leaves undefined
    if dropout_p == 0.0:
        seen = None if mask is None else mask[blind:]
        gqa = k.shape[1] != H
        out = F.scaled_dot_product_attention(q[:, :, blind:], k, v, attn_mask=seen, scale=scale, enable_gqa=gqa)
        return F.pad(out, (0, 0, blind, 0))
    k, v = (t.repeat_interleave(H // t.shape[1], dim=1) for t in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.transpose(-2, -1).to(wide) * (D**-0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = torch.softmax(scores[:, :, blind:], dim=-1).to(q.dtype)
    keep = philox_keep_mask(seed, dropout_p, B * H * Tq, Tk, q.device, first_row).view(B, H, Tq, Tk)
    weights = weights * keep[:, :, blind:] / (1.0 - dropout_p)
    return F.pad(weights @ v, (0, 0, blind, 0))


class _FlashSteps(torch.autograd.Function):
    """The steps of PyTorch's flash kernel (FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithms 1 and 2).

    Weights, output and dS are rounded to the dtype of q, as that kernel rounds them; sums are float32. Backward makes
    the weights again from each row's logsumexp, which is kept in float32. This stands for the kernel where the kernel
    cannot be measured: on a CPU, and with a dropout mask that is given.
    """

    @staticmethod
    def forward(ctx, q, k, v, keep, mask, scale):
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = (q.to(wide) @ k.transpose(-2, -1).to(wide) * scale).masked_fill(~mask, -math.inf)
        weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)  # NaN where a query sees no key
        out = ((weights * keep).to(q.dtype).to(wide) @ v.to(wide)).to(q.dtype)
        logsumexp = torch.logsumexp(scores, dim=-1, keepdim=True)
        weights = torch.exp(scores - logsumexp).nan_to_num(0.0)
        ctx.save_for_backward(q, k, v, keep, weights, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, keep, weights, out = ctx.saved_tensors
        dtype, wide = q.dtype, weights.dtype
        q, k, v, grad, out = (t.to(wide) for t in (q, k, v, grad, out))
        grad_v = (weights * keep).to(dtype).to(wide).transpose(-2, -1) @ grad
        grad_weights = grad @ v.transpose(-2, -1) * keep
        delta = (grad * out).sum(-1, keepdim=True)
        grad_scores = (weights * (grad_weights - delta)).to(dtype).to(wide)
        grad_q, grad_k = grad_scores @ k * ctx.scale, grad_scores.transpose(-2, -1) @ q * ctx.scale
        return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype), None, None, None


def _flash(q, k, v, *, is_causal=True, scale=None, dropout_p=0.0, seed=None, first_row=0):
    B, H, Tq, D = q.shape
    Tk = k.shape[2]
    k, v = (t.repeat_interleave(H // t.shape[1], dim=1) for t in (k, v))
    everything = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device)
    mask = reference.causal_mask(Tq, Tk, q.device) if is_causal else everything
    keep = torch.ones((), device=q.device)
    if dropout_p > 0.0:
        keep = philox_keep_mask(seed, dropout_p, B * H * Tq, Tk, q.device, first_row).view(B, H, Tq, Tk)
        keep = keep / (1.0 - dropout_p)
    return _FlashSteps.apply(q, k, v, keep, mask, D**-0.5 if scale is None else scale)


def _layer_norm(x, weight, bias=None, eps=1e-5):
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def _add_layer_norm(x, residual, weight, bias=None, eps=1e-5, *, dropout_p=0.0, seed=None):
    if dropout_p > 0.0:
        C = x.shape[-1]
        x = x * philox_keep_mask(seed, dropout_p, x.numel() // C, C, x.device).view(x.shape) / (1.0 - dropout_p)
    h = residual + x
    return F.layer_norm(h, (h.shape[-1],), weight, bias, eps), h


def _activation(x, bias=None, *, kind="gelu"):
    x = x if bias is None else x + bias
    if kind.startswith("gelu"):
        return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
    return F.relu(x) if kind == "relu" else F.relu(x).square()


def _two_embeddings(tokens, token_table, position_table=None, *, position_offset=0):
    x = F.embedding(tokens, token_table)
    if position_table is None:
        return x
    positions = torch.arange(position_offset, position_offset + tokens.shape[1], device=tokens.device)
    return x + F.embedding(positions, position_table)


def _cross_entropy(
    logits, targets, *, z_loss=0.0, softcap=None, token_weight=None, return_accuracy=False, **torchs_options
):
    """F.cross_entropy; with options that it does not have, the steps that a model takes around it."""
    targets = targets.long()
    loss, class_dim = F.cross_entropy, 0 if logits.ndim == 1 else 1
    counted = targets != torchs_options.get("ignore_index", -100)
    correct = (counted & (logits.argmax(class_dim) == targets)).float()
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    if z_loss == 0.0 and token_weight is None:
        value = loss(capped, targets, **torchs_options)
    else:
        value = loss(capped, targets, **torchs_options | {"reduction": "none"})
        value = value + z_loss * capped.logsumexp(class_dim).square() * counted
        weights, weight = counted.to(value.dtype), torchs_options.get("weight")
        weights = weights if weight is None else weights * weight[targets * counted]
        if token_weight is not None:
            value, weights = value * token_weight, weights * token_weight
        value = _reduced(value, weights, torchs_options.get("reduction", "mean"))
    if not return_accuracy:
        return value
    return value, correct if torchs_options.get("reduction") == "none" else correct.sum() / counted.sum()


def _reduced(value, weights, reduction):
    return value if reduction == "none" else value.sum() / weights.sum() if reduction == "mean" else value.sum()


def _linear(x, weight, bias=None):
    return F.linear(x, weight, bias)


def _linear_then_cross_entropy(x, weight, targets, *, bias=None, token_weight=None, **options):
    logits = F.linear(x, weight, bias).reshape(-1, weight.shape[0])
    token_weight = None if token_weight is None else token_weight.reshape(-1)
    result = _cross_entropy(logits, targets.reshape(-1), token_weight=token_weight, **options)
    if options.get("reduction") != "none":
        return result
    return tuple(t.view(targets.shape) for t in result) if isinstance(result, tuple) else result.view(targets.shape)


def _linear_then_log_softmax(x, weight, targets, *, bias=None, softcap=None):
    logits = F.linear(x, weight, bias)
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.log_softmax(capped, -1).gather(-1, targets.long()[..., None])[..., 0]


YARDSTICKS: dict[str, Callable[..., Any]] = {
    "attention": _sdpa,
    "layer_norm": _layer_norm,
    "add_layer_norm": _add_layer_norm,
    "activation": _activation,
    "embedding": _two_embeddings,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_then_cross_entropy,
    "linear_log_probs": _linear_then_log_softmax,
    "linear": _linear,
}


def yardstick_for(op: str, backend: str, device_type: str, dropout: bool) -> Callable[..., Any]:
    """The yardstick of a call: for our attention, where PyTorch's flash kernel cannot run, that kernel's steps.

    It takes no dropout mask, and on a CPU it is another kernel than the one that Triton's replaces. Until an op has a
    yardstick, its formula serves, computed in the dtype of the call.
    """
    if op == "attention" and ((dropout and backend != "torch") or (backend == "triton" and device_type == "cpu")):
        return _flash
    return YARDSTICKS.get(op) or getattr(reference, op)
