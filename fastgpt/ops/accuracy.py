"""How an op's error is measured, and how large it may be: the rule of `fastgpt parity` and of the self-tests.

An op is compared with its formula (reference.py) in float64. PyTorch's own op in the same dtype is the yardstick
(yardsticks.py): an error is at most twice PyTorch's, plus a tolerance, because PyTorch's may be zero by chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# In the 16-bit types, one unit in the last place of a number near 1. In the wide types a few units, because sums run in
# another order than PyTorch's.
ATOL = {torch.float64: 2e-14, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def tolerance(dtype: torch.dtype, oracle: Tensor) -> float:
    """How far an error may exceed twice PyTorch's error: ATOL, times the largest value where that is above 1."""
    return ATOL[dtype] * max(1.0, float(oracle.abs().max()) if oracle.numel() else 0.0)


def outputs_and_gradients(
    function: Callable[..., Any],
    arguments: dict[str, Tensor],
    options: dict[str, Any],
    differentiable: Iterable[str],
    upstream_of: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """The outputs of function(**arguments, **options), and the gradients of the `differentiable` arguments, by name.

    `upstream_of` makes the gradient of an output.
    """
    inputs = {name: arguments[name].detach().requires_grad_() for name in differentiable}
    result = function(**{**arguments, **inputs}, **options)
    names = ("out", "accuracy" if options.get("return_accuracy") else "h")
    outputs = dict(zip(names, result, strict=True)) if isinstance(result, tuple) else {"out": result}
    values = {name: out.detach() for name, out in outputs.items()}
    if inputs:
        upstream = {out: upstream_of(out) for out in outputs.values() if out.requires_grad}
        grads = torch.autograd.grad(list(upstream), list(inputs.values()), list(upstream.values()))
        values |= {f"d {name}": grad for name, grad in zip(inputs, grads, strict=True)}
    return values


def max_error(value: Tensor, oracle: Tensor) -> float:
    """The largest |value - oracle|. An infinity or NaN is no error where the oracle has the same; else it is inf."""
    value = value.detach().to(oracle.device, torch.float64)
    same = (value == oracle) | (value.isnan() & oracle.isnan())
    error = torch.where(same, 0.0, (value - oracle).abs())
    return float(error.nan_to_num(nan=math.inf, posinf=math.inf).max()) if error.numel() else 0.0


def exact(tensor: Tensor) -> Tensor:
    """A copy with floating point numbers in float64: what the formula computes with."""
    return tensor.detach().to(torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)
