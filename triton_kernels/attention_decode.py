"""Attention, decoding: at most 8 queries against a long cache of keys and values, as when text is generated.

The formula is that of attention_forward.py. With so few queries there is one tile of them for each head, too few
programs to keep a GPU busy, so the keys are split among programs (Flash-Decoding, Dao et al. 2023). Split c has its own
softmax: out_c, and lse_c, the logarithm of the sum of its exponentials. A second kernel joins the splits:

    out = sum_c exp(lse_c - lse) out_c        lse = log sum_c exp(lse_c)

Where a batch has heads enough to keep the GPU busy, or a head few keys, there is one split, and no second kernel.

What is fused: scores, mask and softmax, as in forward. The query heads that share a key head are rows of one tile, so
the keys and values of a group of heads are read once.

Memory traffic, for a key head of Tk keys in 16 bits: k and v take 4 Tk D bytes. Each split adds 8 bytes, 4 written and
4 read, for each query and column of the output.
"""

import triton
import triton.language as tl

from .attention_tiles import dot, dot_add, load_tile, row_start
from .rounding import round_to


@triton.jit
def load_queries(
    Q, q_batch_stride, q_head_stride, q_stride, batch, key_head, group, n_queries,
    HEAD_SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(q, query): a tile (ROWS, BLOCK_D), and which query each of its rows is.

    Row r of the tile is query r % Tq of query head r // Tq of the group. Rows and columns that are too many are zeros.
    """
    row = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)[None, :]
    query = row % n_queries
    head = key_head * group + row // n_queries
    q_rows = row_start(0, head, q_head_stride) + row_start(0, query, q_stride)
    in_tile = (row < group * n_queries)[:, None] & (columns < HEAD_SIZE)
    q = tl.load(row_start(Q, batch, q_batch_stride) + q_rows[:, None] + columns, mask=in_tile, other=0.0)
    return q, query


@triton.jit
def add_keys(q, k, v, seen, accumulator, largest, total, score_scale, PRECISION: tl.constexpr):
    """(accumulator, largest, total) of the softmax so far, and of a tile of keys more, of which `seen` are seen."""
    scores = tl.where(seen, dot(q, tl.trans(k), PRECISION) * score_scale, -float("inf"))
    new_largest = tl.maximum(largest, tl.max(scores, axis=1))
    shift = tl.where(new_largest == -float("inf"), 0.0, new_largest)
    weights = tl.exp2(scores - shift[:, None])
    shrink = tl.exp2(largest - shift)
    total = total * shrink + tl.sum(weights, axis=1)
    accumulator = dot_add(round_to(weights, v.dtype), v, accumulator * shrink[:, None], PRECISION)
    return accumulator, new_largest, total


@triton.jit
def store_rows(
    Out, Lse, accumulator, largest, total, split, batch, key_head, batch_size, n_heads, group, n_queries,
    HEAD_SIZE: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes what a program has summed up: with SPLIT its part for `join_splits_kernel`, else the result itself."""
    row = tl.arange(0, ROWS)
    query, head = row % n_queries, key_head * group + row // n_queries
    in_rows = row < group * n_queries
    columns = tl.arange(0, BLOCK_D)[None, :]
    blind = total == 0.0
    safe_total = tl.where(blind, 1.0, total)
    of_batch = batch * tl.cast(n_heads * n_queries, tl.int64)
    lse_row = head * n_queries + query
    out_row = query * n_heads + head
    no_key = float("inf")
    if SPLIT:
        of_batch += split * tl.cast(batch_size, tl.int64) * (n_heads * n_queries)
        out_row = lse_row
        no_key = -float("inf")
    out = round_to(accumulator / safe_total[:, None], Out.dtype.element_ty)
    out_rows = Out + of_batch * HEAD_SIZE + (out_row * HEAD_SIZE)[:, None]
    tl.store(out_rows + columns, out, mask=in_rows[:, None] & (columns < HEAD_SIZE))
    tl.store(Lse + of_batch + lse_row, tl.where(blind, no_key, largest + tl.log2(safe_total)), mask=in_rows)


@triton.jit(do_not_specialize=["batch_size", "n_heads", "n_queries", "n_keys", "split_size"])
def decode_kernel(
    Q, K, V, Out, Lse,
    q_batch_stride, q_head_stride, q_stride,
    k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride,
    batch_size, n_heads, group, n_queries, n_keys, split_size, score_scale,
    HEAD_SIZE: tl.constexpr, CAUSAL: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The grid is (splits, B * Hkv).

    With SPLIT, Out is float32 (splits, B, H, Tq, D) and Lse (splits, B, H, Tq): the split's own softmax and its
    logsumexp in base 2, -inf where a query sees none of the split's keys. Without, there is one split, and they are the
    results: Out (B, Tq, H, D), and Lse (B, H, Tq), +inf where a query sees no key.
    """
    n_key_heads = n_heads // group
    split = tl.program_id(0)
    batch = tl.program_id(1) // n_key_heads
    key_head = tl.program_id(1) % n_key_heads
    q, query = load_queries(
        Q, q_batch_stride, q_head_stride, q_stride, batch, key_head, group, n_queries, HEAD_SIZE, ROWS, BLOCK_D
    )
    k_source = (K, k_batch_stride, k_head_stride, k_stride)
    v_source = (V, v_batch_stride, v_head_stride, v_stride)
    first = split * split_size
    stop = tl.minimum(n_keys, first + split_size)
    accumulator = tl.zeros((ROWS, BLOCK_D), tl.float32)
    largest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first_key in range(first, stop, BLOCK_N):
        k = load_tile(k_source, batch, key_head, first_key, n_keys, HEAD_SIZE, True, False, BLOCK_N, BLOCK_D)
        v = load_tile(v_source, batch, key_head, first_key, n_keys, HEAD_SIZE, True, False, BLOCK_N, BLOCK_D)
        keys = first_key + tl.arange(0, BLOCK_N)[None, :]
        seen = keys < n_keys
        if CAUSAL:
            seen = seen & (keys <= query[:, None] + (n_keys - n_queries))
        accumulator, largest, total = add_keys(q, k, v, seen, accumulator, largest, total, score_scale, PRECISION)
    store_rows(
        Out, Lse, accumulator, largest, total, split, batch, key_head, batch_size, n_heads, group, n_queries,
        HEAD_SIZE, SPLIT, ROWS, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_heads", "n_queries", "n_splits"])
def join_splits_kernel(
    PartialOut, PartialLse, Out, Lse, n_rows, n_heads, n_queries, n_splits,
    HEAD_SIZE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program joins the splits of one row (b, h, i): out and lse as in the formula above, in base 2."""
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
