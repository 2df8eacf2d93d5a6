"""Cross-entropy from the head's input: the head's product and the loss in one op that never holds all the logits.

As in Cut Your Losses (Wijmans et al. 2024) and Liger-Kernel (Hsu et al. 2024), rows are taken in chunks.
The logits of a chunk are made, overwritten with their own gradient, multiplied into dx and dW, and dropped.

Both backends run the same algorithm over chunks. They differ in the kernel that turns the logits of a chunk into
losses and gradients, and in the matrix product. The forward op returns the sum of the losses (for "none" each of them)
and, where a gradient is wanted and the loss is a scalar, already dx, dW and db, which saves a second product for the
logits; see `ready_gradients.py`. For "none" each row's incoming gradient is a number of its own, so the backward op
makes the logits again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..chunks import chunk_rows
from . import native
from .arguments import as_loss_options, autocast_dtype, check_float, check_like, check_targets, first_out_of_range
from .backend import dispatch, register
from .flops import product_flops
from .library import define_op, in_dispatch_mode, inside_transform, refuse_forward_mode
from .matmul import large_buffer, matmul_on_native_, matmul_on_torch_
from .ready_gradients import scaled


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
    Memory: beyond inputs and gradients it takes an eighth of the logits, or 256 rows of them, or 2**20 of them,
        whichever is the most. In 16 bits it also takes dW in float32, in which dW is summed, and where the torch
        backend takes 256 rows or 2**20 logits, a copy of these in float32. Only gradients that are asked for are made.
    DTensors: weight and bias may be DTensors. They are gathered for the call, and get the mean of the processes'
        gradients, as in FSDP2. Where x and targets are DTensors, too, the loss is that of all rows; see `dtensor.py`.
    An ignored row of x that is not finite has the loss 0 and the dx 0, but makes dW NaN, as the two separate ops do.
    Raises: as `cross_entropy`. Double backward raises RuntimeError.
    """
    check_float("x", x)
    check_float("weight", weight, ndim=2)
    ignore_index, label_smoothing = as_loss_options(ignore_index, reduction, label_smoothing)
    dtype = None if x.dtype == torch.float64 else autocast_dtype(x)
    check_like("weight", weight, "x", x, dtype=dtype is None)
    if x.ndim == 0:
        raise ValueError("x: expected shape (..., C), got a 0-dim tensor")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight: expected shape (V, {x.shape[-1]}) to fit x {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"weight: expected at least one class, got shape {tuple(weight.shape)}")
    check_targets(targets, x.shape[:-1], "x", x)
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
    loss = dispatch("linear_cross_entropy", backend, x, weight, targets, bias, ignore_index, reduction, label_smoothing)
    return loss.to(loss_dtype)


# --- a chunk ---------------------------------------------------------------------------------------------------------


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def chunk_on_torch_(
    logits: Tensor, targets: Tensor, row_scale: Tensor, ignore_index: int, label_smoothing: float, with_grad: bool
) -> Tensor:
    """Losses (n,) of logits (n, V); with_grad overwrites the logits with the gradient of sum(row_scale * loss)."""
    counted = targets != ignore_index
    targets = torch.where(counted, targets, 0)
    values = logits.to(_statistics_dtype(logits))
    # Without this, the difference of logsumexp and logit would lose its digits where logits are large.
    values.sub_(values.amax(1, keepdim=True))
    of_target = values.gather(1, targets[:, None])[:, 0]
    mean = values.mean(dim=1) if label_smoothing > 0.0 else 0.0
    sums = values.exp_().sum(1)
    loss = sums.log() - of_target * (1.0 - label_smoothing) - mean * label_smoothing
    if with_grad:
        grad = values.div_(sums[:, None])
        if label_smoothing > 0.0:
            grad.sub_(label_smoothing / grad.shape[1])
        grad.scatter_add_(1, targets[:, None], torch.full_like(sums, label_smoothing - 1.0)[:, None])
        grad.mul_(row_scale[:, None]).masked_fill_(~counted[:, None], 0.0)
        if grad is not logits:
            logits.copy_(grad)
    return torch.where(counted, loss, 0.0)


_chunk_on_native_ = define_op(
    "cross_entropy_chunk_(Tensor(a!) logits, Tensor targets, Tensor row_scale, int ignore_index, "
    "float label_smoothing, bool with_grad) -> Tensor",
    forward=native.load_at_first_call("cross_entropy_chunk_"),
    fake=lambda logits, *rest: logits.new_empty(logits.shape[0], dtype=torch.float32),
)


@dataclass(frozen=True)
class _Kernels:
    """What the two backends differ in."""

    chunk_: Callable[..., Tensor]
    product_: Callable[..., None]
    copies_of_16_bits: int  # how often a chunk of 16-bit logits is held, in units of its logits

    def copies(self, x: Tensor) -> int:
        return self.copies_of_16_bits if x.element_size() == 2 else 1


_ON_TORCH = _Kernels(chunk_on_torch_, matmul_on_torch_, copies_of_16_bits=3)  # it converts them to float32
_ON_NATIVE = _Kernels(_chunk_on_native_, matmul_on_native_, copies_of_16_bits=1)


class _ChunkedHead:
    """x weight^T + bias in chunks of rows, and the sums in which its gradients are gathered.

    `wanted` says which of dx, dW and db are asked for. The others are not computed, and stay empty.
    """

    def __init__(self, kernels, x, weight, targets, bias, ignore_index, wanted) -> None:
        self.product_ = kernels.product_
        self.shape = x.shape
        self.x = x.reshape(targets.numel(), x.shape[-1])  # (N, C)
        self.weight, self.bias = weight, bias
        self.targets = targets.reshape(-1).long()
        self.counted = self.targets != ignore_index
        V = weight.shape[0]
        if x.device.type == "cpu" and bool((((self.targets < 0) | (self.targets >= V)) & self.counted).any()):
            raise first_out_of_range("targets", targets, 0, V, ignore=ignore_index)
        self.rows = chunk_rows(self.x.shape[0], V, x.device.type, kernels.copies(x))
        self.buffer = large_buffer(x, min(self.rows, self.x.shape[0]), V)
        self.with_dx, self.with_dw, self.with_db = wanted
        self.stats = _statistics_dtype(x)
        self.dx = self.x.new_empty(self.x.shape if self.with_dx else 0)
        self.dw: Tensor | None = None  # the first chunk makes it
        self.db = self.x.new_zeros(V if self.with_db else 0, dtype=self.stats)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """The rows of each chunk, and its logits, which the caller may overwrite."""
        for start in range(0, self.x.shape[0], self.rows):
            rows = slice(start, start + self.rows)
            x = self.x[rows]
            logits = self.buffer[: x.shape[0]]
            if self.bias is not None:
                logits.copy_(self.bias.expand_as(logits))
            self.product_(x, self.weight.t(), logits, accumulate=self.bias is not None)
            yield rows, logits

    def add_gradient(self, rows: slice, grad: Tensor) -> None:
        """Add what a chunk's logits, of gradient `grad`, give to dx, dW and db."""
        if self.with_dx:
            self.product_(grad, self.weight, self.dx[rows])
        if self.with_dw:
            self._add_weight_gradient(self.x[rows], grad)
        if self.with_db:
            self.db += grad.sum(0, dtype=self.stats)

    def _add_weight_gradient(self, x: Tensor, grad: Tensor) -> None:
        if self.dw is None and self.stats == grad.dtype:
            self.dw = large_buffer(x, *self.weight.shape)
            self.product_(grad.t(), x, self.dw)
        elif self.dw is None:
            self.dw = (grad.t() @ x).to(self.stats)
        elif self.dw.dtype == grad.dtype:
            self.product_(grad.t(), x, self.dw, accumulate=True)
        else:
            self.dw += grad.t() @ x

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """dx, dW and db, the last two in the dtype of the statistics."""
        dx = self.dx.view(self.shape) if self.with_dx else self.dx
        if self.dw is None:  # it is not asked for, or there are no rows
            return dx, self.x.new_zeros(self.weight.shape if self.with_dw else 0, dtype=self.stats), self.db
        return dx, self.dw, self.db


# --- the registered ops ----------------------------------------------------------------------------------------------


def _mean_scale(counted: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """What the reduction multiplies the sum of the losses by; infinite for the mean of nothing."""
    return counted.sum().to(dtype).reciprocal() if reduction == "mean" else torch.ones_like(counted.sum(), dtype=dtype)


def _mean_comes_last(x: Tensor) -> bool:
    """In float16 a chunk's gradient would vanish if it were divided by the number of rows first."""
    return x.dtype == torch.float16


@torch.no_grad()
def _forward(kernels, x, weight, targets, bias, ignore_index, reduction, label_smoothing, *wanted):
    head = _ChunkedHead(kernels, x, weight, targets, bias, ignore_index, wanted)
    losses = torch.empty(head.x.shape[0], dtype=head.stats, device=x.device)
    scale = _mean_scale(head.counted, reduction, head.stats)
    row_scale = (torch.ones_like(scale) if _mean_comes_last(x) else scale).expand(losses.shape).contiguous()
    for rows, logits in head.chunks():
        losses[rows] = kernels.chunk_(
            logits, head.targets[rows], row_scale[rows], ignore_index, label_smoothing, any(wanted)
        )
        head.add_gradient(rows, logits)
    if reduction == "none":
        loss = losses.view(targets.shape)
    else:
        loss = losses.sum() / head.counted.sum() if reduction == "mean" else losses.sum()
    return loss, *head.gradients()


@torch.no_grad()
def _gradients(kernels, grad_loss, x, weight, targets, bias, ignore_index, reduction, label_smoothing, *wanted):
    head = _ChunkedHead(kernels, x, weight, targets, bias, ignore_index, wanted)
    scale = _mean_scale(head.counted, reduction, head.stats)
    row_scale = (grad_loss.reshape(-1).to(head.stats) * scale).expand(head.targets.shape).contiguous()
    for rows, logits in head.chunks():
        kernels.chunk_(logits, head.targets[rows], row_scale[rows], ignore_index, label_smoothing, True)
        head.add_gradient(rows, logits)
    dx, dw, db = head.gradients()
    return dx, dw.to(weight.dtype), db.to(weight.dtype)


def _forward_fake(x, weight, targets, bias, ignore_index, reduction, label_smoothing, *wanted):
    stats = _statistics_dtype(x)
    loss = x.new_empty(targets.shape if reduction == "none" else (), dtype=stats)
    return loss, *_empty_gradients(x, weight, stats, *wanted)


def _gradients_fake(grad_loss, x, weight, targets, bias, ignore_index, reduction, label_smoothing, *wanted):
    return _empty_gradients(x, weight, weight.dtype, *wanted)


def _empty_gradients(x, weight, dtype, with_dx, with_dw, with_db):
    return (
        x.new_empty(x.shape if with_dx else 0),
        weight.new_empty(weight.shape if with_dw else 0, dtype=dtype),
        weight.new_empty(weight.shape[0] if with_db else 0, dtype=dtype),
    )


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, targets, bias, *options = inputs
    ctx.options, ctx.made = options[:3], options[3:]
    _, *gradients = output
    ctx.save_for_backward(x, weight, targets, bias)
    ctx.gradients = gradients


def _backward(compute_gradients: Callable[..., tuple], ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple:
    """Hand out the gradients of the forward op, or where they do not serve, compute them."""
    x, weight, targets, bias = ctx.saved_tensors
    made, ctx.gradients = ctx.gradients, None
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    gradients = None
    if made is not None and ctx.made == wanted and not torch.is_grad_enabled():
        gradients = scaled(made, _scale_of_made_gradients(ctx, grad_loss, x, targets))
    if gradients is None:
        gradients = compute_gradients(grad_loss, x, weight, targets, bias, *ctx.options, *wanted)
    elif in_dispatch_mode():
        _products_made_before(grad_loss, sum(wanted[:2]) * product_flops(x.shape, weight.shape))
    dx, dw, db = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    dw = None if dw is None else dw.to(weight.dtype)
    db = None if db is None else db.to(weight.dtype)
    return dx, dw, None, db, None, None, None, None, None, None


def _scale_of_made_gradients(ctx: Any, grad_loss: Tensor, x: Tensor, targets: Tensor) -> Tensor:
    if not _mean_comes_last(x):
        return grad_loss
    ignore_index, reduction, _ = ctx.options
    mean = _mean_scale(targets.long() != ignore_index, reduction, grad_loss.dtype)
    return torch.where(mean.isfinite(), grad_loss * mean, 0.0)  # 0 for the mean of nothing


def _backward_flops(grad_loss: Any, x: Any, weight: Any, *rest: Any, **options: Any) -> Any:
    """The logits again, and the gradients asked for: the last arguments are with_dx, with_dw and with_db."""
    return (1 + rest[-3] + rest[-2]) * product_flops(x, weight)


# The products of gradients that the forward op made are counted where a FLOP counter expects them: in the backward
# pass, which calls this op where a mode watches. It does nothing.
_products_made_before = define_op(
    "products_made_before(Tensor like, SymInt flops) -> ()",
    forward=lambda like, flops: None,
    fake=lambda like, flops: None,
    flops=lambda like, flops, **options: flops,
)

_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor targets, Tensor? bias, int ignore_index, str reduction, float label_smoothing, "
    "bool with_dx, bool with_dw, bool with_db"
)


def _define(backend: str, kernels: _Kernels) -> Callable[..., Tensor]:
    name = f"linear_cross_entropy_{backend}"
    compute_gradients = define_op(
        f"{name}_backward(Tensor grad_loss, {_ARGUMENTS}) -> (Tensor dx, Tensor dw, Tensor db)",
        forward=partial(_gradients, kernels),
        fake=_gradients_fake,
        is_gradient=True,
        flops=_backward_flops,
    )
    return define_op(
        f"{name}({_ARGUMENTS}) -> (Tensor loss, Tensor dx, Tensor dw, Tensor db)",
        forward=partial(_forward, kernels),
        fake=_forward_fake,
        save=_save,
        backward=partial(_backward, compute_gradients),
        first_only=True,
        flops=lambda x, weight, *rest, **options: product_flops(x, weight),
    )


def _run(op, x, weight, targets, bias, ignore_index, reduction, label_smoothing) -> Tensor:
    refuse_forward_mode("linear_cross_entropy", x, weight, bias)
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
    if any(wanted) and inside_transform():
        raise NotImplementedError(
            "linear_cross_entropy: no derivative inside torch.func transforms (grad, vmap, ...); take "
            "cross_entropy(linear(x, weight), targets) there, or torch.autograd.grad outside"
        )
    if reduction == "none":  # each row's gradient is scaled by a number of its own, which is known in backward alone
        wanted = [False] * 3
    return op(x, weight, targets, bias, ignore_index, reduction, label_smoothing, *wanted)


def _native_serves(x: Tensor, *rest: Any, **options: Any) -> str | None:
    if x.dtype == torch.float64:
        return "its kernels take float32, float16 and bfloat16, and x is float64"
    return inside_transform()


linear_cross_entropy_on_torch = partial(_run, _define("torch", _ON_TORCH))
linear_cross_entropy_on_native = partial(_run, _define("native", _ON_NATIVE))
register("linear_cross_entropy", "torch", linear_cross_entropy_on_torch)
register("linear_cross_entropy", "native", linear_cross_entropy_on_native, _native_serves)
