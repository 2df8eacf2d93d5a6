"""Numbers as users hold them: anything with __index__ is an integer, any real number is a number, a bool is neither."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from fastgpt import ops

X, WEIGHT = torch.randn(4, 8), torch.randn(8)
HEADS = torch.randn(1, 2, 4, 8)
TOKENS = torch.tensor([[1, 3, 0]])
TARGETS = torch.tensor([1, 3, 0, 7])

# Every number that an op takes, the op called with it, and a value it can have.
INTEGERS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "position_offset": (lambda n: ops.embedding(TOKENS, X, X, position_offset=n), 1),
    "ignore_index": (lambda n: ops.cross_entropy(X, TARGETS, ignore_index=n), 3),
    "ignore_index of linear": (lambda n: ops.linear_cross_entropy(X, X.new_ones(9, 8), TARGETS, ignore_index=n), 3),
    "seed": (lambda n: ops.attention(HEADS, HEADS, HEADS, dropout_p=0.5, seed=n), 5),
    "seed of add_layer_norm": (lambda n: ops.add_layer_norm(X, X, WEIGHT, dropout_p=0.5, seed=n)[0], 5),
}
NUMBERS: dict[str, tuple[Callable[[Any], Any], float]] = {
    "scale": (lambda p: ops.attention(HEADS, HEADS, HEADS, scale=p), 0.25),
    "dropout_p": (lambda p: ops.attention(HEADS, HEADS, HEADS, dropout_p=p, seed=1), 0.25),
    "dropout_p of add_layer_norm": (lambda p: ops.add_layer_norm(X, X, WEIGHT, dropout_p=p, seed=1)[0], 0.25),
    "eps": (lambda p: ops.layer_norm(X, WEIGHT, eps=p), 0.25),
    "eps of add_layer_norm": (lambda p: ops.add_layer_norm(X, X, WEIGHT, eps=p)[0], 0.25),
    "label_smoothing": (lambda p: ops.cross_entropy(X, TARGETS, label_smoothing=p), 0.25),
    "label_smoothing of linear": (lambda p: ops.linear_cross_entropy(X, X, TARGETS % 4, label_smoothing=p), 0.25),
}


class Index:
    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str) -> None:
    call, value = INTEGERS[name]
    expected = call(value)
    for kind in (np.int64, np.int32, np.uint8, Index):
        assert torch.equal(call(kind(value)), expected)
    argument = name.split()[0]
    for wrong in (True, 1.0, "1", np.float64(1.0), np.bool_(True)):
        with pytest.raises(TypeError, match=f"^{argument}: expected an int"):
            call(wrong)
    for wrong in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match=f"^{argument}: expected a 64-bit integer, got"):
            call(wrong)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str) -> None:
    call, value = NUMBERS[name]
    expected = call(value)
    for kind in (np.float32, np.float64, np.float16, Fraction):
        assert torch.equal(call(kind(value)), expected)
    for wrong in ("0.25", 1j, None if name != "scale" else [], np.str_("0.25")):
        with pytest.raises(TypeError, match=f"^{name.split()[0]}: expected a number, got"):
            call(wrong)
