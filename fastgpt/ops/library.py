"""The `torch.library` namespace `fastgpt::`. Schemas are defined in Python, so the ops exist without compiled code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

library = torch.library.Library("fastgpt", "DEF")


def raise_on_double_backward(op: str) -> None:
    """Give `fastgpt::op`, which computes a gradient, a derivative that says there is none.

    Without one, PyTorch would treat the op's result as a constant, and a second derivative would be silently wrong.
    """

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"fastgpt::{op} is a gradient and has none of its own: double backward is not supported; "
            "the formulas of fastgpt.ops.reference have every derivative"
        )

    torch.library.register_autograd(f"fastgpt::{op}", backward, setup_context=setup_context, lib=library)


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Raise where forward-mode AD (`torch.func.jvp`) reaches a registered op: PyTorch takes its derivative for 0."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is not None and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{op}: forward-mode derivatives are not supported; the formulas of fastgpt.ops.reference have them"
            )
