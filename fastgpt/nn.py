"""torch.nn's layers and losses on FastGPT's ops: the same constructors, the same keys in the state dict.

Each one is PyTorch's module with another `forward`, which takes the op where the op computes the same, and PyTorch's
own path for everything else: an option that the op does not have (`padding_idx`, several normalised dimensions,
targets that are probabilities), mixed dtypes, nested or sparse tensors, forward-mode derivatives.

Each `forward` also computes the same for an instance of PyTorch's own class: `fastgpt.patch` exchanges the class of a
module, and something that wrapped the method meanwhile still calls it after `unpatch`.

>>> from fastgpt import nn
>>> norm = nn.LayerNorm(768)        # in place of torch.nn.LayerNorm(768)
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .modules import LINEAR, why_called
from .ops.arguments import FLOATS, autocast_dtype
from .ops.library import in_forward_mode

__all__ = ["CrossEntropyLoss", "Embedding", "LayerNorm", "LinearCrossEntropyLoss"]


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm by `ops.layer_norm`: x (..., C) -> (..., C), in the dtype that PyTorch's gives.

    PyTorch's own path computes norms of several dimensions, and those without a weight (elementwise_affine=False).
    """

    def forward(self, input: Tensor) -> Tensor:
        is_served = why_no_layer_norm(self) is None and is_dense_float(input) and fits(input, self.weight, self.bias)
        if is_served and input.ndim > 0 and 0 < input.shape[-1] == self.normalized_shape[0]:
            return ops.layer_norm(input, self.weight, self.bias, self.eps)
        return nn.LayerNorm.forward(self, input)


class Embedding(nn.Embedding):
    """torch.nn.Embedding by `ops.embedding`: indices (...) -> (..., C).

    PyTorch's own path serves padding_idx, max_norm, scale_grad_by_freq and sparse, which change the gradient or the
    table itself.
    """

    def forward(self, input: Tensor) -> Tensor:
        is_served = why_no_embedding(self) is None and _is_index(input) and is_dense_float(self.weight)
        if not is_served or input.device != self.weight.device:
            return nn.Embedding.forward(self, input)
        if input.ndim == 2:
            return ops.embedding(input, self.weight)
        return ops.embedding(input.reshape(1, -1), self.weight).reshape(*input.shape, self.embedding_dim)


class _Options:
    """What the losses here have besides PyTorch's options: of a module of PyTorch's own class, none is set."""

    z_loss: float = 0.0
    softcap: float | None = None
    return_accuracy: bool = False

    def _set(self, z_loss: float, softcap: float | None, return_accuracy: bool) -> None:
        self.z_loss, self.softcap, self.return_accuracy = z_loss, softcap, return_accuracy


def _options_of(loss: Any, token_weight: Tensor | None) -> dict[str, Any]:
    """Those that are in use, as arguments of an op."""
    unset = {name: getattr(_Options, name) for name in ("z_loss", "softcap", "return_accuracy")}
    given = {name: getattr(loss, name, value) for name, value in unset.items()}
    used = {name: value for name, value in given.items() if value != unset[name]}
    return used if token_weight is None else used | {"token_weight": token_weight}


class CrossEntropyLoss(_Options, nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss by `ops.cross_entropy`, where targets are class indices.

    `z_loss`, `softcap` and `return_accuracy` of the constructor and `token_weight` of a call are those of the op, and
    PyTorch's class does not have them: with one of them, targets have to be class indices. PyTorch's own path serves
    targets that are probabilities.

    Raises: what the op raises; ValueError for targets that are probabilities beside an option that needs classes.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        return_accuracy: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self._set(z_loss, softcap, return_accuracy)

    def forward(self, input: Tensor, target: Tensor, token_weight: Tensor | None = None) -> Any:
        more = _options_of(self, token_weight)
        if not (is_dense_float(input) and fits(input, self.weight) and _are_classes(target, input)):
            _refuse(more, target)
            return nn.CrossEntropyLoss.forward(self, input, target)
        options: dict[str, Any] = {"ignore_index": self.ignore_index, "reduction": self.reduction, **more}
        return ops.cross_entropy(input, target, weight=self.weight, label_smoothing=self.label_smoothing, **options)


def _refuse(options: dict[str, Any], target: Any) -> None:
    if options:
        names = ", ".join(options)
        found = f"{target.dtype} {tuple(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(
            f"target: with {names}, expected a class index for each row of dense floating logits, got {found}"
        )


class LinearCrossEntropyLoss(_Options, nn.Module):
    """A head and its loss, as torch.nn.LinearCrossEntropyLoss of torch 2.13: the head is `self.linear`.

    `ops.linear_cross_entropy` computes the loss without ever holding all the logits: of input (..., in_features) and
    target (...), class indices. With class weights, `out_features` (several losses of one input) or targets that are
    probabilities, the logits are made.

    Args:
        in_features, num_classes: the head has a weight of (num_classes * prod(out_features), in_features).
        bias, device, dtype: of the head. weight: (num_classes,), a factor per class.
        reduction, label_smoothing: as for CrossEntropyLoss. ignore_index: None is -100.
        options: is taken so that a call of PyTorch's class works unchanged. The op chooses its chunks itself.
        z_loss, softcap, return_accuracy, and `token_weight` of a call: as for CrossEntropyLoss.

    Returns: the loss in nats, a scalar, or the shape of target for "none".
    Raises: ValueError naming the argument.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        return_accuracy: bool = False,
    ) -> None:
        super().__init__()
        self.weight: Tensor | None
        if weight is not None and weight.shape != (num_classes,):
            raise ValueError(f"weight: expected shape ({num_classes},), a factor per class, got {tuple(weight.shape)}")
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing
        self.options = options
        self._set(z_loss, softcap, return_accuracy)
        self.register_buffer("weight", weight)
        width = math.prod(self.out_features, start=num_classes)
        self.linear = nn.Linear(in_features, width, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Tensor, token_weight: Tensor | None = None) -> Any:
        more = _options_of(self, token_weight)
        ignored = -100 if self.ignore_index is None else self.ignore_index
        options: dict[str, Any] = {"ignore_index": ignored, "reduction": self.reduction}
        options["label_smoothing"] = self.label_smoothing
        if self.weight is None and not self.out_features and _is_index(target) and takes_head(self.linear, input):
            head, bias = self.linear.weight, self.linear.bias
            return ops.linear_cross_entropy(input, head, target, bias=bias, **options, **more)
        logits = self.linear(input)  # (..., num_classes * prod(out_features))
        if self.out_features:
            logits = logits.unflatten(-1, (self.num_classes, *self.out_features))
        elif logits.ndim > 2 and _is_index(target):
            logits = logits.movedim(-1, 1)  # the classes of cross_entropy are dimension 1
        if is_dense_float(logits) and fits(logits, self.weight) and _are_classes(target, logits):
            return ops.cross_entropy(logits, target, weight=self.weight, **options, **more)
        _refuse(more, target)
        return F.cross_entropy(logits, target, weight=self.weight, **options)

    def extra_repr(self) -> str:
        options = ("num_classes", "out_features", "reduction", "ignore_index", "label_smoothing", "z_loss", "softcap")
        return ", ".join(f"{name}={getattr(self, name)}" for name in options)


def why_no_layer_norm(module: nn.LayerNorm) -> str | None:
    """Which option of `module` the op does not have; None where it has all."""
    if len(module.normalized_shape) != 1:
        return f"it normalises {len(module.normalized_shape)} dimensions"
    return "it has no weight" if module.weight is None else None


def why_no_embedding(module: nn.Embedding) -> str | None:
    """As `why_no_layer_norm`: these options change the gradient, or the table itself."""
    for option, usual in (("padding_idx", None), ("max_norm", None), ("scale_grad_by_freq", False), ("sparse", False)):
        if getattr(module, option) != usual:
            return f"it has {option}={getattr(module, option)}"
    return None


def takes_head(head: Any, x: Any) -> bool:
    """Whether the losses may take the tensors of `head`, a Linear, instead of calling it with `x`."""
    is_plain = why_called(head, LINEAR, "weight", "bias") is None
    return is_plain and is_dense_float(x) and fits(x, head.weight, head.bias)


def is_dense_float(tensor: Any) -> bool:
    """Whether the ops take `tensor` as their first floating point argument here."""
    return (
        isinstance(tensor, Tensor)
        and tensor.dtype in FLOATS
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not in_forward_mode()
    )


def fits(x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> bool:
    """Whether the ops take these parameters with `x`: on its device, and in its dtype or under autocast."""
    return all(
        tensor.device == x.device and (tensor.dtype == x.dtype or autocast_dtype(x) is not None)
        for tensor in (weight, bias)
        if tensor is not None
    )


def _is_index(tensor: Any) -> bool:
    is_tensor = isinstance(tensor, Tensor) and tensor.dtype in (torch.int64, torch.int32)
    return is_tensor and tensor.layout is torch.strided and not tensor.is_nested


def _are_classes(target: Any, logits: Tensor) -> bool:
    """Whether `target` has a class index for each row of `logits`, (C,), (N, C) or (N, C, d1, ..., dk)."""
    if not _is_index(target) or logits.ndim == 0 or target.device != logits.device:
        return False
    class_dim = min(1, logits.ndim - 1)
    shape = (*logits.shape[:class_dim], *logits.shape[class_dim + 1 :])
    return logits.shape[class_dim] > 0 and target.shape == shape
