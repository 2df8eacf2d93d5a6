"""Cross-entropy from logits, with the class weights, the smoothing and the reductions of PyTorch's.

Further options are those that trainers of language models ask for: a z-loss, a soft cap on the logits, a weight for
each target, and the accuracy. The native backend (csrc/cross_entropy.*) reads a row of logits once for the loss and its
gradient, which the forward op already makes where backward will ask for it; see `ready_gradients.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias, overload

import torch
import torch.nn.functional as F
from torch import Tensor, int64

from . import native
from .arguments import (
    as_head_options,
    as_loss_options,
    autocast_dtype,
    check_float,
    check_like,
    check_targets,
    check_token_weight,
    first_out_of_range,
)
from .backend import dispatch, register
from .library import define_op, first_and_last, inside_transform, refuse_forward_mode
from .ready_gradients import scaled

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # PyTorch's numbers
LossAndAccuracy: TypeAlias = tuple[Tensor, Tensor]


@overload
def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float | None = ...,
    token_weight: Tensor | None = ...,
    return_accuracy: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float | None = ...,
    token_weight: Tensor | None = ...,
    return_accuracy: Literal[True],
    backend: str = ...,
) -> LossAndAccuracy: ...


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    return_accuracy: bool = False,
    backend: str = "auto",
) -> Tensor | LossAndAccuracy:
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
        z_loss: at least 0: z_loss * logsumexp(logits)**2 is added to the loss of each row, which keeps the logits of a
            model from drifting (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, section 5). `weight` does not scale it.
        softcap: above 0: all of this is computed of softcap * tanh(logits / softcap), which lies within -softcap and
            softcap (Gemma Team 2024, Gemma 2, arXiv:2408.00118, section 2). None is no cap.
        token_weight: the shape of targets, floating point, without gradient: a factor per target, of any sign. "mean"
            divides by the sum of token_weight * weight[target] over the targets that count.
        return_accuracy: return (loss, accuracy) in place of the loss.
        backend: "auto", "torch" or "native".

    DTensors: logits and targets that are DTensors, sharded along rows, give the loss of all rows; see `dtensor.py`.
    Returns: the loss in nats: a scalar, or the shape of targets for "none". "mean" of no counted target is NaN, and so
        is one over weights whose sum is 0. The accuracy is float32 and has no gradient: the share of counted targets
        whose logit is the largest of its row, of equal ones the first, and none is NaN; for "none" 1.0 or 0.0 for each
        target, 0.0 for an ignored one.
    Raises: TypeError, ValueError naming the argument; IndexError with value and position for a target out of range
        (on CUDA the error surfaces as PyTorch's would).
    """
    options = weight, ignore_index, reduction, label_smoothing, z_loss, softcap, token_weight, return_accuracy
    options = _checked(logits, targets, *options)
    return dispatch("cross_entropy", backend, logits, targets, *options)


_MOST_SIGNATURES = 1000
_signatures_checked: set[tuple] = set()


def _checked(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    token_weight: Tensor | None,
    return_accuracy: bool,
) -> tuple:
    """`_check`, but for plain CPU tensors without weights only once for all calls that it cannot tell apart.

    A training step calls this op once, when Python's code has left the caches. The checks then take 20 us, a tenth of
    a small loss and its gradient.
    """
    options = weight, ignore_index, reduction, label_smoothing, z_loss, softcap, token_weight, return_accuracy
    if (
        weight is not None
        or token_weight is not None
        or type(logits) is not Tensor
        or type(targets) is not Tensor
        or not logits.is_cpu
        or not targets.is_cpu
        or logits.is_nested
        or targets.is_nested
        or type(ignore_index) is not int
        or type(reduction) is not str
        or type(label_smoothing) is not float
        or type(z_loss) is not float
        or (softcap is not None and type(softcap) is not float)
        or type(return_accuracy) is not bool
        or torch.compiler.is_compiling()
    ):
        return _check(logits, targets, *options)
    tensors = logits.dtype, logits.layout, logits.shape, targets.dtype, targets.layout, targets.shape
    signature = (*tensors, *options)
    if signature not in _signatures_checked:
        _check(logits, targets, *options)
        if len(_signatures_checked) >= _MOST_SIGNATURES:
            _signatures_checked.clear()
        _signatures_checked.add(signature)
    return options


def _check(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    token_weight: Tensor | None,
    return_accuracy: bool,
) -> tuple:
    """Returns the options, with Python's numbers."""
    check_float("logits", logits)
    ignore_index, label_smoothing = as_loss_options(ignore_index, reduction, label_smoothing)
    z_loss, softcap = as_head_options(z_loss, softcap, return_accuracy)
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
    if token_weight is not None:
        check_token_weight(token_weight, targets)
    return weight, ignore_index, reduction, label_smoothing, z_loss, softcap, token_weight, return_accuracy


def cross_entropy_on_torch(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    token_weight: Tensor | None,
    return_accuracy: bool,
) -> Tensor | LossAndAccuracy:
    targets = targets.long()  # `ignore_index` may be outside the range of int32
    usual = weight, ignore_index, reduction, label_smoothing
    if z_loss == 0.0 and softcap is None and token_weight is None:
        loss = _loss_on_torch(logits, targets, *usual)
    else:
        loss = _loss_with_options_on_torch(logits, targets, *usual, z_loss, softcap, token_weight)
    if not return_accuracy:
        return loss
    return loss, accuracy(_correct_on_torch(logits.detach(), targets, ignore_index), targets, ignore_index, reduction)


def _loss_on_torch(
    logits: Tensor, targets: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor:
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


def _loss_with_options_on_torch(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    token_weight: Tensor | None,
) -> Tensor:
    """The formula, in float32 where the logits have 16 bits."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    class_dim = 0 if logits.ndim == 1 else 1
    counted = targets != ignore_index
    x = logits.masked_fill(~counted.unsqueeze(class_dim), 0.0).to(wide)
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    weight = None if weight is None else weight.to(wide)
    loss = _loss_on_torch(x, targets, weight, ignore_index, "none", label_smoothing)
    if z_loss > 0.0:
        loss = loss + torch.where(counted, z_loss * x.logsumexp(class_dim).square(), 0.0)
    weights = counted.to(wide) if weight is None else torch.where(counted, weight[targets * counted], 0.0)
    if token_weight is not None:
        of_token = torch.where(counted, token_weight.to(wide), 0.0)
        loss, weights = loss * of_token, weights * of_token
    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        total = weights.sum()
        loss = torch.where(total == 0.0, torch.nan, loss.sum() / total)
    return loss if autocast_dtype(logits) is not None else loss.to(logits.dtype)


def _correct_on_torch(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """1.0 where the target is the first of a row's largest logits, of which none is NaN; else 0.0."""
    class_dim = 0 if logits.ndim == 1 else 1
    counted = targets != ignore_index
    of_target = logits.gather(class_dim, (targets * counted).unsqueeze(class_dim)).squeeze(class_dim)
    # Where one of them is NaN, argmax gives its place.
    return (counted & (logits.argmax(class_dim) == targets) & ~of_target.isnan()).float()


def accuracy(correct: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The accuracy of both losses from 1.0 or 0.0 for each of the targets, see `cross_entropy`."""
    return correct if reduction == "none" else correct.sum() / (targets != ignore_index).sum()


def _float16_mean_on_torch(
    logits: Tensor, targets: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> Tensor:
    """The mean, summed in float32: PyTorch sums float16 losses in float16, whose largest number is 65504."""
    each = _loss_on_torch(logits, targets, weight, ignore_index, "none", label_smoothing).float()
    counted = targets != ignore_index
    weights = counted.float()
    if weight is not None:
        weights = weights * weight.float()[targets * counted]
    total = weights.sum()
    return torch.where(total == 0.0, torch.nan, each.sum() / total).to(logits.dtype)


# --- the native backend: csrc/cross_entropy.cpp, csrc/cross_entropy.cu ------------------------------------------------


def _fake(logits, targets, weight, token_weight, ignore_index, reduction, *numbers_and_flags):
    N, C = logits.shape
    with_grad, with_correct = numbers_and_flags[-2:]
    return (
        logits.new_empty(N if reduction == REDUCTIONS["none"] else (), dtype=torch.float32),
        # the gradient; else each row's maximum, and the log of its sum of exp(x - maximum)
        logits.new_empty((N, C)) if with_grad else logits.new_empty((N, 2), dtype=torch.float32),
        logits.new_empty(N if with_correct else 0, dtype=torch.float32),
    )


def _gradient_fake(grad_loss, logits, *rest):
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, targets, weight, token_weight, *ctx.options, with_grad, _ = inputs
    ctx.gradient = output[1] if with_grad else None
    ctx.save_for_backward(logits, targets, weight, token_weight, None if with_grad else output[1])


def _backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple:
    gradient, ctx.gradient = ctx.gradient, None
    gradients = None if gradient is None or torch.is_grad_enabled() else scaled((gradient,), grad_loss)
    if gradients is None:
        gradients = (_gradient(grad_loss, *ctx.saved_tensors, *ctx.options),)
    return *gradients, *(None,) * 10


_gradient = define_op(
    "cross_entropy_native_backward(Tensor grad_loss, Tensor logits, Tensor targets, Tensor? weight, "
    "Tensor? token_weight, Tensor? statistics, int ignore_index, int reduction, float label_smoothing, float z_loss, "
    "float softcap) -> Tensor",
    forward=native.load_at_first_call("cross_entropy_native_backward"),
    fake=_gradient_fake,
    is_gradient=True,
)
# Where `saved` is the gradient, backward scales it in place: whoever calls the registered op must not change it.
_cross_entropy_native = define_op(
    "cross_entropy_native(Tensor logits, Tensor targets, Tensor? weight, Tensor? token_weight, int ignore_index, "
    "int reduction, float label_smoothing, float z_loss, float softcap, bool with_grad, bool with_correct) "
    "-> (Tensor loss, Tensor saved, Tensor correct)",
    forward=native.load_at_first_call("cross_entropy_native"),
    fake=_fake,
    save=_save,
    backward=_backward,
    first_only=True,
)
_loss_and_correct_native = first_and_last("cross_entropy_native", _backward, _save)


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
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    token_weight: Tensor | None,
    return_accuracy: bool,
) -> Tensor | LossAndAccuracy:
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
    of_token = None if token_weight is None else token_weight.detach().float().reshape(-1).contiguous()
    cap = 0.0 if softcap is None else softcap
    options = ignore_index, REDUCTIONS[reduction], label_smoothing, z_loss, cap, with_grad, return_accuracy
    tensors, correct = (rows, row_targets, class_weight, of_token), None
    try:
        if return_accuracy:
            loss, correct = _loss_and_correct_native(*tensors, *options)
        else:
            loss = _cross_entropy_native(*tensors, *options)
    except IndexError:
        raise first_out_of_range("targets", targets, 0, C, ignore=ignore_index) from None
    if reduction == "none":
        loss = loss.view(targets.shape)
    if loss.dtype != logits.dtype and autocast_dtype(logits) is None:
        loss = loss.to(logits.dtype)
    if correct is None:
        return loss
    return loss, accuracy(correct.view(targets.shape), targets, ignore_index, reduction)


def _native_serves(logits: Tensor, targets: Tensor, *options: Any, **more: Any) -> str | None:
    if logits.dtype == torch.float64:
        return "its kernels take float32, float16 and bfloat16, and logits is float64"
    return inside_transform()


native.takes_plans("cross_entropy", set_cuda_plans)
register("cross_entropy", "torch", cross_entropy_on_torch)
register("cross_entropy", "native", cross_entropy_on_native, _native_serves)
