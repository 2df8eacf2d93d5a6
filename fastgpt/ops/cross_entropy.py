"""Cross-entropy from logits, and from the head's input: `linear_cross_entropy` never holds all the logits at once.

The fused form is the idea of Cut Your Losses (Wijmans et al. 2024) and Liger-Kernel (Hsu et al. 2024): rows are taken
in chunks; a chunk's logits are made, turned into their own gradient in place, multiplied into dx and dW, and dropped.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import (
    autocast_dtype,
    check_float,
    check_ignore_index,
    check_index,
    check_label_smoothing,
    check_like,
    check_reduction,
    first_out_of_range,
)
from .backend import dispatch, register
from .library import library, raise_on_double_backward, refuse_forward_mode


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
        logits: (C,), (N, C) or (N, C, d1, ..., dk), float16, bfloat16, float32 or float64; never changed.
        targets: (), (N,) or (N, d1, ..., dk), int64 or int32, each in [0, C) or `ignore_index`.
        weight: (C,), like logits, without gradient: a factor per class; None is 1.
        ignore_index: targets of this value count for nothing.
        reduction: "mean" (over the targets' weights), "sum" or "none".
        label_smoothing: in [0, 1].
        backend: "auto", "torch" or "native".

    Returns: the loss in nats: a scalar, or the shape of targets for "none". "mean" of no counted target is NaN.
    Raises: TypeError, ValueError naming the argument; IndexError with value and position for a target out of range
        (on CUDA the error surfaces as PyTorch's would).
    """
    check_float("logits", logits)
    check_index("targets", targets)
    check_like("targets", targets, "logits", logits, dtype=False)
    check_reduction(reduction)
    check_label_smoothing(label_smoothing)
    check_ignore_index(ignore_index)
    if logits.ndim == 0:
        raise ValueError("logits: expected (C,), (N, C) or (N, C, d1, ..., dk), got a 0-dim tensor")
    class_dim = 0 if logits.ndim == 1 else 1
    C = logits.shape[class_dim]
    if C == 0:
        raise ValueError(f"logits: expected at least one class, got shape {tuple(logits.shape)}")
    expected = logits.shape[:class_dim] + logits.shape[class_dim + 1 :]
    if targets.shape != expected:
        raise ValueError(
            f"targets: expected shape {tuple(expected)} to fit logits {tuple(logits.shape)}, got {tuple(targets.shape)}"
        )
    if weight is not None:
        check_float("weight", weight, ndim=1)
        check_like("weight", weight, "logits", logits, dtype=autocast_dtype(logits) is None)
        if weight.shape[0] != C:
            raise ValueError(f"weight: expected shape ({C},), one factor per class, got {tuple(weight.shape)}")
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError("weight: class weights get no gradient; pass weight.detach()")
    return dispatch(
        "cross_entropy",
        backend,
        logits.device.type,
        logits,
        targets,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """``cross_entropy(linear(x, weight, bias), targets)`` without ever holding all the logits.

    Args:
        x: (..., C), float16, bfloat16, float32 or float64: the input of the head.
        weight: (V, C), like x: the head. bias: (V,), like x, or None.
        targets: (...), the leading shape of x, int64 or int32, each in [0, V) or `ignore_index`.
        ignore_index, reduction, label_smoothing: as for `cross_entropy`.
        backend: "auto", "torch" or "native".

    Returns: the loss in nats, a scalar, or the shape of targets for "none"; float32 under autocast, else x's dtype.
    Raises: as `cross_entropy`. Double backward raises RuntimeError.
    """
    check_float("x", x)
    check_float("weight", weight, ndim=2)
    check_index("targets", targets)
    check_reduction(reduction)
    check_label_smoothing(label_smoothing)
    check_ignore_index(ignore_index)
    dtype = None if x.dtype == torch.float64 else autocast_dtype(x)
    check_like("targets", targets, "x", x, dtype=False)
    check_like("weight", weight, "x", x, dtype=dtype is None)
    if x.ndim == 0:
        raise ValueError("x: expected shape (..., C), got a 0-dim tensor")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight: expected shape (V, {x.shape[-1]}) to fit x {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"weight: expected at least one class, got shape {tuple(weight.shape)}")
    if targets.shape != x.shape[:-1]:
        raise ValueError(
            f"targets: expected shape {tuple(x.shape[:-1])} to fit x {tuple(x.shape)}, got {tuple(targets.shape)}"
        )
    if bias is not None:
        check_float("bias", bias, ndim=1)
        check_like("bias", bias, "x", x, dtype=dtype is None)
        V = weight.shape[0]
        if bias.shape[0] != V:
            raise ValueError(
                f"bias: expected shape ({V},) to fit weight {tuple(weight.shape)}, got {tuple(bias.shape)}"
            )
    loss_dtype = x.dtype
    if dtype is not None:
        x, weight, loss_dtype = x.to(dtype), weight.to(dtype), torch.float32
        bias = None if bias is None else bias.to(dtype)
    loss = dispatch(
        "linear_cross_entropy",
        backend,
        x.device.type,
        x,
        weight,
        targets,
        bias=bias,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss.to(loss_dtype)


def _torch(
    logits: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    try:
        return F.cross_entropy(
            logits,
            targets.long(),
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    except (IndexError, RuntimeError) as error:
        if "out of bounds" not in str(error):
            raise
        C = logits.shape[0 if logits.ndim == 1 else 1]
        raise first_out_of_range("targets", targets, 0, C, ignore=ignore_index) from None


# --- linear_cross_entropy on the torch backend -----------------------------------------------------------------------
#
# The forward op returns the loss and, where a gradient is wanted and the loss is a scalar, already dx, dW and db of the
# sum of the losses: the chunk's logits are at hand, so no second product is needed. The backward op then only scales
# them. (Of the sum, not of the mean: a probability times 1 / N is 0 in float16, before a loss scale could save it.)
# For "none" the incoming gradient differs per row, so backward makes the logits once more.

library.define(
    "linear_cross_entropy_torch(Tensor x, Tensor weight, Tensor targets, Tensor? bias, int ignore_index, "
    "str reduction, float label_smoothing, bool with_grad) -> (Tensor, Tensor, Tensor, Tensor)"
)
library.define(
    "linear_cross_entropy_torch_backward(Tensor grad_loss, Tensor x, Tensor weight, Tensor targets, Tensor? bias, "
    "int ignore_index, str reduction, float label_smoothing, Tensor dx, Tensor dw, Tensor db) "
    "-> (Tensor, Tensor, Tensor)"
)


def _chunk_rows(n_rows: int, vocab_size: int) -> int:
    """Rows per chunk: about 16M logits (64 MB in float32), so that products stay large and memory small."""
    return max(1, min(n_rows, max(64, 2**24 // vocab_size)))


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunk_loss(logits: Tensor, targets: Tensor, counted: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """logits (n, V) less their row's maximum -> (loss (n,), logsumexp (n,))."""
    logsumexp = torch.logsumexp(logits, dim=1)
    loss = logsumexp - logits.gather(1, targets[:, None])[:, 0] * (1.0 - label_smoothing)
    if label_smoothing > 0.0:
        loss = loss - logits.mean(dim=1) * label_smoothing
    return torch.where(counted, loss, 0.0), logsumexp


def _chunk_grad_(
    logits: Tensor, targets: Tensor, logsumexp: Tensor, row_grad: Tensor, label_smoothing: float
) -> Tensor:
    """Overwrite logits (n, V) with the gradient of sum(row_grad * loss)."""
    grad = logits.sub_(logsumexp[:, None]).exp_()
    if label_smoothing > 0.0:
        grad.sub_(label_smoothing / grad.shape[1])
    grad.scatter_add_(1, targets[:, None], torch.full_like(logsumexp, label_smoothing - 1.0)[:, None])
    return grad.mul_(row_grad[:, None]).masked_fill_((row_grad == 0.0)[:, None], 0.0)


class _Chunks:
    """The rows of x, chunk by chunk, with the sums that dW and db are gathered in."""

    def __init__(self, x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int) -> None:
        self.x = x.reshape(targets.numel(), x.shape[-1])
        self.weight, self.bias = weight, bias
        flat = targets.reshape(-1).long()
        V = weight.shape[0]
        self.counted = flat != ignore_index
        self.targets = torch.where(self.counted, flat, 0)
        if flat.device.type == "cpu" and flat.numel() and (int(self.targets.min()) < 0 or int(self.targets.max()) >= V):
            raise first_out_of_range("targets", targets, 0, V, ignore=ignore_index)
        self.stats = _statistics_dtype(x)
        self.rows = _chunk_rows(self.x.shape[0], V)

    def __iter__(self):
        for start in range(0, self.x.shape[0], self.rows):
            rows = slice(start, start + self.rows)
            logits = F.linear(self.x[rows], self.weight, self.bias).to(self.stats)
            yield rows, logits.sub_(logits.amax(1, keepdim=True))  # else logsumexp - logit would cancel in large logits

    def start_gradients(self) -> None:
        self.dx = torch.empty_like(self.x, memory_format=torch.contiguous_format)
        self.dw = torch.zeros_like(self.weight, dtype=self.stats, memory_format=torch.contiguous_format)
        self.db = torch.zeros(
            self.weight.shape[0] if self.bias is not None else 0, dtype=self.stats, device=self.x.device
        )

    def add_gradient(self, rows: slice, grad: Tensor) -> None:
        low = grad.to(self.x.dtype)  # (n, V): the product runs in the dtype of x, as F.linear's backward would
        torch.mm(low, self.weight, out=self.dx[rows])
        if self.dw.dtype == low.dtype:
            self.dw.addmm_(low.t(), self.x[rows])
        else:
            self.dw += low.t() @ self.x[rows]
        if self.bias is not None:
            self.db += grad.sum(0)


@torch.no_grad()
def _linear_forward(x, weight, targets, bias, ignore_index, reduction, label_smoothing, with_grad):
    chunks = _Chunks(x, weight, targets, bias, ignore_index)
    row_grad = chunks.counted.to(chunks.stats)
    losses = torch.empty(chunks.x.shape[0], dtype=chunks.stats, device=x.device)
    if with_grad:
        chunks.start_gradients()
    for rows, logits in chunks:
        counted, chunk_targets = chunks.counted[rows], chunks.targets[rows]
        losses[rows], logsumexp = _chunk_loss(logits, chunk_targets, counted, label_smoothing)
        if with_grad:
            chunks.add_gradient(rows, _chunk_grad_(logits, chunk_targets, logsumexp, row_grad[rows], label_smoothing))
    if reduction == "none":
        loss = losses.view(targets.shape)
    else:
        total = losses.sum()
        loss = total / chunks.counted.sum() if reduction == "mean" else total
    if not with_grad:
        return loss, losses.new_empty(0), losses.new_empty(0), losses.new_empty(0)
    return loss, chunks.dx.view(x.shape), chunks.dw, chunks.db


@torch.no_grad()
def _linear_backward(grad_loss, x, weight, targets, bias, ignore_index, reduction, label_smoothing, dx, dw, db):
    if reduction != "none":
        factor = grad_loss.to(dw.dtype)
        if reduction == "mean":  # of no counted target: the loss is NaN and the gradient 0, as PyTorch's
            count = (targets != ignore_index).sum()
            factor = torch.where(count > 0, factor / count, 0.0)
        return tuple((grad.to(dw.dtype) * factor).to(x.dtype) for grad in (dx, dw, db))
    chunks = _Chunks(x, weight, targets, bias, ignore_index)
    chunks.start_gradients()
    row_grad = torch.where(chunks.counted, grad_loss.reshape(-1).to(chunks.stats), 0.0)
    for rows, logits in chunks:
        logsumexp = torch.logsumexp(logits, dim=1)
        chunks.add_gradient(
            rows, _chunk_grad_(logits, chunks.targets[rows], logsumexp, row_grad[rows], label_smoothing)
        )
    return chunks.dx.view(x.shape), chunks.dw.to(weight.dtype), chunks.db.to(weight.dtype)


library.impl("linear_cross_entropy_torch", _linear_forward, "CompositeExplicitAutograd")
library.impl("linear_cross_entropy_torch_backward", _linear_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("fastgpt::linear_cross_entropy_torch", lib=library)
def _linear_forward_fake(x, weight, targets, bias, ignore_index, reduction, label_smoothing, with_grad):
    stats = _statistics_dtype(x)
    loss = x.new_empty(targets.shape if reduction == "none" else (), dtype=stats)
    if not with_grad:
        return loss, x.new_empty(0, dtype=stats), x.new_empty(0, dtype=stats), x.new_empty(0, dtype=stats)
    dw = x.new_empty(weight.shape, dtype=stats)
    db = x.new_empty(weight.shape[0] if bias is not None else 0, dtype=stats)
    return loss, x.new_empty(x.shape), dw, db


@torch.library.register_fake("fastgpt::linear_cross_entropy_torch_backward", lib=library)
def _linear_backward_fake(grad_loss, x, weight, targets, bias, ignore_index, reduction, label_smoothing, dx, dw, db):
    db_rows = weight.shape[0] if bias is not None else 0
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(db_rows)


def _linear_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, targets, bias, *ctx.options, _ = inputs
    _, dx, dw, db = output
    ctx.mark_non_differentiable(dx, dw, db)
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, targets, bias, dx, dw, db)


def _linear_autograd(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple:
    x, weight, targets, bias, dx, dw, db = ctx.saved_tensors
    backward = torch.ops.fastgpt.linear_cross_entropy_torch_backward.default
    dx, dw, db = backward(grad_loss, x, weight, targets, bias, *ctx.options, dx, dw, db)
    return dx, dw, None, db if ctx.has_bias else None, None, None, None, None


torch.library.register_autograd(
    "fastgpt::linear_cross_entropy_torch", _linear_autograd, setup_context=_linear_setup_context, lib=library
)
raise_on_double_backward("linear_cross_entropy_torch_backward")


def _torch_linear(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    refuse_forward_mode("linear_cross_entropy", x, weight, bias)
    wants_grad = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    return torch.ops.fastgpt.linear_cross_entropy_torch(
        x, weight, targets, bias, ignore_index, reduction, label_smoothing, wants_grad and reduction != "none"
    )[0]


register("cross_entropy", "torch", _torch)
register("linear_cross_entropy", "torch", _torch_linear)
