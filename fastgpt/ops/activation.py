"""The activation of a feed-forward layer, with the bias that is added before it.

The native backend (csrc/activation_rows.h) adds the bias in the same pass. Backward computes the derivative again from
x, so that nothing else is kept, and sums the gradient of the bias in the same pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import ACTIVATIONS
from . import native
from .arguments import autocast_dtype, check_float, check_like
from .backend import Absent, Slower, dispatch, register
from .library import define_op, inside_transform, refuse_forward_mode


def activation(x: Tensor, bias: Tensor | None = None, *, kind: str = "gelu", backend: str = "auto") -> Tensor:
    """f(x + bias), with f one of the activations of `GPTConfig`.

    Args:
        x: (..., C), float16, bfloat16, float32 or float64; any strides.
        bias: (C,), the dtype of x; None adds nothing.
        kind: "gelu", x Phi(x) with the distribution function of the normal distribution (Hendrycks and Gimpel 2016,
            arXiv:1606.08415); "gelu_tanh", its approximation by a tanh, as in GPT-2; "relu", max(x, 0); "relu2",
            relu(x)^2 (So et al. 2021, arXiv:2109.08668).
        backend: "auto", "torch" or "native".

    Returns: the shape and dtype of x.
    Raises: TypeError, ValueError naming the argument; BackendError where a named backend cannot serve.
    """
    check_float("x", x)
    if kind not in ACTIVATIONS:
        raise ValueError(f"kind: expected one of {', '.join(ACTIVATIONS)}, got {kind!r}")
    if bias is not None:
        check_float("bias", bias, ndim=1)
        check_like("bias", bias, "x", x, dtype=autocast_dtype(x) is None)
        if x.ndim == 0 or x.shape[-1] != bias.shape[0]:
            raise ValueError(f"bias: expected shape (C,) to fit x (..., C) {tuple(x.shape)}, got {tuple(bias.shape)}")
    return dispatch("activation", backend, x, bias, kind=kind)


def activation_on_torch(x: Tensor, bias: Tensor | None, *, kind: str) -> Tensor:
    if bias is not None:
        x = x + bias.to(x.dtype)
    if kind == "gelu":
        return F.gelu(x)
    if kind == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return F.relu(x) if kind == "relu" else F.relu(x).square()


# --- the native backend: csrc/activation.cpp --------------------------------------------------------------------------


def _fake(x, bias, kind):
    return x.new_empty(x.shape)


def _gradients_fake(grad, x, bias, kind, with_x, with_bias):
    return x.new_empty(x.shape if with_x else 0), x.new_empty(x.shape[-1] if with_bias else 0)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, bias, ctx.kind = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    with_x, with_bias = ctx.needs_input_grad[:2]
    d_x, d_bias = _gradients(grad, *ctx.saved_tensors, ctx.kind, with_x, with_bias)
    return d_x if with_x else None, d_bias if with_bias else None, None


_gradients = define_op(
    "activation_native_backward(Tensor grad, Tensor x, Tensor? bias, int kind, bool with_x, bool with_bias) "
    "-> (Tensor, Tensor)",
    forward=native.load_at_first_call("activation_native_backward"),
    fake=_gradients_fake,
    is_gradient=True,
)
_activation_native = define_op(
    "activation_native(Tensor x, Tensor? bias, int kind) -> Tensor",
    forward=native.load_at_first_call("activation_native"),
    fake=_fake,
    save=_save,
    backward=_backward,
)


def activation_on_native(x: Tensor, bias: Tensor | None, *, kind: str) -> Tensor:
    refuse_forward_mode("activation", x, bias)
    return _activation_native(x, bias if bias is None else bias.to(x.dtype), ACTIVATIONS.index(kind))


def _native_serves(x: Tensor, *args: Any, **kwargs: Any) -> str | None:
    if not x.is_cpu:
        return Absent("its kernels for the activation run on CPUs")
    if x.dtype == torch.float64:
        return "its kernels take float32, float16 and bfloat16, and x is float64"
    return inside_transform()


def _native_unproved(x: Tensor, bias: Tensor | None = None, kind: str = "gelu", **options: Any) -> str | None:
    if kind == "gelu" and bias is None and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return Slower("without a gradient and a bias PyTorch's gelu is as fast or faster")
    return native.slower_without_avx()


register("activation", "torch", activation_on_torch)
register("activation", "native", activation_on_native, _native_serves, _native_unproved)
