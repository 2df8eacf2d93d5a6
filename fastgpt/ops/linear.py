"""x W^T + b where x has few rows, as in generation: the weights are read once, as fast as the memory gives them.

Not an op of the package's surface: `linear` is `torch.nn.functional.linear`, which the extension's kernel takes over
where it was measured to be the faster one (csrc/linear_rows.h, `native.FASTER_THAN_LIBRARY`): without gradients, for a
handful of rows, on the processors that `linear_choice` names. FASTGPT_BACKEND=native takes it on others, too.
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

# Up to here the kernel was ahead at every shape measured. In bfloat16 the library has instructions for products that
# the kernel does not use.
MOST_ROWS = {torch.float32: 8, torch.bfloat16: 2, torch.float16: 8}

library.define("linear_native(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
native.load_at_first_call(library, "linear_native")
register_flops("linear_native", lambda x, weight, bias, **options: product_flops(x, weight))


@torch.library.register_fake("fastgpt::linear_native", lib=library)
def _linear_fake(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _ = inputs
    with_x, with_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if with_weight else None, weight if with_x else None)


def _autograd(ctx: Any, grad: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    with_x, with_weight, with_bias = ctx.needs_input_grad
    rows = grad.reshape(-1, grad.shape[-1])
    d_x = grad @ weight if with_x else None
    d_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if with_weight else None
    return d_x, d_weight, rows.sum(0) if with_bias else None


torch.library.register_autograd("fastgpt::linear_native", _autograd, setup_context=_setup_context, lib=library)
_run = torch.ops.fastgpt.linear_native.default


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) -> (..., N); see `torch.nn.functional.linear`."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _native_serves(x, weight, bias):
        return F.linear(x, weight, bias)
    return below_autograd(_run, x, weight, bias)


def linear_choice() -> tuple[bool, str]:
    """Whether a few rows take the extension's kernel on this machine, and in words why, or why not."""
    reason = _reason_against()
    if reason is not None:
        return False, reason
    if requested() == "native":
        return True, "the native backend was asked for"
    return True, "its own kernel was measured to be faster than the matrix library on processors like this one"


def _reason_against() -> str | None:
    if requested() not in ("auto", "native"):
        return f"the {requested()} backend was asked for"
    reason = unavailable("native", "cpu")
    if reason is None and requested() == "auto":
        reason = native.reason_for_library("linear")
    return reason


def _native_serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        all(_is_plain(tensor, x.dtype) for tensor in (x, weight, bias) if tensor is not None)
        and x.ndim > 0
        and 0 < x.numel() <= MOST_ROWS.get(x.dtype, 0) * x.shape[-1]
        and weight.ndim == 2
        and (bias is None or (bias.ndim == 1 and bias.shape[0] == weight.shape[0]))
        and weight.stride(1) == 1
        and autocast_dtype(x) is None
        and inside_transform() is None
        and not in_forward_mode()
        and _reason_against() is None
    )


def _is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Of no class that has a product of its own, dense, on the CPU."""
    return (
        type(tensor) in (Tensor, Parameter)
        and tensor.is_cpu
        and tensor.dtype == dtype
        and tensor.layout is torch.strided
    )
