"""Attention, decoding against a cache of fixed size, to which the kernel appends: nothing changes from token to token.

As attention_decode.py, for queries whose own keys and values are not in the cache yet. How many tokens the cache holds
is read from a tensor on the device, so a CUDA graph of one token serves all of them: the grid covers the capacity of
the cache, and each split takes its share of the keys that are there.

What is fused: decoding, and writing the new keys and values into the cache. The program of the first split reads them
from where the projection wrote them, and writes them behind the keys of the cache, which no other program reads.

Memory traffic: that of attention_decode.py, and the new keys and values once more, written.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import _decode_plan, _dense_heads, _precision, _strides, empty_heads
from .attention_configs import JOIN_CONFIG
from .attention_decode import add_keys, join_splits_kernel, load_queries, store_rows
from .attention_tiles import load_tile, row_start
from .target import architecture, device_of, multiprocessors, next_power_of_2


@triton.jit(do_not_specialize=["batch_size", "n_heads", "n_queries", "n_splits"])
def cached_decode_kernel(
    Q, NewK, NewV, K, V, Length, Out, Lse,
    q_batch_stride, q_head_stride, q_stride,
    new_k_batch_stride, new_k_head_stride, new_k_stride,
    new_v_batch_stride, new_v_head_stride, new_v_stride,
    k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride,
    batch_size, n_heads, group, n_queries, capacity, n_splits, score_scale,
    HEAD_SIZE: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_NEW: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The grid is (splits, B * Hkv). Out and Lse are those of `decode_kernel`.

    The n_queries new tokens stand behind the *Length tokens of the cache: query i sees those and new tokens up to i.
    Where the cache has no room for them, nothing is written into it, and the result is NaN.
    """
    n_key_heads = n_heads // group
    split = tl.program_id(0)
    batch = tl.program_id(1) // n_key_heads
    key_head = tl.program_id(1) % n_key_heads
    length = tl.load(Length)
    has_room = (length >= 0) & (length + n_queries <= capacity)
    n_keys = tl.where(has_room, length, 0).to(tl.int32)
    q, query = load_queries(
        Q, q_batch_stride, q_head_stride, q_stride, batch, key_head, group, n_queries, HEAD_SIZE, ROWS, BLOCK_D
    )
    accumulator = tl.zeros((ROWS, BLOCK_D), tl.float32)
    largest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)

    new = tl.arange(0, BLOCK_NEW)
    n_new = tl.where(split == 0, n_queries, 0)  # of this program
    source = (NewK, new_k_batch_stride, new_k_head_stride, new_k_stride)
    new_k = load_tile(source, batch, key_head, 0, n_new, HEAD_SIZE, True, False, BLOCK_NEW, BLOCK_D)
    source = (NewV, new_v_batch_stride, new_v_head_stride, new_v_stride)
    new_v = load_tile(source, batch, key_head, 0, n_new, HEAD_SIZE, True, False, BLOCK_NEW, BLOCK_D)
    columns = tl.arange(0, BLOCK_D)[None, :]
    in_cache = (new < tl.where(has_room, n_new, 0))[:, None] & (columns < HEAD_SIZE)
    k_rows = row_start(row_start(row_start(K, batch, k_batch_stride), key_head, k_head_stride), n_keys, k_stride)
    v_rows = row_start(row_start(row_start(V, batch, v_batch_stride), key_head, v_head_stride), n_keys, v_stride)
    tl.store(k_rows + new[:, None] * k_stride + columns, new_k, mask=in_cache)
    tl.store(v_rows + new[:, None] * v_stride + columns, new_v, mask=in_cache)
    new_seen = (new < n_new)[None, :] & (new[None, :] <= query[:, None])
    accumulator, largest, total = add_keys(
        q, new_k, new_v, new_seen, accumulator, largest, total, score_scale, PRECISION
    )

    split_size = tl.cdiv(tl.cdiv(n_keys, n_splits), BLOCK_N) * BLOCK_N
    first = split * split_size
    stop = tl.minimum(n_keys, first + split_size)
    k_source = (K, k_batch_stride, k_head_stride, k_stride)
    v_source = (V, v_batch_stride, v_head_stride, v_stride)
    for first_key in range(first, stop, BLOCK_N):
        k = load_tile(k_source, batch, key_head, first_key, n_keys, HEAD_SIZE, True, False, BLOCK_N, BLOCK_D)
        v = load_tile(v_source, batch, key_head, first_key, n_keys, HEAD_SIZE, True, False, BLOCK_N, BLOCK_D)
        seen = (first_key + tl.arange(0, BLOCK_N) < n_keys)[None, :]
        accumulator, largest, total = add_keys(q, k, v, seen, accumulator, largest, total, score_scale, PRECISION)
    accumulator = tl.where(has_room, accumulator, float("nan"))
    store_rows(
        Out, Lse, accumulator, largest, total, split, batch, key_head, batch_size, n_heads, group, n_queries,
        HEAD_SIZE, SPLIT, ROWS, BLOCK_D,
    )  # fmt: skip


BLOCK_NEW = 16  # rows of a tile of new keys: as many as a matrix instruction takes, and more than `MAX_DECODED_QUERIES`


def decode_(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, length: Tensor, scale: float) -> Tensor:
    """Attention of q (B, H, T, D) over the first `length` of keys and values, and over k and v, which are appended.

    keys, values (B, Hkv, capacity, D), whose D elements lie side by side; k, v (B, Hkv, T, D); length () int64. Returns
    (B, H, T, D), laid out as (B, T, H, D).
    """
    B, H, T, D = q.shape
    Hkv, capacity = keys.shape[1:3]
    out = empty_heads(q, H, T)
    if out.numel() == 0:
        return out
    q, k, v = _dense_heads(q), _dense_heads(k), _dense_heads(v)
    group = H // Hkv
    config, n_splits, _ = _decode_plan(
        B * Hkv, group * T, capacity, D, q.element_size(), architecture(q), multiprocessors(q)
    )
    partial_out, lse = out, torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    partial_lse = lse
    if n_splits > 1:
        partial_out = torch.empty((n_splits, B, H, T, D), dtype=torch.float32, device=q.device)
        partial_lse = torch.empty((n_splits, B, H, T), dtype=torch.float32, device=q.device)
    with device_of(q):
        cached_decode_kernel[(n_splits, B * Hkv)](
            q, k, v, keys, values, length, partial_out, partial_lse, *_strides(q, k, v, keys, values),
            B, H, group, T, capacity, n_splits, scale * math.log2(math.e),
            HEAD_SIZE=D, SPLIT=n_splits > 1, PRECISION=_precision(q.dtype), BLOCK_NEW=BLOCK_NEW, **config,
        )  # fmt: skip
        if n_splits > 1:
            join_splits_kernel[(B * H * T,)](
                partial_out, partial_lse, out, lse, B * H * T, H, T, n_splits,
                HEAD_SIZE=D, BLOCK_D=config["BLOCK_D"], SPLITS=next_power_of_2(n_splits), **JOIN_CONFIG,
            )  # fmt: skip
    return out
