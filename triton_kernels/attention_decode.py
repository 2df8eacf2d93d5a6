"""Scaled dot product attention that never writes the (Tq, Tk) scores: forward, backward and decoding.

What is fused: scores, causal mask, softmax, dropout and the product with v run tile by tile in registers (online
softmax: Milakov & Gimelshein 2018, FlashAttention: Dao et al. 2022, FlashAttention-2: Dao 2023). Only the float32
logsumexp of each row is kept for backward.

    forward    a program owns BLOCK_M queries of one head and walks over the keys:

                   keys ->   full  full  full  diag
                           +-----+-----+-----+-----+      Tiles left of the diagonal are whole and need no mask;
               queries  m  |     |     |     |\\    |      tiles right of it are never visited. The exponential is
                           +-----+-----+-----+-----+      exp2 with log2(e) folded into the scale: one FMA a score.
               Where queries and keys fit one tile, a program takes several heads, and fetches the next beside this.

    backward   two passes, so that every sum has one owner and no atomics are needed:
               dQ    a program owns queries, walks over keys; also makes delta = rowsum(dO * O) for the other pass
               dK dV a program owns keys, walks over queries, and over the query heads that share its key head
                          A head whose queries and keys fit one tile takes a single pass that makes all three.
               Gradients that nobody asks for are not made: dQ alone takes one pass, dV alone the other.

    decoding   up to 8 queries against a long cache: the keys are split among programs, and a second kernel joins the
               parts by their logsumexps. The query heads that share a key head are rows of one tile: one read of k, v.

The causal mask is aligned to the bottom right: query i sees key j when j <= i + Tk - Tq. Long causal rows are started
first, and heads in sections whose keys and values fit the L2 cache together, so that the programs end at one time.
The long forward starts only as many programs as the chip holds, where equal pairs of tiles share out evenly.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import keep_tile, last_dropped
from .rounding import round_to
from .target import (
    COMPILE_OPTIONS,
    INTERPRETING,
    TensorDescriptor,
    architecture,
    cdiv,
    device_of,
    float32_precision,
    multiprocessors,
    next_power_of_2,
)

MAX_HEAD_SIZE = 256
MAX_DECODED_QUERIES = 8
SHORT = 256  # the longest sequence of the short regime
_L2_SECTION_BYTES = 24 * 2**20  # keys and values that are in use at one time: half of the L2 cache of an H100
_UPCAST = tl.constexpr(INTERPRETING)  # the interpreter's dots of bfloat16 are wrong; the operands are already rounded


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    if _UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _dot_add(a, b, accumulator, PRECISION: tl.constexpr):
    if _UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def _offsets(stride, N_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    return tl.arange(0, N_ROWS)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _row(base, first, stride):
    """The address of row `first`, in 64 bits: a tensor may exceed 2^31 elements. (Within a tile 32 bits will do.)"""
    return base + first * tl.cast(stride, tl.int64)


@triton.jit
def _load_tile(
    source, batch, head, first, n_rows, HEAD_SIZE: tl.constexpr, MASK_ROWS: tl.constexpr, DESCRIPTORS: tl.constexpr,
    N_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(N_ROWS, BLOCK_D) from row `first` of a head; zeros outside the tensor.

    `source` is (tensor, batch stride, head stride, row stride). Where the tensor is a descriptor, the Tensor Memory
    Accelerator fetches the tile as a whole: no addresses and no predicates in registers.
    """
    tensor, batch_stride, head_stride, stride = source
    if DESCRIPTORS:
        tile = tensor.load([batch, head, first, 0]).reshape(N_ROWS, BLOCK_D)
    else:
        base = _row(_row(_row(tensor, batch, batch_stride), head, head_stride), first, stride)
        pointers = base + _offsets(stride, N_ROWS, BLOCK_D)
        in_head = (tl.arange(0, BLOCK_D) < HEAD_SIZE)[None, :]
        if MASK_ROWS:
            in_rows = (first + tl.arange(0, N_ROWS) < n_rows)[:, None]
            tile = tl.load(pointers, mask=in_rows & in_head if HEAD_SIZE != BLOCK_D else in_rows, other=0.0)
        elif HEAD_SIZE != BLOCK_D:
            tile = tl.load(pointers, mask=in_head, other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def _store_tile(
    tensor, tile, batch, head, first, n_heads, n_rows, HEAD_SIZE: tl.constexpr,
    N_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Into a contiguous (B, n_rows, n_heads, HEAD_SIZE)."""
    stride = n_heads * HEAD_SIZE
    base = _row(_row(tensor, batch * tl.cast(n_rows, tl.int64) + first, stride), head, HEAD_SIZE)
    mask = (first + tl.arange(0, N_ROWS) < n_rows)[:, None] & (tl.arange(0, BLOCK_D) < HEAD_SIZE)[None, :]
    tl.store(base + _offsets(stride, N_ROWS, BLOCK_D), round_to(tile, tensor.dtype.element_ty), mask=mask)


@triton.jit
def _seen(
    first_query, first_key, n_queries, n_keys, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Mask (BLOCK_M, BLOCK_N): True where the query may see the key, and the key exists.

    A causal query that exists sees only keys that exist. What a query beyond the last one sees goes nowhere: its row
    of the output is not stored, and in backward its logsumexp of +inf makes its weights exactly 0.
    """
    keys = first_key + tl.arange(0, BLOCK_N)[None, :]
    queries = first_query + tl.arange(0, BLOCK_M)[:, None]
    return keys <= queries + (n_keys - n_queries) if CAUSAL else keys < n_keys


@triton.jit
def _key_range(
    first_query, n_queries, n_keys, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """(unmasked end, end) of a tile of queries: all of it sees the keys before the first, none of it those after."""
    end, unmasked_end = n_keys, n_keys
    if CAUSAL:
        offset = n_keys - n_queries
        end = tl.minimum(n_keys, tl.maximum(0, first_query + BLOCK_M + offset))
        unmasked_end = tl.minimum(n_keys, tl.maximum(0, first_query + offset + 1))
    return unmasked_end // BLOCK_N * BLOCK_N, end


@triton.jit
def _first_row(batch, n_heads, head, n_rows):
    """The index, in 64 bits, of a head's first row in (B, n_heads, n_rows)."""
    return (batch.to(tl.int64) * n_heads + head) * n_rows


@triton.jit
def _locate(job, batch_size, n_heads, n_tiles, section, LAST_FIRST: tl.constexpr):
    """(batch, head, tile) of a job: all tiles of `section` heads before the next section's."""
    first_head = job // (section * n_tiles) * section
    heads_here = tl.minimum(section, batch_size * n_heads - first_head)
    within = job - first_head * n_tiles
    tile = within // heads_here
    if LAST_FIRST:
        tile = n_tiles - 1 - tile
    head = first_head + within % heads_here
    return head // n_heads, head % n_heads, tile


@triton.jit
def _locate_of_pair(turn, batch_size, n_heads, n_tiles, section):
    """(batch, head, tile) of a persistent program's turn, n_tiles even: a heavy tile, then the light one beside it.

    Under the causal mask tiles i and n_tiles - 1 - i together see as many keys as any other such two.
    """
    pair = tl.program_id(0) + turn // 2 * tl.num_programs(0)
    batch, head, tile = _locate(pair, batch_size, n_heads, n_tiles // 2, section, False)
    return batch, head, tl.where(turn % 2 == 0, n_tiles - 1 - tile, tile)


# --- forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_tile(
    accumulator, largest, total, q, k_source, v_source, batch, key_head, first_query, first_key,
    n_queries, n_keys, score_scale, seed, mask_row, last_dropped,
    HEAD_SIZE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The online softmax of a tile of queries, one tile of keys further."""
    k = _load_tile(k_source, batch, key_head, first_key, n_keys, HEAD_SIZE, MASKED, DESCRIPTORS, BLOCK_N, BLOCK_D)
    scores = _dot(q, tl.trans(k), PRECISION)
    if MASKED:
        seen = _seen(first_query, first_key, n_queries, n_keys, CAUSAL, BLOCK_M, BLOCK_N)
        scores = tl.where(seen, scores, -float("inf"))
    new_largest = tl.maximum(largest, tl.max(scores, axis=1) * score_scale)
    shift = new_largest
    if MASKED:  # a row that has seen no key yet: its largest score is -inf, and -inf - -inf would be NaN
        shift = tl.where(new_largest == -float("inf"), 0.0, new_largest)
    weights = tl.exp2(scores * score_scale - shift[:, None])
    shrink = tl.exp2(largest - shift)
    total = total * shrink + tl.sum(weights, axis=1)
    accumulator = accumulator * shrink[:, None]
    if DROPOUT:
        keep = keep_tile(seed, mask_row, first_key, last_dropped, BLOCK_M, BLOCK_N)
        weights = tl.where(keep, weights, 0.0)
    v = _load_tile(v_source, batch, key_head, first_key, n_keys, HEAD_SIZE, MASKED, DESCRIPTORS, BLOCK_N, BLOCK_D)
    accumulator = _dot_add(round_to(weights, v.dtype), v, accumulator, PRECISION)
    return accumulator, new_largest, total


@triton.jit
def _forward_tiles(
    accumulator, largest, total, q, k_source, v_source, batch, key_head, first_query, start, stop,
    n_queries, n_keys, score_scale, seed, mask_row, last_dropped,
    HEAD_SIZE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    for first_key in range(start, stop, BLOCK_N):
        accumulator, largest, total = _forward_tile(
            accumulator, largest, total, q, k_source, v_source, batch, key_head, first_query, first_key,
            n_queries, n_keys, score_scale, seed, mask_row, last_dropped,
            HEAD_SIZE, CAUSAL, MASKED, DROPOUT, PRECISION, DESCRIPTORS, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    return accumulator, largest, total


@triton.jit
def _store_forward(
    Out, Lse, accumulator, largest, total, batch, head, first_query, mask_row, n_heads, n_queries, keep_scale,
    HEAD_SIZE: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blind = total == 0.0
    factor = tl.where(blind, 0.0, 1.0 / tl.where(blind, 1.0, total))
    if DROPOUT:
        factor *= keep_scale
    out = accumulator * factor[:, None]
    _store_tile(Out, out, batch, head, first_query, n_heads, n_queries, HEAD_SIZE, BLOCK_M, BLOCK_D)
    lse = tl.where(blind, float("inf"), largest + tl.log2(tl.where(blind, 1.0, total)))
    tl.store(Lse + mask_row + tl.arange(0, BLOCK_M), lse, mask=first_query + tl.arange(0, BLOCK_M) < n_queries)


@triton.jit(do_not_specialize=["n_queries", "n_keys", "section", "last_dropped"])
def forward_kernel(
    Q, K, V, Out, Lse, Seed,
    q_batch_stride, q_head_stride, q_stride,
    k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride,
    batch_size, n_heads, group, n_queries, n_keys, section, score_scale, last_dropped, keep_scale,
    HEAD_SIZE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Out is (B, Tq, H, D) contiguous; Lse (B, H, Tq) float32, in base 2, +inf where a query sees no key.

    A persistent program takes pairs of tiles, others a tile each.
    """
    q_source = (Q, q_batch_stride, q_head_stride, q_stride)
    k_source = (K, k_batch_stride, k_head_stride, k_stride)
    v_source = (V, v_batch_stride, v_head_stride, v_stride)
    seed = tl.load(Seed) if DROPOUT else 0
    n_tiles = tl.cdiv(n_queries, BLOCK_M)
    n_turns = 1
    if PERSISTENT:
        n_turns = 2 * tl.cdiv(batch_size * n_heads * n_tiles // 2 - tl.program_id(0), tl.num_programs(0))
    for turn in range(n_turns):
        if PERSISTENT:
            batch, head, tile = _locate_of_pair(turn, batch_size, n_heads, n_tiles, section)
        else:
            batch, head, tile = _locate(tl.program_id(0), batch_size, n_heads, n_tiles, section, CAUSAL)
        first_query = tile * BLOCK_M
        q = _load_tile(q_source, batch, head, first_query, n_queries, HEAD_SIZE, True, DESCRIPTORS, BLOCK_M, BLOCK_D)
        mask_row = _first_row(batch, n_heads, head, n_queries) + first_query
        unmasked_end, end = _key_range(first_query, n_queries, n_keys, CAUSAL, BLOCK_M, BLOCK_N)
        accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        accumulator, largest, total = _forward_tiles(
            accumulator, largest, total, q, k_source, v_source, batch, head // group, first_query, 0, unmasked_end,
            n_queries, n_keys, score_scale, seed, mask_row, last_dropped,
            HEAD_SIZE, CAUSAL, False, DROPOUT, PRECISION, DESCRIPTORS, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        accumulator, largest, total = _forward_tiles(
            accumulator, largest, total, q, k_source, v_source, batch, head // group, first_query, unmasked_end, end,
            n_queries, n_keys, score_scale, seed, mask_row, last_dropped,
            HEAD_SIZE, CAUSAL, True, DROPOUT, PRECISION, DESCRIPTORS, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        _store_forward(
            Out, Lse, accumulator, largest, total, batch, head, first_query, mask_row, n_heads, n_queries, keep_scale,
            HEAD_SIZE, DROPOUT, BLOCK_M, BLOCK_D,
        )  # fmt: skip


@triton.jit(do_not_specialize=["batch_size", "n_queries", "n_keys", "last_dropped"])
def one_tile_forward_kernel(
    Q, K, V, Out, Lse, Seed,
    q_batch_stride, q_head_stride, q_stride,
    k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride,
    batch_size, n_heads, group, n_queries, n_keys, score_scale, last_dropped, keep_scale,
    HEAD_SIZE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`forward_kernel` where Tq <= BLOCK_M and Tk <= BLOCK_N: a program takes every n-th head.

    No loop over keys is left, so the loop over heads is the one that is pipelined: the next head is on its way while
    this one is multiplied.
    """
    q_source = (Q, q_batch_stride, q_head_stride, q_stride)
    k_source = (K, k_batch_stride, k_head_stride, k_stride)
    v_source = (V, v_batch_stride, v_head_stride, v_stride)
    seed = tl.load(Seed) if DROPOUT else 0
    for index in range(tl.program_id(0), batch_size * n_heads, tl.num_programs(0)):
        batch, head = index // n_heads, index % n_heads
        q = _load_tile(q_source, batch, head, 0, n_queries, HEAD_SIZE, True, False, BLOCK_M, BLOCK_D)
        mask_row = _first_row(batch, n_heads, head, n_queries)
        accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        accumulator, largest, total = _forward_tile(
            accumulator, largest, total, q, k_source, v_source, batch, head // group, 0, 0,
            n_queries, n_keys, score_scale, seed, mask_row, last_dropped,
            HEAD_SIZE, CAUSAL, True, DROPOUT, PRECISION, False, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        _store_forward(
            Out, Lse, accumulator, largest, total, batch, head, 0, mask_row, n_heads, n_queries, keep_scale,
            HEAD_SIZE, DROPOUT, BLOCK_M, BLOCK_D,
        )  # fmt: skip


# --- backward ---------------------------------------------------------------------------------------------------------
#
# With P = softmax(S), S = scale * Q K^T, and keep the dropout mask times 1 / (1 - p):
#     dV = (P * keep)^T dO,   dP = (dO V^T) * keep,   dS = P * (dP - delta),   dQ = scale * dS K,   dK = scale * dS^T Q
# and delta = rowsum(P * dP) = rowsum(dO * O). P is made again from the scores and the row's logsumexp.


@triton.jit
def _add_to_grad_kv(
    grad_k, grad_v, q, k, v, grad_out, lse, delta, seen, keep, score_scale, keep_scale,
    GRAD_K: tl.constexpr, GRAD_V: tl.constexpr, GRAD_SCORES: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(grad_k, grad_v, dS^T): one tile of queries added to the sums of one tile of keys.

    Scores are made transposed, (BLOCK_N, BLOCK_M), the layout in which the products with dO and q read them. dV is
    finished before dP is begun, so that fewer tiles are alive at a time. dS^T is None where neither GRAD_K nor
    GRAD_SCORES asks for it.
    """
    weights = tl.exp2(_dot(k, tl.trans(q), PRECISION) * score_scale - lse[None, :])
    if MASKED:
        weights = tl.where(tl.trans(seen), weights, 0.0)
    if DROPOUT:
        keep = tl.trans(keep)
        dropped = tl.where(keep, weights * keep_scale, 0.0)
    else:
        dropped = weights
    if GRAD_V:
        grad_v = _dot_add(round_to(dropped, q.dtype), grad_out, grad_v, PRECISION)
    grad_scores = None
    if GRAD_K or GRAD_SCORES:
        grad_weights = _dot(v, tl.trans(grad_out), PRECISION)
        if DROPOUT:
            grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
        grad_scores = round_to(weights * (grad_weights - delta[None, :]), q.dtype)
    if GRAD_K:
        grad_k = _dot_add(grad_scores, q, grad_k, PRECISION)
    return grad_k, grad_v, grad_scores


@triton.jit
def _grad_q_tiles(
    grad_q, q, grad_out, lse, delta, k_source, v_source, batch, key_head, first_query, start, stop,
    n_queries, n_keys, score_scale, seed, mask_row, last_dropped, keep_scale,
    HEAD_SIZE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    for first_key in range(start, stop, BLOCK_N):
        k = _load_tile(k_source, batch, key_head, first_key, n_keys, HEAD_SIZE, MASKED, DESCRIPTORS, BLOCK_N, BLOCK_D)
        v = _load_tile(v_source, batch, key_head, first_key, n_keys, HEAD_SIZE, MASKED, DESCRIPTORS, BLOCK_N, BLOCK_D)
        if q.dtype == tl.float32:  # or the compiler reads all of q into registers and waits for k, v with them there
            tl.debug_barrier()
        weights = tl.exp2(_dot(q, tl.trans(k), PRECISION) * score_scale - lse[:, None])
        if MASKED:
            seen = _seen(first_query, first_key, n_queries, n_keys, CAUSAL, BLOCK_M, BLOCK_N)
            weights = tl.where(seen, weights, 0.0)
        grad_weights = _dot(grad_out, tl.trans(v), PRECISION)
        if DROPOUT:
            keep = keep_tile(seed, mask_row, first_key, last_dropped, BLOCK_M, BLOCK_N)
            grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
        grad_scores = weights * (grad_weights - delta[:, None])
        grad_q = _dot_add(round_to(grad_scores, k.dtype), k, grad_q, PRECISION)
    return grad_q


@triton.jit(do_not_specialize=["n_queries", "n_keys", "section", "last_dropped"])
def grad_q_kernel(
    GradOut, Q, K, V, Out, Lse, Delta, GradQ, Seed,
    grad_batch_stride, grad_head_stride, grad_stride,
    q_batch_stride, q_head_stride, q_stride,
    k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride,
    batch_size, n_heads, group, n_queries, n_keys, section, score_scale, scale, last_dropped, keep_scale,
    GRAD_Q: tl.constexpr,
    HEAD_SIZE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """GradQ and Out are (B, Tq, H, D) contiguous; Delta (B, H, Tq) float32 is written for `grad_kv_kernel`.

    Without GRAD_Q that is all it does.
    """
    batch, head, tile = _locate(tl.program_id(0), batch_size, n_heads, tl.cdiv(n_queries, BLOCK_M), section, CAUSAL)
    first_query = tile * BLOCK_M
    q_source = (Q, q_batch_stride, q_head_stride, q_stride)
    grad_source = (GradOut, grad_batch_stride, grad_head_stride, grad_stride)
    k_source = (K, k_batch_stride, k_head_stride, k_stride)
    v_source = (V, v_batch_stride, v_head_stride, v_stride)
    out_stride = n_heads * HEAD_SIZE
    out_source = (Out, n_queries * tl.cast(out_stride, tl.int64), HEAD_SIZE, out_stride)
    grad_out = _load_tile(
        grad_source, batch, head, first_query, n_queries, HEAD_SIZE, True, DESCRIPTORS, BLOCK_M, BLOCK_D
    )
    out = _load_tile(out_source, batch, head, first_query, n_queries, HEAD_SIZE, True, False, BLOCK_M, BLOCK_D)
    mask_row = _first_row(batch, n_heads, head, n_queries) + first_query
    in_rows = first_query + tl.arange(0, BLOCK_M) < n_queries
    lse = tl.load(Lse + mask_row + tl.arange(0, BLOCK_M), mask=in_rows, other=float("inf"))
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), axis=1)
    tl.store(Delta + mask_row + tl.arange(0, BLOCK_M), delta, mask=in_rows)
    if GRAD_Q:
        q = _load_tile(q_source, batch, head, first_query, n_queries, HEAD_SIZE, True, DESCRIPTORS, BLOCK_M, BLOCK_D)
        seed = tl.load(Seed) if DROPOUT else 0
        unmasked_end, end = _key_range(first_query, n_queries, n_keys, CAUSAL, BLOCK_M, BLOCK_N)
        grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        grad_q = _grad_q_tiles(
            grad_q, q, grad_out, lse, delta, k_source, v_source, batch, head // group, first_query, 0, unmasked_end,
            n_queries, n_keys, score_scale, seed, mask_row, last_dropped, keep_scale,
            HEAD_SIZE, CAUSAL, False, DROPOUT, PRECISION, DESCRIPTORS, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        grad_q = _grad_q_tiles(
            grad_q, q, grad_out, lse, delta, k_source, v_source, batch, head // group, first_query, unmasked_end, end,
            n_queries, n_keys, score_scale, seed, mask_row, last_dropped, keep_scale,
            HEAD_SIZE, CAUSAL, True, DROPOUT, PRECISION, DESCRIPTORS, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        _store_tile(GradQ, grad_q * scale, batch, head, first_query, n_heads, n_queries, HEAD_SIZE, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["n_queries", "n_keys", "section", "last_dropped"])
def grad_kv_kernel(
    GradOut, Q, K, V, Lse, Delta, GradK, GradV, Seed,
    grad_batch_stride, grad_head_stride, grad_stride,
    q_batch_stride, q_head_stride, q_stride,
    k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride,
    batch_size, n_heads, group, n_queries, n_keys, section, score_scale, scale, last_dropped, keep_scale,
    GRAD_K: tl.constexpr, GRAD_V: tl.constexpr,
    HEAD_SIZE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """GradK and GradV are (B, Tk, Hkv, D) contiguous. The first keys have the most queries, and start first.

    Unlike the other passes this one masks every tile: a second loop for the whole tiles costs forty registers, which
    two sums of (BLOCK_N, BLOCK_D) leave no room for, and spilling costs more than a compare and a select a score.
    """
    n_key_heads = n_heads // group
    batch, key_head, tile = _locate(tl.program_id(0), batch_size, n_key_heads, tl.cdiv(n_keys, BLOCK_N), section, False)
    first_key = tile * BLOCK_N
    q_source = (Q, q_batch_stride, q_head_stride, q_stride)
    grad_source = (GradOut, grad_batch_stride, grad_head_stride, grad_stride)
    k_source = (K, k_batch_stride, k_head_stride, k_stride)
    v_source = (V, v_batch_stride, v_head_stride, v_stride)
    k = _load_tile(k_source, batch, key_head, first_key, n_keys, HEAD_SIZE, True, DESCRIPTORS, BLOCK_N, BLOCK_D)
    v = None
    if GRAD_K:  # the gradient of v itself needs neither v nor delta
        v = _load_tile(v_source, batch, key_head, first_key, n_keys, HEAD_SIZE, True, DESCRIPTORS, BLOCK_N, BLOCK_D)
    seed = tl.load(Seed) if DROPOUT else 0
    start = tl.maximum(0, first_key - (n_keys - n_queries)) // BLOCK_M * BLOCK_M if CAUSAL else 0
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for head in range(key_head * group, (key_head + 1) * group):
        mask_row = _first_row(batch, n_heads, head, n_queries)
        for first_query in range(start, n_queries, BLOCK_M):
            q = _load_tile(
                q_source, batch, head, first_query, n_queries, HEAD_SIZE, True, DESCRIPTORS, BLOCK_M, BLOCK_D
            )
            grad_out = _load_tile(
                grad_source, batch, head, first_query, n_queries, HEAD_SIZE, True, DESCRIPTORS, BLOCK_M, BLOCK_D
            )
            queries = first_query + tl.arange(0, BLOCK_M)
            # Rows that do not exist, and those that see no key, have a logsumexp of +inf: their weights are exactly 0.
            lse = tl.load(Lse + mask_row + queries, mask=queries < n_queries, other=float("inf"))
            delta = None
            if GRAD_K:
                delta = tl.load(Delta + mask_row + queries, mask=queries < n_queries, other=0.0)
            seen = _seen(first_query, first_key, n_queries, n_keys, CAUSAL, BLOCK_M, BLOCK_N)
            keep = None
            if DROPOUT:
                keep = keep_tile(seed, mask_row + first_query, first_key, last_dropped, BLOCK_M, BLOCK_N)
            grad_k, grad_v, _ = _add_to_grad_kv(
                grad_k, grad_v, q, k, v, grad_out, lse, delta, seen, keep, score_scale, keep_scale,
                GRAD_K, GRAD_V, False, CAUSAL, DROPOUT, PRECISION,
            )  # fmt: skip
    if GRAD_K:
        _store_tile(GradK, grad_k * scale, batch, key_head, first_key, n_key_heads, n_keys, HEAD_SIZE, BLOCK_N, BLOCK_D)
    if GRAD_V:
        _store_tile(GradV, grad_v, batch, key_head, first_key, n_key_heads, n_keys, HEAD_SIZE, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=["n_queries", "n_keys", "last_dropped"])
def one_tile_backward_kernel(
    GradOut, Q, K, V, Out, Lse, GradQ, GradK, GradV, Seed,
    grad_batch_stride, grad_head_stride, grad_stride,
    q_batch_stride, q_head_stride, q_stride,
    k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride,
    n_heads, group, n_queries, n_keys, score_scale, scale, last_dropped, keep_scale,
    GRAD_Q: tl.constexpr, GRAD_K: tl.constexpr, GRAD_V: tl.constexpr,
    HEAD_SIZE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients asked for of the query heads of one key head, Tq <= BLOCK_M and Tk <= BLOCK_N.

    One launch instead of two, and q, k, v, dO and the scores once instead of twice: what short sequences consist of.
    """
    n_key_heads = n_heads // group
    batch = tl.program_id(0) // n_key_heads
    key_head = tl.program_id(0) % n_key_heads
    q_source = (Q, q_batch_stride, q_head_stride, q_stride)
    grad_source = (GradOut, grad_batch_stride, grad_head_stride, grad_stride)
    k_source = (K, k_batch_stride, k_head_stride, k_stride)
    v_source = (V, v_batch_stride, v_head_stride, v_stride)
    out_stride = n_heads * HEAD_SIZE
    out_source = (Out, n_queries * tl.cast(out_stride, tl.int64), HEAD_SIZE, out_stride)
    k = _load_tile(k_source, batch, key_head, 0, n_keys, HEAD_SIZE, True, False, BLOCK_N, BLOCK_D)
    v = _load_tile(v_source, batch, key_head, 0, n_keys, HEAD_SIZE, True, False, BLOCK_N, BLOCK_D)
    seed = tl.load(Seed) if DROPOUT else 0
    queries = tl.arange(0, BLOCK_M)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for head in range(key_head * group, (key_head + 1) * group):
        q = _load_tile(q_source, batch, head, 0, n_queries, HEAD_SIZE, True, False, BLOCK_M, BLOCK_D)
        grad_out = _load_tile(grad_source, batch, head, 0, n_queries, HEAD_SIZE, True, False, BLOCK_M, BLOCK_D)
        out = _load_tile(out_source, batch, head, 0, n_queries, HEAD_SIZE, True, False, BLOCK_M, BLOCK_D)
        mask_row = _first_row(batch, n_heads, head, n_queries)
        lse = tl.load(Lse + mask_row + queries, mask=queries < n_queries, other=float("inf"))
        delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), axis=1)
        seen = _seen(0, 0, n_queries, n_keys, CAUSAL, BLOCK_M, BLOCK_N)
        keep = None
        if DROPOUT:
            keep = keep_tile(seed, mask_row, 0, last_dropped, BLOCK_M, BLOCK_N)
        grad_k, grad_v, grad_scores = _add_to_grad_kv(
            grad_k, grad_v, q, k, v, grad_out, lse, delta, seen, keep, score_scale, keep_scale,
            GRAD_K, GRAD_V, GRAD_Q, True, DROPOUT, PRECISION,
        )  # fmt: skip
        if GRAD_Q:
            grad_q = _dot(tl.trans(grad_scores), k, PRECISION) * scale
            _store_tile(GradQ, grad_q, batch, head, 0, n_heads, n_queries, HEAD_SIZE, BLOCK_M, BLOCK_D)
    if GRAD_K:
        _store_tile(GradK, grad_k * scale, batch, key_head, 0, n_key_heads, n_keys, HEAD_SIZE, BLOCK_N, BLOCK_D)
    if GRAD_V:
        _store_tile(GradV, grad_v, batch, key_head, 0, n_key_heads, n_keys, HEAD_SIZE, BLOCK_N, BLOCK_D)


# --- decoding ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_queries", "n_keys", "split_size"])
def decode_kernel(
    Q, K, V, PartialOut, PartialLse,
    q_batch_stride, q_head_stride, q_stride,
    k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride,
    batch_size, n_heads, group, n_queries, n_keys, split_size, score_scale,
    HEAD_SIZE: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Programs (splits, B * Hkv). A row of the tile is (member of the group, query), in this order.

    PartialOut (splits, B, H, Tq, D) and PartialLse (splits, B, H, Tq), float32: this split's own softmax and its
    logsumexp in base 2, -inf where a query sees none of the split's keys.
    """
    n_key_heads = n_heads // group
    split = tl.program_id(0)
    batch = tl.program_id(1) // n_key_heads
    key_head = tl.program_id(1) % n_key_heads
    row = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)[None, :]
    query = row % n_queries
    head = key_head * group + row // n_queries
    in_rows = row < group * n_queries
    in_tile = in_rows[:, None] & (columns < HEAD_SIZE)
    q_rows = _row(0, head, q_head_stride) + _row(0, query, q_stride)
    q = tl.load(_row(Q, batch, q_batch_stride) + q_rows[:, None] + columns, mask=in_tile, other=0.0)
    k_source = (K, k_batch_stride, k_head_stride, k_stride)
    v_source = (V, v_batch_stride, v_head_stride, v_stride)
    first = split * split_size
    stop = tl.minimum(n_keys, first + split_size)
    accumulator = tl.zeros((ROWS, BLOCK_D), tl.float32)
    largest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first_key in range(first, stop, BLOCK_N):
        k = _load_tile(k_source, batch, key_head, first_key, n_keys, HEAD_SIZE, True, False, BLOCK_N, BLOCK_D)
        v = _load_tile(v_source, batch, key_head, first_key, n_keys, HEAD_SIZE, True, False, BLOCK_N, BLOCK_D)
        keys = first_key + tl.arange(0, BLOCK_N)[None, :]
        seen = keys < n_keys
        if CAUSAL:
            seen = seen & (keys <= query[:, None] + (n_keys - n_queries))
        scores = tl.where(seen, _dot(q, tl.trans(k), PRECISION) * score_scale, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        shift = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(largest - shift)
        total = total * shrink + tl.sum(weights, axis=1)
        accumulator = _dot_add(round_to(weights, v.dtype), v, accumulator * shrink[:, None], PRECISION)
        largest = new_largest
    blind = total == 0.0
    safe_total = tl.where(blind, 1.0, total)
    out_row = ((split * tl.cast(batch_size, tl.int64) + batch) * n_heads + head) * n_queries + query
    tl.store(PartialOut + out_row[:, None] * HEAD_SIZE + columns, accumulator / safe_total[:, None], mask=in_tile)
    tl.store(PartialLse + out_row, tl.where(blind, -float("inf"), largest + tl.log2(safe_total)), mask=in_rows)


@triton.jit(do_not_specialize=["n_queries", "n_splits"])
def join_splits_kernel(
    PartialOut, PartialLse, Out, Lse, n_rows, n_heads, n_queries, n_splits,
    HEAD_SIZE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row (b, h, i) a program: the parts' outputs, weighted by exp(logsumexp)."""
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    columns = tl.arange(0, BLOCK_D)
    lse = tl.load(PartialLse + splits * n_rows + row, mask=splits < n_splits, other=-float("inf"))
    largest = tl.max(lse, axis=0)
    blind = largest == -float("inf")
    weights = tl.exp2(lse - tl.where(blind, 0.0, largest))
    total = tl.where(blind, 1.0, tl.sum(weights, axis=0))
    parts = tl.load(
        PartialOut + (splits.to(tl.int64)[:, None] * n_rows + row) * HEAD_SIZE + columns[None, :],
        mask=(splits < n_splits)[:, None] & (columns < HEAD_SIZE)[None, :],
        other=0.0,
    )
    out = tl.sum(parts * weights[:, None], axis=0) / total
    batch_head = row // n_queries
    out_row = (batch_head // n_heads * n_queries + row % n_queries) * n_heads + batch_head % n_heads
    tl.store(Out + out_row * HEAD_SIZE + columns, round_to(out, Out.dtype.element_ty), mask=columns < HEAD_SIZE)
    tl.store(Lse + row, tl.where(blind, float("inf"), largest + tl.log2(total)))


# --- launch configurations --------------------------------------------------------------------------------------------
#
# Chosen by hand and held to tests/kernel_budgets.toml: no spills, but for a few bytes in float32, and small enough that
# two programs share a multiprocessor where the head size lets them, so that one's softmax runs beside the other's
# products.


def _config(block_m: int, block_n: int, num_warps: int, num_stages: int, block_d: int) -> dict[str, int]:
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "num_warps": num_warps,
        "num_stages": num_stages,
        **COMPILE_OPTIONS,
    }


def _float32_config(block_d: int, num_warps: int) -> dict[str, int]:
    """Products of float32 take no tensor core: each lane holds whole rows of its operands, so tiles are small."""
    return _config(16, 16, num_warps, 1, block_d)


def _block_d(head_size: int) -> int:
    return max(16, next_power_of_2(head_size))  # 16 is the least depth of a tensor core product


@lru_cache
def forward_config(head_size: int, element_size: int, longest: int, descriptors: bool, dropout: bool) -> dict[str, int]:
    """`longest` is max(Tq, Tk). Masks of dropout take registers: there the same tile is spread over more warps."""
    d = _block_d(head_size)
    if element_size == 4:
        return _float32_config(d, {128: 8, 256: 16}.get(d, 4))
    if descriptors:
        return _config(128, 64, 8 if dropout or d > 64 else 4, 3, d)
    if longest <= 32:  # of 16-bit elements, only heads above 128: the others fit one tile
        return _config(32, 32, 4, 1, d)
    return _config(64, 32 if dropout or d > 64 else 64, 4 if d <= 128 else 8, 2, d)


@lru_cache
def one_tile_forward_config(
    head_size: int, element_size: int, longest: int, dropout: bool, arch: int
) -> dict[str, int] | None:
    """The forward without a loop over keys, where two heads (one used, one on its way) fit; None where they do not."""
    d = _block_d(head_size)
    block = max(16, next_power_of_2(longest))
    if element_size == 4 or d > 128 or block > 64 or block * d > 64 * 64:
        return None
    if arch >= 100 and block * d == 64 * 64 and not dropout:  # four warps spill there
        return _config(block, block, 8, 2, d)
    return _config(block, block, 4 if block >= 32 else 2, 2, d)


@lru_cache
def grad_q_config(head_size: int, element_size: int, descriptors: bool, dropout: bool) -> dict[str, int]:
    d = _block_d(head_size)
    if element_size == 4:
        return _float32_config(d, 4 if d <= 64 else 8)
    if descriptors:
        return _config(128, 32 if dropout and d > 64 else 64, 8, 3 if d <= 64 else 2, d)
    if d <= 128:
        return _config(64, 32, 4 if d <= 64 else 8, 2, d)
    return _config(16, 32, 4, 1, d)


@lru_cache
def grad_kv_config(
    head_size: int, element_size: int, descriptors: bool, dropout: bool, group: int, arch: int
) -> dict[str, int]:
    d = _block_d(head_size)
    if element_size == 4:
        return _float32_config(d, 4 if d <= 64 else 8)
    if descriptors:
        return _config(64 if d <= 64 or (group == 1 and not dropout) else 32, 128, 8, 2, d)
    if d <= 64:  # from sm_90 on, operands may stay in shared memory
        return _config(32, 64 if arch >= 90 or not dropout else 32, 4, 2, d)
    return _config(32, 32, 8, 2 if d == 128 else 1, d)


@lru_cache
def one_tile_config(head_size: int, element_size: int, longest: int, dropout: bool, arch: int) -> dict[str, int] | None:
    """The single-pass backward, where queries, keys and all three sums fit one tile; None where they do not."""
    d = _block_d(head_size)
    block = max(16, next_power_of_2(longest))
    largest = 64 * 32 if dropout or arch < 90 else 64 * 64
    if element_size == 4 or block > 64 or block * d > largest:
        return None
    return _config(block, block, 8 if block == 64 else 4, 1, d)


@lru_cache
def decode_config(head_size: int, element_size: int, n_rows: int) -> dict[str, int]:
    """`n_rows`: query heads that share a key head, times queries. See `decodes` for how many there may be."""
    d = _block_d(head_size)
    if element_size == 4:
        config = _config(0, 16, 8 if d <= 128 else 4, 1, d)
    else:
        config = _config(0, 32 if d > 128 else 64, 4, 2, d)
    del config["BLOCK_M"]
    return config | {"ROWS": max(16, next_power_of_2(n_rows))}


def decodes(head_size: int, element_size: int, n_queries: int, group: int) -> bool:
    """Whether the queries of a key head are few enough to be rows of one tile that fits the registers."""
    n_rows, d = group * n_queries, _block_d(head_size)
    fits = n_rows <= 32 and n_rows * d <= 32 * 128 if element_size == 4 else n_rows * d <= 64 * 128
    return n_queries <= MAX_DECODED_QUERIES and fits


def persistent_programs(n_heads: int, n_tiles: int, num_warps: int, n_multiprocessors: int) -> int | None:
    """For the long forward, as many programs as a chip holds: 8 warps of 255 registers a thread fill a multiprocessor.

    None where pairs of tiles would leave programs idle for more than 1/20 of the time: there one program a tile,
    started when another ends, shares the work out better.
    """
    n_pairs, n_programs = n_heads * n_tiles // 2, 8 // num_warps * n_multiprocessors
    even = n_tiles % 2 == 0 and n_pairs > n_programs
    return n_programs if even and 20 * n_pairs >= 19 * cdiv(n_pairs, n_programs) * n_programs else None


def one_tile_programs(n_heads: int, num_warps: int, n_multiprocessors: int) -> int:
    """12 warps of 170 registers a thread fill a multiprocessor; a program beyond that takes its heads in a loop."""
    return min(n_heads, 12 // num_warps * n_multiprocessors)


JOIN_CONFIG = {"num_warps": 4, **COMPILE_OPTIONS}


def n_decode_splits(n_key_heads: int, n_keys: int, block_n: int, n_multiprocessors: int) -> tuple[int, int]:
    """(splits, keys in each): two programs for every multiprocessor, and at least 128 keys for each program."""
    wanted = min(128, cdiv(2 * n_multiprocessors, n_key_heads), cdiv(n_keys, 128))
    split_size = cdiv(cdiv(n_keys, wanted), block_n) * block_n
    return cdiv(n_keys, split_size), split_size


# --- launchers --------------------------------------------------------------------------------------------------------


def _dense_heads(x: Tensor) -> Tensor:
    """x itself where a head's elements lie side by side, as in every view of a (B, T, H, D) tensor; else a copy.

    Offsets within a tile are 32 bits wide, which a stride of 2^24 between rows would leave.
    """
    return x if (x.stride(3) == 1 or x.shape[3] == 1) and x.stride(2) < 2**24 else x.contiguous()


def _sources(
    of_queries: tuple[Tensor, ...], of_keys: tuple[Tensor, ...], descriptors: bool, config: dict[str, int]
) -> tuple:
    """The tensors as a kernel takes them: themselves, or descriptors of their tiles of one head."""
    if not descriptors:
        return of_queries + of_keys
    return tuple(
        TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, config[n_rows], config["BLOCK_D"]])
        for tensors, n_rows in ((of_queries, "BLOCK_M"), (of_keys, "BLOCK_N"))
        for x in tensors
    )


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _precision(dtype: torch.dtype) -> str:
    return float32_precision() if dtype == torch.float32 else "ieee"


def _takes_descriptors(longest: int, *tensors: Tensor) -> bool:
    """The long regime: where making descriptors (microseconds each) is worth it, and the chip has the accelerator."""
    x = tensors[0]
    return (
        longest > SHORT
        and x.element_size() == 2
        and x.shape[3] <= 128
        and architecture(x) // 10 == 9
        and all(
            t.data_ptr() % 16 == 0 and all(s > 0 and s * t.element_size() % 16 == 0 for s in t.stride()[:3])
            for t in tensors
        )
    )


def _section(n_keys: int, head_size: int, element_size: int) -> int:
    return max(1, _L2_SECTION_BYTES // max(1, 2 * n_keys * head_size * element_size))


def empty_heads(like: Tensor, n_heads: int, length: int) -> Tensor:
    """(B, n_heads, length, D), laid out as (B, length, n_heads, D): what a model reshapes to (B, T, C) for free."""
    B, _, _, D = like.shape
    return like.new_empty((B, length, n_heads, D)).transpose(1, 2)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse): out (B, H, Tq, D), laid out as (B, Tq, H, D); lse (B, H, Tq) float32, in base 2, +inf for no key."""
    B, H, Tq, D = q.shape
    Hkv, Tk = k.shape[1:3]
    out = empty_heads(q, H, Tq)
    lse = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    if Tk == 0:
        return out.zero_(), lse.fill_(math.inf)
    q, k, v = _dense_heads(q), _dense_heads(k), _dense_heads(v)
    group = H // Hkv
    score_scale = scale * math.log2(math.e)
    constants = {"HEAD_SIZE": D, "CAUSAL": is_causal, "PRECISION": _precision(q.dtype)}
    if decodes(D, q.element_size(), Tq, group) and dropout_p == 0.0:
        config = decode_config(D, q.element_size(), group * Tq)
        n_splits, split_size = n_decode_splits(B * Hkv, Tk, config["BLOCK_N"], multiprocessors(q))
        if n_splits > 1:
            _decode(q, k, v, out, lse, n_splits, split_size, score_scale, constants | config)
            return out, lse
    key = lse if seed is None else seed
    factors = (score_scale, last_dropped(dropout_p), 1.0 / (1.0 - dropout_p))
    constants["DROPOUT"] = dropout_p > 0.0
    config = one_tile_forward_config(D, q.element_size(), max(Tq, Tk), dropout_p > 0.0, architecture(q))
    if config is not None:
        with device_of(q):
            one_tile_forward_kernel[(one_tile_programs(B * H, config["num_warps"], multiprocessors(q)),)](
                q, k, v, out, lse, key, *_strides(q, k, v), B, H, group, Tq, Tk, *factors, **constants, **config
            )
        return out, lse
    descriptors = _takes_descriptors(max(Tq, Tk), q, k, v)
    config = forward_config(D, q.element_size(), max(Tq, Tk), descriptors, dropout_p > 0.0)
    n_tiles, n_programs = cdiv(Tq, config["BLOCK_M"]), None
    if descriptors:
        n_programs = persistent_programs(B * H, n_tiles, config["num_warps"], multiprocessors(q))
    with device_of(q):
        forward_kernel[(n_programs or B * H * n_tiles,)](
            *_sources((q,), (k, v), descriptors, config), out, lse, key, *_strides(q, k, v),
            B, H, group, Tq, Tk, _section(Tk, D, q.element_size()), *factors,
            DESCRIPTORS=descriptors, PERSISTENT=n_programs is not None, **constants, **config,
        )  # fmt: skip
    return out, lse


def _decode(q, k, v, out, lse, n_splits, split_size, score_scale, config):
    B, H, Tq, D = q.shape
    Hkv, Tk = k.shape[1:3]
    partial_out = torch.empty((n_splits, B, H, Tq, D), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty((n_splits, B, H, Tq), dtype=torch.float32, device=q.device)
    with device_of(q):
        decode_kernel[(n_splits, B * Hkv)](
            q, k, v, partial_out, partial_lse, *_strides(q, k, v),
            B, H, H // Hkv, Tq, Tk, split_size, score_scale, **config,
        )  # fmt: skip
        join_splits_kernel[(B * H * Tq,)](
            partial_out, partial_lse, out, lse, B * H * Tq, H, Tq, n_splits,
            HEAD_SIZE=D, BLOCK_D=config["BLOCK_D"], SPLITS=next_power_of_2(n_splits), **JOIN_CONFIG,
        )  # fmt: skip


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, laid out as (B, T, H, D) like `out`; empty where `output_mask` does not ask for one.

    dQ alone takes one pass and dV alone the other; dK takes delta too, which the pass of dQ makes.
    """
    B, H, Tq, D = q.shape
    Hkv, Tk = k.shape[1:3]
    needs_q, needs_k, needs_v = output_mask
    grad_q = empty_heads(q, H, Tq) if needs_q else q.new_empty(0)
    grad_k = empty_heads(k, Hkv, Tk) if needs_k else k.new_empty(0)
    grad_v = empty_heads(v, Hkv, Tk) if needs_v else v.new_empty(0)
    if q.numel() == 0 or k.numel() == 0 or not any(output_mask):
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_()
    q, k, v, grad_out = _dense_heads(q), _dense_heads(k), _dense_heads(v), _dense_heads(grad_out)
    out, lse = out.transpose(1, 2).contiguous(), lse.contiguous()  # as `forward` lays them out: no copy
    key = lse if seed is None else seed
    strides = _strides(grad_out, q, k, v)
    group = H // Hkv
    section = _section(Tk, D, q.element_size())
    factors = (scale * math.log2(math.e), scale, last_dropped(dropout_p), 1.0 / (1.0 - dropout_p))
    constants = {"HEAD_SIZE": D, "CAUSAL": is_causal, "DROPOUT": dropout_p > 0.0, "PRECISION": _precision(q.dtype)}
    size, longest = q.element_size(), max(Tq, Tk)
    with device_of(q):
        config = one_tile_config(D, size, longest, dropout_p > 0.0, architecture(q))
        if config is not None:
            one_tile_backward_kernel[(B * Hkv,)](
                grad_out, q, k, v, out, lse, grad_q, grad_k, grad_v, key, *strides, H, group, Tq, Tk, *factors,
                GRAD_Q=needs_q, GRAD_K=needs_k, GRAD_V=needs_v, **constants, **config,
            )  # fmt: skip
            return grad_q, grad_k, grad_v
        descriptors = _takes_descriptors(longest, q, k, v, grad_out)
        constants["DESCRIPTORS"] = descriptors
        delta = torch.empty_like(lse) if needs_q or needs_k else lse.new_empty(0)
        if needs_q or needs_k:
            config = grad_q_config(D, size, descriptors, dropout_p > 0.0)
            grad_q_kernel[(B * H * cdiv(Tq, config["BLOCK_M"]),)](
                *_sources((grad_out, q), (k, v), descriptors, config), out, lse, delta, grad_q, key, *strides,
                B, H, group, Tq, Tk, section, *factors, GRAD_Q=needs_q, **constants, **config,
            )  # fmt: skip
        if needs_k or needs_v:
            config = grad_kv_config(D, size, descriptors, dropout_p > 0.0, group, architecture(q))
            grad_kv_kernel[(B * Hkv * cdiv(Tk, config["BLOCK_N"]),)](
                *_sources((grad_out, q), (k, v), descriptors, config), lse, delta, grad_k, grad_v, key, *strides,
                B, H, group, Tq, Tk, section, *factors, GRAD_K=needs_k, GRAD_V=needs_v, **constants, **config,
            )  # fmt: skip
    return grad_q, grad_k, grad_v
