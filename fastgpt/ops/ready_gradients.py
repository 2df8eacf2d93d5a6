"""Gradients that the forward pass of a loss op has computed already; backward scales and returns them.

Where a gradient is wanted and the loss is a scalar, the forward ops of both losses compute it together with the loss,
while the logits are in the caches. The first backward pass multiplies it, in place, by the incoming gradient and
returns it. A second pass through a kept graph, or one with create_graph, computes it again from the saved inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .library import define_op, is_wrapped_by_transform


def _scale_gradient_(gradient: Tensor, scale: Tensor) -> None:
    """gradient *= scale, but an ignored row's 0 stays 0 where `scale` is not finite, as in PyTorch.

    The CUDA extension has a kernel that reads `scale` on the device, and returns at once where it is 1.
    """
    torch.where(gradient == 0, gradient, gradient * scale, out=gradient)


_scale_in_kernel_ = define_op(
    "scale_gradient_(Tensor(a!) gradient, Tensor scale) -> ()",
    forward=_scale_gradient_,
    fake=lambda gradient, scale: None,
)


def scaled(gradients: Sequence[Tensor], scale: Tensor) -> Sequence[Tensor] | None:
    """The gradients times `scale`, in place where no trace or transform would miss the change.

    None where they have to be computed again because `scale` is not finite: the zeros of an ignored row must stay 0,
    all other zeros must become NaN, and the gradients do not tell the one from the other.
    """
    if type(scale) is not Tensor or is_wrapped_by_transform(scale):  # being traced
        return [torch.where(gradient == 0, gradient, gradient * scale) for gradient in gradients]
    if not scale.is_cpu:  # reading its value would wait for the device: where it is not finite, all zeros stay 0
        for gradient in gradients:
            in_kernel = gradient.dtype != torch.float64 and scale.dtype == torch.float32
            (_scale_in_kernel_ if in_kernel else _scale_gradient_)(gradient, scale)
        return gradients
    try:
        factor = scale.item()
    except RuntimeError:  # a batch of gradients at once (is_grads_batched), which has more than one value
        return [torch.where(gradient == 0, gradient, gradient * scale) for gradient in gradients]
    if factor == 1.0:
        return gradients
    return [gradient.mul_(factor) for gradient in gradients] if math.isfinite(factor) else None
