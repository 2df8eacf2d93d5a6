"""Attention of a few new tokens over a cache of fixed size, to which their keys and values are appended.

Used by generation with a CUDA graph: all shapes, and all addresses, are the same for every token. How many tokens the
cache holds is read on the device. `attention` is the definition: over the tokens of the cache and the new ones, causal.

It is not among the public ops: it changes `keys` and `values`, has no gradient, and cannot check the length, because
that would wait for the device. Where the new tokens do not fit, nothing is appended, and the result is NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import choose, register
from .library import define_op

MAX_NEW_TOKENS = 8
MAX_ROWS, MAX_TILE = 32, 32 * 128  # rows, and values, of the kernel's one tile of queries: those of a key head


def attention_cached_(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> Tensor:
    """softmax(q k'^T / sqrt(D)) v' with k', v' the first `length` rows of `keys` and `values`, and k, v behind them.

    Args:
        q: (B, H, T, D), T at most 8: query i is token length + i.
        k, v: (B, Hkv, T, D), like q: those of the same tokens, which are written into the cache.
        keys, values: (B, Hkv, capacity, D), like q; the D elements of a row lie side by side.
        length: 0-dim, int64, on the same device: how many tokens the cache holds. The caller counts the new ones.

    Returns: (B, H, T, D). The backend is that of `attention`, but PyTorch where a key head has too many queries.
    """
    if keys.stride(3) != 1 or values.stride(3) != 1 or max(keys.stride(2), values.stride(2)) >= 2**24:
        raise ValueError(
            "keys, values: expected the D elements of each row side by side, and rows less than 2**24 apart"
        )
    if not 1 <= q.shape[2] <= MAX_NEW_TOKENS:
        raise ValueError(f"q: expected 1 to {MAX_NEW_TOKENS} new tokens, got {q.shape[2]}")
    if length.dtype != torch.int64 or length.ndim != 0:
        raise TypeError(f"length: expected a 0-dim int64 tensor, got {length.dtype} {tuple(length.shape)}")
    rows = q.shape[1] // max(1, k.shape[1]) * q.shape[2]
    on_triton = rows <= MAX_ROWS and rows * q.shape[3] <= MAX_TILE
    if on_triton:
        of_cache = {"route": "attention_cached"}
        on_triton = choose("attention", "auto", q.device.type, (q, keys, values), of_cache)[0] == "triton"
    run = _attention_cached_triton_ if on_triton else attention_cached_on_torch_
    return run(q, k, v, keys, values, length, 1.0 / math.sqrt(q.shape[3]))


@torch.no_grad()
def attention_cached_on_torch_(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor, scale: float
) -> Tensor:
    """Masked attention over the whole capacity."""
    T, capacity = q.shape[2], keys.shape[2]
    positions = length + torch.arange(T, device=q.device)
    has_room = (length >= 0) & (length + T <= capacity)
    rows = torch.where(has_room, positions, torch.arange(T, device=q.device) % capacity)
    for cache, new in ((keys, k), (values, v)):
        cache.index_copy_(2, rows, torch.where(has_room, new, cache.index_select(2, rows)))
    seen = torch.arange(capacity, device=q.device) <= positions[:, None]  # (T, capacity)
    # What lies behind the newest token may be anything, and 0 * NaN would be NaN.
    keys, values = (torch.where(seen[-1, :, None], cache, 0.0) for cache in (keys, values))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, scale=scale, enable_gqa=grouped)
    return torch.where(has_room, out, torch.nan)


@torch.no_grad()
def attention_of_rows_(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, rows: Tensor | None, lengths: Tensor, longest: int
) -> Tensor:
    """As `attention_cached_` for one new token of each of n sequences, which have lengths of their own.

    q, k, v (n, H, 1, D). Sequence i is in row `rows[i]` of keys and values (B, H, capacity, D), in row i where `rows`
    is None, and lengths[i] of its tokens are there already: rows (n,), lengths (n, 1), int64, on the device. `longest`
    is the largest length. What lies behind a sequence's tokens is masked, and has to be finite. By PyTorch, on every
    device.
    """
    at = lengths[:, 0]
    own = torch.arange(q.shape[0], device=q.device) if rows is None else rows
    for cache, new in ((keys, k), (values, v)):
        cache[own, :, at] = new[:, :, 0].to(cache.dtype)
    keys, values = keys[:, :, : longest + 1], values[:, :, : longest + 1]
    if rows is not None:
        keys, values = keys[rows], values[rows]
    seen = torch.arange(longest + 1, device=q.device) <= lengths  # (n, longest + 1)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None])


def _on_triton(q, k, v, keys, values, length, scale):
    from ..triton_kernels import attention_cached

    return attention_cached.decode_(q, k, v, keys, values, length, scale)


_attention_cached_triton_ = define_op(
    "attention_cached_triton_(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor length, "
    "float scale) -> Tensor",
    forward=_on_triton,
    fake=lambda q, *rest: q.new_empty(q.transpose(1, 2).shape).transpose(1, 2),
)


def _append_twice(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor, **defaults: Any
) -> Tensor:
    """For the self-test: the second call reads what the first one has appended. The caches stay as they are."""
    keys, values = keys.clone(), values.clone()
    for n_tokens in (length, length + q.shape[2]):
        out = _attention_cached_triton_(q, k, v, keys, values, n_tokens, 1.0 / math.sqrt(q.shape[3]))
    return out


register("attention_cached", "triton", _append_twice)
