"""Philox against its published vectors and a second implementation; the masks' rates; the generator's mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.ops.dropout import drop_threshold, dropout, philox_4x32, philox_keep_mask

ONES = 0xFFFFFFFF
CPU = torch.device("cpu")

# kat_vectors of Random123 (Salmon et al. 2011), philox4x32 with 10 rounds: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_published_vectors(counter, key, expected) -> None:
    assert philox_4x32(counter, key) == expected  # Python's integers, which do not wrap
    words = philox_4x32(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(int(w) for w in words) == expected  # int64, which does


def keeps(seed: int, row: int, column: int, p: float) -> bool:
    """The definition in ops/dropout.py, for one element, in Python's integers."""
    seed %= 2**64
    words = philox_4x32((column // 4, row & ONES, row >> 32, 0), (seed & ONES, seed >> 32))
    return (words[column % 4] >> 1) >= round(p * 2**31)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    p=st.floats(0.0, 0.999),
    n_rows=st.integers(0, 5),
    n_cols=st.integers(0, 9),
)
def test_mask_is_its_definition(seed: int, p: float, n_rows: int, n_cols: int) -> None:
    mask = philox_keep_mask(seed, p, n_rows, n_cols, CPU)
    assert mask.shape == (n_rows, n_cols) and mask.dtype == torch.bool
    assert mask.tolist() == [[keeps(seed, i, j, p) for j in range(n_cols)] for i in range(n_rows)]
    assert torch.equal(philox_keep_mask(torch.tensor(seed), p, n_rows, n_cols, CPU), mask)


def test_rows_past_32_bits_have_their_own_words() -> None:
    """More rows than one can hold: the counter's third word is the row's high half, on tensors as on integers."""
    row = 2**32 + 5
    rows = torch.tensor([5, row])
    words = philox_4x32((torch.zeros(2, dtype=torch.int64), rows & ONES, rows >> 32, 0), (7, 0))
    for i, r in enumerate(rows.tolist()):
        assert tuple(int(w[i]) for w in words) == philox_4x32((0, r & ONES, r >> 32, 0), (7, 0))
    assert int(words[0][0]) != int(words[0][1])


def test_mask_does_not_depend_on_the_shape_around_it() -> None:
    large = philox_keep_mask(3, 0.5, 20, 37, CPU)
    assert torch.equal(philox_keep_mask(3, 0.5, 7, 10, CPU), large[:7, :10])
    assert torch.equal(philox_keep_mask(3, 0.5, 7, 10, CPU, 13), large[13:, :10])


@pytest.mark.parametrize("p", [0.0, 2.0**-31, 0.1, 0.5, 0.9])
def test_philox_rate(p: float) -> None:
    n = 400 * 500
    dropped = n - int(philox_keep_mask(42, p, 400, 500, CPU).sum())
    assert abs(dropped - n * p) <= 5 * (n * p * (1 - p)) ** 0.5 + (p > 0)
    assert p == 0.0 or drop_threshold(p) >= 1


@pytest.mark.parametrize("p", [2.0**-16, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_generator_dropout(p: float, dtype: torch.dtype) -> None:
    n = 200_001  # not a multiple of the four lanes
    x = torch.ones(n, dtype=dtype)
    y = dropout(x, p, torch.Generator().manual_seed(5))
    kept = y != 0
    assert y.dtype == dtype
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / (1 - round(p * 2**16) / 2**16)))
    assert abs(n - int(kept.sum()) - n * p) <= 5 * (n * p * (1 - p)) ** 0.5
    assert torch.equal(y, dropout(x, p, torch.Generator().manual_seed(5)))
    assert not torch.equal(y, dropout(x, p, torch.Generator().manual_seed(6)))
    assert torch.equal(x, torch.ones(n, dtype=dtype))


def test_generator_dropout_follows_manual_seed_and_has_its_gradient() -> None:
    x = torch.randn(6, 7, requires_grad=True)
    torch.manual_seed(1)
    y = dropout(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(y, dropout(x, 0.5))
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(y == 0, 0.0, 2.0))


def test_generator_dropout_of_nothing() -> None:
    x = torch.ones(3)
    assert dropout(x, 0.0) is x
    assert dropout(torch.ones(0, 4), 0.5).shape == (0, 4)
