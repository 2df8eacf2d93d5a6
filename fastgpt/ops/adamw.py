"""One step of AdamW, and the norm of all gradients, by the extension: each a single pass over all tensors of a list.

They are not among the public ops; training/adamw.py is what uses them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import native
from .backend import preferred, unavailable
from .library import define_op

_adamw = define_op(
    "adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
    "float lr, float weight_decay, float beta1, float beta2, float eps, float grad_scale) -> ()",
    forward=native.load_at_first_call("adamw_"),
    fake=lambda *args: None,
)
_total_norm = define_op(
    "total_norm(Tensor[] tensors) -> Tensor",
    forward=native.load_at_first_call("total_norm"),
    fake=lambda tensors: tensors[0].new_empty(()),
)


def one_pass_choice() -> tuple[bool, str]:
    """Whether the extension takes the steps on this machine's CPU, and in words why, or why not."""
    if preferred() == "torch":
        return False, "the torch backend is preferred"
    reason = unavailable("native", "cpu")
    if reason is not None:
        return False, reason
    if preferred() != "native" and native.load("cpu").instruction_set() == "generic":
        return False, "its kernel was measured with AVX2 and AVX-512; this processor has neither"
    return True, "clipping and AdamW take one pass over the gradients"


def is_plain(tensor: Tensor) -> bool:
    """Whether the kernels take `tensor`."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.dtype == torch.float32
        and tensor.is_contiguous()
    )


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of all `tensors`, at least one, plain, together: 0-dim. See torch.nn.utils.get_total_norm."""
    return _total_norm(list(tensors))


def adamw_(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    grad_scale: float = 1.0,
) -> None:
    """One step for plain tensors, in place. `grad_scale` multiplies the gradients, which stay as they are."""
    _adamw(weights, grads, exp_avgs, exp_avg_sqs, steps, lr, weight_decay, *betas, eps, grad_scale)
    torch.autograd.graph.increment_version(weights)
