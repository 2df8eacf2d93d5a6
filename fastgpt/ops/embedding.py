"""Token embedding plus position embedding: two gathers and an add in one op.

The native backend (csrc/embedding.*) stores each output row once, and sums the gradient rows of one token in a
fixed order: tokens are grouped by a stable counting sort, so there are no atomics and the bits never change.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .arguments import as_int64, check_float, check_index, check_like, first_out_of_range
from .backend import dispatch, register
from .library import (
    below_autograd,
    inside_transform,
    library,
    raise_on_double_backward,
    refuse_forward_mode,
    register_autograd,
)


def embedding(
    tokens: Tensor,
    token_table: Tensor,
    position_table: Tensor | None = None,
    *,
    position_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """token_table[tokens] + position_table[position_offset : position_offset + T].

    Args:
        tokens: (B, T), int64 or int32, each in [0, V).
        token_table: (V, C), float16, bfloat16, float32 or float64.
        position_table: (P, C), like token_table, with position_offset + T <= P; None adds nothing.
        position_offset: the position of the first token; generation with a cache starts past 0.
        backend: "auto", "torch" or "native".

    Returns: (B, T, C), the dtype of token_table. Gradients of both tables are deterministic.
    Raises: TypeError, ValueError naming the argument; IndexError with value and position for a token out of range
        (on CUDA, where that would wait for the device, the error surfaces as PyTorch's would).
    """
    check_index("tokens", tokens, ndim=2)
    check_float("token_table", token_table, ndim=2)
    check_like("tokens", tokens, "token_table", token_table, dtype=False)
    if token_table.shape[0] == 0 and tokens.numel() > 0:
        raise IndexError(f"token_table: has no rows for tokens of shape {tuple(tokens.shape)}")
    position_offset = as_int64("position_offset", position_offset)
    if position_offset < 0:
        raise ValueError(f"position_offset: expected an int of at least 0, got {position_offset}")
    if position_table is not None:
        check_float("position_table", position_table, ndim=2)
        check_like("position_table", position_table, "token_table", token_table)
        C = token_table.shape[1]
        if position_table.shape[1] != C:
            raise ValueError(
                f"position_table: expected shape (P, {C}) as token_table, got {tuple(position_table.shape)}"
            )
        if position_offset + tokens.shape[1] > position_table.shape[0]:
            raise IndexError(
                f"tokens: positions {position_offset}..{position_offset + tokens.shape[1] - 1} do not fit the "
                f"{position_table.shape[0]} rows of position_table"
            )
    return dispatch("embedding", backend, tokens, token_table, position_table, position_offset=position_offset)


def _torch(
    tokens: Tensor, token_table: Tensor, position_table: Tensor | None = None, *, position_offset: int = 0
) -> Tensor:
    try:
        x = F.embedding(tokens, token_table)  # (B, T, C)
    except IndexError:
        raise first_out_of_range("tokens", tokens, 0, token_table.shape[0]) from None
    if position_table is None:
        return x
    return x + position_table[position_offset : position_offset + tokens.shape[1]]


# --- the native backend ----------------------------------------------------------------------------------------------

library.define(
    "embedding_native(Tensor tokens, Tensor token_table, Tensor? position_table, SymInt position_offset) -> Tensor"
)
library.define(
    "embedding_native_backward(Tensor grad, Tensor tokens, SymInt vocab_size, SymInt n_positions, "
    "SymInt position_offset, bool with_tokens, bool with_positions) -> (Tensor, Tensor)"
)
library.define("embedding_sum_sorted(Tensor grad, Tensor sorted, Tensor order, SymInt vocab_size) -> Tensor")
library.define("embedding_sum_positions(Tensor grad, SymInt n_positions, SymInt position_offset) -> Tensor")
native.load_at_first_call(
    library, "embedding_native", "embedding_native_backward", "embedding_sum_sorted", "embedding_sum_positions"
)


@torch.no_grad()
def _native_backward_cuda(grad, tokens, vocab_size, n_positions, position_offset, with_tokens, with_positions):
    """On a GPU the tokens are sorted by PyTorch, stably, and the kernels sum runs of equal ones."""
    grad = grad.contiguous()
    C = grad.shape[2]
    d_tokens, d_positions = grad.new_empty((0, C)), grad.new_empty((0, C))
    if with_tokens:
        in_order, order = torch.sort(tokens.reshape(-1), stable=True)
        d_tokens = torch.ops.fastgpt.embedding_sum_sorted(grad.view(tokens.numel(), C), in_order, order, vocab_size)
    if with_positions:
        d_positions = torch.ops.fastgpt.embedding_sum_positions(grad, n_positions, position_offset)
    return d_tokens, d_positions


library.impl("embedding_native_backward", _native_backward_cuda, "CUDA")


@torch.library.register_fake("fastgpt::embedding_native", lib=library)
def _native_fake(tokens, token_table, position_table, position_offset):
    return token_table.new_empty((*tokens.shape, token_table.shape[1]))


@torch.library.register_fake("fastgpt::embedding_native_backward", lib=library)
def _native_backward_fake(grad, tokens, vocab_size, n_positions, position_offset, with_tokens, with_positions):
    C = grad.shape[2]
    return grad.new_empty((vocab_size if with_tokens else 0, C)), grad.new_empty(
        (n_positions if with_positions else 0, C)
    )


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    tokens, token_table, position_table, ctx.position_offset = inputs
    ctx.vocab_size = token_table.shape[0]
    ctx.n_positions = 0 if position_table is None else position_table.shape[0]
    ctx.save_for_backward(tokens)


def _autograd(ctx: Any, grad: Tensor) -> tuple:
    (tokens,) = ctx.saved_tensors
    _, with_tokens, with_positions, _ = ctx.needs_input_grad
    backward = torch.ops.fastgpt.embedding_native_backward.default
    sizes = ctx.vocab_size, ctx.n_positions, ctx.position_offset
    arguments = (grad, tokens, *sizes, with_tokens, with_positions)
    plain = type(grad) is Tensor and not torch.is_grad_enabled()  # not traced, and not to be derived again
    d_tokens, d_positions = below_autograd(backward, *arguments) if plain else backward(*arguments)
    return None, d_tokens if with_tokens else None, d_positions if with_positions else None, None


raise_on_double_backward("embedding_native_backward")
_embedding_native = register_autograd("embedding_native", _autograd, _setup_context)


def _native(
    tokens: Tensor, token_table: Tensor, position_table: Tensor | None = None, *, position_offset: int = 0
) -> Tensor:
    refuse_forward_mode("embedding", token_table, position_table)
    try:
        return _embedding_native(tokens.long(), token_table, position_table, position_offset)
    except IndexError:
        raise first_out_of_range("tokens", tokens, 0, token_table.shape[0]) from None


def _native_supports(
    tokens: Tensor, token_table: Tensor, position_table: Tensor | None = None, *, position_offset: int = 0
) -> str | None:
    if token_table.dtype == torch.float64:
        return "its kernels take float32, float16 and bfloat16, and token_table is float64"
    return inside_transform()


register("embedding", "torch", _torch)
register("embedding", "native", _native, _native_supports)
