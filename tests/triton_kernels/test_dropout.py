"""The dropout mask inside a kernel is the defined one, bit by bit, for every row and column that fits."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from fastgpt.ops.dropout import philox_keep_mask
from fastgpt.triton_kernels.dropout import keep_tile, last_dropped
from triton_checks import DEVICE


@triton.jit
def store_mask(seed, mask, first_row, first_column, last, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    keep = keep_tile(tl.load(seed), first_row, first_column, last, ROWS, COLUMNS)
    offsets = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(mask + offsets, keep.to(tl.int8))


@pytest.mark.parametrize("seed", [0, 2**40 + 3, 2**63 - 1])
@pytest.mark.parametrize(("first_row", "first_column"), [(0, 0), (5, 8), (100, 64)])
def test_a_tile_is_a_part_of_the_defined_mask(seed, first_row, first_column):
    whole = philox_keep_mask(seed, 0.3, first_row + 8, first_column + 16, torch.device("cpu"))
    mask = torch.empty(8, 16, dtype=torch.int8, device=DEVICE)
    store_mask[(1,)](torch.tensor(seed, device=DEVICE), mask, first_row, first_column, last_dropped(0.3), 8, 16)
    assert torch.equal(mask.cpu().bool(), whole[first_row:, first_column:].cpu())


def test_the_bound_below_which_elements_are_dropped():
    assert last_dropped(0.0) == -1 and last_dropped(0.5) == 2**30 - 1 and last_dropped(1.0) == 2**31 - 1
