"""Measure one case: an op on one backend in one dtype, forward and each gradient, against the float64 oracle."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import accuracy, reference
from ..ops.accuracy import ATOL, max_error, tolerance
from ..ops.backend import OPS, dispatch
from ..ops.yardsticks import yardstick_for
from .cases import Draw, ParityCase

DTYPES = tuple(ATOL)


@dataclass(frozen=True)
class ParityRow:
    """One compared tensor of a case: "out" (and "h" or "accuracy"), or "d <argument>". Errors are the largest ones."""

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
    # The class weights of cross_entropy have no gradient in PyTorch; the weights of targets have none in any loss.
    without = {"token_weight", "weight"} if case.op == "cross_entropy" else {"token_weight"}
    differentiable = [name for name, tensor in arguments.items() if tensor.is_floating_point() and name not in without]
    draw = Draw(arguments[differentiable[0]].dtype, "cpu", seed=1)

    def upstream_of(out: Tensor) -> Tensor:
        # These numbers are exact in every dtype, so that all functions that are compared get the same gradient.
        grad = torch.full((), 0.5) if case.expanded_grad else draw.index(17, *out.shape) / 8.0 - 1.0
        return grad.to(out.device, out.dtype).expand(out.shape)

    return accuracy.outputs_and_gradients(function, arguments, options, differentiable, upstream_of)


def exact_copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU, with floating point numbers in float64: what the oracle computes with."""
    return accuracy.exact(tensor).cpu()


def _on_backend(op: str, backend: str) -> Callable[..., Any]:
    """The public op, or, where `op` is an internal one, what is registered under its name."""
    if op in OPS:
        return functools.partial(getattr(ops, op), backend=backend)
    return lambda x, **others: dispatch(op, backend, x, **others)


def measure_case(case: ParityCase, backend: str, dtype: torch.dtype, device: str = "cpu") -> list[ParityRow]:
    """The errors of `case` on `backend`. Raises BackendError, with the reason, where the backend does not serve it."""
    drawn = case.arguments(Draw(dtype, device))
    arguments = {name: tensor for name, tensor in drawn.items() if tensor is not None}
    exact = {name: exact_copy(tensor) for name, tensor in arguments.items()}
    ours = outputs_and_gradients(_on_backend(case.op, backend), case, arguments, case.options)
    changed = [name for name, before in exact.items() if not torch.equal(exact_copy(arguments[name]), before)]
    yardstick = yardstick_for(case.op, backend, device, "dropout_p" in case.options)
    theirs = outputs_and_gradients(yardstick, case, arguments, case.options)
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
