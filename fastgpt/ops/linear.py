"""x W^T + b where x has few rows, as in generation: the weights are read once, as fast as the memory gives them.

Not an op of the package's surface: `linear` is `torch.nn.functional.linear`, which the extension's kernel takes over
where it is the faster one (csrc/linear_rows.h): on a CPU, without gradients, for a handful of rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from .arguments import autocast_dtype
from .backend import requested, unavailable
from .library import below_autograd, inside_transform, library

# With more rows the matrix library reads the weights as often, and computes faster; in 16 bits sooner, because there it
# has instructions (AVX512-BF16) that the kernel does not use.
MOST_ROWS = {torch.float32: 8, torch.bfloat16: 4, torch.float16: 4}

library.define("linear_native(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.register_fake("fastgpt::linear_native", lib=library)
def _linear_fake(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _autograd(ctx: Any, grad: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    rows = grad.flatten(0, -2)
    return grad @ weight, rows.t() @ x.flatten(0, -2), rows.sum(0) if ctx.has_bias else None


torch.library.register_autograd("fastgpt::linear_native", _autograd, setup_context=_setup_context, lib=library)


_run = torch.ops.fastgpt.linear_native.default


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) -> (..., N); see `torch.nn.functional.linear`."""
    if torch.is_grad_enabled() or not _native_serves(x, weight, bias):
        return F.linear(x, weight, bias)
    return below_autograd(_run, x, weight, bias)


def _native_serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    parameters = (weight,) if bias is None else (weight, bias)
    return (
        x.is_cpu
        and all(type(p) in (Tensor, Parameter) and p.is_cpu and p.dtype == x.dtype for p in parameters)
        and 0 < x.numel() <= MOST_ROWS.get(x.dtype, 0) * x.shape[-1]
        and weight.ndim == 2
        and weight.stride(1) == 1
        and requested() in ("auto", "native")
        and not torch.compiler.is_compiling()
        and autocast_dtype(x) is None
        and inside_transform() is None
        and torch.autograd.forward_ad._current_level < 0
        and unavailable("native", "cpu") is None
    )
