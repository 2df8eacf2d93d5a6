"""x W^T + b with a faster kernel for few rows, as in generation, where reading the weights takes most of the time.

It is not one of the public ops. `linear` is `torch.nn.functional.linear`, except where the extension's kernel was
measured to be faster (csrc/linear_rows.h, `native.FASTER_THAN_LIBRARY`): without gradients, for a few rows, on the
processors that `linear_choice` names. FASTGPT_BACKEND=native uses the kernel on other processors, too.
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
from .flops import product_flops
from .library import below_autograd, define_op, in_forward_mode, inside_transform

# Up to this many rows the kernel was faster at every shape measured. For bfloat16 the library uses instructions for
# matrix products that the kernel does not use.
MOST_ROWS = {torch.float32: 8, torch.bfloat16: 2, torch.float16: 8}


def _fake(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _ = inputs
    with_x, with_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if with_weight else None, weight if with_x else None)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    with_x, with_weight, with_bias = ctx.needs_input_grad
    rows = grad.reshape(-1, grad.shape[-1])
    d_x = grad @ weight if with_x else None
    d_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if with_weight else None
    return d_x, d_weight, rows.sum(0) if with_bias else None


define_op(
    "linear_native(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    forward=native.load_at_first_call("linear_native"),
    fake=_fake,
    save=_save,
    backward=_backward,
    flops=lambda x, weight, bias, **options: product_flops(x, weight),
)
_linear_native = torch.ops.fastgpt.linear_native.default  # called without gradients alone


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) -> (..., N); see `torch.nn.functional.linear`."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _native_serves(x, weight, bias):
        return F.linear(x, weight, bias)
    return below_autograd(_linear_native, x, weight, bias)


def linear_choice() -> tuple[bool, str]:
    """Whether few rows run on the extension's kernel on this machine, and in words why, or why not."""
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
    """Whether `tensor` is dense, on the CPU, and of no subclass, which may define its own product."""
    return (
        type(tensor) in (Tensor, Parameter)
        and tensor.is_cpu
        and tensor.dtype == dtype
        and tensor.layout is torch.strided
    )
