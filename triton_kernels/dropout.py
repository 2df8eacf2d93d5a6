"""Dropout masks inside a kernel: Philox-4x32-10 at (row, column), one call for four neighbouring columns.

Every backend draws masks by this definition, so that a mask can be rebuilt and tested bit by bit:

    key     = (low, high 32 bits of seed)
    counter = (column // 4, low, high 32 bits of row, 0)
    element (row, column) reads output word column % 4 as u, and is dropped when (u >> 1) < round(p * 2**31)

One call gives the words of four columns, because its ten rounds take about eighty integer instructions: a call for each
element of a tile would take longer than the rest of attention. Source: Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC 2011.
"""

import triton
import triton.language as tl


def last_dropped(p: float) -> int:
    """The largest 31-bit word that drops an element; -1 drops none.

    Kernels compare with this instead of the threshold round(p * 2**31), because 2**31 does not fit an int32.
    """
    return round(p * 2**31) - 1


@triton.jit
def keep_tile(seed, first_row, first_column, last_dropped, N_ROWS: tl.constexpr, N_COLUMNS: tl.constexpr):
    """Mask (N_ROWS, N_COLUMNS), True where kept; `first_column` is a multiple of 4."""
    rows = first_row + tl.arange(0, N_ROWS).to(tl.int64)[:, None]
    groups = first_column // 4 + tl.arange(0, N_COLUMNS // 4)[None, :]
    zeros = tl.zeros((N_ROWS, N_COLUMNS // 4), dtype=tl.uint32)
    groups = groups.to(tl.uint32) + zeros
    low = (rows & 0xFFFFFFFF).to(tl.uint32) + zeros
    high = (rows >> 32).to(tl.uint32) + zeros
    w0, w1, w2, w3 = tl.philox(seed, groups, low, high, zeros)
    k0 = (w0 >> 1).to(tl.int32) > last_dropped
    k1 = (w1 >> 1).to(tl.int32) > last_dropped
    k2 = (w2 >> 1).to(tl.int32) > last_dropped
    k3 = (w3 >> 1).to(tl.int32) > last_dropped
    # join() adds an innermost axis. The last join pairs words 0, 2 with 1, 3, so that word 2a + b gets position 2a + b.
    lanes = tl.join(tl.join(k0, k2), tl.join(k1, k3))  # (rows, groups, 2, 2)
    return tl.reshape(lanes, (N_ROWS, N_COLUMNS))
