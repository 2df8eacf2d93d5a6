"""The log-probability of each target from the head's input, in one op that never holds all the logits.

It is what preference optimisation, distillation and the evaluation of answers ask for. Rows are taken in the chunks of
linear_cross_entropy.py, whose kernel it runs: a log-probability is minus the loss of a row. Each row's incoming
gradient is a number of its own, so the backward op makes the logits again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .arguments import as_softcap, check_float
from .backend import dispatch, register
from .flops import product_flops
from .library import define_op
from .linear_cross_entropy import (
    ON_NATIVE,
    ON_TORCH,
    ChunkedHead,
    Kernels,
    backward_flops,
    cast_for_head,
    check_head,
    gradients_fake,
    native_serves,
    refuse_transforms,
    statistics_dtype,
)

IGNORES_NONE = -(2**63)  # an ignore_index for the chunk's kernel that no target in range can be


def linear_log_probs(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """``log_softmax(linear(x, weight, bias))[..., targets]`` without ever holding all the logits.

    Args:
        x: (..., C), float16, bfloat16, float32 or float64: the input of the head.
        weight: (V, C), like x: the head. bias: (V,), like x, or None.
        targets: (...), the leading shape of x, int64 or int32, each in [0, V). There is no value that is ignored: give
            positions that do not count any class, and leave out their results.
        softcap: above 0: the logits are softcap * tanh(linear(...) / softcap), as for `cross_entropy`. None: no cap.
        backend: "auto", "torch" or "native".

    Returns: (...), the log-probability of each target in nats, computed in float32 (float64 for float64), and in x's
        dtype, float32 under autocast. x, weight and bias get gradients.
    Memory, DTensors: as for `linear_cross_entropy` with the reduction "none".
    Raises: TypeError, ValueError naming the argument; IndexError with value and position for a target out of range
        (on CUDA the error surfaces as PyTorch's would). Double backward raises RuntimeError.

    Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) needs two of them for each of two models:

    >>> chosen = ops.linear_log_probs(hidden_of_chosen, head, chosen_tokens).sum(-1)  # (B, T, C), (V, C), (B, T)
    >>> rejected = ops.linear_log_probs(hidden_of_rejected, head, rejected_tokens).sum(-1)  # (B,)
    >>> loss = -F.logsigmoid(beta * ((chosen - rejected) - (chosen_of_reference - rejected_of_reference))).mean()
    """
    check_float("x", x)
    check_float("weight", weight, ndim=2)
    softcap = as_softcap(softcap)
    check_head(x, weight, targets, bias)
    x, weight, bias, dtype = cast_for_head(x, weight, bias)
    return dispatch("linear_log_probs", backend, x, weight, targets, bias, softcap).to(dtype)


@torch.no_grad()
def _forward(
    kernels: Kernels, x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float
) -> Tensor:
    head = ChunkedHead(kernels, x, weight, targets, bias, None, (False,) * 3, softcap)
    losses = torch.zeros(head.x.shape[0], dtype=head.stats, device=x.device)
    for rows, logits in head.chunks():
        scale = losses[rows]  # it is read for gradients alone
        losses[rows], _ = kernels.chunk_(
            logits, head.targets[rows], scale, IGNORES_NONE, 0.0, 0.0, softcap, False, False
        )
    return (0.0 - losses).view(targets.shape)  # 0 is not negative


@torch.no_grad()
def _gradients(
    kernels: Kernels,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    head = ChunkedHead(kernels, x, weight, targets, bias, None, wanted, softcap)
    scale = -grad.reshape(-1).to(head.stats)
    for rows, logits in head.chunks():
        kernels.chunk_(logits, head.targets[rows], scale[rows], IGNORES_NONE, 0.0, 0.0, softcap, True, False)
        head.add_gradient(rows, logits)
    return head.gradients_as(weight.dtype)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.softcap = inputs
    ctx.save_for_backward(*tensors)


def _backward(compute_gradients: Callable[..., tuple], ctx: Any, grad: Tensor) -> tuple:
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    gradients = compute_gradients(grad, *ctx.saved_tensors, ctx.softcap, *wanted)
    dx, dw, db = (gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))
    return dx, dw, None, db, None


_ARGUMENTS = "Tensor x, Tensor weight, Tensor targets, Tensor? bias, float softcap"


def _define(backend: str, kernels: Kernels) -> Callable[..., Tensor]:
    name = f"linear_log_probs_{backend}"
    flags = "bool with_dx, bool with_dw, bool with_db"
    compute_gradients = define_op(
        f"{name}_backward(Tensor grad, {_ARGUMENTS}, {flags}) -> (Tensor dx, Tensor dw, Tensor db)",
        forward=partial(_gradients, kernels),
        fake=gradients_fake,
        is_gradient=True,
        flops=backward_flops,
    )
    return define_op(
        f"{name}({_ARGUMENTS}) -> Tensor",
        forward=partial(_forward, kernels),
        fake=lambda x, weight, targets, *rest: x.new_empty(targets.shape, dtype=statistics_dtype(x)),
        save=_save,
        backward=partial(_backward, compute_gradients),
        flops=lambda x, weight, *rest, **options: product_flops(x, weight),
    )


def _run(
    op: Callable[..., Tensor], x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None
) -> Tensor:
    instead = "log_softmax(linear(x, weight), -1).gather(...)"
    refuse_transforms("linear_log_probs", instead, x, weight, bias)
    return op(x, weight, targets, bias, 0.0 if softcap is None else softcap)


linear_log_probs_on_torch = partial(_run, _define("torch", ON_TORCH))
linear_log_probs_on_native = partial(_run, _define("native", ON_NATIVE))
register("linear_log_probs", "torch", linear_log_probs_on_torch)
register("linear_log_probs", "native", linear_log_probs_on_native, native_serves)
