"""Token embedding plus position embedding: two gathers and an add in one op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import check_float, check_index, check_like, first_out_of_range
from .backend import dispatch, register


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
    if isinstance(position_offset, bool) or not isinstance(position_offset, (int, torch.SymInt)) or position_offset < 0:
        raise ValueError(f"position_offset: expected an int of at least 0, got {position_offset!r}")
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
    return dispatch(
        "embedding", backend, tokens.device.type, tokens, token_table, position_table, position_offset=position_offset
    )


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


register("embedding", "torch", _torch)
