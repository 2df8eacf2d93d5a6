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
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..chunks import chunk_rows
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
from .cross_entropy import LossAndAccuracy, accuracy
from .flops import product_flops
from .library import define_op, first_and_last, in_dispatch_mode, inside_transform, refuse_forward_mode
from .matmul import large_buffer, matmul_on_native_, matmul_on_torch_
from .ready_gradients import scaled


@overload
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
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
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    softcap: float | None = ...,
    token_weight: Tensor | None = ...,
    return_accuracy: Literal[True],
    backend: str = ...,
) -> LossAndAccuracy: ...


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    return_accuracy: bool = False,
    backend: str = "auto",
) -> Tensor | LossAndAccuracy:
    """``cross_entropy(linear(x, weight, bias), targets)`` without ever holding all the logits.

    Args:
        x: (..., C), float16, bfloat16, float32 or float64: the input of the head.
        weight: (V, C), like x: the head. bias: (V,), like x, or None.
        targets: (...), the leading shape of x, int64 or int32, each in [0, V) or `ignore_index`.
        ignore_index, reduction, label_smoothing: as for `cross_entropy`.
        z_loss, softcap, token_weight, return_accuracy: as for `cross_entropy`.
        backend: "auto", "torch" or "native".

    Returns: the loss in nats, a scalar, or the shape of targets for "none"; float32 under autocast, else x's dtype.
        With return_accuracy, (loss, accuracy); the accuracy is that of the logits in the dtype of the product.
    Memory: beyond inputs and gradients it takes an eighth of the logits, or 256 rows of them, or 2**20 of them,
        whichever is the most. In 16 bits it also takes dW in float32, in which dW is summed, and where the torch
        backend takes 256 rows or 2**20 logits, a copy of these in float32, and with a softcap another one. Only
        gradients that are asked for are made.
    DTensors: weight and bias may be DTensors. They are gathered for the call, and get the mean of the processes'
        gradients, as in FSDP2. Where x and targets are DTensors, too, the loss is that of all rows; see `dtensor.py`.
    An ignored row of x that is not finite has the loss 0 and the dx 0, but makes dW NaN, as the two separate ops do.
    Raises: as `cross_entropy`. Double backward raises RuntimeError.
    """
    check_float("x", x)
    check_float("weight", weight, ndim=2)
    ignore_index, label_smoothing = as_loss_options(ignore_index, reduction, label_smoothing)
    z_loss, softcap = as_head_options(z_loss, softcap, return_accuracy)
    check_head(x, weight, targets, bias)
    if token_weight is not None:
        check_token_weight(token_weight, targets)
    x, weight, bias, loss_dtype = cast_for_head(x, weight, bias)
    options = ignore_index, reduction, label_smoothing, z_loss, softcap, token_weight, return_accuracy
    result = dispatch("linear_cross_entropy", backend, x, weight, targets, bias, *options)
    return (result[0].to(loss_dtype), result[1]) if return_accuracy else result.to(loss_dtype)


def _dtype_of_autocast(x: Tensor) -> torch.dtype | None:
    return None if x.dtype == torch.float64 else autocast_dtype(x)


def check_head(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    """x and weight, which are known to be floating point, targets and bias fit one another."""
    has_dtype = _dtype_of_autocast(x) is None
    check_like("weight", weight, "x", x, dtype=has_dtype)
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
        check_like("bias", bias, "x", x, dtype=has_dtype)
        V = weight.shape[0]
        if bias.shape[0] != V:
            raise ValueError(
                f"bias: expected shape ({V},) to fit weight {tuple(weight.shape)}, got {tuple(bias.shape)}"
            )


def cast_for_head(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype]:
    """x, weight and bias in autocast's dtype, where there is one, and the dtype of the op's result."""
    dtype = _dtype_of_autocast(x)
    if dtype is None:
        return x, weight, bias, x.dtype
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), torch.float32


# --- a chunk ---------------------------------------------------------------------------------------------------------


def statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def chunk_on_torch_(
    logits: Tensor,
    targets: Tensor,
    row_scale: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    with_grad: bool,
    with_correct: bool,
) -> tuple[Tensor, Tensor]:
    """Losses (n,) of logits (n, V); with_grad overwrites the logits with the gradient of sum(row_scale * loss).

    The second result is 1 for each row whose target is its first largest logit, else 0; empty unless with_correct.
    """
    counted = targets != ignore_index
    targets = torch.where(counted, targets, 0)
    values = logits.to(statistics_dtype(logits))
    correct = _correct(values, targets, counted) if with_correct else row_scale.new_empty(0, dtype=torch.float32)
    slope: Tensor | float = 1.0
    if softcap > 0.0:
        values.div_(softcap).tanh_()
        slope = 1.0 - values.square()
        values.mul_(softcap)
    # Without this, the difference of logsumexp and logit would lose its digits where logits are large.
    largest = values.amax(1, keepdim=True)
    values.sub_(largest)
    of_target = values.gather(1, targets[:, None])[:, 0]
    mean = values.mean(dim=1) if label_smoothing > 0.0 else 0.0
    sums = values.exp_().sum(1)
    log_sum = sums.log()
    loss = log_sum - of_target * (1.0 - label_smoothing) - mean * label_smoothing
    if z_loss > 0.0:
        logsumexp = log_sum + largest[:, 0]
        loss += z_loss * logsumexp.square()
    if with_grad:
        grad = values.div_(sums[:, None])
        if z_loss > 0.0:
            grad.mul_(1.0 + 2.0 * z_loss * logsumexp[:, None])
        if label_smoothing > 0.0:
            grad.sub_(label_smoothing / grad.shape[1])
        grad.scatter_add_(1, targets[:, None], torch.full_like(sums, label_smoothing - 1.0)[:, None])
        if softcap > 0.0:
            grad.mul_(slope)
        grad.mul_(row_scale[:, None]).masked_fill_(~counted[:, None], 0.0)
        if grad is not logits:
            logits.copy_(grad)
    return torch.where(counted, loss, 0.0), correct


def _correct(values: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """As of a row that has a NaN argmax gives its place, no target of such a row is correct."""
    of_target = values.gather(1, targets[:, None])[:, 0]
    return (counted & (values.argmax(1) == targets) & ~of_target.isnan()).float()


def _chunk_fake(logits, targets, row_scale, *numbers_and_flags):
    n_correct = logits.shape[0] if numbers_and_flags[-1] else 0
    return tuple(logits.new_empty(n, dtype=torch.float32) for n in (logits.shape[0], n_correct))


_chunk_on_native_ = define_op(
    "cross_entropy_chunk_(Tensor(a!) logits, Tensor targets, Tensor row_scale, int ignore_index, "
    "float label_smoothing, float z_loss, float softcap, bool with_grad, bool with_correct) "
    "-> (Tensor losses, Tensor correct)",
    forward=native.load_at_first_call("cross_entropy_chunk_"),
    fake=_chunk_fake,
)


@dataclass(frozen=True)
class Kernels:
    """What the two backends differ in."""

    chunk_: Callable[..., tuple[Tensor, Tensor]]
    product_: Callable[..., None]
    holds_float32: bool  # beside a chunk of 16-bit logits, or of capped ones, the same in float32

    def copies(self, x: Tensor, softcap: float) -> int:
        """How often a chunk is held, in units of its logits: in 16 bits a copy in float32 is two."""
        copies = 2 if x.element_size() == 2 else 1
        held = (x.element_size() == 2) + (softcap > 0.0) if self.holds_float32 else 0
        return 1 + held * copies


ON_TORCH = Kernels(chunk_on_torch_, matmul_on_torch_, holds_float32=True)
ON_NATIVE = Kernels(_chunk_on_native_, matmul_on_native_, holds_float32=False)


class ChunkedHead:
    """x weight^T + bias in chunks of rows, and the sums in which its gradients are gathered.

    `wanted` says which of dx, dW and db are asked for. The others are not computed, and stay empty. Without an
    `ignore_index`, every target counts.
    """

    def __init__(self, kernels, x, weight, targets, bias, ignore_index, wanted, softcap=0.0) -> None:
        self.product_ = kernels.product_
        self.shape = x.shape
        self.x = x.reshape(targets.numel(), x.shape[-1])  # (N, C)
        self.weight, self.bias = weight, bias
        self.targets = targets.reshape(-1).long()
        V = weight.shape[0]
        outside = (self.targets < 0) | (self.targets >= V)
        if ignore_index is not None:
            self.counted = self.targets != ignore_index
            outside &= self.counted
        if x.device.type == "cpu" and bool(outside.any()):
            raise first_out_of_range("targets", targets, 0, V, ignore=ignore_index)
        self.rows = chunk_rows(self.x.shape[0], V, x.device.type, kernels.copies(x, softcap))
        self.buffer = large_buffer(x, min(self.rows, self.x.shape[0]), V)
        self.with_dx, self.with_dw, self.with_db = wanted
        self.stats = statistics_dtype(x)
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

    def gradients_as(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """dx, and dW and db in the dtype of the weight."""
        dx, dw, db = self.gradients()
        return dx, dw.to(dtype), db.to(dtype)


# --- the registered ops ----------------------------------------------------------------------------------------------


def _mean_scale(counted: Tensor, of_token: Tensor | None, reduction: str, dtype: torch.dtype) -> Tensor:
    """What the reduction multiplies the sum of the losses by; infinite for the mean of nothing."""
    total = counted.sum() if of_token is None else of_token.sum()
    return total.to(dtype).reciprocal() if reduction == "mean" else torch.ones_like(total, dtype=dtype)


def _of_token(token_weight: Tensor | None, counted: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The weights (N,) of the targets, 0 for those that are ignored."""
    return None if token_weight is None else torch.where(counted, token_weight.reshape(-1).to(dtype), 0.0)


def _mean_comes_last(x: Tensor) -> bool:
    """In float16 a chunk's gradient would vanish if it were divided by the number of rows first."""
    return x.dtype == torch.float16


@torch.no_grad()
def _forward(
    kernels: Kernels,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    token_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    *flags: bool,
) -> tuple[Tensor, ...]:
    *wanted, with_correct = flags
    head = ChunkedHead(kernels, x, weight, targets, bias, ignore_index, wanted, softcap)
    losses = torch.empty(head.x.shape[0], dtype=head.stats, device=x.device)
    correct = torch.empty(losses.shape if with_correct else 0, dtype=torch.float32, device=x.device)
    of_token = _of_token(token_weight, head.counted, head.stats)
    scale = _mean_scale(head.counted, of_token, reduction, head.stats)
    row_scale = (torch.ones_like(scale) if _mean_comes_last(x) else scale).expand(losses.shape).contiguous()
    if of_token is not None:
        row_scale *= of_token
    options = ignore_index, label_smoothing, z_loss, softcap, any(wanted), with_correct
    for rows, logits in head.chunks():
        losses[rows], of_rows = kernels.chunk_(logits, head.targets[rows], row_scale[rows], *options)
        if with_correct:
            correct[rows] = of_rows
        head.add_gradient(rows, logits)
    if of_token is not None:
        losses *= of_token
    correct = correct.view(targets.shape) if with_correct else correct
    return _reduced(losses, head.counted, of_token, reduction, targets.shape), *head.gradients(), correct


def _reduced(losses: Tensor, counted: Tensor, of_token: Tensor | None, reduction: str, shape: torch.Size) -> Tensor:
    if reduction == "none":
        return losses.view(shape)
    if reduction == "sum":
        return losses.sum()
    if of_token is None:
        return losses.sum() / counted.sum()
    total = of_token.sum()
    return torch.where(total == 0.0, torch.nan, losses.sum() / total)


@torch.no_grad()
def _gradients(
    kernels: Kernels,
    grad_loss: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    token_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    head = ChunkedHead(kernels, x, weight, targets, bias, ignore_index, wanted, softcap)
    of_token = _of_token(token_weight, head.counted, head.stats)
    scale = _mean_scale(head.counted, of_token, reduction, head.stats)
    row_scale = (grad_loss.reshape(-1).to(head.stats) * scale).expand(head.targets.shape).contiguous()
    if of_token is not None:
        row_scale = row_scale * of_token
    for rows, logits in head.chunks():
        options = ignore_index, label_smoothing, z_loss, softcap, True, False
        kernels.chunk_(logits, head.targets[rows], row_scale[rows], *options)
        head.add_gradient(rows, logits)
    return head.gradients_as(weight.dtype)


def _forward_fake(x, weight, targets, bias, token_weight, ignore_index, reduction, *numbers_and_flags):
    stats = statistics_dtype(x)
    loss = x.new_empty(targets.shape if reduction == "none" else (), dtype=stats)
    *wanted, with_correct = numbers_and_flags[-4:]
    correct = x.new_empty(targets.shape if with_correct else 0, dtype=torch.float32)
    return loss, *_empty_gradients(x, weight, stats, *wanted), correct


def gradients_fake(grad: Any, x: Any, weight: Any, *rest: Any) -> tuple:
    """Of an op whose last arguments are with_dx, with_dw and with_db."""
    return _empty_gradients(x, weight, weight.dtype, *rest[-3:])


def _empty_gradients(x, weight, dtype, with_dx, with_dw, with_db):
    return (
        x.new_empty(x.shape if with_dx else 0),
        weight.new_empty(weight.shape if with_dw else 0, dtype=dtype),
        weight.new_empty(weight.shape[0] if with_db else 0, dtype=dtype),
    )


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, targets, bias, token_weight, *options = inputs
    ctx.options, ctx.made = options[:5], options[5:8]
    _, *gradients, _ = output
    ctx.save_for_backward(x, weight, targets, bias, token_weight)
    ctx.gradients = gradients


def _backward(compute_gradients: Callable[..., tuple], ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple:
    """Hand out the gradients of the forward op, or where they do not serve, compute them."""
    x, weight, targets, bias, token_weight = ctx.saved_tensors
    made, ctx.gradients = ctx.gradients, None
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    gradients = None
    if made is not None and ctx.made == wanted and not torch.is_grad_enabled():
        gradients = scaled(made, _scale_of_made_gradients(ctx, grad_loss, x, targets, token_weight))
    if gradients is None:
        gradients = compute_gradients(grad_loss, x, weight, targets, bias, token_weight, *ctx.options, *wanted)
    elif in_dispatch_mode():
        _products_made_before(grad_loss, sum(wanted[:2]) * product_flops(x.shape, weight.shape))
    dx, dw, db = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    dw = None if dw is None else dw.to(weight.dtype)
    db = None if db is None else db.to(weight.dtype)
    return dx, dw, None, db, *(None,) * 10


def _scale_of_made_gradients(
    ctx: Any, grad_loss: Tensor, x: Tensor, targets: Tensor, token_weight: Tensor | None
) -> Tensor:
    if not _mean_comes_last(x):
        return grad_loss
    ignore_index, reduction, *_ = ctx.options
    counted = targets.long() != ignore_index
    of_token = _of_token(token_weight, counted.view(-1), grad_loss.dtype)
    mean = _mean_scale(counted, of_token, reduction, grad_loss.dtype)
    return torch.where(mean.isfinite(), grad_loss * mean, 0.0)  # 0 for the mean of nothing


def backward_flops(grad_loss: Any, x: Any, weight: Any, *rest: Any, **options: Any) -> Any:
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
    "Tensor x, Tensor weight, Tensor targets, Tensor? bias, Tensor? token_weight, int ignore_index, str reduction, "
    "float label_smoothing, float z_loss, float softcap, bool with_dx, bool with_dw, bool with_db"
)


def _define(backend: str, kernels: Kernels) -> tuple[Callable[..., Tensor], Callable[..., LossAndAccuracy]]:
    """The op on `backend` for the loss alone, and for the loss with what is correct."""
    name = f"linear_cross_entropy_{backend}"
    compute_gradients = define_op(
        f"{name}_backward(Tensor grad_loss, {_ARGUMENTS}) -> (Tensor dx, Tensor dw, Tensor db)",
        forward=partial(_gradients, kernels),
        fake=gradients_fake,
        is_gradient=True,
        flops=backward_flops,
    )
    backward = partial(_backward, compute_gradients)
    loss = define_op(
        f"{name}({_ARGUMENTS}, bool with_correct) -> (Tensor loss, Tensor dx, Tensor dw, Tensor db, Tensor correct)",
        forward=partial(_forward, kernels),
        fake=_forward_fake,
        save=_save,
        backward=backward,
        first_only=True,
        flops=lambda x, weight, *rest, **options: product_flops(x, weight),
    )
    return loss, first_and_last(name, backward, _save)


def refuse_transforms(op: str, instead: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[bool]:
    """Raise where a derivative is asked for that `op` does not have. Returns whose gradients are asked for."""
    refuse_forward_mode(op, x, weight, bias)
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
    if any(wanted) and inside_transform():
        raise NotImplementedError(
            f"{op}: no derivative inside torch.func transforms (grad, vmap, ...); take "
            f"{instead} there, or torch.autograd.grad outside"
        )
    return wanted


def _run(
    ops: tuple[Callable[..., Tensor], Callable[..., LossAndAccuracy]],
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    token_weight: Tensor | None,
    return_accuracy: bool,
) -> Tensor | LossAndAccuracy:
    instead = "cross_entropy(linear(x, weight), targets)"
    wanted = refuse_transforms("linear_cross_entropy", instead, x, weight, bias)
    if reduction == "none":  # each row's gradient is scaled by a number of its own, which is known in backward alone
        wanted = [False] * 3
    of_token = None if token_weight is None else token_weight.detach()
    options = ignore_index, reduction, label_smoothing, z_loss, 0.0 if softcap is None else softcap
    loss, loss_and_correct = ops
    if not return_accuracy:
        return loss(x, weight, targets, bias, of_token, *options, *wanted, False)
    value, correct = loss_and_correct(x, weight, targets, bias, of_token, *options, *wanted, True)
    return value, accuracy(correct, targets, ignore_index, reduction)


def native_serves(x: Tensor, *rest: Any, **options: Any) -> str | None:
    if x.dtype == torch.float64:
        return "its kernels take float32, float16 and bfloat16, and x is float64"
    return inside_transform()


linear_cross_entropy_on_torch = partial(_run, _define("torch", ON_TORCH))
linear_cross_entropy_on_native = partial(_run, _define("native", ON_NATIVE))
register("linear_cross_entropy", "torch", linear_cross_entropy_on_torch)
register("linear_cross_entropy", "native", linear_cross_entropy_on_native, native_serves)
