"""x W^T + b where x has few rows, as in generation: the weights are read once, as fast as the memory gives them.

Not an op of the package's surface: `linear` is `torch.nn.functional.linear`, which the extension's kernel takes over
where it was measured to be the faster one (csrc/linear_rows.h): on a CPU with AVX2 or AVX-512, without gradients, for a
handful of rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from . import native
from .arguments import autocast_dtype
from .backend import requested, unavailable
from .flops import product_flops, register_flops
from .library import below_autograd, in_forward_mode, inside_transform, library

# Up to here the kernel was ahead at every shape measured (an AMD processor, AVX2 and AVX-512). In bfloat16 the library
# has instructions for products that the kernel does not use.
MOST_ROWS = {torch.float32: 8, torch.bfloat16: 2, torch.float16: 8}

library.define("linear_native(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
native.load_at_first_call(library, "linear_native")
register_flops("linear_native", lambda x, weight, bias, **options: product_flops(x, weight))


@torch.library.register_fake("fastgpt::linear_native", lib=library)
def _linear_fake(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _autograd(ctx: Any, grad: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    N, K = weight.shape
    rows = grad.reshape(-1, N)
    return grad @ weight, rows.t() @ x.reshape(-1, K), rows.sum(0) if ctx.has_bias else None


torch.library.register_autograd("fastgpt::linear_native", _autograd, setup_context=_setup_context, lib=library)
_run = torch.ops.fastgpt.linear_native.default


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) -> (..., N); see `torch.nn.functional.linear`."""
    if torch.is_grad_enabled() or not _native_serves(x, weight, bias):
        return F.linear(x, weight, bias)
    return below_autograd(_run, x, weight, bias)


def _native_serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        all(_is_plain(tensor, x.dtype) for tensor in (x, weight, bias) if tensor is not None)
        and x.ndim > 0
        and 0 < x.numel() <= MOST_ROWS.get(x.dtype, 0) * x.shape[-1]
        and weight.ndim == 2
        and (bias is None or (bias.ndim == 1 and bias.shape[0] == weight.shape[0]))
        and weight.stride(1) == 1
        and requested() in ("auto", "native")
        and not torch.compiler.is_compiling()
        and autocast_dtype(x) is None
        and inside_transform() is None
        and not in_forward_mode()
        and unavailable("native", "cpu") is None
        and native.load("cpu").instruction_set() != "generic"  # which converts 16 bits slowly, and was not compared
    )


def _is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Of no class that has a product of its own, dense, on the CPU."""
    return (
        type(tensor) in (Tensor, Parameter)
        and tensor.is_cpu
        and tensor.dtype == dtype
        and tensor.layout is torch.strided
    )
