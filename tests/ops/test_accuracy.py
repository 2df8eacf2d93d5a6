"""How an error is measured, and how large it may be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastgpt.ops.accuracy import ATOL, exact, max_error, outputs_and_gradients, tolerance


def test_max_error() -> None:
    inf, nan = math.inf, math.nan
    oracle = torch.tensor([1.0, inf, nan], dtype=torch.float64)
    assert max_error(torch.tensor([1.5, inf, nan]), oracle) == 0.5
    assert max_error(torch.tensor([nan, inf, nan]), oracle) == inf
    assert max_error(torch.tensor([1.0, -inf, nan]), oracle) == inf
    assert max_error(torch.tensor([1.0, inf, 0.0]), oracle) == inf
    assert max_error(torch.empty(0), torch.empty(0, dtype=torch.float64)) == 0.0


def test_the_tolerance_grows_with_values_above_1() -> None:
    small, large = torch.tensor([0.5]), torch.tensor([-8.0, 2.0])
    assert tolerance(torch.float32, small) == ATOL[torch.float32] == tolerance(torch.float32, torch.empty(0))
    assert tolerance(torch.float32, large) == 8.0 * ATOL[torch.float32]


def test_an_exact_copy_keeps_integers() -> None:
    x = torch.tensor([1.5], dtype=torch.bfloat16)
    assert exact(x).dtype == torch.float64 and exact(x).item() == 1.5
    assert exact(torch.tensor([3])).dtype == torch.int64


def test_outputs_and_gradients_by_name() -> None:
    """The second output needs no gradient: it takes no part in the gradients, and is returned."""

    def function(a: Tensor, b: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        return a * b * factor, b.detach() + 1.0

    tensors = {"a": torch.tensor([2.0]), "b": torch.tensor([3.0])}
    values = outputs_and_gradients(function, tensors, {"factor": 5.0}, ["a"], torch.ones_like)
    assert {name: value.item() for name, value in values.items()} == {"out": 30.0, "h": 4.0, "d a": 15.0}
    assert not any(value.requires_grad for value in values.values()) and not tensors["a"].requires_grad
    assert list(
        outputs_and_gradients(torch.mul, {"input": tensors["a"], "other": tensors["b"]}, {}, [], pytest.fail)
    ) == ["out"]
