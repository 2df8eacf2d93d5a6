"""Measure one case: an op on one backend in one dtype, forward and each gradient, against the float64 oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import reference
from .cases import Draw, ParityCase
from .yardsticks import yardstick_for

# In the 16-bit types, one unit in the last place of a number near 1. In the wide types a few units, because sums run in
# another order than PyTorch's.
ATOL = {torch.float64: 2e-14, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = tuple(ATOL)


def tolerance(dtype: torch.dtype, oracle: Tensor) -> float:
    """How far an error may exceed twice PyTorch's error: ATOL, times the largest value where that is above 1."""
    return ATOL[dtype] * max(1.0, float(oracle.abs().max()) if oracle.numel() else 0.0)


@dataclass(frozen=True)
class ParityRow:
    """One compared tensor of a case: "out" (and "h"), or the gradient "d <argument>". Errors are the largest ones."""

    op: str
    backend: str
    dtype: str
    case: str
    value: str
    ours: float
    torch: float
    atol: float
    passed: bool
    reason: str = ""  # what is wrong, where it is not the size of the error

    @property
    def ratio(self) -> float | None:
        """Our error over PyTorch's; None where PyTorch's is 0."""
        return self.ours / self.torch if self.torch > 0.0 else None


@dataclass(frozen=True)
class SkippedCase:
    """A case that a backend does not serve, and why."""

    op: str
    backend: str
    dtype: str
    case: str
    reason: str


def outputs_and_gradients(
    function: Callable[..., Any], case: ParityCase, arguments: dict[str, Tensor], options: dict[str, Any]
) -> dict[str, Tensor]:
    """The outputs of function(**arguments, **options) and the gradient of every argument that has one, by name."""
    # The class weights of cross_entropy have no gradient in PyTorch.
    inputs = {
        name: tensor.detach().requires_grad_()
        for name, tensor in arguments.items()
        if tensor.is_floating_point() and (case.op, name) != ("cross_entropy", "weight")
    }
    result = function(**{**arguments, **inputs}, **options)
    outputs = dict(zip(("out", "h"), result, strict=True)) if isinstance(result, tuple) else {"out": result}
    draw = Draw(next(iter(inputs.values())).dtype, "cpu", seed=1)
    upstream = []
    for out in outputs.values():
        # These numbers are exact in every dtype, so that all functions that are compared get the same gradient.
        grad = torch.full((), 0.5) if case.expanded_grad else draw.index(17, *out.shape) / 8.0 - 1.0
        upstream.append(grad.to(out.device, out.dtype).expand(out.shape))
    grads = torch.autograd.grad(list(outputs.values()), list(inputs.values()), upstream)
    values = {name: out.detach() for name, out in outputs.items()}
    return values | {f"d {name}": grad for name, grad in zip(inputs, grads, strict=True)}


def max_error(value: Tensor, oracle: Tensor) -> float:
    """The largest |value - oracle|. An infinity or NaN is no error where the oracle has the same; else it is inf."""
    value = value.detach().to(oracle.device, torch.float64)
    same = (value == oracle) | (value.isnan() & oracle.isnan())
    error = torch.where(same, 0.0, (value - oracle).abs())
    return float(error.nan_to_num(nan=math.inf, posinf=math.inf).max()) if error.numel() else 0.0


def exact_copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU, with floating point numbers in float64: what the oracle computes with."""
    return tensor.detach().to("cpu", torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)


def measure_case(case: ParityCase, backend: str, dtype: torch.dtype, device: str = "cpu") -> list[ParityRow]:
    """The errors of `case` on `backend`. Raises BackendError, with the reason, where the backend does not serve it."""
    drawn = case.arguments(Draw(dtype, device))
    arguments = {name: tensor for name, tensor in drawn.items() if tensor is not None}
    exact = {name: exact_copy(tensor) for name, tensor in arguments.items()}
    ours = outputs_and_gradients(getattr(ops, case.op), case, arguments, {**case.options, "backend": backend})
    changed = [name for name, before in exact.items() if not torch.equal(exact_copy(arguments[name]), before)]
    theirs = outputs_and_gradients(yardstick_for(case, backend, device), case, arguments, case.options)
    oracle = outputs_and_gradients(getattr(reference, case.op), case, exact, case.options)
    rows = []
    for name, expected in oracle.items():
        reason = f"{', '.join(changed)} was written to" if changed else ""
        if ours[name].shape != expected.shape:
            reason = f"shape {tuple(ours[name].shape)}, expected {tuple(expected.shape)}"
        elif ours[name].dtype != theirs[name].dtype:
            reason = f"dtype {ours[name].dtype}, PyTorch's has {theirs[name].dtype}"
        error = math.inf if reason else max_error(ours[name], expected)
        torch_error, atol = max_error(theirs[name], expected), tolerance(dtype, expected)
        passed = error <= 2.0 * torch_error + atol
        rows.append(
            ParityRow(case.op, backend, dtype_name(dtype), case.name, name, error, torch_error, atol, passed, reason)
        )
    return rows


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
