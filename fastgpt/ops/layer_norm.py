"""Layer norm over the last dimension, alone and fused with the residual add that comes before it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .arguments import as_dropout, as_number, autocast_dtype, check_float, check_like
from .backend import Absent, Slower, dispatch, register
from .dropout import dropout, first_sequence_of, philox_keep_mask
from .library import define_op, inside_transform, refuse_forward_mode
from .triton_backend import seed_tensor

_LARGE = 2**23  # bytes: results as large as this are new memory at every call
MAX_TRITON_WIDTH = 16384  # a row has to fit into the registers of one program


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, backend: str = "auto"
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension (Ba et al. 2016, arXiv:1607.06450).

    Args:
        x: (..., C), float16, bfloat16, float32 or float64; any strides.
        weight, bias: (C,), the dtype of x; bias may be None.
        eps: added to the (biased) variance; at least 0.
        backend: "auto", "torch", "triton" or "native".

    Returns: (..., C), the dtype of x; under autocast that of F.layer_norm, float32 on CUDA. Mean and 1/std are kept in
        float32 (float64 for float64).
    Raises: TypeError, ValueError naming the argument; BackendError where a named backend cannot serve.
    """
    check_float("x", x)
    eps = _check_affine(x, x.dtype, weight, bias, eps)
    return dispatch("layer_norm", backend, x, weight, bias, eps)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h = residual + dropout(x), and its layer norm: the step between two branches of a pre-norm transformer.

    Args:
        x: (..., C), the branch's output, the part that is dropped out.
        residual: the shape of x. Where its dtype differs from x's, h has the wider one, as ``residual + x`` would.
        weight, bias, eps: as for `layer_norm`, in the dtype of h.
        dropout_p: probability, in [0, 1), of dropping an element of x.
        seed: int, or 0-dim int64 tensor: the Philox key of the dropout mask (see `ops/dropout.py`, row: the index of
            the row of C elements, column: the feature). None draws from torch's generator.
        backend: "auto", "torch", "triton" or "native".

    Returns: (layer_norm(h), h), both (..., C); the first in the dtype that `layer_norm` gives.
    Raises: TypeError, ValueError naming the argument; BackendError where a named backend cannot serve.
    """
    check_float("x", x)
    check_float("residual", residual)
    check_like("residual", residual, "x", x, dtype=False)
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected the shape of x {tuple(x.shape)}, got {tuple(residual.shape)}")
    eps = _check_affine(x, torch.promote_types(x.dtype, residual.dtype), weight, bias, eps)
    dropout_p, seed = as_dropout(dropout_p, seed)
    return dispatch("add_layer_norm", backend, x, residual, weight, bias, eps, dropout_p=dropout_p, seed=seed)


def layer_norm_for_reader(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """`layer_norm` for a caller all of whose readers cast the result to `dtype`, as autocast casts a linear's input.

    A backend that can write the result in `dtype` does so: it has been computed in float32, and is rounded once, as the
    reader's cast would round it. Another backend returns what `layer_norm` returns.
    """
    eps = _check_affine(x, x.dtype, weight, bias, eps)
    return dispatch("layer_norm", "auto", x, weight, bias, eps, read_as=dtype)


def add_layer_norm_for_reader(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` for a caller all of whose readers cast the first result, as for `layer_norm_for_reader`."""
    eps = _check_affine(x, torch.promote_types(x.dtype, residual.dtype), weight, bias, eps)
    options = {"dropout_p": dropout_p, "seed": None, "read_as": dtype}
    return dispatch("add_layer_norm", "auto", x, residual, weight, bias, eps, **options)


def _check_affine(x: Tensor, dtype: torch.dtype, weight: Tensor, bias: Tensor | None, eps: float) -> float:
    """Check weight, bias and eps, where the rows that are normalised have `dtype`. Returns eps as a number."""
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected shape (..., C) with C at least 1, got {tuple(x.shape)}")
    same_dtype = autocast_dtype(x) is None  # under autocast PyTorch's own op takes mixed dtypes, too
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            if name == "weight":
                raise TypeError("weight: expected a tensor, got NoneType")
            continue
        check_float(name, tensor, ndim=1)
        check_like(name, tensor, "x", x, dtype=False)
        if same_dtype and tensor.dtype != dtype:
            raise TypeError(f"{name}: has dtype {tensor.dtype}, but the rows to normalise have {dtype}")
        if tensor.shape[0] != x.shape[-1]:
            raise ValueError(
                f"{name}: expected shape ({x.shape[-1]},) to fit x {tuple(x.shape)}, got {tuple(tensor.shape)}"
            )
    eps = as_number("eps", eps)
    if not eps >= 0.0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")
    return eps


def layer_norm_on_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, read_as: torch.dtype | None = None
) -> Tensor:
    if x.dtype == torch.float32 and weight.dtype != torch.float32:  # PyTorch's kernel on a CPU refuses these
        weight, bias = weight.float(), None if bias is None else bias.float()
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_layer_norm_on_torch(x, residual, weight, bias, eps, *, dropout_p, seed, read_as=None) -> tuple[Tensor, Tensor]:
    if dropout_p > 0.0 and seed is not None:
        C = x.shape[-1]
        first_row = first_sequence_of(x, dropout_p) * math.prod(x.shape[1:-1])
        keep = philox_keep_mask(seed, dropout_p, x.numel() // C, C, x.device, first_row).view(x.shape)
        x = x * keep.to(x.dtype) * (1.0 / (1.0 - dropout_p))
    else:
        x = dropout(x, dropout_p)
    h = residual + x
    return layer_norm_on_torch(h, weight, bias, eps), h


# --- registered ops ---------------------------------------------------------------------------------------------------
#
# On each backend one op serves both: without `residual` it is layer_norm, and its second result is empty.


def _forward_fake(x, residual, weight, bias, eps, dropout_p, seed, first_sequence, out_dtype):
    n_rows = x.numel() // x.shape[-1]
    h = x.new_empty(0)
    if residual is not None:
        h = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return x.new_empty(x.shape, dtype=out_dtype), h, x.new_empty((2, n_rows), dtype=torch.float32)


def _gradients_fake(
    grad_y, grad_sum, x, weight, stats, dropout_p, seed, first_sequence, residual_dtype, x_dtype, output_mask
):
    needs_x, needs_residual, needs_weight, needs_bias = output_mask
    x_is_residual = dropout_p == 0.0 and x_dtype == residual_dtype
    grad_residual = x.new_empty(x.shape if needs_residual or (needs_x and x_is_residual) else 0, dtype=residual_dtype)
    grad_x = x.new_empty(x.shape if needs_x and not x_is_residual else 0, dtype=x_dtype)
    return grad_residual, grad_x, weight.new_empty((int(needs_weight) + int(needs_bias), *weight.shape))


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, residual, weight, _, _, dropout_p, seed, ctx.first_sequence, ctx.out_dtype = inputs
    _, h, stats = output
    ctx.mark_non_differentiable(*((h, stats) if residual is None else (stats,)))
    ctx.set_materialize_grads(False)  # where only one of y and h is used, the kernel reads no gradient of zeros
    ctx.dropout_p = 0.0 if residual is None else dropout_p  # without a residual nothing is dropped
    ctx.x_dtype = x.dtype
    ctx.residual_dtype = x.dtype if residual is None else residual.dtype
    ctx.save_for_backward(x if residual is None else h, weight, stats, seed)


def _backward_by(gradients: Callable[..., tuple]) -> Callable[..., tuple]:
    """The derivative of an op; `gradients` gives the results of `_gradients_fake`."""

    def backward(ctx: Any, grad_y: Tensor | None, grad_h: Tensor | None, *unused: Tensor | None) -> tuple:
        x, weight, stats, seed = ctx.saved_tensors
        if grad_y is None and grad_h is None:
            return (None,) * 9
        if grad_y is None:
            grad_y = torch.zeros(x.shape, dtype=ctx.out_dtype, device=x.device)
        asked = ctx.needs_input_grad[:4]
        options = ctx.dropout_p, seed, ctx.first_sequence, ctx.residual_dtype, ctx.x_dtype
        grad_residual, grad_x, grad_affine = gradients(grad_y, grad_h, x, weight, stats, *options, asked)
        needs_x, needs_residual, needs_weight, needs_bias = asked
        if ctx.dropout_p == 0.0 and ctx.x_dtype == ctx.residual_dtype:
            grad_x = grad_residual
        return (
            grad_x if needs_x else None,
            grad_residual if needs_residual else None,
            grad_affine[0] if needs_weight else None,
            grad_affine[-1] if needs_bias else None,
            *(None,) * 5,
        )

    return backward


def _define(backend: str, forward: Callable[..., tuple], gradients: Callable[..., tuple]) -> Callable[..., tuple]:
    by_op = define_op(
        f"layer_norm_{backend}_backward(Tensor grad_y, Tensor? grad_sum, Tensor x, Tensor weight, Tensor stats, "
        "float dropout_p, Tensor? seed, int first_sequence, ScalarType residual_dtype, ScalarType x_dtype, "
        "bool[4] output_mask) -> (Tensor, Tensor, Tensor)",
        forward=gradients,
        fake=_gradients_fake,
        is_gradient=True,
    )
    return define_op(
        f"layer_norm_{backend}(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, float dropout_p, "
        "Tensor? seed, int first_sequence, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
        forward=forward,
        fake=_forward_fake,
        save=_save,
        backward=_backward_by(by_op),
    )


def _forward_on_triton(x, residual, weight, bias, eps, dropout_p, seed, first_sequence, out_dtype):
    from ..triton_kernels import layer_norm

    return layer_norm.forward(x, residual, weight, bias, eps, dropout_p, seed, out_dtype, first_sequence)


def _gradients_on_triton(
    grad_y, grad_sum, x, weight, stats, dropout_p, seed, first_sequence, residual_dtype, x_dtype, output_mask
):
    from ..triton_kernels import layer_norm

    dtypes = (residual_dtype, x_dtype)
    return layer_norm.backward(
        grad_y, grad_sum, x, weight, stats, dropout_p, seed, *dtypes, output_mask, first_sequence
    )


_OPS = {
    "triton": _define("triton", _forward_on_triton, _gradients_on_triton),  # triton_kernels/layer_norm.py
    "native": _define(  # csrc/layer_norm.cpp
        "native",
        native.load_at_first_call("layer_norm_native"),
        native.load_at_first_call("layer_norm_native_backward"),
    ),
}


def _out_dtype(h_dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype of F.layer_norm's result: autocast makes it float32 on CUDA, and leaves it alone on a CPU."""
    return torch.float32 if device_type == "cuda" and torch.is_autocast_enabled("cuda") else h_dtype


def _layer_norm_on(
    backend: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, read_as: torch.dtype | None = None
) -> Tensor:
    out_dtype = read_as or _out_dtype(x.dtype, x.device.type)
    refuse_forward_mode("layer_norm", x, weight, bias)
    return _OPS[backend](x, None, weight, bias, eps, 0.0, None, 0, out_dtype)[0]


def _add_layer_norm_on(
    backend: str, x, residual, weight, bias, eps, *, dropout_p, seed, read_as=None
) -> tuple[Tensor, Tensor]:
    out_dtype = read_as or _out_dtype(torch.promote_types(x.dtype, residual.dtype), x.device.type)
    key, first = seed_tensor(dropout_p, seed, x.device), first_sequence_of(x, dropout_p)
    refuse_forward_mode("add_layer_norm", x, residual, weight, bias)
    y, h, _ = _OPS[backend](x, residual, weight, bias, eps, dropout_p, key, first, out_dtype)
    return y, h


def _triton_serves(x: Tensor, *args: Any, **kwargs: Any) -> str | None:
    if x.dtype == torch.float64:
        return "float64 is not supported: the kernels keep their statistics in float32"
    if x.shape[-1] > MAX_TRITON_WIDTH:
        return f"width {x.shape[-1]} is above {MAX_TRITON_WIDTH}: a row must fit into one program's registers"
    return inside_transform()


def _triton_serves_add(x: Tensor, residual: Tensor, *args: Any, **kwargs: Any) -> str | None:
    return _triton_serves(residual if residual.dtype == torch.float64 else x)


def _native_serves(x: Tensor, *args: Any, **kwargs: Any) -> str | None:
    if not x.is_cpu:
        return Absent("its kernels for layer norm run on CPUs")
    if x.dtype == torch.float64:
        return "its kernels take float32, float16 and bfloat16, and x is float64"
    return inside_transform()


def _native_serves_add(x: Tensor, residual: Tensor, *args: Any, **kwargs: Any) -> str | None:
    if residual.dtype == torch.float64:
        return "its kernels take float32, float16 and bfloat16, and residual is float64"
    return _native_serves(x)


def _native_unproved_add(
    x: Tensor, residual: Tensor, *affine: Any, dropout_p: float = 0.0, **kwargs: Any
) -> str | None:
    if dropout_p == 0.0 and not torch.compiler.is_compiling() and x.nbytes >= _LARGE and not torch.is_grad_enabled():
        return Slower("of large tensors, without dropout and gradients, PyTorch's sum and norm are faster")
    return native.slower_without_avx()


register("layer_norm", "torch", layer_norm_on_torch)
register("add_layer_norm", "torch", add_layer_norm_on_torch)
register("layer_norm", "triton", functools.partial(_layer_norm_on, "triton"), _triton_serves)
register("add_layer_norm", "triton", functools.partial(_add_layer_norm_on, "triton"), _triton_serves_add)
register("layer_norm", "native", functools.partial(_layer_norm_on, "native"), _native_serves)
register(
    "add_layer_norm",
    "native",
    functools.partial(_add_layer_norm_on, "native"),
    _native_serves_add,
    _native_unproved_add,
)
