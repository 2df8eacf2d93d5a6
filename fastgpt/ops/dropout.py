"""Dropout that can be rebuilt: a Philox mask keyed by (seed, row, column), and a fast one for callers without a seed.

The mask is part of the ops' definition, so every backend draws the same one and the oracle can check it bit by bit:

    Philox-4x32-10, key     = (low, high 32 bits of seed)
                    counter = (column // 4, low, high 32 bits of row, 0)
    element (row, column) reads output word column % 4 as u, and is dropped when (u >> 1) < round(p * 2**31)

Kept elements are scaled by 1 / (1 - p). Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

Several processes that share a batch draw the masks of the whole batch, each for its own sequences: see `rows_from`.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Iterator

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF

_rows: tuple[int, int] | None = None  # what `rows_from` was given, where a call is inside of it


@contextlib.contextmanager
def rows_from(first_sequence: int, n_sequences: int) -> Iterator[None]:
    """Inside, dropout treats the sequences of every call as a part of a larger batch.

    Sequence 0 of a call is sequence `first_sequence` of a batch of `n_sequences`. Dropout then draws the masks that
    the whole batch would have for these sequences, and leaves torch's generator where the whole batch would leave it.
    So processes that divide a batch, and whose generators have the same state, drop what one process would drop. Only
    PyTorch's own attention and its recurrent layers on a GPU have other masks inside than outside, because their
    kernels cannot draw a part.

    The backward pass of an op uses the rows of its forward pass, wherever it runs; what is computed anew in a backward
    pass (`torch.utils.checkpoint`) has to be inside, too. It holds for all threads of the process, because autograd
    runs backward passes in threads of its own. The first dimension of every tensor has to be that of the sequences.

    Raises: TypeError, ValueError naming the argument; at a call, ValueError where its sequences exceed the batch.
    """
    first_sequence, n_sequences = operator.index(first_sequence), operator.index(n_sequences)
    if not 0 <= first_sequence < n_sequences:
        raise ValueError(f"first_sequence: expected a number in 0..{n_sequences - 1}, got {first_sequence}")
    with _within((first_sequence, n_sequences)):
        yield


def without_rows() -> contextlib.AbstractContextManager[None]:
    """Inside, every call is a batch of its own, also where that is inside of `rows_from`."""
    return _within(None)


@contextlib.contextmanager
def _within(rows: tuple[int, int] | None) -> Iterator[None]:
    global _rows
    before, _rows = _rows, rows
    try:
        yield
    finally:
        _rows = before


def within_rows() -> bool:
    """Whether this is inside of `rows_from`."""
    return _rows is not None


def first_sequence_of(x: Tensor, p: float) -> int:
    """The number of sequence 0 of x (B, ..., C) in the batch of `rows_from`; 0 outside of it, and without dropout."""
    if _rows is None or p == 0.0:
        return 0
    first_sequence, n_sequences = _rows
    if x.ndim < 2 or first_sequence + x.shape[0] > n_sequences:
        raise ValueError(
            f"x: dropout inside rows_from({first_sequence}, {n_sequences}) expected (B, ..., C) with B at most "
            f"{n_sequences - first_sequence}, got {tuple(x.shape)}"
        )
    return first_sequence


def philox_4x32(counter: tuple, key: tuple) -> tuple:
    """Ten Philox rounds on int64 tensors (or ints) that hold unsigned 32-bit words; returns four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0 = c0 * _MULTIPLIERS[0]  # wraps past 2**63: the low 64 bits are right, and `& _LOW` removes the sign's copies
        p1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (((p1 >> 32) & _LOW) ^ c1 ^ k0), p1 & _LOW, (((p0 >> 32) & _LOW) ^ c3 ^ k1), p0 & _LOW
        k0 = (k0 + _KEY_STEPS[0]) & _LOW
        k1 = (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def drop_threshold(p: float) -> int:
    """A 31-bit word below this is a dropped element."""
    return round(p * 2**31)


def philox_keep_mask(
    seed: int | Tensor, p: float, n_rows: int, n_cols: int, device: torch.device, first_row: int = 0
) -> Tensor:
    """The mask of the definition above, from `first_row` on: bool (n_rows, n_cols), True where the element is kept."""
    rows = torch.arange(first_row, first_row + n_rows, device=device)[:, None]
    groups = torch.arange((n_cols + 3) // 4, device=device)[None, :]
    seed = seed.to(device) if isinstance(seed, Tensor) else seed
    zero = torch.zeros_like(rows)
    words = philox_4x32((groups, rows & _LOW, (rows >> 32) & _LOW, zero), (seed & _LOW, (seed >> 32) & _LOW))
    by_lane = torch.stack([w.expand(n_rows, groups.shape[1]) for w in words], dim=-1)
    # A slice would ask whether n_cols is the whole width, and torch.compile would make a graph for either answer.
    by_column = by_lane.reshape(n_rows, 4 * groups.shape[1]).index_select(1, torch.arange(n_cols, device=device))
    return (by_column >> 1) >= drop_threshold(p)


def dropout(x: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Zero elements of x with probability p and scale the rest by 1 / (1 - p); the mask comes from torch's generator.

    On a CPU, `torch.nn.functional.dropout` takes 9 to 16 ns for each element of its mask, on one thread. Here every
    64-bit draw gives the masks of four elements, which is about eight times as fast; p becomes a multiple of 2**-16.
    """
    if p == 0.0:
        return x
    if x.device.type != "cpu" and _rows is None:
        return torch.nn.functional.dropout(x, p)
    first = first_sequence_of(x, p)
    shape = x.shape if _rows is None else (_rows[1], *x.shape[1:])
    if x.device.type != "cpu":  # the mask that this function draws for a tensor of the whole batch
        keep = torch.nn.functional.dropout(x.new_ones(shape), p)[first : first + x.shape[0]] != 0.0
        return torch.where(keep, x * (1.0 / (1.0 - p)), 0.0)
    dropped_lanes = max(1, min(round(p * 2**16), 2**16 - 1))
    numel = math.prod(shape)
    draws = torch.empty((numel + 3) // 4, dtype=torch.int64, device=x.device)
    draws.random_(-(2**63), None, generator=generator)
    lanes = draws.view(torch.int16)[:numel].view(shape)[first : first + x.shape[0]]
    scale = 2**16 / (2**16 - dropped_lanes)
    return x * (lanes >= dropped_lanes - 2**15).to(x.dtype).mul_(scale)


def dropout_between_layers(x: Tensor, p: float) -> Tensor:
    """Inside of `rows_from`, for x (B, T, C), what PyTorch's recurrent layers have between them for the whole batch.

    They draw their masks as (T, B, C). On a GPU theirs are cuDNN's, which only has the same chances.
    """
    assert _rows is not None
    first = first_sequence_of(x, p)
    factors = torch.nn.functional.dropout(x.new_ones(x.shape[1], _rows[1], x.shape[2]), p)
    return x * factors[:, first : first + x.shape[0]].transpose(0, 1)
