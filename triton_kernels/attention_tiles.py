"""What the attention kernels share: finding, loading, masking, multiplying and storing a tile of q, k, v or out.

A tile is BLOCK_M queries or BLOCK_N keys of one head, with BLOCK_D columns: the head size, rounded up to a power of two
of at least 16 because a matrix instruction multiplies no fewer. Columns beyond the head size are zeros, so they add
nothing to a product. Inputs may have any strides; outputs are (B, T, H, D), with rows at any distance.

The causal mask is aligned to the bottom right: query i sees key j when j <= i + Tk - Tq.
"""

import triton
import triton.language as tl

from .rounding import round_to
from .target import INTERPRETING

# Triton's interpreter multiplies tiles of bfloat16 wrongly. There they are multiplied in float32, which gives the same
# products, because the operands have been rounded to bfloat16 before.
_UPCAST = tl.constexpr(INTERPRETING)

# Arguments of which no kernel is compiled anew for each kind of value.
VARYING = ["batch_size", "n_heads", "n_queries", "n_keys", "section", "rows_before", "last_dropped"]


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b in float32. PRECISION says how float32 operands are multiplied: "ieee" or "tf32"."""
    if _UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def dot_add(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a @ b."""
    if _UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def _tile_offsets(stride, N_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets (N_ROWS, BLOCK_D) within a tile, in 32 bits, which `_dense_heads` of attention.py makes wide enough."""
    return tl.arange(0, N_ROWS)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def row_start(base, first, stride):
    """base + first * stride, in 64 bits because a tensor may have more than 2^31 elements."""
    return base + first * tl.cast(stride, tl.int64)


@triton.jit
def load_tile(
    source, batch, head, first, n_rows, HEAD_SIZE: tl.constexpr, MASK_ROWS: tl.constexpr, DESCRIPTORS: tl.constexpr,
    N_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(N_ROWS, BLOCK_D): the rows of a head from row `first` on, and zeros outside the tensor.

    `source` is (tensor, batch stride, head stride, row stride). With DESCRIPTORS the tensor is a tensor descriptor, and
    the Tensor Memory Accelerator fetches the whole tile, so that addresses and masks take no registers.
    """
    tensor, batch_stride, head_stride, stride = source
    if DESCRIPTORS:
        tile = tensor.load([batch, head, first, 0]).reshape(N_ROWS, BLOCK_D)
    else:
        base = row_start(row_start(row_start(tensor, batch, batch_stride), head, head_stride), first, stride)
        pointers = base + _tile_offsets(stride, N_ROWS, BLOCK_D)
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
def store_tile(
    tensor, tile, batch, head, first, stride, n_rows, HEAD_SIZE: tl.constexpr,
    N_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes a tile into (B, n_rows, heads, HEAD_SIZE), whose rows are `stride` apart and hold their heads in a row."""
    base = row_start(row_start(tensor, batch * tl.cast(n_rows, tl.int64) + first, stride), head, HEAD_SIZE)
    mask = (first + tl.arange(0, N_ROWS) < n_rows)[:, None] & (tl.arange(0, BLOCK_D) < HEAD_SIZE)[None, :]
    tl.store(base + _tile_offsets(stride, N_ROWS, BLOCK_D), round_to(tile, tensor.dtype.element_ty), mask=mask)


@triton.jit
def seen_mask(
    first_query, first_key, n_queries, n_keys, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Mask (BLOCK_M, BLOCK_N): True where the query may see the key and the key exists.

    Under the causal mask, a query that exists can see only keys that exist, so the second condition is not checked.
    Rows of queries beyond the last one may be anything: forward does not store them, and in backward their logsumexp
    of +inf makes their weights exactly 0.
    """
    keys = first_key + tl.arange(0, BLOCK_N)[None, :]
    queries = first_query + tl.arange(0, BLOCK_M)[:, None]
    return keys <= queries + (n_keys - n_queries) if CAUSAL else keys < n_keys


@triton.jit
def key_range(
    first_query, n_queries, n_keys, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """(unmasked end, end) of a tile of queries: all of them see every key before the first, none a key from `end` on.

    The unmasked end is rounded down to whole tiles of keys. The end is at least 1, so that the compiler knows that a
    loop over the keys runs at least once. Where it does not know that, it clears the sums in two places, and the
    assembler of sm_90 then waits for each matrix instruction before it issues the next one.
    """
    end, unmasked_end = n_keys, n_keys
    if CAUSAL:
        offset = n_keys - n_queries
        end = tl.minimum(n_keys, tl.maximum(0, first_query + BLOCK_M + offset))
        unmasked_end = tl.minimum(n_keys, tl.maximum(0, first_query + offset + 1))
    return unmasked_end // BLOCK_N * BLOCK_N, tl.maximum(1, end)


@triton.jit
def first_row_of_head(batch, n_heads, head, n_rows):
    """The index of a head's first row in (B, n_heads, n_rows), in 64 bits."""
    return (batch.to(tl.int64) * n_heads + head) * n_rows


@triton.jit
def locate_tile(job, batch_size, n_heads, n_tiles, section, LAST_FIRST: tl.constexpr):
    """(batch, head, tile) of a job: all tiles of `section` heads come before those of the next `section` heads.

    The keys and values of a section fit the L2 cache together. LAST_FIRST starts with the last tile of each head: under
    the causal mask those see the most keys, and the programs that finish last should be short ones.
    """
    first_head = job // (section * n_tiles) * section
    heads_here = tl.minimum(section, batch_size * n_heads - first_head)
    within = job - first_head * n_tiles
    tile = within // heads_here
    if LAST_FIRST:
        tile = n_tiles - 1 - tile
    head = first_head + within % heads_here
    return head // n_heads, head % n_heads, tile


@triton.jit
def locate_tile_of_pair(turn, batch_size, n_heads, n_tiles, section):
    """(batch, head, tile) of a persistent program's turn: first the heavy tile of a pair, then the light one.

    Tiles i and n_tiles - 1 - i are a pair (n_tiles is even). Under the causal mask every pair sees as many keys as any
    other, so programs with the same number of pairs have the same work.
    """
    pair = tl.program_id(0) + turn // 2 * tl.num_programs(0)
    batch, head, tile = locate_tile(pair, batch_size, n_heads, n_tiles // 2, section, False)
    return batch, head, tl.where(turn % 2 == 0, n_tiles - 1 - tile, tile)
