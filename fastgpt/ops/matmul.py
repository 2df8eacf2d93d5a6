"""Matrix products into a given tensor, and large buffers: what linear_cross_entropy's chunks are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .flops import product_flops
from .library import define_op


def _large_buffer(like, rows, columns):
    """Uninitialised. The CPU extension keeps freed buffers for the next call, see csrc/large_blocks.h."""
    return like.new_empty((rows, columns))


large_buffer = define_op(
    "large_buffer(Tensor like, SymInt rows, SymInt columns) -> Tensor", forward=_large_buffer, fake=_large_buffer
)
_matmul_ = define_op(
    "matmul_(Tensor a, Tensor b, Tensor(c!) out, bool accumulate) -> ()",
    forward=native.load_at_first_call("matmul_"),
    fake=lambda a, b, out, accumulate: None,
    flops=lambda a, b, *rest, **options: product_flops(a, (b[1],)),
)


def matmul_on_torch_(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = a b, or out += a b where `accumulate`, by the matrix library that PyTorch calls."""
    if accumulate:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def matmul_on_native_(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """The same, by the extension's kernel where that was measured to be faster, see csrc/matmul.h."""
    if a.is_cpu and a.dtype == torch.float32 and native.reason_for_library("matmul") is None:
        _matmul_(a, b, out, accumulate)
    else:
        matmul_on_torch_(a, b, out, accumulate)
