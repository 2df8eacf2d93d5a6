"""Gradients that were made with the loss are handed out scaled, in place where that loses nothing."""

import math

import pytest
import torch

from fastgpt.ops.ready_gradients import scaled


@pytest.mark.parametrize("factor", [1.0, -0.5, 0.0])
def test_a_finite_factor_scales_in_place(factor):
    gradient = torch.tensor([0.0, 2.0, -4.0])
    expected = gradient * factor
    (result,) = scaled([gradient], torch.tensor(factor))
    assert result is gradient and torch.equal(gradient, expected)


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_factor_that_is_not_finite_asks_for_the_gradients_anew(factor):
    gradient = torch.tensor([0.0, 2.0])
    assert scaled([gradient], torch.tensor(factor)) is None
    assert torch.equal(gradient, torch.tensor([0.0, 2.0]))
