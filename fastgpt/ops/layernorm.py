"""Layer norm over the last dimension, alone and fused with the residual add that comes before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import autocast_dtype, check_dropout, check_float, check_like, check_number
from .backend import dispatch, register
from .dropout import dropout, philox_keep_mask


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, backend: str = "auto"
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension (Ba et al. 2016, arXiv:1607.06450).

    Args:
        x: (..., C), float16, bfloat16, float32 or float64; any strides.
        weight, bias: (C,), the dtype of x; bias may be None.
        eps: added to the (biased) variance; at least 0.
        backend: "auto", "torch" or "triton".

    Returns: (..., C), the dtype of x. Mean and 1/std are kept in float32 (float64 for float64).
    Raises: TypeError, ValueError naming the argument; BackendError where a named backend cannot serve.
    """
    check_float("x", x)
    _check_affine(x, x.dtype, weight, bias, eps)
    return dispatch("layer_norm", backend, x.device.type, x, weight, bias, eps)


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
        backend: "auto", "torch" or "triton".

    Returns: (layer_norm(h), h), both (..., C).
    Raises: TypeError, ValueError naming the argument; BackendError where a named backend cannot serve.
    """
    check_float("x", x)
    check_float("residual", residual)
    check_like("residual", residual, "x", x, dtype=False)
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected the shape of x {tuple(x.shape)}, got {tuple(residual.shape)}")
    _check_affine(x, torch.promote_types(x.dtype, residual.dtype), weight, bias, eps)
    check_dropout(dropout_p, seed)
    return dispatch(
        "add_layer_norm", backend, x.device.type, x, residual, weight, bias, eps, dropout_p=dropout_p, seed=seed
    )


def _check_affine(x: Tensor, dtype: torch.dtype, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    """`dtype` is that of what is normalised."""
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected shape (..., C) with C at least 1, got {tuple(x.shape)}")
    same_dtype = autocast_dtype(x) is None  # autocast casts, or mixes, as PyTorch's own op does
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            if name == "weight":
                raise TypeError("weight: expected a tensor, got NoneType")
            continue
        check_float(name, tensor, ndim=1)
        check_like(name, tensor, "x", x, dtype=False)
        if same_dtype and tensor.dtype != dtype:
            raise TypeError(f"{name}: has dtype {tensor.dtype}, but what is normalised has {dtype}")
        if tensor.shape[0] != x.shape[-1]:
            raise ValueError(
                f"{name}: expected shape ({x.shape[-1]},) to fit x {tuple(x.shape)}, got {tuple(tensor.shape)}"
            )
    check_number("eps", eps)
    if not eps >= 0.0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def _torch_add(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if dropout_p > 0.0 and seed is not None:
        C = x.shape[-1]
        keep = philox_keep_mask(seed, dropout_p, x.numel() // C, C, x.device).view(x.shape)
        x = x * keep.to(x.dtype) * (1.0 / (1.0 - dropout_p))
    else:
        x = dropout(x, dropout_p)
    h = residual + x
    return _torch(h, weight, bias, eps), h


register("layer_norm", "torch", _torch)
register("add_layer_norm", "torch", _torch_add)
