"""Cross-entropy from logits, and from the head's input: `linear_cross_entropy` never holds all the logits at once.

The fused form is the idea of Cut Your Losses (Wijmans et al. 2024) and Liger-Kernel (Hsu et al. 2024): rows are taken
in chunks; a chunk's logits are made, turned into their own gradient in place, multiplied into dx and dW, and dropped.

Where a gradient is wanted and the loss is a scalar, the forward ops compute it with the loss, while the logits are in
the caches; backward hands it out, scaled in place by the incoming gradient where that is not 1. It is handed out
once: a second pass through a kept graph, or one with create_graph, computes it again from the saved inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, int64, strided

from . import native
from .arguments import (
    FLOATS,
    as_int64,
    as_label_smoothing,
    autocast_dtype,
    check_float,
    check_index,
    check_like,
    check_reduction,
    first_out_of_range,
    same_number_hint,
)
from .backend import dispatch, register
from .flops import product_flops, register_flops
from .library import (
    in_dispatch_mode,
    inside_transform,
    is_wrapped_by_transform,
    library,
    raise_on_double_backward,
    refuse_forward_mode,
    register_autograd,
)

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

    Returns: the loss in nats: a scalar, or the shape of targets for "none". "mean" of no counted target is NaN.
    Raises: TypeError, ValueError naming the argument; IndexError with value and position for a target out of range
        (on CUDA the error surfaces as PyTorch's would).
    """
    if not _is_plain(logits, targets, weight, ignore_index, reduction, label_smoothing):
        ignore_index, label_smoothing = _check(logits, targets, weight, ignore_index, reduction, label_smoothing)
    return dispatch("cross_entropy", backend, logits, targets, weight, ignore_index, reduction, label_smoothing)


def _is_plain(
    logits: Tensor, targets: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> bool:
    """Whether this is a call as training makes it, which `_check` would pass.

    Asked first, because a step calls the op once, when Python's code has left the caches: the checks one by one then
    take 20 us, a tenth of a small loss and its gradient.
    """
    return (
        type(logits) is Tensor
        and type(targets) is Tensor
        and logits.dtype in FLOATS
        and targets.dtype is int64
        and logits.is_cpu
        and targets.is_cpu
        and logits.layout is strided
        and targets.layout is strided
        and not logits.is_nested
        and not targets.is_nested
        and targets.ndim == 1
        and logits.ndim == 2
        and logits.shape[0] == targets.shape[0]
        and logits.shape[1] > 0
        and weight is None
        and type(ignore_index) is int
        and ignore_index == -100
        and type(label_smoothing) is float
        and label_smoothing == 0.0
        and type(reduction) is str
        and reduction in ("mean", "sum", "none")
    )


def _check(
    logits: Tensor, targets: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> tuple[int, float]:
    """Returns ignore_index and label_smoothing as numbers of Python."""
    check_float("logits", logits)
    check_index("targets", targets)
    check_like("targets", targets, "logits", logits, dtype=False)
    check_reduction(reduction)
    label_smoothing = as_label_smoothing(label_smoothing)
    ignore_index = as_int64("ignore_index", ignore_index)
    if logits.ndim == 0:
        raise ValueError("logits: expected (C,), (N, C) or (N, C, d1, ..., dk), got a 0-dim tensor")
    class_dim = 0 if logits.ndim == 1 else 1
    C = logits.shape[class_dim]
    if C == 0:
        raise ValueError(f"logits: expected at least one class, got shape {tuple(logits.shape)}")
    expected = logits.shape[:class_dim] + logits.shape[class_dim + 1 :]
    if targets.shape != expected:
        hint = same_number_hint(targets, expected)
        if logits.ndim > 2 and targets.shape == logits.shape[:-1]:
            hint = "; the classes are dimension 1: pass logits.flatten(0, -2) and targets.flatten()"
        raise ValueError(
            f"targets: expected shape {tuple(expected)} to fit logits {tuple(logits.shape)}, "
            f"got {tuple(targets.shape)}{hint}"
        )
    if weight is not None:
        check_float("weight", weight, ndim=1)
        check_like("weight", weight, "logits", logits, dtype=autocast_dtype(logits) is None)
        if weight.shape[0] != C:
            raise ValueError(f"weight: expected shape ({C},), one factor per class, got {tuple(weight.shape)}")
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError("weight: class weights get no gradient; pass weight.detach()")
    return ignore_index, label_smoothing


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
    Memory: beyond inputs and gradients an eighth of the logits, or what 256 rows of them take, or 2**20 of them,
        whichever is the most; in 16 bits also dW in float32, in which it is summed, and where the torch backend takes
        the 256 rows or the 2**20 logits, a copy of them in float32. A gradient nobody asks for is not made.
    An ignored row of x that is not finite has the loss and the dx 0, but makes dW NaN, as the two ops one by one do.
    Raises: as `cross_entropy`. Double backward raises RuntimeError.
    """
    check_float("x", x)
    check_float("weight", weight, ndim=2)
    check_index("targets", targets)
    check_reduction(reduction)
    label_smoothing = as_label_smoothing(label_smoothing)
    ignore_index = as_int64("ignore_index", ignore_index)
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
            f"{same_number_hint(targets, x.shape[:-1])}"
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
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    if reduction == "mean" and logits.dtype == torch.float16 and autocast_dtype(logits) is None:
        return _torch_float16_mean(logits, targets, weight, ignore_index, label_smoothing)
    # An ignored row of NaN would have a gradient of NaN.
    ignored = (targets == ignore_index).unsqueeze(0 if logits.ndim == 1 else 1)
    try:
        return F.cross_entropy(
            logits.masked_fill(ignored, 0.0),
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


def _torch_float16_mean(
    logits: Tensor, targets: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> Tensor:
    """The mean, summed in float32: PyTorch sums float16 losses in float16, where 65504 is the largest number."""
    each = _torch(logits, targets, weight, ignore_index, "none", label_smoothing).float()
    counted = targets != ignore_index
    weights = counted.float()
    if weight is not None:
        weights = weights * weight.float()[targets.long() * counted]
    total = weights.sum()
    return torch.where(total == 0.0, torch.nan, each.sum() / total).to(logits.dtype)


# --- gradients made in the forward pass ------------------------------------------------------------------------------

library.define("scale_gradient_(Tensor(a!) gradient, Tensor scale) -> ()")


def _scale_gradient_(gradient: Tensor, scale: Tensor) -> None:
    """gradient *= scale, but an ignored row's 0 stays 0 where `scale` is not finite, as in PyTorch.

    The CUDA extension has a kernel that reads `scale` on the device and leaves at once where it is 1.
    """
    torch.where(gradient == 0, gradient, gradient * scale, out=gradient)


library.impl("scale_gradient_", _scale_gradient_, "CompositeExplicitAutograd")


@torch.library.register_fake("fastgpt::scale_gradient_", lib=library)
def _scale_gradient_fake(gradient, scale):
    return None


def _scaled(gradients: Sequence[Tensor], scale: Tensor) -> Sequence[Tensor] | None:
    """The gradients times `scale`, in place where that can be done behind autograd's back.

    None where they have to be computed again: where `scale` is not finite, a zero that stands for an ignored row stays
    0, and any other becomes NaN, and here they look alike.
    """
    if type(scale) is not Tensor or is_wrapped_by_transform(scale):  # being traced
        return [torch.where(gradient == 0, gradient, gradient * scale) for gradient in gradients]
    if not scale.is_cpu:  # its value is on the device: only ignored rows are right where it is not finite
        for gradient in gradients:
            in_kernel = gradient.dtype != torch.float64 and scale.dtype == torch.float32
            (torch.ops.fastgpt.scale_gradient_ if in_kernel else _scale_gradient_)(gradient, scale)
        return gradients
    try:
        factor = scale.item()
    except RuntimeError:  # a batch of gradients at once (is_grads_batched), which has no one value
        return [torch.where(gradient == 0, gradient, gradient * scale) for gradient in gradients]
    if factor == 1.0:
        return gradients
    return [gradient.mul_(factor) for gradient in gradients] if math.isfinite(factor) else None


# --- large buffers ---------------------------------------------------------------------------------------------------

library.define("large_buffer(Tensor like, SymInt rows, SymInt columns) -> Tensor")


@torch.library.register_fake("fastgpt::large_buffer", lib=library)
def _large_buffer(like, rows, columns):
    """Uninitialised. The CPU extension keeps freed ones for the next call, see csrc/large_blocks.h."""
    return like.new_empty((rows, columns))


library.impl("large_buffer", _large_buffer, "CompositeExplicitAutograd")


# --- products --------------------------------------------------------------------------------------------------------

library.define("matmul_(Tensor a, Tensor b, Tensor(c!) out, bool accumulate) -> ()")


register_flops("matmul_", lambda a, b, *rest, **options: product_flops(a, (b[1],)))


@torch.library.register_fake("fastgpt::matmul_", lib=library)
def _matmul_fake(a, b, out, accumulate):
    return None


def _library_product_(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out (+)= a b, by the matrix library that PyTorch calls."""
    if accumulate:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def _native_product_(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out (+)= a b, by the extension's product where it is the faster one, see csrc/matmul.h."""
    if a.is_cpu and a.dtype == torch.float32 and native.reason_for_library("matmul") is None:
        torch.ops.fastgpt.matmul_(a, b, out, accumulate)
    else:
        _library_product_(a, b, out, accumulate)


# --- cross_entropy on the native backend -----------------------------------------------------------------------------

# `saved`, where it is the gradient, is what backward hands out, scaled in place: whoever calls the op himself leaves it
# alone.
library.define(
    "cross_entropy_native(Tensor logits, Tensor targets, Tensor? weight, int ignore_index, int reduction, "
    "float label_smoothing, bool with_grad) -> (Tensor loss, Tensor saved)"
)
library.define(
    "cross_entropy_native_backward(Tensor grad_loss, Tensor logits, Tensor targets, Tensor? weight, "
    "Tensor? statistics, int ignore_index, int reduction, float label_smoothing) -> Tensor"
)
library.define(
    "cross_entropy_chunk_(Tensor(a!) logits, Tensor targets, Tensor row_scale, int ignore_index, "
    "float label_smoothing, bool with_grad) -> Tensor"
)


native.load_at_first_call(
    library, "cross_entropy_native", "cross_entropy_native_backward", "cross_entropy_chunk_", "matmul_"
)


@torch.library.register_fake("fastgpt::cross_entropy_native", lib=library)
def _native_fake(logits, targets, weight, ignore_index, reduction, label_smoothing, with_grad):
    N, C = logits.shape
    return (
        logits.new_empty(N if reduction == REDUCTIONS["none"] else (), dtype=torch.float32),
        # the gradient; else each row's maximum, and the log of its sum of exp(x - maximum)
        logits.new_empty((N, C)) if with_grad else logits.new_empty((N, 2), dtype=torch.float32),
    )


@torch.library.register_fake("fastgpt::cross_entropy_native_backward", lib=library)
def _native_backward_fake(grad_loss, logits, targets, weight, statistics, ignore_index, reduction, label_smoothing):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("fastgpt::cross_entropy_chunk_", lib=library)
def _chunk_fake(logits, targets, row_scale, ignore_index, label_smoothing, with_grad):
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def _native_setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, targets, weight, *ctx.options, with_grad = inputs
    ctx.gradient = output[1] if with_grad else None
    ctx.save_for_backward(logits, targets, weight, None if with_grad else output[1])


def _native_autograd(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple:
    gradient, ctx.gradient = ctx.gradient, None
    scaled = None if gradient is None or torch.is_grad_enabled() else _scaled((gradient,), grad_loss)
    if scaled is None:
        backward = torch.ops.fastgpt.cross_entropy_native_backward
        scaled = (backward(grad_loss, *ctx.saved_tensors, *ctx.options),)
    return *scaled, None, None, None, None, None, None


_cross_entropy_native = register_autograd(
    "cross_entropy_native", _native_autograd, _native_setup_context, first_only=True
)
raise_on_double_backward("cross_entropy_native_backward")


def _native(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
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
    # float16 with a scaled loss: the mean's gradient would be rounded, and vanish, before the scale reaches it.
    with_grad = with_grad and logits.dtype != torch.float16
    try:
        loss = _cross_entropy_native(
            rows,
            row_targets,
            None if weight is None else weight.detach().float(),
            ignore_index,
            REDUCTIONS[reduction],
            label_smoothing,
            with_grad,
        )
    except IndexError:
        raise first_out_of_range("targets", targets, 0, C, ignore=ignore_index) from None
    if reduction == "none":
        loss = loss.view(targets.shape)
    return loss if loss.dtype == logits.dtype or autocast_dtype(logits) is not None else loss.to(logits.dtype)


def _native_supports(logits: Tensor, targets: Tensor, *options: Any, **more: Any) -> str | None:
    if logits.dtype == torch.float64:
        return "its kernels take float32, float16 and bfloat16, and logits is float64"
    return inside_transform()


# --- linear_cross_entropy --------------------------------------------------------------------------------------------
#
# One chunked algorithm for both backends; they differ in what turns a chunk of logits into losses and gradients. The
# forward op returns the sum of the losses (or each, for "none") and, where a gradient is wanted and the loss is a
# scalar, already dx, dW and db: the chunk's logits are at hand, so no second product is needed. For "none" the incoming
# gradient differs per row, and the backward op makes the logits once more.


# The bounds of a chunk. They are numbers, and follow nothing that a system reports of itself: the last cache of a
# virtual machine is a whole socket's, shared with strangers.
LARGEST_CHUNK = {"cpu": 2**23, "cuda": 2**26}  # logits: a CPU's stay near its caches, a GPU wants thousands of rows
SMALLEST_CHUNK = 2**20  # logits: 4 MB of float32, which nobody misses
FEWEST_ROWS = 256  # with fewer, reading and writing dW once per chunk is no longer hidden by the products
PARTS = 12  # a chunk of a twelfth, with what the products need beside it, stays below an eighth of all the logits


def _chunk_rows(n_rows: int, vocab_size: int, device_type: str = "cpu", copies: int = 1) -> int:
    """Rows per chunk: chunks of equal size, of at most LARGEST_CHUNK logits and about a twelfth of all of them.

    Where a twelfth is less than FEWEST_ROWS rows, or than SMALLEST_CHUNK logits, a chunk has that many. `copies` is how
    often the backend holds a chunk, in units of its logits.
    """
    rows = min(LARGEST_CHUNK.get(device_type, LARGEST_CHUNK["cpu"]) // vocab_size, n_rows // (PARTS * copies))
    rows = max(rows, FEWEST_ROWS, SMALLEST_CHUNK // vocab_size)
    n_chunks = max(1, -(-n_rows // rows))
    return max(1, -(-n_rows // n_chunks))


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _torch_chunk_(
    logits: Tensor, targets: Tensor, row_scale: Tensor, ignore_index: int, label_smoothing: float, with_grad: bool
) -> Tensor:
    """Losses (n,) of logits (n, V); with_grad overwrites the logits with the gradient of sum(row_scale * loss)."""
    counted = targets != ignore_index
    targets = torch.where(counted, targets, 0)
    values = logits.to(_statistics_dtype(logits))
    values.sub_(values.amax(1, keepdim=True))  # else logsumexp - logit would cancel in large logits
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


_CHUNKS = {"torch": _torch_chunk_, "native": lambda *args: torch.ops.fastgpt.cross_entropy_chunk_(*args)}
_PRODUCTS = {"torch": _library_product_, "native": _native_product_}


class _Head:
    """x weight^T + bias, chunk by chunk, and the sums in which its gradients are gathered."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        ignore_index: int,
        product_: Callable[..., None],
        copies: int,
    ) -> None:
        self.product_ = product_
        self.x = x.reshape(targets.numel(), x.shape[-1])  # (N, C)
        self.weight, self.bias = weight, bias
        self.targets = targets.reshape(-1).long()
        self.counted = self.targets != ignore_index
        V = weight.shape[0]
        if x.device.type == "cpu" and bool((((self.targets < 0) | (self.targets >= V)) & self.counted).any()):
            raise first_out_of_range("targets", targets, 0, V, ignore=ignore_index)
        self.rows = _chunk_rows(self.x.shape[0], V, x.device.type, copies)
        self.buffer = torch.ops.fastgpt.large_buffer(x, min(self.rows, self.x.shape[0]), V)

    def __iter__(self):
        for start in range(0, self.x.shape[0], self.rows):
            rows = slice(start, start + self.rows)
            x = self.x[rows]
            logits = self.buffer[: x.shape[0]]
            if self.bias is not None:
                logits.copy_(self.bias.expand_as(logits))
            self.product_(x, self.weight.t(), logits, accumulate=self.bias is not None)
            yield rows, logits

    def start_gradients(self, wanted: Sequence[bool]) -> None:
        """`wanted`: which of dx, dW and db are asked for. Nothing is computed for the others; they stay empty."""
        self.with_dx, self.with_dw, self.with_db = wanted
        self.stats = _statistics_dtype(self.x)
        V, C = self.weight.shape
        self.dx = self.x.new_empty(self.x.shape if self.with_dx else 0)
        self.dw = (
            None
            if self.with_dw and self.x.shape[0] > 0
            else self.x.new_zeros((V, C) if self.with_dw else 0, dtype=self.stats)
        )
        self.db = self.x.new_zeros(V if self.with_db else 0, dtype=self.stats)

    def add_gradient(self, rows: slice, grad: Tensor) -> None:
        if self.with_dx:
            self.product_(grad, self.weight, self.dx[rows])
        if self.with_dw:
            self._add_weight_gradient(self.x[rows], grad)
        if self.with_db:
            self.db += grad.sum(0, dtype=self.stats)

    def _add_weight_gradient(self, x: Tensor, grad: Tensor) -> None:
        if self.dw is None and self.stats == grad.dtype:
            self.dw = torch.ops.fastgpt.large_buffer(x, *self.weight.shape)
            self.product_(grad.t(), x, self.dw)
        elif self.dw is None:
            self.dw = (grad.t() @ x).to(self.stats)
        elif self.dw.dtype == grad.dtype:
            self.product_(grad.t(), x, self.dw, accumulate=True)
        else:
            self.dw += grad.t() @ x


def _mean_scale(counted: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """What the reduction multiplies the sum of the losses by; infinite for the mean of nothing."""
    return counted.sum().to(dtype).reciprocal() if reduction == "mean" else torch.ones_like(counted.sum(), dtype=dtype)


def _mean_comes_last(x: Tensor) -> bool:
    """In float16 a chunk's gradient would vanish if it were divided by the number of rows first."""
    return x.dtype == torch.float16


def _linear_backward_flops(grad_loss: Any, x: Any, weight: Any, *rest: Any, **options: Any) -> Any:
    """The logits once more, and the gradients asked for: the last arguments are with_dx, with_dw and with_db."""
    return (1 + rest[-3] + rest[-2]) * product_flops(x, weight)


def _define_linear(backend: str) -> Callable[..., Any]:
    name = f"linear_cross_entropy_{backend}"
    chunk_, product_ = _CHUNKS[backend], _PRODUCTS[backend]

    def copies(x: Tensor) -> int:  # of a chunk's logits: the torch backend converts 16 bits to float32
        return 3 if backend == "torch" and x.element_size() == 2 else 1

    @torch.no_grad()
    def forward(x, weight, targets, bias, ignore_index, reduction, label_smoothing, with_dx, with_dw, with_db):
        head = _Head(x, weight, targets, bias, ignore_index, product_, copies(x))
        stats = _statistics_dtype(x)
        losses = torch.empty(head.x.shape[0], dtype=stats, device=x.device)
        scale = _mean_scale(head.counted, reduction, stats)
        row_scale = (torch.ones_like(scale) if _mean_comes_last(x) else scale).expand(losses.shape).contiguous()
        head.start_gradients((with_dx, with_dw, with_db))
        with_grad = with_dx or with_dw or with_db
        for rows, logits in head:
            losses[rows] = chunk_(logits, head.targets[rows], row_scale[rows], ignore_index, label_smoothing, with_grad)
            if with_grad:
                head.add_gradient(rows, logits)
        if reduction == "none":
            loss = losses.view(targets.shape)
        else:
            loss = losses.sum() / head.counted.sum() if reduction == "mean" else losses.sum()
        return loss, head.dx.view(x.shape) if with_dx else head.dx, head.dw, head.db

    @torch.no_grad()
    def backward(
        grad_loss, x, weight, targets, bias, ignore_index, reduction, label_smoothing, with_dx, with_dw, with_db
    ):
        head = _Head(x, weight, targets, bias, ignore_index, product_, copies(x))
        head.start_gradients((with_dx, with_dw, with_db))
        stats = _statistics_dtype(x)
        scale = _mean_scale(head.counted, reduction, stats)
        row_scale = (grad_loss.reshape(-1).to(stats) * scale).expand(head.targets.shape).contiguous()
        for rows, logits in head:
            chunk_(logits, head.targets[rows], row_scale[rows], ignore_index, label_smoothing, True)
            head.add_gradient(rows, logits)
        return head.dx.view(x.shape) if with_dx else head.dx, head.dw.to(weight.dtype), head.db.to(weight.dtype)

    def gradients_fake(x, weight, dtype, with_dx, with_dw, with_db):
        return (
            x.new_empty(x.shape if with_dx else 0),
            weight.new_empty(weight.shape if with_dw else 0, dtype=dtype),
            weight.new_empty(weight.shape[0] if with_db else 0, dtype=dtype),
        )

    def forward_fake(x, weight, targets, bias, ignore_index, reduction, label_smoothing, *wanted):
        stats = _statistics_dtype(x)
        loss = x.new_empty(targets.shape if reduction == "none" else (), dtype=stats)
        return loss, *gradients_fake(x, weight, stats, *wanted)

    def backward_fake(grad_loss, x, weight, targets, bias, ignore_index, reduction, label_smoothing, *wanted):
        return gradients_fake(x, weight, weight.dtype, *wanted)

    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, targets, bias, *options = inputs
        ctx.options, ctx.made = options[:3], options[3:]
        _, *gradients = output
        ctx.save_for_backward(x, weight, targets, bias)
        ctx.gradients = gradients

    def autograd(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple:
        x, weight, targets, bias = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        scaled = None
        if gradients is not None and ctx.made == wanted and not torch.is_grad_enabled():
            scale = grad_loss
            if _mean_comes_last(x):
                ignore_index, reduction, _ = ctx.options
                mean = _mean_scale(targets.long() != ignore_index, reduction, grad_loss.dtype)
                scale = torch.where(mean.isfinite(), grad_loss * mean, 0.0)  # 0 for the mean of nothing
            scaled = _scaled(gradients, scale)
        if scaled is None:
            compute = getattr(torch.ops.fastgpt, f"{name}_backward")
            scaled = compute(grad_loss, x, weight, targets, bias, *ctx.options, *wanted)
        elif in_dispatch_mode():
            torch.ops.fastgpt.products_made_before(grad_loss, sum(wanted[:2]) * product_flops(x.shape, weight.shape))
        dx, dw, db = (gradient if want else None for gradient, want in zip(scaled, wanted, strict=True))
        dw = None if dw is None else dw.to(weight.dtype)
        db = None if db is None else db.to(weight.dtype)
        return dx, dw, None, db, None, None, None, None, None, None

    library.define(
        f"{name}(Tensor x, Tensor weight, Tensor targets, Tensor? bias, int ignore_index, str reduction, "
        "float label_smoothing, bool with_dx, bool with_dw, bool with_db) "
        "-> (Tensor loss, Tensor dx, Tensor dw, Tensor db)"
    )
    library.define(
        f"{name}_backward(Tensor grad_loss, Tensor x, Tensor weight, Tensor targets, Tensor? bias, int ignore_index, "
        "str reduction, float label_smoothing, bool with_dx, bool with_dw, bool with_db) "
        "-> (Tensor dx, Tensor dw, Tensor db)"
    )
    library.impl(name, forward, "CompositeExplicitAutograd")
    library.impl(f"{name}_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastgpt::{name}", forward_fake, lib=library)
    torch.library.register_fake(f"fastgpt::{name}_backward", backward_fake, lib=library)
    register_flops(name, lambda x, weight, *rest, **options: product_flops(x, weight))
    register_flops(f"{name}_backward", _linear_backward_flops)
    raise_on_double_backward(f"{name}_backward")
    return register_autograd(name, autograd, setup_context, first_only=True)


_linear_torch, _linear_native = _define_linear("torch"), _define_linear("native")


def _linear(
    run: Callable[..., Any],
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
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
    if any(wanted) and inside_transform():
        raise NotImplementedError(
            "linear_cross_entropy: no derivative inside torch.func transforms (grad, vmap, ...); take "
            "cross_entropy(linear(x, weight), targets) there, or torch.autograd.grad outside"
        )
    if reduction == "none":  # each row's gradient is scaled by a number of its own, which only backward knows
        wanted = [False] * 3
    return run(x, weight, targets, bias, ignore_index, reduction, label_smoothing, *wanted)


def _native_linear_supports(x: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> str | None:
    if x.dtype == torch.float64:
        return "its kernels take float32, float16 and bfloat16, and x is float64"
    return inside_transform()


register("cross_entropy", "torch", _torch)
register("cross_entropy", "native", _native, _native_supports)
register("linear_cross_entropy", "torch", partial(_linear, _linear_torch))
register("linear_cross_entropy", "native", partial(_linear, _linear_native), _native_linear_supports)
