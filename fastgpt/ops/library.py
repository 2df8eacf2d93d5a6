"""The `torch.library` namespace `fastgpt::`. Schemas are defined in Python, so the ops exist without compiled code."""

from __future__ import annotations

from typing import Any

import torch

library = torch.library.Library("fastgpt", "DEF")


def raise_on_double_backward(op: str) -> None:
    """Give `fastgpt::op`, which computes a gradient, a derivative that says there is none.

    Without one, PyTorch would treat the op's result as a constant, and a second derivative would be silently wrong.
    """

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"fastgpt::{op} has no derivative: double backward is not supported; use backend='torch' ops"
        )

    torch.library.register_autograd(f"fastgpt::{op}", backward, setup_context=setup_context, lib=library)
