"""The cast that ends a float32 computation rounds to the nearest value, and a tie to the even one."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from fastgpt.triton_kernels.rounding import round_to
from triton_checks import DEVICE


@triton.jit
def round_all(x, y, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(y + offsets, round_to(tl.load(x + offsets), y.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_it_rounds_as_pytorch_does(dtype):
    step = torch.finfo(dtype).eps
    near_one = 1 + step * torch.tensor([0.25, 0.5, 0.75, 1.5, 2.5, 3.5])  # 0.5, 1.5, ... are ties
    x = torch.cat([near_one, -near_one, torch.tensor([0.0, 3e4, 1e-3, -7.7])]).to(DEVICE)
    y = torch.empty_like(x, dtype=dtype)
    round_all[(1,)](x, y, N=len(x))
    assert torch.equal(y, x.to(dtype))
