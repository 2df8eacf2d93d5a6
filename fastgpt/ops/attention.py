"""Scaled dot product attention: softmax(q k^T * scale + causal mask), dropped out, times v."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import autocast_dtype, check_dropout, check_float, check_like, check_number
from .backend import dispatch, register
from .dropout import dropout, philox_keep_mask
from .reference import causal_mask

MAX_HEAD_SIZE = 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every query over the keys it may see (Vaswani et al. 2017; FlashAttention, Dao et al. 2022).

    Args:
        q: (B, H, Tq, D), float16, bfloat16, float32 or float64; any strides; D at most 256.
        k, v: (B, Hkv, Tk, D), like q; Hkv divides H, and H / Hkv neighbouring query heads share one key head.
        is_causal: query i sees key j when j <= i + Tk - Tq (aligned to the bottom right). A query that sees no key,
            which happens for Tq > Tk, gives zeros.
        scale: factor of the scores; None is 1 / sqrt(D).
        dropout_p: probability, in [0, 1), of dropping an attention weight.
        seed: int, or 0-dim int64 tensor: the Philox key of the dropout mask (see `ops/dropout.py`, row
            (b * H + h) * Tq + i, column j). None draws from torch's generator.
        backend: "auto", "torch" or "triton".

    Returns: (B, H, Tq, D), the dtype of q (under autocast: the autocast dtype).
    Raises: TypeError, ValueError naming the argument; BackendError where a named backend cannot serve.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_float(name, tensor, ndim=4)
    dtype = autocast_dtype(q)
    if dtype is not None and q.dtype != torch.float64:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    check_like("k", k, "q", q)
    check_like("v", v, "q", q)
    B, H, _, D = q.shape
    Hkv = k.shape[1]
    if k.shape[0] != B or k.shape[3] != D:
        raise ValueError(f"k: expected shape ({B}, Hkv, Tk, {D}) to fit q {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"v: expected the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
    if (H == 0) != (Hkv == 0) or (Hkv and H % Hkv):
        raise ValueError(f"k: its {Hkv} heads do not divide the {H} heads of q")
    if not 0 < D <= MAX_HEAD_SIZE:
        raise ValueError(f"q: head size {D} is outside 1..{MAX_HEAD_SIZE}")
    if scale is not None:
        check_number("scale", scale)
        if not math.isfinite(scale):
            raise ValueError(f"scale: expected a finite number or None, got {scale}")
    check_dropout(dropout_p, seed)
    return dispatch(
        "attention", backend, q.device.type, q, k, v, is_causal=is_causal, scale=scale, dropout_p=dropout_p, seed=seed
    )


def _torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """PyTorch's fused kernel where it gives the defined result, the explicit formula for the dropout it cannot do."""
    Tq, Tk = q.shape[2], k.shape[2]
    if is_causal and Tq > Tk:  # the first rows see no key
        blind = Tq - Tk
        if dropout_p == 0.0 or seed is None:  # a seeded mask is keyed by the number of the row: the rows stay together
            seen = _torch(q[:, :, blind:], k, v, is_causal=True, scale=scale, dropout_p=dropout_p)
            return F.pad(seen, (0, 0, blind, 0))
    if dropout_p > 0.0 and (seed is not None or q.device.type == "cpu"):
        if autocast_dtype(q) is None:
            return _with_explicit_dropout(q, k, v, is_causal, scale, dropout_p, seed)
        with torch.autocast(q.device.type, enabled=False):  # it would take the float32 products back to half
            return _with_explicit_dropout(q, k, v, is_causal, scale, dropout_p, seed)
    mask = None
    if is_causal and Tq != Tk and Tq > 1:
        mask = causal_mask(Tq, Tk, q.device)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=is_causal and mask is None and Tq > 1,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _with_explicit_dropout(q, k, v, is_causal, scale, dropout_p, seed):
    B, H, Tq, D = q.shape
    Tk = k.shape[2]
    out_dtype = q.dtype
    if out_dtype in (torch.float16, torch.bfloat16):  # scores of half precision overflow, or lose what softmax needs
        q, k, v = q.float(), k.float(), v.float()
    if k.shape[1] != H:
        k, v = (t.repeat_interleave(H // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(-2, -1) * (1.0 / math.sqrt(D) if scale is None else scale)  # (B, H, Tq, Tk)
    if is_causal:
        mask = causal_mask(Tq, Tk, q.device)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # finite: a row of -inf would give NaN
    weights = torch.softmax(scores, dim=-1)
    if is_causal and Tq > Tk:
        weights = weights.masked_fill(~mask, 0.0)
    if seed is None:
        weights = dropout(weights, dropout_p)
    else:
        keep = philox_keep_mask(seed, dropout_p, B * H * Tq, Tk, q.device).view(B, H, Tq, Tk)
        weights = weights * keep.to(weights.dtype) * (1.0 / (1.0 - dropout_p))
    return (weights @ v).to(out_dtype)


register("attention", "torch", _torch)
