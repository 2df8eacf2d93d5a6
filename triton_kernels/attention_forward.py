"""Attention, forward: out = softmax(scale * q k^T + mask) v, without writing the (Tq, Tk) scores to memory.

For query i and the keys j that it sees:

    s_ij = scale * q_i . k_j        lse_i = log sum_j exp(s_ij)        out_i = sum_j exp(s_ij - lse_i) v_j

Dropout multiplies exp(s_ij - lse_i) by 0 or 1 / (1 - p). A query that sees no key gives zeros.

What is fused: scores, mask, softmax, dropout and the product with v. A program holds BLOCK_M queries in registers and
goes over the keys of their head, one tile of keys after the other:

                  keys ->   full  full  full  diag
                          +-----+-----+-----+-----+      Tiles left of the diagonal are seen whole and need no mask;
        queries  m        |     |     |     |\\    |      tiles right of it are not visited.
                          +-----+-----+-----+-----+

For each query it keeps the largest score so far (`largest`), the sum of the exponentials (`total`) and the sum of the
weighted values (`accumulator`). Where a tile of keys brings a larger score, both sums are first multiplied by
exp(old largest - new largest): the online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867; FlashAttention, Dao et
al. 2022, arXiv:2205.14135; FlashAttention-2, Dao 2023, arXiv:2307.08691). exp(x) is computed as 2^(x log2(e)), and
log2(e) is a part of the scale, so that a score takes one multiply-add before its exponential. `lse` is in base 2, too.

Memory traffic, for a head of T queries and keys in 16 bits: q, k, v and out take 8 T D bytes, lse 4 T. Scores that are
written and read back would add at least 4 T^2. Keys and values are read once for each tile of queries, all but the
first time from the L2 cache.
"""

import triton
import triton.language as tl

from .attention_tiles import (
    VARYING,
    dot,
    dot_add,
    first_row_of_head,
    key_range,
    load_tile,
    locate_tile,
    locate_tile_of_pair,
    seen_mask,
    store_tile,
)
from .dropout import keep_tile
from .rounding import round_to

# The largest score of a row before its first key. It is finite, so that the difference of two such scores is 0, and not
# NaN as that of two infinities; the scores that a mask hides are -inf, and their exponentials are 0 beside it.
_NO_SCORE = tl.constexpr(-3.4028234663852886e38)  # of all float32 numbers the smallest


@triton.jit
def _forward_tile(
    accumulator, largest, total, q, k_source, v_source, batch, key_head, first_query, first_key, masked,
    n_queries, n_keys, score_scale, seed, mask_row, last_dropped,
    HEAD_SIZE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds one tile of keys to the online softmax of a tile of queries; `masked`: some query does not see all of it."""
    k = load_tile(k_source, batch, key_head, first_key, n_keys, HEAD_SIZE, True, DESCRIPTORS, BLOCK_N, BLOCK_D)
    scores = dot(q, tl.trans(k), PRECISION)
    if masked:
        seen = seen_mask(first_query, first_key, n_queries, n_keys, CAUSAL, BLOCK_M, BLOCK_N)
        scores = tl.where(seen, scores, -float("inf"))
    new_largest = tl.maximum(largest, tl.max(scores, axis=1) * score_scale)
    weights = tl.exp2(scores * score_scale - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    total = total * shrink + tl.sum(weights, axis=1)
    accumulator = accumulator * shrink[:, None]
    if DROPOUT:
        keep = keep_tile(seed, mask_row, first_key, last_dropped, BLOCK_M, BLOCK_N)
        weights = tl.where(keep, weights, 0.0)
    v = load_tile(v_source, batch, key_head, first_key, n_keys, HEAD_SIZE, True, DESCRIPTORS, BLOCK_N, BLOCK_D)
    accumulator = dot_add(round_to(weights, v.dtype), v, accumulator, PRECISION)
    return accumulator, new_largest, total


@triton.jit
def _store_forward(
    Out, Lse, accumulator, largest, total, batch, head, first_query, mask_row,
    n_heads, n_queries, n_keys, keep_scale,
    HEAD_SIZE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Divides by the sum of the exponentials, and writes the outputs and logsumexps of a tile of queries."""
    queries = first_query + tl.arange(0, BLOCK_M)
    if CAUSAL:
        blind = queries + (n_keys - n_queries) < 0  # queries that see no key: zeros, and a logsumexp of +inf
        total = tl.where(blind, 1.0, total)
        largest = tl.where(blind, float("inf"), largest)
    lse = largest + tl.log2(total)
    out = accumulator * (keep_scale / total if DROPOUT else 1.0 / total)[:, None]
    store_tile(Out, out, batch, head, first_query, n_heads * HEAD_SIZE, n_queries, HEAD_SIZE, BLOCK_M, BLOCK_D)
    tl.store(Lse + mask_row + tl.arange(0, BLOCK_M), lse, mask=queries < n_queries)


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    Q, K, V, Out, Lse, Seed,
    q_batch_stride, q_head_stride, q_stride,
    k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride,
    batch_size, n_heads, group, n_queries, n_keys, section,
    score_scale, rows_before: tl.int64, last_dropped, keep_scale,
    HEAD_SIZE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Out is (B, Tq, H, D) contiguous; Lse (B, H, Tq) float32, in base 2, +inf where a query sees no key.

    A program takes one tile of queries; a PERSISTENT program goes over many tiles, in pairs of equal work.
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
            batch, head, tile = locate_tile_of_pair(turn, batch_size, n_heads, n_tiles, section)
        else:
            batch, head, tile = locate_tile(tl.program_id(0), batch_size, n_heads, n_tiles, section, CAUSAL)
        first_query = tile * BLOCK_M
        q = load_tile(q_source, batch, head, first_query, n_queries, HEAD_SIZE, True, DESCRIPTORS, BLOCK_M, BLOCK_D)
        mask_row = first_row_of_head(batch, n_heads, head, n_queries) + first_query
        unmasked_end, end = key_range(first_query, n_queries, n_keys, CAUSAL, BLOCK_M, BLOCK_N)
        accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        largest = tl.full((BLOCK_M,), _NO_SCORE, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        for first_key in range(0, end, BLOCK_N):
            accumulator, largest, total = _forward_tile(
                accumulator, largest, total, q, k_source, v_source, batch, head // group, first_query, first_key,
                first_key >= unmasked_end, n_queries, n_keys, score_scale, seed, rows_before + mask_row, last_dropped,
                HEAD_SIZE, CAUSAL, DROPOUT, PRECISION, DESCRIPTORS, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        _store_forward(
            Out, Lse, accumulator, largest, total, batch, head, first_query, mask_row,
            n_heads, n_queries, n_keys, keep_scale, HEAD_SIZE, CAUSAL, DROPOUT, BLOCK_M, BLOCK_D,
        )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def one_tile_forward_kernel(
    Q, K, V, Out, Lse, Seed,
    q_batch_stride, q_head_stride, q_stride,
    k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride,
    batch_size, n_heads, group, n_queries, n_keys, score_scale, rows_before: tl.int64, last_dropped, keep_scale,
    HEAD_SIZE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`forward_kernel` for Tq <= BLOCK_M and Tk <= BLOCK_N: of n programs, each takes every n-th head.

    There is no loop over keys, so the compiler pipelines the loop over heads: the next head is fetched while this one
    is multiplied.
    """
    q_source = (Q, q_batch_stride, q_head_stride, q_stride)
    k_source = (K, k_batch_stride, k_head_stride, k_stride)
    v_source = (V, v_batch_stride, v_head_stride, v_stride)
    seed = tl.load(Seed) if DROPOUT else 0
    for index in range(tl.program_id(0), batch_size * n_heads, tl.num_programs(0)):
        batch, head = index // n_heads, index % n_heads
        q = load_tile(q_source, batch, head, 0, n_queries, HEAD_SIZE, True, False, BLOCK_M, BLOCK_D)
        mask_row = first_row_of_head(batch, n_heads, head, n_queries)
        accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        largest = tl.full((BLOCK_M,), _NO_SCORE, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        # Made from `mask_row`, the row of dropout took registers for which there was no room on sm_100.
        accumulator, largest, total = _forward_tile(
            accumulator, largest, total, q, k_source, v_source, batch, head // group, 0, 0, True,
            n_queries, n_keys, score_scale, seed, rows_before + tl.cast(index, tl.int64) * n_queries, last_dropped,
            HEAD_SIZE, CAUSAL, DROPOUT, PRECISION, False, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        _store_forward(
            Out, Lse, accumulator, largest, total, batch, head, 0, mask_row,
            n_heads, n_queries, n_keys, keep_scale, HEAD_SIZE, CAUSAL, DROPOUT, BLOCK_M, BLOCK_D,
        )  # fmt: skip
