"""Scaled dot product attention that never writes the (Tq, Tk) scores: forward, backward and decoding.

What is fused: scores, causal mask, softmax, dropout and the product with v run tile by tile in registers (online
softmax: Milakov & Gimelshein 2018, FlashAttention: Dao et al. 2022, FlashAttention-2: Dao 2023). Only the float32
logsumexp of each row is kept for backward.

    forward    a program owns BLOCK_M queries of one head and walks over the keys:

                   keys ->   full  full  full  diag
                           +-----+-----+-----+-----+      Tiles left of the diagonal are whole and need no mask;
               queries  m  |     |     |     |\\    |      tiles right of it are never visited. The exponential is
                           +-----+-----+-----+-----+      exp2 with log2(e) folded into the scale: one FMA a score.

    backward   two passes, so that every sum has one owner and no atomics are needed:
               dQ    a program owns queries, walks over keys; also makes delta = rowsum(dO * O) for the other pass
               dK dV a program owns keys, walks over queries, and over the query heads that share its key head
               A head whose queries and keys fit one tile takes a single pass that makes all three.
    decoding   up to 8 queries against a long cache: the keys are split among programs, and a second kernel joins the
               parts by their logsumexps. The query heads that share a key head are rows of one tile: one read of k, v.

The causal mask is aligned to the bottom right: query i sees key j when j <= i + Tk - Tq. Long causal rows are started
first, and heads in sections whose keys and values fit the L2 cache together, so that the programs end at one time.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import keep_tile, last_dropped
from .target import COMPILE_OPTIONS, INTERPRETING, architecture, device_of, float32_precision, multiprocessors

MAX_HEAD_SIZE = 256
MAX_DECODED_QUERIES = 8
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
def _pointers(base, stride, first, N_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of the tile (N_ROWS, BLOCK_D) whose rows begin at `first`, in 64 bits: a tensor may exceed 2^31 elements."""
    rows = first + tl.arange(0, N_ROWS).to(tl.int64)
    return base + rows[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _load_tile(pointers, first, n_rows, HEAD_SIZE: tl.constexpr, MASK_ROWS: tl.constexpr):
    N_ROWS: tl.constexpr = pointers.shape[0]
    BLOCK_D: tl.constexpr = pointers.shape[1]
    if MASK_ROWS:
        mask = (first + tl.arange(0, N_ROWS) < n_rows)[:, None]
        if HEAD_SIZE != BLOCK_D:
            mask = mask & (tl.arange(0, BLOCK_D) < HEAD_SIZE)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)
    elif HEAD_SIZE != BLOCK_D:
        return tl.load(pointers, mask=(tl.arange(0, BLOCK_D) < HEAD_SIZE)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store_tile(pointers, tile, first, n_rows, HEAD_SIZE: tl.constexpr):
    N_ROWS: tl.constexpr = pointers.shape[0]
    BLOCK_D: tl.constexpr = pointers.shape[1]
    mask = (first + tl.arange(0, N_ROWS) < n_rows)[:, None] & (tl.arange(0, BLOCK_D) < HEAD_SIZE)[None, :]
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _seen(
    first_query, first_key, n_queries, n_keys, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Mask (BLOCK_M, BLOCK_N): True where the key exists and the query may see it."""
    keys = first_key + tl.arange(0, BLOCK_N)[None, :]
    queries = first_query + tl.arange(0, BLOCK_M)[:, None]
    seen = (keys < n_keys) & (queries < n_queries)
    if CAUSAL:
        seen = seen & (keys <= queries + (n_keys - n_queries))
    return seen


@triton.jit
def _locate(n_heads, n_tiles, section, LAST_FIRST: tl.constexpr):
    """(batch * head, tile) of this program: all tiles of `section` heads before the next section's."""
    program = tl.program_id(0)
    first_head = program // (section * n_tiles) * section
    heads_here = tl.minimum(section, n_heads - first_head)
    within = program - first_head * n_tiles
    tile = within // heads_here
    head = first_head + within % heads_here
    return head, (n_tiles - 1 - tile if LAST_FIRST else tile)


# --- forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_tiles(
    accumulator,
    largest,
    total,
    q,
    k_pointers,
    v_pointers,
    k_stride,
    v_stride,
    first_query,
    start,
    stop,
    n_queries,
    n_keys,
    score_scale,
    seed,
    mask_row,
    last_dropped,
    HEAD_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    for first_key in range(start, stop, BLOCK_N):
        k = _load_tile(k_pointers, first_key, n_keys, HEAD_SIZE, MASKED)
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
        v = _load_tile(v_pointers, first_key, n_keys, HEAD_SIZE, MASKED)
        accumulator = _dot_add(weights.to(v.dtype), v, accumulator, PRECISION)
        largest = new_largest
        k_pointers += BLOCK_N * k_stride
        v_pointers += BLOCK_N * v_stride
    return accumulator, largest, total, k_pointers, v_pointers


@triton.jit(do_not_specialize=["n_queries", "n_keys", "section", "last_dropped"])
def forward_kernel(
    Q,
    K,
    V,
    Out,
    Lse,
    Seed,
    q_batch_stride,
    q_head_stride,
    q_stride,
    k_batch_stride,
    k_head_stride,
    k_stride,
    v_batch_stride,
    v_head_stride,
    v_stride,
    batch_size,
    n_heads,
    group,
    n_queries,
    n_keys,
    section,
    score_scale,
    last_dropped,
    keep_scale,
    HEAD_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Out is (B, Tq, H, D) contiguous; Lse (B, H, Tq) float32, in base 2, +inf where a query sees no key."""
    head, tile = _locate(batch_size * n_heads, tl.cdiv(n_queries, BLOCK_M), section, CAUSAL)
    batch = (head // n_heads).to(tl.int64)
    h = (head % n_heads).to(tl.int64)
    first_query = tile * BLOCK_M
    q = _load_tile(
        _pointers(Q + batch * q_batch_stride + h * q_head_stride, q_stride, first_query, BLOCK_M, BLOCK_D),
        first_query, n_queries, HEAD_SIZE, True,
    )  # fmt: skip
    k_pointers = _pointers(K + batch * k_batch_stride + h // group * k_head_stride, k_stride, 0, BLOCK_N, BLOCK_D)
    v_pointers = _pointers(V + batch * v_batch_stride + h // group * v_head_stride, v_stride, 0, BLOCK_N, BLOCK_D)
    mask_row = (batch * n_heads + h) * n_queries + first_query
    seed = tl.load(Seed) if DROPOUT else 0

    end, unmasked_end = n_keys, n_keys
    if CAUSAL:
        offset = n_keys - n_queries
        end = tl.minimum(n_keys, tl.maximum(0, first_query + BLOCK_M + offset))
        unmasked_end = tl.minimum(n_keys, tl.maximum(0, first_query + offset + 1))
    unmasked_end = unmasked_end // BLOCK_N * BLOCK_N
    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    accumulator, largest, total, k_pointers, v_pointers = _forward_tiles(
        accumulator, largest, total, q, k_pointers, v_pointers, k_stride, v_stride, first_query, 0, unmasked_end,
        n_queries, n_keys, score_scale, seed, mask_row, last_dropped,
        HEAD_SIZE, CAUSAL, False, DROPOUT, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    accumulator, largest, total, k_pointers, v_pointers = _forward_tiles(
        accumulator, largest, total, q, k_pointers, v_pointers, k_stride, v_stride, first_query, unmasked_end, end,
        n_queries, n_keys, score_scale, seed, mask_row, last_dropped,
        HEAD_SIZE, CAUSAL, True, DROPOUT, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip

    blind = total == 0.0
    factor = tl.where(blind, 0.0, 1.0 / tl.where(blind, 1.0, total))
    if DROPOUT:
        factor *= keep_scale
    out_stride = n_heads * HEAD_SIZE
    out = _pointers(Out + (batch * n_queries * n_heads + h) * HEAD_SIZE, out_stride, first_query, BLOCK_M, BLOCK_D)
    _store_tile(out, accumulator * factor[:, None], first_query, n_queries, HEAD_SIZE)
    lse = tl.where(blind, float("inf"), largest + tl.log2(tl.where(blind, 1.0, total)))
    tl.store(Lse + mask_row + tl.arange(0, BLOCK_M), lse, mask=first_query + tl.arange(0, BLOCK_M) < n_queries)


# --- backward ---------------------------------------------------------------------------------------------------------
#
# With P = softmax(S), S = scale * Q K^T, and keep the dropout mask times 1 / (1 - p):
#     dV = (P * keep)^T dO,   dP = (dO V^T) * keep,   dS = P * (dP - delta),   dQ = scale * dS K,   dK = scale * dS^T Q
# and delta = rowsum(P * dP) = rowsum(dO * O). P is made again from the scores and the row's logsumexp.


@triton.jit
def _weights_and_grad(
    q, k, v, grad_out, lse, delta, seen, score_scale, keep, keep_scale,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(weights after dropout, dS): both (BLOCK_M, BLOCK_N)."""
    weights = tl.exp2(_dot(q, tl.trans(k), PRECISION) * score_scale - lse[:, None])
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    grad_weights = _dot(grad_out, tl.trans(v), PRECISION)
    if DROPOUT:
        grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
        dropped = tl.where(keep, weights * keep_scale, 0.0)
    else:
        dropped = weights
    return dropped, weights * (grad_weights - delta[:, None])


@triton.jit
def _grad_q_tiles(
    grad_q, q, grad_out, lse, delta, k_pointers, v_pointers, k_stride, v_stride, first_query, start, stop,
    n_queries, n_keys, score_scale, seed, mask_row, last_dropped, keep_scale,
    HEAD_SIZE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    for first_key in range(start, stop, BLOCK_N):
        k = _load_tile(k_pointers, first_key, n_keys, HEAD_SIZE, MASKED)
        v = _load_tile(v_pointers, first_key, n_keys, HEAD_SIZE, MASKED)
        seen = None
        keep = None
        if MASKED:
            seen = _seen(first_query, first_key, n_queries, n_keys, CAUSAL, BLOCK_M, BLOCK_N)
        if DROPOUT:
            keep = keep_tile(seed, mask_row, first_key, last_dropped, BLOCK_M, BLOCK_N)
        _, grad_scores = _weights_and_grad(
            q, k, v, grad_out, lse, delta, seen, score_scale, keep, keep_scale, MASKED, DROPOUT, PRECISION
        )
        grad_q = _dot_add(grad_scores.to(k.dtype), k, grad_q, PRECISION)
        k_pointers += BLOCK_N * k_stride
        v_pointers += BLOCK_N * v_stride
    return grad_q, k_pointers, v_pointers


@triton.jit(do_not_specialize=["n_queries", "n_keys", "section", "last_dropped"])
def grad_q_kernel(
    GradOut, Q, K, V, Out, Lse, Delta, GradQ, Seed,
    grad_batch_stride, grad_head_stride, grad_stride,
    q_batch_stride, q_head_stride, q_stride,
    k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride,
    batch_size, n_heads, group, n_queries, n_keys, section, score_scale, scale, last_dropped, keep_scale,
    HEAD_SIZE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """GradQ and Out are (B, Tq, H, D) contiguous; Delta (B, H, Tq) float32 is written for `grad_kv_kernel`."""
    head, tile = _locate(batch_size * n_heads, tl.cdiv(n_queries, BLOCK_M), section, CAUSAL)
    batch = (head // n_heads).to(tl.int64)
    h = (head % n_heads).to(tl.int64)
    first_query = tile * BLOCK_M
    q = _load_tile(
        _pointers(Q + batch * q_batch_stride + h * q_head_stride, q_stride, first_query, BLOCK_M, BLOCK_D),
        first_query, n_queries, HEAD_SIZE, True,
    )  # fmt: skip
    grad_out = _load_tile(
        _pointers(GradOut + batch * grad_batch_stride + h * grad_head_stride, grad_stride, first_query, BLOCK_M, BLOCK_D),
        first_query, n_queries, HEAD_SIZE, True,
    )  # fmt: skip
    at_head = (batch * n_queries * n_heads + h) * HEAD_SIZE
    out_stride = n_heads * HEAD_SIZE
    out = _load_tile(
        _pointers(Out + at_head, out_stride, first_query, BLOCK_M, BLOCK_D), first_query, n_queries, HEAD_SIZE, True
    )
    mask_row = (batch * n_heads + h) * n_queries + first_query
    in_rows = first_query + tl.arange(0, BLOCK_M) < n_queries
    lse = tl.load(Lse + mask_row + tl.arange(0, BLOCK_M), mask=in_rows, other=float("inf"))
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), axis=1)
    tl.store(Delta + mask_row + tl.arange(0, BLOCK_M), delta, mask=in_rows)
    k_pointers = _pointers(K + batch * k_batch_stride + h // group * k_head_stride, k_stride, 0, BLOCK_N, BLOCK_D)
    v_pointers = _pointers(V + batch * v_batch_stride + h // group * v_head_stride, v_stride, 0, BLOCK_N, BLOCK_D)
    seed = tl.load(Seed) if DROPOUT else 0

    end, unmasked_end = n_keys, n_keys
    if CAUSAL:
        offset = n_keys - n_queries
        end = tl.minimum(n_keys, tl.maximum(0, first_query + BLOCK_M + offset))
        unmasked_end = tl.minimum(n_keys, tl.maximum(0, first_query + offset + 1))
    unmasked_end = unmasked_end // BLOCK_N * BLOCK_N
    grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    grad_q, k_pointers, v_pointers = _grad_q_tiles(
        grad_q, q, grad_out, lse, delta, k_pointers, v_pointers, k_stride, v_stride, first_query, 0, unmasked_end,
        n_queries, n_keys, score_scale, seed, mask_row, last_dropped, keep_scale,
        HEAD_SIZE, CAUSAL, False, DROPOUT, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    grad_q, k_pointers, v_pointers = _grad_q_tiles(
        grad_q, q, grad_out, lse, delta, k_pointers, v_pointers, k_stride, v_stride, first_query, unmasked_end, end,
        n_queries, n_keys, score_scale, seed, mask_row, last_dropped, keep_scale,
        HEAD_SIZE, CAUSAL, True, DROPOUT, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    out = _pointers(GradQ + at_head, out_stride, first_query, BLOCK_M, BLOCK_D)
    _store_tile(out, grad_q * scale, first_query, n_queries, HEAD_SIZE)


@triton.jit
def _grad_kv_tiles(
    grad_k, grad_v, k, v, q_base, grad_base, q_stride, grad_stride, lse_base, delta_base, first_key, start, stop,
    n_queries, n_keys, score_scale, seed, mask_row, last_dropped, keep_scale,
    HEAD_SIZE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BLOCK_D: tl.constexpr = k.shape[1]
    q_pointers = _pointers(q_base, q_stride, start, BLOCK_M, BLOCK_D)
    grad_pointers = _pointers(grad_base, grad_stride, start, BLOCK_M, BLOCK_D)
    for first_query in range(start, stop, BLOCK_M):
        q = _load_tile(q_pointers, first_query, n_queries, HEAD_SIZE, True)
        grad_out = _load_tile(grad_pointers, first_query, n_queries, HEAD_SIZE, True)
        queries = first_query + tl.arange(0, BLOCK_M)
        # Rows that do not exist, and those that see no key, have a logsumexp of +inf: their weights are exactly 0.
        lse = tl.load(lse_base + queries, mask=queries < n_queries, other=float("inf"))
        delta = tl.load(delta_base + queries, mask=queries < n_queries, other=0.0)
        seen = None
        keep = None
        if MASKED:
            seen = _seen(first_query, first_key, n_queries, n_keys, CAUSAL, BLOCK_M, BLOCK_N)
        if DROPOUT:
            keep = keep_tile(seed, mask_row + first_query, first_key, last_dropped, BLOCK_M, BLOCK_N)
        weights, grad_scores = _weights_and_grad(
            q, k, v, grad_out, lse, delta, seen, score_scale, keep, keep_scale, MASKED, DROPOUT, PRECISION
        )
        grad_v = _dot_add(tl.trans(weights.to(q.dtype)), grad_out, grad_v, PRECISION)
        grad_k = _dot_add(tl.trans(grad_scores.to(q.dtype)), q, grad_k, PRECISION)
        q_pointers += BLOCK_M * q_stride
        grad_pointers += BLOCK_M * grad_stride
    return grad_k, grad_v


@triton.jit(do_not_specialize=["n_queries", "n_keys", "section", "last_dropped"])
def grad_kv_kernel(
    GradOut, Q, K, V, Lse, Delta, GradK, GradV, Seed,
    grad_batch_stride, grad_head_stride, grad_stride,
    q_batch_stride, q_head_stride, q_stride,
    k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride,
    batch_size, n_heads, group, n_queries, n_keys, section, score_scale, scale, last_dropped, keep_scale,
    HEAD_SIZE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """GradK and GradV are (B, Tk, Hkv, D) contiguous. The first keys have the most queries, and start first."""
    n_key_heads = n_heads // group
    key_head, tile = _locate(batch_size * n_key_heads, tl.cdiv(n_keys, BLOCK_N), section, False)
    batch = (key_head // n_key_heads).to(tl.int64)
    kh = (key_head % n_key_heads).to(tl.int64)
    first_key = tile * BLOCK_N
    k = _load_tile(
        _pointers(K + batch * k_batch_stride + kh * k_head_stride, k_stride, first_key, BLOCK_N, BLOCK_D),
        first_key, n_keys, HEAD_SIZE, True,
    )  # fmt: skip
    v = _load_tile(
        _pointers(V + batch * v_batch_stride + kh * v_head_stride, v_stride, first_key, BLOCK_N, BLOCK_D),
        first_key, n_keys, HEAD_SIZE, True,
    )  # fmt: skip
    seed = tl.load(Seed) if DROPOUT else 0
    start, unmasked_start = 0, 0
    if CAUSAL:
        offset = n_keys - n_queries
        start = tl.maximum(0, first_key - offset) // BLOCK_M * BLOCK_M
        unmasked_start = tl.cdiv(tl.maximum(0, first_key + BLOCK_N - 1 - offset), BLOCK_M) * BLOCK_M
    unmasked_start = tl.minimum(unmasked_start, tl.cdiv(n_queries, BLOCK_M) * BLOCK_M)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for member in range(0, group):
        h = kh * group + member
        q_base = Q + batch * q_batch_stride + h * q_head_stride
        grad_base = GradOut + batch * grad_batch_stride + h * grad_head_stride
        mask_row = (batch * n_heads + h) * n_queries
        grad_k, grad_v = _grad_kv_tiles(
            grad_k, grad_v, k, v, q_base, grad_base, q_stride, grad_stride, Lse + mask_row, Delta + mask_row,
            first_key, start, unmasked_start, n_queries, n_keys,
            score_scale, seed, mask_row, last_dropped, keep_scale,
            HEAD_SIZE, CAUSAL, True, DROPOUT, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        grad_k, grad_v = _grad_kv_tiles(
            grad_k, grad_v, k, v, q_base, grad_base, q_stride, grad_stride, Lse + mask_row, Delta + mask_row,
            first_key, unmasked_start, n_queries, n_queries, n_keys,
            score_scale, seed, mask_row, last_dropped, keep_scale,
            HEAD_SIZE, CAUSAL, False, DROPOUT, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    at_head = (batch * n_keys * n_key_heads + kh) * HEAD_SIZE
    out_stride = n_key_heads * HEAD_SIZE
    _store_tile(
        _pointers(GradK + at_head, out_stride, first_key, BLOCK_N, BLOCK_D),
        grad_k * scale, first_key, n_keys, HEAD_SIZE,
    )  # fmt: skip
    _store_tile(
        _pointers(GradV + at_head, out_stride, first_key, BLOCK_N, BLOCK_D), grad_v, first_key, n_keys, HEAD_SIZE
    )


@triton.jit(do_not_specialize=["n_queries", "n_keys", "last_dropped"])
def one_tile_backward_kernel(
    GradOut, Q, K, V, Out, Lse, GradQ, GradK, GradV, Seed,
    grad_batch_stride, grad_head_stride, grad_stride,
    q_batch_stride, q_head_stride, q_stride,
    k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride,
    n_heads, group, n_queries, n_keys, score_scale, scale, last_dropped, keep_scale,
    HEAD_SIZE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All three gradients of the query heads of one key head, Tq <= BLOCK_M and Tk <= BLOCK_N.

    One launch instead of two, and q, k, v, dO and the scores once instead of twice: what short sequences consist of.
    """
    n_key_heads = n_heads // group
    batch = (tl.program_id(0) // n_key_heads).to(tl.int64)
    kh = (tl.program_id(0) % n_key_heads).to(tl.int64)
    k = _load_tile(
        _pointers(K + batch * k_batch_stride + kh * k_head_stride, k_stride, 0, BLOCK_N, BLOCK_D),
        0, n_keys, HEAD_SIZE, True,
    )  # fmt: skip
    v = _load_tile(
        _pointers(V + batch * v_batch_stride + kh * v_head_stride, v_stride, 0, BLOCK_N, BLOCK_D),
        0, n_keys, HEAD_SIZE, True,
    )  # fmt: skip
    seed = tl.load(Seed) if DROPOUT else 0
    queries = tl.arange(0, BLOCK_M)
    seen = _seen(0, 0, n_queries, n_keys, CAUSAL, BLOCK_M, BLOCK_N)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    out_stride = n_heads * HEAD_SIZE
    for member in range(0, group):
        h = kh * group + member
        q = _load_tile(
            _pointers(Q + batch * q_batch_stride + h * q_head_stride, q_stride, 0, BLOCK_M, BLOCK_D),
            0, n_queries, HEAD_SIZE, True,
        )  # fmt: skip
        grad_out = _load_tile(
            _pointers(GradOut + batch * grad_batch_stride + h * grad_head_stride, grad_stride, 0, BLOCK_M, BLOCK_D),
            0, n_queries, HEAD_SIZE, True,
        )  # fmt: skip
        at_head = (batch * n_queries * n_heads + h) * HEAD_SIZE
        out = _load_tile(_pointers(Out + at_head, out_stride, 0, BLOCK_M, BLOCK_D), 0, n_queries, HEAD_SIZE, True)
        mask_row = (batch * n_heads + h) * n_queries
        lse = tl.load(Lse + mask_row + queries, mask=queries < n_queries, other=float("inf"))
        delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), axis=1)
        keep = None
        if DROPOUT:
            keep = keep_tile(seed, mask_row, 0, last_dropped, BLOCK_M, BLOCK_N)
        weights, grad_scores = _weights_and_grad(
            q, k, v, grad_out, lse, delta, seen, score_scale, keep, keep_scale, True, DROPOUT, PRECISION
        )
        grad_v = _dot_add(tl.trans(weights.to(q.dtype)), grad_out, grad_v, PRECISION)
        grad_scores = grad_scores.to(q.dtype)
        grad_k = _dot_add(tl.trans(grad_scores), q, grad_k, PRECISION)
        grad_q = _dot(grad_scores, k, PRECISION) * scale
        _store_tile(_pointers(GradQ + at_head, out_stride, 0, BLOCK_M, BLOCK_D), grad_q, 0, n_queries, HEAD_SIZE)
    at_head = (batch * n_keys * n_key_heads + kh) * HEAD_SIZE
    out_stride = n_key_heads * HEAD_SIZE
    _store_tile(_pointers(GradK + at_head, out_stride, 0, BLOCK_N, BLOCK_D), grad_k * scale, 0, n_keys, HEAD_SIZE)
    _store_tile(_pointers(GradV + at_head, out_stride, 0, BLOCK_N, BLOCK_D), grad_v, 0, n_keys, HEAD_SIZE)


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
    batch = (tl.program_id(1) // n_key_heads).to(tl.int64)
    kh = (tl.program_id(1) % n_key_heads).to(tl.int64)
    row = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)[None, :]
    query = row % n_queries
    h = kh * group + row // n_queries
    in_rows = row < group * n_queries
    in_tile = in_rows[:, None] & (columns < HEAD_SIZE)
    q_rows = h * q_head_stride + query.to(tl.int64) * q_stride
    q = tl.load(Q + batch * q_batch_stride + q_rows[:, None] + columns, mask=in_tile, other=0.0)
    first = split * split_size
    stop = tl.minimum(n_keys, first + split_size)
    k_pointers = _pointers(K + batch * k_batch_stride + kh * k_head_stride, k_stride, first, BLOCK_N, BLOCK_D)
    v_pointers = _pointers(V + batch * v_batch_stride + kh * v_head_stride, v_stride, first, BLOCK_N, BLOCK_D)
    accumulator = tl.zeros((ROWS, BLOCK_D), tl.float32)
    largest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first_key in range(first, stop, BLOCK_N):
        k = _load_tile(k_pointers, first_key, n_keys, HEAD_SIZE, True)
        v = _load_tile(v_pointers, first_key, n_keys, HEAD_SIZE, True)
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
        accumulator = _dot_add(weights.to(v.dtype), v, accumulator * shrink[:, None], PRECISION)
        largest = new_largest
        k_pointers += BLOCK_N * k_stride
        v_pointers += BLOCK_N * v_stride
    blind = total == 0.0
    safe_total = tl.where(blind, 1.0, total)
    out_row = ((split * batch_size + batch) * n_heads + h) * n_queries + query
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
    tl.store(Out + out_row * HEAD_SIZE + columns, out.to(Out.dtype.element_ty), mask=columns < HEAD_SIZE)
    tl.store(Lse + row, tl.where(blind, float("inf"), largest + tl.log2(total)))


# --- launch configurations --------------------------------------------------------------------------------------------
#
# Chosen by hand and held to tests/kernel_budgets.toml: no spills, and small enough that two programs share a
# multiprocessor where the head size lets them, so that one's softmax runs beside the other's products.


def _config(block_m: int, block_n: int, num_warps: int, num_stages: int, block_d: int) -> dict[str, int]:
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "num_warps": num_warps,
        "num_stages": num_stages,
        **COMPILE_OPTIONS,
    }


def _block_d(head_size: int) -> int:
    return max(16, triton.next_power_of_2(head_size))  # 16 is the least depth of a tensor core product


def forward_config(head_size: int, element_size: int, longest: int, arch: int) -> dict[str, int]:
    """`longest` is max(Tq, Tk): up to 256 it is the short regime, whose tiles are no larger than the sequence."""
    d = _block_d(head_size)
    if element_size == 4:
        return _config(32, 32, 4, 1, d)
    if longest <= 32:
        return _config(32, 32, 2, 1, d)
    if longest <= 256 or arch not in (90, 100):
        return _config(64, 64 if d <= 128 else 32, 4, 2, d)
    if d <= 64:
        return _config(128, 64, 4, 3, d)
    return _config(128, 64, 8, 2, d)


def grad_q_config(head_size: int, element_size: int, longest: int, arch: int) -> dict[str, int]:
    d = _block_d(head_size)
    if element_size == 4:
        return _config(32, 32, 4, 1, d)
    if longest <= 256 or arch not in (90, 100):
        return _config(64, 64 if d <= 128 else 32, 4, 2, d)
    if d <= 64:
        return _config(128, 64, 8, 3, d)
    return _config(128, 64, 8, 2, d)


def grad_kv_config(head_size: int, element_size: int, longest: int, arch: int) -> dict[str, int]:
    d = _block_d(head_size)
    if element_size == 4:
        return _config(32, 32, 4, 1, d)
    if longest <= 256 or arch not in (90, 100):
        return _config(64 if d <= 128 else 32, 64, 4, 2, d)
    if d <= 64:
        return _config(64, 128, 8, 3, d)
    return _config(64, 128, 8, 2, d)


def one_tile_config(head_size: int, element_size: int, longest: int) -> dict[str, int] | None:
    """The single-pass backward, where queries and keys fit one tile; None where they do not."""
    d = _block_d(head_size)
    block = max(16, triton.next_power_of_2(longest))
    if element_size == 4:
        return _config(block, block, 4, 1, d) if block <= 32 and d <= 64 else None
    if block > 128 or d > 128 or block * d > 128 * 64:
        return None
    return _config(block, block, 8 if block == 128 else 4, 1, d)


def decode_config(head_size: int, element_size: int, n_rows: int) -> dict[str, int]:
    """`n_rows`: query heads that share a key head, times queries."""
    d = _block_d(head_size)
    config = _config(0, 32 if element_size == 4 or d > 128 else 64, 4, 1 if element_size == 4 else 2, d)
    del config["BLOCK_M"]
    return config | {"ROWS": max(16, triton.next_power_of_2(n_rows))}


def n_decode_splits(n_key_heads: int, n_keys: int, block_n: int, n_multiprocessors: int) -> tuple[int, int]:
    """(splits, keys in each): two programs for every multiprocessor, and at least 128 keys for each program."""
    wanted = min(128, triton.cdiv(2 * n_multiprocessors, n_key_heads), triton.cdiv(n_keys, 128))
    split_size = triton.cdiv(triton.cdiv(n_keys, wanted), block_n) * block_n
    return triton.cdiv(n_keys, split_size), split_size


# --- launchers --------------------------------------------------------------------------------------------------------


def _dense_heads(x: Tensor) -> Tensor:
    """x itself where the elements of a head lie side by side, which every view of a (B, T, H, D) tensor has."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _precision(dtype: torch.dtype) -> str:
    return float32_precision() if dtype == torch.float32 else "ieee"


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
    if Tq <= MAX_DECODED_QUERIES and group * Tq <= 64 and dropout_p == 0.0:
        config = decode_config(D, q.element_size(), group * Tq)
        n_splits, split_size = n_decode_splits(B * Hkv, Tk, config["BLOCK_N"], multiprocessors(q))
        if n_splits > 1:
            _decode(q, k, v, out, lse, n_splits, split_size, score_scale, constants | config)
            return out, lse
    config = forward_config(D, q.element_size(), max(Tq, Tk), architecture(q))
    with device_of(q):
        forward_kernel[(B * H * triton.cdiv(Tq, config["BLOCK_M"]),)](
            q, k, v, out, lse, lse if seed is None else seed, *_strides(q, k, v),
            B, H, group, Tq, Tk, _section(Tk, D, q.element_size()),
            score_scale, last_dropped(dropout_p), 1.0 / (1.0 - dropout_p),
            DROPOUT=dropout_p > 0.0, **constants, **config,
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
            HEAD_SIZE=D, BLOCK_D=config["BLOCK_D"], SPLITS=triton.next_power_of_2(n_splits), num_warps=4,
            **COMPILE_OPTIONS,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, laid out as (B, T, H, D) like `out`."""
    B, H, Tq, D = q.shape
    Hkv, Tk = k.shape[1:3]
    grad_q, grad_k, grad_v = empty_heads(q, H, Tq), empty_heads(k, Hkv, Tk), empty_heads(v, Hkv, Tk)
    if grad_q.numel() == 0 or grad_k.numel() == 0:
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_()
    q, k, v, grad_out = _dense_heads(q), _dense_heads(k), _dense_heads(v), _dense_heads(grad_out)
    out, lse = out.transpose(1, 2).contiguous(), lse.contiguous()  # as `forward` lays them out: no copy
    key = lse if seed is None else seed
    strides = _strides(grad_out, q, k, v)
    group = H // Hkv
    section = _section(Tk, D, q.element_size())
    factors = (scale * math.log2(math.e), scale, last_dropped(dropout_p), 1.0 / (1.0 - dropout_p))
    constants = {"HEAD_SIZE": D, "CAUSAL": is_causal, "DROPOUT": dropout_p > 0.0, "PRECISION": _precision(q.dtype)}
    size, longest, arch = q.element_size(), max(Tq, Tk), architecture(q)
    with device_of(q):
        config = one_tile_config(D, size, longest)
        if config is not None:
            one_tile_backward_kernel[(B * Hkv,)](
                grad_out, q, k, v, out, lse, grad_q, grad_k, grad_v, key, *strides, H, group, Tq, Tk, *factors,
                **constants, **config,
            )  # fmt: skip
            return grad_q, grad_k, grad_v
        delta = torch.empty_like(lse)
        config = grad_q_config(D, size, longest, arch)
        grad_q_kernel[(B * H * triton.cdiv(Tq, config["BLOCK_M"]),)](
            grad_out, q, k, v, out, lse, delta, grad_q, key, *strides, B, H, group, Tq, Tk, section, *factors,
            **constants, **config,
        )  # fmt: skip
        config = grad_kv_config(D, size, longest, arch)
        grad_kv_kernel[(B * Hkv * triton.cdiv(Tk, config["BLOCK_N"]),)](
            grad_out, q, k, v, lse, delta, grad_k, grad_v, key, *strides, B, H, group, Tq, Tk, section, *factors,
            **constants, **config,
        )  # fmt: skip
    return grad_q, grad_k, grad_v
