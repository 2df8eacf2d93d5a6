"""Cross-entropy from logits, with the class weights, the smoothing and the reductions of PyTorch's.

The native backend (csrc/cross_entropy.*) reads a row of logits once for the loss and its gradient, which the forward
op already makes where backward will ask for it; see `ready_gradients.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, int64

from . import native
from .arguments import as_loss_options, autocast_dtype, check_float, check_like, check_targets, first_out_of_range
from .backend import dispatch, register
from .library import define_op, inside_transform, refuse_forward_mode
from .ready_gradients import scaled

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # PyTorch's numbers


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """-log softmax(logits)[target], as `torch.nn.functional.cross_entropy` defines it for class indices.

    Args:
        logits: (C,), (N, C) or (N, C, d1, ..., dk), float16, bfloat16, float32 or float64; never changed. The classes
            are dimension 1, as in PyTorch: of a model's (B, T, V) pass logits.flatten(0, 1) and targets.flatten().
        targets: (), (N,) or (N, d1, ..., dk), int64 or int32, each in [0, C) or `ignore_index`.
        weight: (C,), like logits, without gradient: a factor per class; None is 1.
        ignore_index: targets of this value count for nothing: their rows have the loss 0 and the gradient 0, even where
            their logits are not finite (PyTorch's gradient is NaN there).
        reduction: "mean" (over the targets' weights), "sum" or "none".
        label_smoothing: in [0, 1].
        backend: "auto", "torch" or "native".

    DTensors: logits and targets that are DTensors, sharded along rows, give the loss of all rows; see `dtensor.py`.
    Returns: the loss in nats: a scalar, or the shape of targets for "none". "mean" of no counted target is NaN.
    Raises: TypeError, ValueError naming the argument; IndexError with value and position for a target out of range
        (on CUDA the error surfaces as PyTorch's would).
    """
    ignore_index, label_smoothing = _checked(logits, targets, weight, ignore_index, reduction, label_smoothing)
    return dispatch("cross_entropy", backend, logits, targets, weight, ignore_index, reduction, label_smoothing)


_MOST_SIGNATURES = 1000
_signatures_checked: set[tuple] = set()


def _checked(
    logits: Tensor, targets: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> tuple[int, float]:
    """`_check`, but for plain CPU tensors without class weights only once for all calls that it cannot tell apart.

    A training step calls this op once, when Python's code has left the caches. The checks then take 20 us, a tenth of
    a small loss and its gradient.
    """
    if (
        weight is not None
        or type(logits) is not Tensor
        or type(targets) is not Tensor
        or not logits.is_cpu
        or not targets.is_cpu
        or logits.is_nested
        or targets.is_nested
        or type(ignore_index) is not int
        or type(reduction) is not str
        or type(label_smoothing) is not float
        or torch.compiler.is_compiling()
    ):
        return _check(logits, targets, weight, ignore_index, reduction, label_smoothing)
    tensors = logits.dtype, logits.layout, logits.shape, targets.dtype, targets.layout, targets.shape
    signature = (*tensors, ignore_index, reduction, label_smoothing)
    if signature not in _signatures_checked:
        _check(logits, targets, weight, ignore_index, reduction, label_smoothing)
        if len(_signatures_checked) >= _MOST_SIGNATURES:
            _signatures_checked.clear()
        _signatures_checked.add(signature)
    return ignore_index, label_smoothing


def _check(
    logits: Tensor, targets: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> tuple[int, float]:
    """Returns ignore_index and label_smoothing as Python's numbers."""
    check_float("logits", logits)
    ignore_index, label_smoothing = as_loss_options(ignore_index, reduction, label_smoothing)
    if logits.ndim == 0:
        raise ValueError("logits: expected (C,), (N, C) or (N, C, d1, ..., dk), got a 0-dim tensor")
    class_dim = 0 if logits.ndim == 1 else 1
    C = logits.shape[class_dim]
    if C == 0:
        raise ValueError(f"logits: expected at least one class, got shape {tuple(logits.shape)}")
    check_targets(targets, logits.shape[:class_dim] + logits.shape[class_dim + 1 :], "logits", logits)
    if weight is not None:
        check_float("weight", weight, ndim=1)
        check_like("weight", weight, "logits", logits, dtype=autocast_dtype(logits) is None)
        if weight.shape[0] != C:
            raise ValueError(f"weight: expected shape ({C},), one factor per class, got {tuple(weight.shape)}")
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError("weight: class weights get no gradient; pass weight.detach()")
    return ignore_index, label_smoothing


def cross_entropy_on_torch(
    logits: Tensor, targets: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor:
    targets = targets.long()  # `ignore_index` may be outside the range of int32
    if reduction == "mean" and logits.dtype == torch.float16 and autocast_dtype(logits) is None:
        return _float16_mean_on_torch(logits, targets, weight, ignore_index, label_smoothing)
    # PyTorch's gradient of an ignored row that is NaN is NaN.
    ignored = (targets == ignore_index).unsqueeze(0 if logits.ndim == 1 else 1)
    try:
        return F.cross_entropy(
            logits.masked_fill(ignored, 0.0),
            targets,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    except (IndexError, RuntimeError) as error:
        if "out of bounds" not in str(error):
            raise
        C = logits.shape[0 if logits.ndim == 1 else 1]
        raise first_out_of_range("targets", targets, 0, C, ignore=ignore_index) from None


def _float16_mean_on_torch(
    logits: Tensor, targets: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> Tensor:
    """The mean, summed in float32: PyTorch sums float16 losses in float16, whose largest number is 65504."""
    each = cross_entropy_on_torch(logits, targets, weight, ignore_index, "none", label_smoothing).float()
    counted = targets != ignore_index
    weights = counted.float()
    if weight is not None:
        weights = weights * weight.float()[targets * counted]
    total = weights.sum()
    return torch.where(total == 0.0, torch.nan, each.sum() / total).to(logits.dtype)


# --- the native backend: csrc/cross_entropy.cpp, csrc/cross_entropy.cu ------------------------------------------------


def _fake(logits, targets, weight, ignore_index, reduction, label_smoothing, with_grad):
    N, C = logits.shape
    return (
        logits.new_empty(N if reduction == REDUCTIONS["none"] else (), dtype=torch.float32),
        # the gradient; else each row's maximum, and the log of its sum of exp(x - maximum)
        logits.new_empty((N, C)) if with_grad else logits.new_empty((N, 2), dtype=torch.float32),
    )


def _gradient_fake(grad_loss, logits, targets, weight, statistics, ignore_index, reduction, label_smoothing):
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, targets, weight, *ctx.options, with_grad = inputs
    ctx.gradient = output[1] if with_grad else None
    ctx.save_for_backward(logits, targets, weight, None if with_grad else output[1])


def _backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple:
    gradient, ctx.gradient = ctx.gradient, None
    gradients = None if gradient is None or torch.is_grad_enabled() else scaled((gradient,), grad_loss)
    if gradients is None:
        gradients = (_gradient(grad_loss, *ctx.saved_tensors, *ctx.options),)
    return *gradients, None, None, None, None, None, None


_gradient = define_op(
    "cross_entropy_native_backward(Tensor grad_loss, Tensor logits, Tensor targets, Tensor? weight, "
    "Tensor? statistics, int ignore_index, int reduction, float label_smoothing) -> Tensor",
    forward=native.load_at_first_call("cross_entropy_native_backward"),
    fake=_gradient_fake,
    is_gradient=True,
)
# Where `saved` is the gradient, backward scales it in place: whoever calls the registered op must not change it.
_cross_entropy_native = define_op(
    "cross_entropy_native(Tensor logits, Tensor targets, Tensor? weight, int ignore_index, int reduction, "
    "float label_smoothing, bool with_grad) -> (Tensor loss, Tensor saved)",
    forward=native.load_at_first_call("cross_entropy_native"),
    fake=_fake,
    save=_save,
    backward=_backward,
    first_only=True,
)


_set_plans = define_op(
    "cross_entropy_set_plans(Tensor on, int[] plans) -> ()",
    forward=native.load_at_first_call("cross_entropy_set_plans"),
    fake=lambda on, plans: None,
)
_plan = define_op(
    "cross_entropy_plan(Tensor logits, int passes) -> int[]",
    forward=native.load_at_first_call("cross_entropy_plan"),
    fake=lambda logits, passes: [0, 0],
)


def set_cuda_plans(device: torch.device | str, plans: Iterable[tuple[int, int, int, int, int]]) -> None:
    """Choose by how many threads and blocks csrc/cross_entropy.cu computes a row on `device`, in place of its default.

    Each plan is (element_size, passes, most_classes, threads, blocks), and counts for calls with values of so many
    bytes (2 or 4), one pass over a row or (2) more than one, and rows of at most so many classes and more than half of
    that. A loss with its gradient takes two passes, a loss alone one, and so does the gradient for "none" from the
    saved statistics. A call takes the first plan that counts for it, and without one the default. Earlier plans are
    forgotten: `set_cuda_plans(device, [])` leaves the default alone.

    threads, blocks   where the row is kept between its passes
    32, 1             in registers: rows of up to 512 bytes
    128|256|512, 0    nowhere: it is read again; the only choice for one pass, with (32, 1)
    128|256|512, 1    in the shared memory of its block
    256|512, 2|4|8    in the shared memories of a cluster of so many blocks, from sm_90 on

    The plan changes the order of additions, and nothing else; each gives the same bits in every run. Raises
    RuntimeError naming the plan for one that the device has no kernel, shared memory or clusters for, and ValueError
    for one that is not five integers: then none is set.
    """
    plans = list(plans)
    for plan in plans:
        if len(plan) != 5 or not all(type(number) is int for number in plan):
            raise ValueError(f"plans: {plan}: expected (element_size, passes, most_classes, threads, blocks), integers")
    _set_plans(torch.empty(0, device=device), [number for plan in plans for number in plan])


def cuda_plan(logits: Tensor, passes: int = 2) -> tuple[int, int]:
    """The (threads, blocks) with which a row of logits (N, C) is computed; see `set_cuda_plans`."""
    threads, blocks = _plan(logits, passes)
    return threads, blocks


def cross_entropy_on_native(
    logits: Tensor, targets: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor:
    refuse_forward_mode("cross_entropy", logits)
    C = logits.shape[0 if logits.ndim == 1 else 1]
    rows, row_targets = logits, targets
    if logits.ndim != 2:
        rows = logits.movedim(0 if logits.ndim == 1 else 1, -1).reshape(-1, C)
        row_targets = targets.reshape(-1)
    if row_targets.dtype is not int64:
        row_targets = row_targets.long()
    with_grad = torch.is_grad_enabled() and logits.requires_grad and reduction != "none"
    # In float16 the gradient of a mean may be rounded to 0 before backward can multiply it by the scale of the loss.
    with_grad = with_grad and logits.dtype != torch.float16
    class_weight = None if weight is None else weight.detach().float()
    options = ignore_index, REDUCTIONS[reduction], label_smoothing
    try:
        loss = _cross_entropy_native(rows, row_targets, class_weight, *options, with_grad)
    except IndexError:
        raise first_out_of_range("targets", targets, 0, C, ignore=ignore_index) from None
    if reduction == "none":
        loss = loss.view(targets.shape)
    return loss if loss.dtype == logits.dtype or autocast_dtype(logits) is not None else loss.to(logits.dtype)


def _native_serves(logits: Tensor, targets: Tensor, *options: Any, **more: Any) -> str | None:
    if logits.dtype == torch.float64:
        return "its kernels take float32, float16 and bfloat16, and logits is float64"
    return inside_transform()


native.takes_plans("cross_entropy", set_cuda_plans)
register("cross_entropy", "torch", cross_entropy_on_torch)
register("cross_entropy", "native", cross_entropy_on_native, _native_serves)
