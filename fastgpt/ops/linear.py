"""x W^T + b on a CPU by the extension's kernels, where these were measured to be faster than the matrix library.

It is not one of the public ops. `linear` is `torch.nn.functional.linear`, except on the processors that
`linear_choice` names (`native.FASTER_THAN_LIBRARY`). There, a few rows without gradients, as in generation, take a
kernel that reads the weights once (csrc/linear_rows.h), and more rows in float32, as in training, take the extension's
matrix product (csrc/matmul_tiles.h), forward and backward. FASTGPT_BACKEND=native takes both on other processors, too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import has_torch_function

from . import dtensor, native
from .arguments import autocast_dtype
from .backend import preferred, register, unavailable
from .flops import product_flops
from .library import define_op, in_dispatch_mode, in_forward_mode, inside_transform

# Up to this many rows the kernel for few rows was faster at every shape measured. For bfloat16 the library uses
# instructions for matrix products that the kernel does not use.
MOST_ROWS = {torch.float32: 8, torch.bfloat16: 2, torch.float16: 8}
# The smallest product at which the kernels were measured to be faster, forward, and forward with backward; at half of
# it they are slower, because their call takes about 5 us longer than the library's (docs/kernels-native.md).
FEWEST_MULTIPLY_ADDS = 2**20


def _fake(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_backward(grad, x, weight, with_bias):
    return (
        grad.new_empty(0 if weight is None else (*grad.shape[:-1], weight.shape[1])),
        grad.new_empty(0 if x is None else (grad.shape[-1], x.shape[-1])),
        grad.new_empty(grad.shape[-1] if with_bias else 0),
    )


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _ = inputs
    with_x, with_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if with_weight else None, weight if with_x else None)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    with_x, with_weight, with_bias = ctx.needs_input_grad
    if torch.is_grad_enabled() or grad.dtype != torch.float32 or not grad.is_cpu:  # the formula can be differentiated
        rows = grad.reshape(-1, grad.shape[-1])
        d_x = grad @ weight if with_x else None
        d_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if with_weight else None
        return d_x, d_weight, rows.sum(0) if with_bias else None
    d_x, d_weight, d_bias = _linear_native_backward(grad, x, weight, with_bias)
    return d_x if with_x else None, d_weight if with_weight else None, d_bias if with_bias else None


def _backward_flops(grad: Any, x: Any, weight: Any, with_bias: bool, **options: Any) -> Any:
    dx = 0 if weight is None else product_flops(grad, (weight[1],))
    return dx + (0 if x is None else product_flops(grad, (x[-1],)))


_linear_native_backward = define_op(
    "linear_native_backward(Tensor grad, Tensor? x, Tensor? weight, bool with_bias) -> (Tensor, Tensor, Tensor)",
    forward=native.load_at_first_call("linear_native_backward"),
    fake=_fake_backward,
    is_gradient=True,
    flops=_backward_flops,
)
_linear_native = define_op(
    "linear_native(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    forward=native.load_at_first_call("linear_native"),
    fake=_fake,
    save=_save,
    backward=_backward,
    flops=lambda x, weight, bias, **options: product_flops(x, weight),
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) -> (..., N); see `torch.nn.functional.linear`."""
    if dtensor.is_loaded() and dtensor.has_local_tensors("linear", (x, weight, bias)):
        return dtensor.on_local_tensors("linear", linear, x, weight, bias)
    if torch.compiler.is_compiling() or not _native_serves(x, weight, bias):
        return F.linear(x, weight, bias)
    return _linear_native(x, weight, bias)


def linear_choice(kernel: str) -> tuple[bool, str]:
    """Whether `kernel`, "linear" (few rows), "matmul" or "orthogonal", runs on this machine, and why, or why not."""
    reason = _reason_against(kernel)
    if reason is not None:
        return False, reason
    if preferred() == "native":
        return True, "the native backend is preferred"
    return True, "its own kernel was measured to be faster than the matrix library on processors like this one"


def _reason_against(kernel: str) -> str | None:
    if preferred() == "torch":
        return "the torch backend is preferred"
    reason = unavailable("native", "cpu")
    if reason is None and preferred() != "native":
        reason = native.reason_for_library(kernel)
    return reason


def _native_serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        all(_is_plain(tensor, x.dtype) for tensor in (x, weight, bias) if tensor is not None)
        and x.ndim > 0
        and x.numel() > 0
        and weight.ndim == 2
        and weight.shape[1] == x.shape[-1]
        and (bias is None or (bias.ndim == 1 and bias.shape[0] == weight.shape[0]))
        and weight.stride(1) == 1
        and autocast_dtype(x) is None
        and inside_transform() is None
        and not in_forward_mode()
        and not in_dispatch_mode()
        and not has_torch_function((x,))
        and (kernel := _kernel_for(x, weight)) is not None
        and _reason_against(kernel) is None
    )


def _kernel_for(x: Tensor, weight: Tensor) -> str | None:
    """Which of the extension's kernels is the faster one for these shapes; None for neither."""
    if x.numel() <= MOST_ROWS.get(x.dtype, 0) * x.shape[-1] and not torch.is_grad_enabled():
        return "linear"
    if x.dtype == torch.float32 and x.numel() * weight.shape[0] >= FEWEST_MULTIPLY_ADDS:
        return "matmul"
    return None


def _kernels_serve(x: Tensor, *args: Any, **kwargs: Any) -> str | None:
    if not x.is_cpu:
        return "its kernels run on CPUs only"
    if x.dtype == torch.float64:
        return "its kernels take float32, float16 and bfloat16, and x is float64"
    return None


def _is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether `tensor` is dense, on the CPU, and of no subclass, which may define its own product."""
    return (
        type(tensor) in (Tensor, Parameter)
        and tensor.is_cpu
        and tensor.dtype == dtype
        and tensor.layout is torch.strided
    )


# For `fastgpt parity`, which measures the kernels of every shape and on every machine. `linear` chooses for itself.
register("linear", "torch", lambda x, weight, bias=None: F.linear(x, weight, bias))
register("linear", "native", lambda x, weight, bias=None: _linear_native(x, weight, bias), _kernels_serve)
