"""The checks that every op makes of its arguments. An error names the argument, what was given and what is expected."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from ..config import as_int
from .library import assume_constant_result

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_float(name: str, tensor: Tensor, ndim: int | None = None) -> None:
    """`tensor` is a floating point tensor, of `ndim` dimensions where that is given."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise _not_dense(name, tensor)
    if ndim is not None and tensor.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(tensor.shape)}")


def check_index(name: str, tensor: Tensor, ndim: int | None = None) -> None:
    """`tensor` holds int64 or int32 indices."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected int64 (or int32) indices, got {tensor.dtype}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise _not_dense(name, tensor)
    if ndim is not None and tensor.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {tuple(tensor.shape)}")


def _not_dense(name: str, tensor: Tensor) -> TypeError:
    kind = "a nested tensor" if tensor.is_nested else f"one of layout {tensor.layout}"
    return TypeError(f"{name}: expected a dense tensor, got {kind}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """`tensor` lies on the device of `other`, and has its dtype."""
    if not (tensor.is_cpu and other.is_cpu) and tensor.device != other.device:
        raise ValueError(f"{name}: on {tensor.device}, but {other_name} is on {other.device}")
    if dtype and tensor.dtype != other.dtype:
        raise TypeError(f"{name}: has dtype {tensor.dtype}, but {other_name} has {other.dtype}")


def check_bool(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def as_number(name: str, value: Any) -> Any:
    """`value`, a real number of any library, as Python's; a symbolic one stays as it is."""
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return value
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def as_int64(name: str, value: Any, expected: str = "an int") -> int:
    """`value`, an integer of any library, as an int of 64 bits; a symbolic one stays as it is."""
    if type(value) is not int and not isinstance(value, torch.SymInt):
        try:
            value = as_int(value)
        except TypeError:
            raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}") from None
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected a 64-bit integer, got {value}")
    return value


def as_dropout(dropout_p: Any, seed: Any) -> tuple[float, int | Tensor | None]:
    """Returns both as Python's numbers; `seed` may also be a tensor or None."""
    dropout_p = as_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a number in [0, 1), got {dropout_p}")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.ndim != 0:
            raise TypeError(f"seed: expected an int or a 0-dim int64 tensor, got {seed.dtype} {tuple(seed.shape)}")
    elif seed is not None:
        seed = as_int64("seed", seed, "an int or a 0-dim int64 tensor")
    return dropout_p, seed


def as_loss_options(ignore_index: Any, reduction: str, label_smoothing: Any) -> tuple[int, float]:
    """Checks the options that both losses have. Returns ignore_index and label_smoothing as Python's numbers."""
    if not isinstance(reduction, str) or reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    label_smoothing = as_number("label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    return as_int64("ignore_index", ignore_index), label_smoothing


def as_head_options(z_loss: Any, softcap: Any, return_accuracy: Any) -> tuple[float, float | None]:
    """Checks further options that both losses have. Returns z_loss and softcap as Python's numbers."""
    z_loss = as_number("z_loss", z_loss)
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"z_loss: expected a finite number of at least 0, got {z_loss}")
    check_bool("return_accuracy", return_accuracy)
    return z_loss, as_softcap(softcap)


def as_softcap(softcap: Any) -> float | None:
    """Returns `softcap` as Python's number, or None."""
    if softcap is None:
        return None
    softcap = as_number("softcap", softcap)
    if not 1e-30 <= softcap <= 1e30:  # its inverse is a normal float32, too
        raise ValueError(f"softcap: expected None or a finite number above 0, from 1e-30 to 1e30, got {softcap}")
    return softcap


def check_token_weight(token_weight: Tensor, targets: Tensor) -> None:
    """`token_weight` has a number for each of the targets, without gradient."""
    check_float("token_weight", token_weight)
    check_like("token_weight", token_weight, "targets", targets, dtype=False)
    if token_weight.shape != targets.shape:
        expected = f"the shape of targets, {tuple(targets.shape)}"
        raise ValueError(f"token_weight: expected {expected}, got {tuple(token_weight.shape)}")
    if token_weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("token_weight: the factors of targets get no gradient; pass token_weight.detach()")


def check_targets(targets: Tensor, expected: torch.Size, name: str, tensor: Tensor) -> None:
    """`targets` holds indices on the device of `tensor`, in the shape `expected`, which fits the shape of `tensor`."""
    check_index("targets", targets)
    check_like("targets", targets, name, tensor, dtype=False)
    if targets.shape == expected:
        return
    hint = ""
    if tensor.ndim > 2 and targets.shape == tensor.shape[:-1]:  # logits, because a linear layer's x expects this shape
        hint = "; the classes are dimension 1: pass logits.flatten(0, -2) and targets.flatten()"
    elif targets.numel() == expected.numel():
        view = "flatten()" if len(expected) == 1 else f"view{tuple(expected)}"
        hint = f"; the number of them is right: pass targets.{view}"
    given = f"to fit {name} {tuple(tensor.shape)}, got {tuple(targets.shape)}"
    raise ValueError(f"targets: expected shape {tuple(expected)} {given}{hint}")


def first_out_of_range(name: str, indices: Tensor, low: int, high: int, ignore: int | None = None) -> IndexError:
    """The error for the first of `indices` outside [low, high) that is not `ignore`: its value and its position."""
    indices = indices.long()  # `ignore` may be outside the range of int32
    bad = (indices < low) | (indices >= high)
    if ignore is not None:
        bad &= indices != ignore
    position = tuple(bad.nonzero()[0].tolist())
    value = int(indices[position])
    return IndexError(f"{name}: value {value} at position {position} is outside [{low}, {high})")


@assume_constant_result  # torch 2.11 cannot trace is_autocast_available
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype of autocast on the device of `tensor`; None where autocast is off, or the device (meta) has none."""
    device_type = "cpu" if tensor.is_cpu else tensor.device.type
    if not _has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)
