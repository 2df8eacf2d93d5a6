"""Whose error an op's is compared with."""

from __future__ import annotations

import pytest
import torch

from fastgpt.ops import reference
from fastgpt.ops.yardsticks import YARDSTICKS, yardstick_for


def test_attention_of_triton_is_compared_with_a_flash_kernel() -> None:
    """PyTorch has one on a GPU, which takes no mask of dropout; elsewhere its steps stand for it."""
    sdpa = YARDSTICKS["attention"]
    assert yardstick_for("attention", "triton", "cuda", dropout=False) is sdpa
    assert yardstick_for("attention", "torch", "cpu", dropout=True) is sdpa
    steps = yardstick_for("attention", "triton", "cpu", dropout=False)
    assert steps is yardstick_for("attention", "triton", "cuda", dropout=True) is not sdpa
    assert yardstick_for("layer_norm", "triton", "cpu", dropout=False) is YARDSTICKS["layer_norm"]


@pytest.mark.parametrize("dropout", [False, True])
def test_the_steps_of_the_flash_kernel_are_attention(dropout) -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 8, dtype=torch.float64).requires_grad_()
    options = {"dropout_p": 0.3, "seed": 5} if dropout else {}
    ours = yardstick_for("attention", "triton", "cpu", dropout)(q, k, v, **options)
    expected = reference.attention(q, k, v, **options)
    torch.testing.assert_close(ours, expected)
    grads = (torch.autograd.grad(out.cos().sum(), (q, k, v)) for out in (ours, expected))
    torch.testing.assert_close(*grads)
