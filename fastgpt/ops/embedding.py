"""Token embedding plus position embedding: two gathers and an add in one op.

The native backend (csrc/embedding.*) writes each output row once. It groups the tokens by a stable sort, and sums the
gradient rows of each token in that order, without atomics, so that the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .arguments import as_int64, check_float, check_index, check_like, first_out_of_range
from .backend import dispatch, register
from .library import below_autograd, define_op, inside_transform, refuse_forward_mode


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


def embedding_on_torch(
    tokens: Tensor, token_table: Tensor, position_table: Tensor | None, position_offset: int
) -> Tensor:
    try:
        x = F.embedding(tokens, token_table)  # (B, T, C)
    except IndexError:
        raise first_out_of_range("tokens", tokens, 0, token_table.shape[0]) from None
    if position_table is None:
        return x
    return x + position_table[position_offset : position_offset + tokens.shape[1]]


# --- the native backend: csrc/embedding.cpp, csrc/embedding.cu --------------------------------------------------------


def _fake(tokens, token_table, position_table, position_offset):
    return token_table.new_empty((*tokens.shape, token_table.shape[1]))


def _gradients_fake(grad, tokens, vocab_size, n_positions, position_offset, with_tokens, with_positions):
    C = grad.shape[2]
    d_tokens = grad.new_empty((vocab_size if with_tokens else 0, C))
    return d_tokens, grad.new_empty((n_positions if with_positions else 0, C))


CUDA_CHUNK = 32  # sorted tokens of a block: as many blocks as possible, whose partial sums are still few. Not timed.
_cuda_chunks: dict[torch.device, list[tuple[int, int, int]]] = {}


def set_cuda_chunks(device: torch.device | str, chunks: Iterable[tuple[int, int, int]]) -> None:
    """Choose how many sorted tokens a block of csrc/embedding.cu takes on `device`, in place of CUDA_CHUNK.

    Each choice is (element_size, most_tokens, chunk), and counts for gradients with values of so many bytes (2 or 4)
    of at most so many tokens and more than half of that. The chunk is a multiple of 8 up to 128. A call takes the first
    choice that counts for it, and without one the default. Earlier choices are forgotten: `set_cuda_chunks(device, [])`
    leaves the default alone. A choice changes the order of additions, and nothing else; each gives the same bits in
    every run. Raises ValueError naming the choice for one that no kernel serves: then none is set.
    """
    chunks = list(chunks)
    for choice in chunks:
        if not _is_choice(*choice):
            raise ValueError(
                f"chunks: {choice}: expected (element_size, most_tokens, chunk) with an element_size of 2 or 4, at "
                "least 1 token, and a chunk that is a multiple of 8 up to 128"
            )
    _cuda_chunks[_with_index(device)] = chunks


def _is_choice(element_size: Any = None, most_tokens: Any = None, chunk: Any = None, *more: Any) -> bool:
    if more or not all(type(number) is int for number in (element_size, most_tokens, chunk)):
        return False
    return element_size in (2, 4) and most_tokens >= 1 and chunk in range(8, 129, 8)


def cuda_chunk(device: torch.device | str, element_size: int, n_tokens: int) -> int:
    """How many sorted tokens a block takes; see `set_cuda_chunks`."""
    for size, most_tokens, chunk in _cuda_chunks.get(_with_index(device), ()):
        if size == element_size and n_tokens <= most_tokens < 2 * n_tokens:
            return chunk
    return CUDA_CHUNK


def _with_index(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


@torch.no_grad()
def _gradients_on_cuda(grad, tokens, vocab_size, n_positions, position_offset, with_tokens, with_positions):
    """On a GPU the tokens are sorted by PyTorch, stably, and the kernels sum runs of equal ones.

    A radix sort takes half the passes for 32 bits. The forward pass has refused tokens that these do not hold.
    """
    grad = grad.contiguous()
    C = grad.shape[2]
    d_tokens, d_positions = grad.new_empty((0, C)), grad.new_empty((0, C))
    if with_tokens:
        keys = tokens.reshape(-1)
        in_order, order = torch.sort(keys.int() if vocab_size < 2**31 else keys, stable=True)
        chunk = cuda_chunk(grad.device, grad.element_size(), tokens.numel())
        d_tokens = _sum_sorted(grad.view(tokens.numel(), C), in_order, order, vocab_size, chunk)
    if with_positions:
        d_positions = _sum_positions(grad, n_positions, position_offset)
    return d_tokens, d_positions


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    tokens, token_table, position_table, ctx.position_offset = inputs
    ctx.vocab_size = token_table.shape[0]
    ctx.n_positions = 0 if position_table is None else position_table.shape[0]
    ctx.save_for_backward(tokens)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    (tokens,) = ctx.saved_tensors
    _, with_tokens, with_positions, _ = ctx.needs_input_grad
    sizes = ctx.vocab_size, ctx.n_positions, ctx.position_offset
    arguments = (grad, tokens, *sizes, with_tokens, with_positions)
    plain = type(grad) is Tensor and not torch.is_grad_enabled()  # it is neither traced nor differentiated again
    d_tokens, d_positions = below_autograd(_gradients, *arguments) if plain else _gradients(*arguments)
    return None, d_tokens if with_tokens else None, d_positions if with_positions else None, None


_sum_sorted = define_op(
    "embedding_sum_sorted(Tensor grad, Tensor sorted, Tensor order, SymInt vocab_size, int chunk) -> Tensor",
    forward=native.load_at_first_call("embedding_sum_sorted"),
    fake=lambda grad, in_order, order, vocab_size, chunk: grad.new_empty((vocab_size, grad.shape[1])),
)
_sum_positions = define_op(
    "embedding_sum_positions(Tensor grad, SymInt n_positions, SymInt position_offset) -> Tensor",
    forward=native.load_at_first_call("embedding_sum_positions"),
    fake=lambda grad, n_positions, position_offset: grad.new_empty((n_positions, grad.shape[2])),
)
_gradients = define_op(
    "embedding_native_backward(Tensor grad, Tensor tokens, SymInt vocab_size, SymInt n_positions, "
    "SymInt position_offset, bool with_tokens, bool with_positions) -> (Tensor, Tensor)",
    forward=native.load_at_first_call("embedding_native_backward"),
    forward_on_cuda=_gradients_on_cuda,
    fake=_gradients_fake,
    is_gradient=True,
)
_embedding_native = define_op(
    "embedding_native(Tensor tokens, Tensor token_table, Tensor? position_table, SymInt position_offset) -> Tensor",
    forward=native.load_at_first_call("embedding_native"),
    fake=_fake,
    save=_save,
    backward=_backward,
)


def embedding_on_native(
    tokens: Tensor, token_table: Tensor, position_table: Tensor | None, position_offset: int
) -> Tensor:
    refuse_forward_mode("embedding", token_table, position_table)
    try:
        return _embedding_native(tokens.long(), token_table, position_table, position_offset)
    except IndexError:
        raise first_out_of_range("tokens", tokens, 0, token_table.shape[0]) from None


def _native_serves(tokens: Tensor, token_table: Tensor, *positions: Any, **options: Any) -> str | None:
    if token_table.dtype == torch.float64:
        return "its kernels take float32, float16 and bfloat16, and token_table is float64"
    return inside_transform()


native.takes_plans("embedding", set_cuda_chunks)
register("embedding", "torch", embedding_on_torch)
register("embedding", "native", embedding_on_native, _native_serves)
