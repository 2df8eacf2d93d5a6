"""The logits of one new token through a whole GPT, by one op: generation on a CPU (csrc/decode.cpp).

It is not one of the public ops. A token of a small model takes less time than the calls of the ops that it consists of,
and a larger one is read faster by this kernel than by PyTorch's matrix library, which is made for many rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import ACTIVATIONS
from . import native
from .backend import preferred, unavailable
from .flops import product_flops
from .library import define_op

# Up to this many sequences the op was faster than one op after the other. For bfloat16 the matrix library uses
# instructions that the kernel does not use.
MOST_SEQUENCES = {torch.float32: 8, torch.bfloat16: 2, torch.float16: 8}


def _flops(tokens, weights, *rest, **options):
    return sum(product_flops((tokens[0], shape[1]), shape) for shape in weights[2:] if len(shape) == 2)


_decode_native_ = define_op(
    "decode_native_(Tensor tokens, Tensor[] weights, Tensor(a!) cache, int length, Tensor? rows, int activation, "
    "float eps) -> Tensor",
    forward=native.load_at_first_call("decode_native_"),
    fake=lambda tokens, weights, cache, *rest: cache.new_empty((tokens.shape[0], weights[0].shape[0])),
    flops=_flops,
)


def decode_(
    tokens: Tensor,
    weights: list[Tensor],
    cache: Tensor,
    length: int,
    activation: str,
    eps: float,
    rows: Tensor | None = None,
) -> Tensor:
    """tokens (n, 1) int64 after the `length` tokens of cache (2, L, B, H, block_size, D) -> logits (n, V).

    The keys and values of the new tokens are added to the cache. Without `rows`, n is B. rows (n, 2), int64: the row of
    each token in the cache, and the length of that row, at most `length`. weights, contiguous, in the dtype of the
    cache: the tables of tokens and positions; in each block weight and bias of the norm, qkv, proj, the second norm, up
    and down; those of the last norm and of the head. A bias that is not there is a tensor of no values.
    """
    return _decode_native_(tokens, weights, cache, length, rows, ACTIVATIONS.index(activation), eps)


def reason_against_decode() -> str | None:
    """Why a token takes one op after the other on this machine, in words; None where it takes one for all."""
    if preferred() not in ("auto", "native"):  # one op for all would leave out the ops that the other one has
        return f"the {preferred()} backend is preferred"
    return unavailable("native", "cpu")
