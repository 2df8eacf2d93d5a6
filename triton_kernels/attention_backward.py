"""Attention, backward: the gradients of q, k and v, from weights that are computed again instead of stored.

With P the softmax of the scores S = scale * q k^T, and M the dropout mask times 1 / (1 - p) (all ones without dropout):

    dV = (P * M)^T dO        dP = (dO V^T) * M        delta = rowsum(P * dP) = rowsum(dO * O)
    dS = P * (dP - delta)    dQ = scale * dS K        dK = scale * dS^T Q

P is computed again, tile by tile, as exp(S - lse) with the logsumexp of each row that forward kept (FlashAttention-2,
Dao 2023, arXiv:2307.08691, algorithm 2).

What is fused: all of the above, in two passes, so that every sum belongs to one program. No atomic additions are
needed, and the same inputs give the same bits every time:

    dQ        a program holds BLOCK_M queries and goes over the keys; it also writes delta for the other pass
    dK, dV    a program holds BLOCK_N keys and goes over the queries of every query head that shares their key head

Where queries and keys of a head fit one tile, a single pass computes all three gradients. A gradient that nobody asks
for is not computed: dQ alone takes only the first pass, and dV alone only the second.

Memory traffic, for a head of T queries and keys in 16 bits: each pass reads or writes 12 T D bytes (dQ: q, k, v, O, dO,
dQ; dK, dV: q, k, v, dO, dK, dV) and 8 T of lse and delta. P and dS, written and read back, would add at least 8 T^2.
Two passes multiply seven matrices instead of five, which is the price of having no atomics.
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
    seen_mask,
    store_tile,
)
from .dropout import keep_tile
from .rounding import round_to


@triton.jit
def _add_to_grad_kv(
    grad_k, grad_v, q, k, v, grad_out, lse, delta, seen, keep, score_scale, keep_scale,
    GRAD_K: tl.constexpr, GRAD_V: tl.constexpr, GRAD_SCORES: tl.constexpr,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(grad_k, grad_v, dS^T): adds one tile of queries to the sums of one tile of keys.

    Scores are computed transposed, (BLOCK_N, BLOCK_M), because the products with dO and q read them in that layout. dV
    is finished before dP is begun, so that fewer tiles occupy registers at a time. Where neither GRAD_K nor GRAD_SCORES
    asks for dS^T, the weights take its place: triton 3.6 cannot return a None among other results.
    """
    weights = tl.exp2(dot(k, tl.trans(q), PRECISION) * score_scale - lse[None, :])
    if MASKED:
        weights = tl.where(tl.trans(seen), weights, 0.0)
    if DROPOUT:
        keep = tl.trans(keep)
        dropped = tl.where(keep, weights * keep_scale, 0.0)
    else:
        dropped = weights
    if GRAD_V:
        grad_v = dot_add(round_to(dropped, q.dtype), grad_out, grad_v, PRECISION)
    grad_scores = weights
    if GRAD_K or GRAD_SCORES:
        grad_weights = dot(v, tl.trans(grad_out), PRECISION)
        if DROPOUT:
            grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
        grad_scores = round_to(weights * (grad_weights - delta[None, :]), q.dtype)
    if GRAD_K:
        grad_k = dot_add(grad_scores, q, grad_k, PRECISION)
    return grad_k, grad_v, grad_scores


@triton.jit
def _row_stride(n_heads, HEAD_SIZE: tl.constexpr, PACKED: tl.constexpr):
    """The distance of two rows of a gradient. PACKED: the gradients of q, k and v lie side by side in one tensor."""
    return n_heads * (3 * HEAD_SIZE if PACKED else HEAD_SIZE)


@triton.jit(do_not_specialize=VARYING)
def grad_q_kernel(
    GradOut, Q, K, V, Out, Lse, Delta, GradQ, Seed,
    grad_batch_stride, grad_head_stride, grad_stride,
    q_batch_stride, q_head_stride, q_stride,
    k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride, grad_q_stride,
    batch_size, n_heads, group, n_queries, n_keys, section,
    score_scale, scale, rows_before: tl.int64, last_dropped, keep_scale,
    GRAD_Q: tl.constexpr,
    HEAD_SIZE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Out is (B, Tq, H, D) contiguous; GradQ has the same shape, and rows `grad_q_stride` apart.

    Delta (B, H, Tq), in float32, is written for `grad_kv_kernel`. `grad_q_stride` is an argument, so that the compiler
    does not know that the rows of GradQ are as far apart as those of Out. It would keep the offsets of Out in registers
    over the loop, to use them again: at head size 64, 135 registers a thread instead of 128, and so one program instead
    of two on a multiprocessor.

    Without GRAD_Q, only Delta is written.
    """
    batch, head, tile = locate_tile(tl.program_id(0), batch_size, n_heads, tl.cdiv(n_queries, BLOCK_M), section, CAUSAL)
    first_query = tile * BLOCK_M
    q_source = (Q, q_batch_stride, q_head_stride, q_stride)
    grad_source = (GradOut, grad_batch_stride, grad_head_stride, grad_stride)
    k_source = (K, k_batch_stride, k_head_stride, k_stride)
    v_source = (V, v_batch_stride, v_head_stride, v_stride)
    out_stride = n_heads * HEAD_SIZE
    out_source = (Out, n_queries * tl.cast(out_stride, tl.int64), HEAD_SIZE, out_stride)
    grad_out = load_tile(
        grad_source, batch, head, first_query, n_queries, HEAD_SIZE, True, DESCRIPTORS, BLOCK_M, BLOCK_D
    )
    out = load_tile(out_source, batch, head, first_query, n_queries, HEAD_SIZE, True, False, BLOCK_M, BLOCK_D)
    mask_row = first_row_of_head(batch, n_heads, head, n_queries) + first_query
    in_rows = first_query + tl.arange(0, BLOCK_M) < n_queries
    lse = tl.load(Lse + mask_row + tl.arange(0, BLOCK_M), mask=in_rows, other=float("inf"))
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), axis=1)
    tl.store(Delta + mask_row + tl.arange(0, BLOCK_M), delta, mask=in_rows)
    if GRAD_Q:
        q = load_tile(q_source, batch, head, first_query, n_queries, HEAD_SIZE, True, DESCRIPTORS, BLOCK_M, BLOCK_D)
        seed = tl.load(Seed) if DROPOUT else 0
        unmasked_end, end = key_range(first_query, n_queries, n_keys, CAUSAL, BLOCK_M, BLOCK_N)
        key_head = head // group
        grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for first_key in range(0, end, BLOCK_N):
            k = load_tile(k_source, batch, key_head, first_key, n_keys, HEAD_SIZE, True, DESCRIPTORS, BLOCK_N, BLOCK_D)
            v = load_tile(v_source, batch, key_head, first_key, n_keys, HEAD_SIZE, True, DESCRIPTORS, BLOCK_N, BLOCK_D)
            if q.dtype == tl.float32:
                # Without a barrier here, the compiler reads all of q into registers before it waits for k and v.
                tl.debug_barrier()
            weights = tl.exp2(dot(q, tl.trans(k), PRECISION) * score_scale - lse[:, None])
            if first_key >= unmasked_end:
                seen = seen_mask(first_query, first_key, n_queries, n_keys, CAUSAL, BLOCK_M, BLOCK_N)
                weights = tl.where(seen, weights, 0.0)
            grad_weights = dot(grad_out, tl.trans(v), PRECISION)
            if DROPOUT:
                keep = keep_tile(seed, rows_before + mask_row, first_key, last_dropped, BLOCK_M, BLOCK_N)
                grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
            grad_scores = weights * (grad_weights - delta[:, None])
            grad_q = dot_add(round_to(grad_scores, k.dtype), k, grad_q, PRECISION)
        grad_q *= scale
        store_tile(GradQ, grad_q, batch, head, first_query, grad_q_stride, n_queries, HEAD_SIZE, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def grad_kv_kernel(
    GradOut, Q, K, V, Lse, Delta, GradK, GradV, Seed,
    grad_batch_stride, grad_head_stride, grad_stride,
    q_batch_stride, q_head_stride, q_stride,
    k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride,
    batch_size, n_heads, group, n_queries, n_keys, section,
    score_scale, scale, rows_before: tl.int64, last_dropped, keep_scale,
    GRAD_K: tl.constexpr, GRAD_V: tl.constexpr, PACKED: tl.constexpr,
    HEAD_SIZE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """GradK and GradV are (B, Tk, Hkv, D) contiguous, unless they are PACKED: see `_row_stride`.

    The first keys are seen by the most queries, and start first.

    Unlike the other passes, this one masks every tile. A branch over the mask, for the tiles that are seen whole, took
    up to forty more registers on triton 3.6. Beside two sums of (BLOCK_N, BLOCK_D) there is no room for them, and
    spilling registers costs more than the comparison and the selection that the mask adds to each score.
    """
    n_key_heads = n_heads // group
    batch, key_head, tile = locate_tile(
        tl.program_id(0), batch_size, n_key_heads, tl.cdiv(n_keys, BLOCK_N), section, False
    )
    first_key = tile * BLOCK_N
    q_source = (Q, q_batch_stride, q_head_stride, q_stride)
    grad_source = (GradOut, grad_batch_stride, grad_head_stride, grad_stride)
    k_source = (K, k_batch_stride, k_head_stride, k_stride)
    v_source = (V, v_batch_stride, v_head_stride, v_stride)
    k = load_tile(k_source, batch, key_head, first_key, n_keys, HEAD_SIZE, True, DESCRIPTORS, BLOCK_N, BLOCK_D)
    v = None
    if GRAD_K:  # the gradient of v itself needs neither v nor delta
        v = load_tile(v_source, batch, key_head, first_key, n_keys, HEAD_SIZE, True, DESCRIPTORS, BLOCK_N, BLOCK_D)
    seed = tl.load(Seed) if DROPOUT else 0
    start = tl.maximum(0, first_key - (n_keys - n_queries)) // BLOCK_M * BLOCK_M if CAUSAL else 0
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for head in range(key_head * group, (key_head + 1) * group):
        mask_row = first_row_of_head(batch, n_heads, head, n_queries)
        for first_query in range(start, n_queries, BLOCK_M):
            q = load_tile(q_source, batch, head, first_query, n_queries, HEAD_SIZE, True, DESCRIPTORS, BLOCK_M, BLOCK_D)
            grad_out = load_tile(
                grad_source, batch, head, first_query, n_queries, HEAD_SIZE, True, DESCRIPTORS, BLOCK_M, BLOCK_D
            )
            queries = first_query + tl.arange(0, BLOCK_M)
            # Rows that do not exist, and rows that see no key, have a logsumexp of +inf: their weights are exactly 0.
            lse = tl.load(Lse + mask_row + queries, mask=queries < n_queries, other=float("inf"))
            delta = None
            if GRAD_K:
                delta = tl.load(Delta + mask_row + queries, mask=queries < n_queries, other=0.0)
            seen = seen_mask(first_query, first_key, n_queries, n_keys, CAUSAL, BLOCK_M, BLOCK_N)
            keep = None
            if DROPOUT:
                keep = keep_tile(seed, rows_before + mask_row + first_query, first_key, last_dropped, BLOCK_M, BLOCK_N)
            grad_k, grad_v, _ = _add_to_grad_kv(
                grad_k, grad_v, q, k, v, grad_out, lse, delta, seen, keep, score_scale, keep_scale,
                GRAD_K, GRAD_V, False, CAUSAL, DROPOUT, PRECISION,
            )  # fmt: skip
    stride = _row_stride(n_key_heads, HEAD_SIZE, PACKED)
    if GRAD_K:
        store_tile(GradK, grad_k * scale, batch, key_head, first_key, stride, n_keys, HEAD_SIZE, BLOCK_N, BLOCK_D)
    if GRAD_V:
        store_tile(GradV, grad_v, batch, key_head, first_key, stride, n_keys, HEAD_SIZE, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def one_tile_backward_kernel(
    GradOut, Q, K, V, Out, Lse, GradQ, GradK, GradV, Seed,
    grad_batch_stride, grad_head_stride, grad_stride,
    q_batch_stride, q_head_stride, q_stride,
    k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride,
    n_heads, group, n_queries, n_keys, score_scale, scale, rows_before: tl.int64, last_dropped, keep_scale,
    GRAD_Q: tl.constexpr, GRAD_K: tl.constexpr, GRAD_V: tl.constexpr, PACKED: tl.constexpr,
    HEAD_SIZE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All gradients that are asked for, for one key head and its query heads, where Tq <= BLOCK_M and Tk <= BLOCK_N.

    One launch instead of two; q, k, v and dO are read once instead of twice, and the scores are made once. For short
    sequences, launches and reads are most of the time.
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
    k = load_tile(k_source, batch, key_head, 0, n_keys, HEAD_SIZE, True, False, BLOCK_N, BLOCK_D)
    v = load_tile(v_source, batch, key_head, 0, n_keys, HEAD_SIZE, True, False, BLOCK_N, BLOCK_D)
    seed = tl.load(Seed) if DROPOUT else 0
    queries = tl.arange(0, BLOCK_M)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for head in range(key_head * group, (key_head + 1) * group):
        q = load_tile(q_source, batch, head, 0, n_queries, HEAD_SIZE, True, False, BLOCK_M, BLOCK_D)
        grad_out = load_tile(grad_source, batch, head, 0, n_queries, HEAD_SIZE, True, False, BLOCK_M, BLOCK_D)
        out = load_tile(out_source, batch, head, 0, n_queries, HEAD_SIZE, True, False, BLOCK_M, BLOCK_D)
        mask_row = first_row_of_head(batch, n_heads, head, n_queries)
        lse = tl.load(Lse + mask_row + queries, mask=queries < n_queries, other=float("inf"))
        delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), axis=1)
        seen = seen_mask(0, 0, n_queries, n_keys, CAUSAL, BLOCK_M, BLOCK_N)
        keep = None
        if DROPOUT:
            keep = keep_tile(seed, rows_before + mask_row, 0, last_dropped, BLOCK_M, BLOCK_N)
        grad_k, grad_v, grad_scores = _add_to_grad_kv(
            grad_k, grad_v, q, k, v, grad_out, lse, delta, seen, keep, score_scale, keep_scale,
            GRAD_K, GRAD_V, GRAD_Q, True, DROPOUT, PRECISION,
        )  # fmt: skip
        if GRAD_Q:
            grad_q = dot(tl.trans(grad_scores), k, PRECISION) * scale
            stride = _row_stride(n_heads, HEAD_SIZE, PACKED)
            store_tile(GradQ, grad_q, batch, head, 0, stride, n_queries, HEAD_SIZE, BLOCK_M, BLOCK_D)
    stride = _row_stride(n_key_heads, HEAD_SIZE, PACKED)
    if GRAD_K:
        store_tile(GradK, grad_k * scale, batch, key_head, 0, stride, n_keys, HEAD_SIZE, BLOCK_N, BLOCK_D)
    if GRAD_V:
        store_tile(GradV, grad_v, batch, key_head, 0, stride, n_keys, HEAD_SIZE, BLOCK_N, BLOCK_D)
