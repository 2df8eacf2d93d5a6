"""Sampling, one token at a time, with a cache of keys and values.

While the sequence fits `block_size`, a step computes one new token against the cache. Beyond that the context is the
last `block_size` tokens, as in the lecture: each step moves every token one position down, which changes its learned
position embedding and all that was computed from it, so each step computes the whole window again. With a `stride` the
window moves by that many tokens at once instead, and the cache serves the steps between. A recurrent model's cache is
its state, which has the same size for a text of any length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import GPTConfig, as_float, as_int_argument

# Between these a temperature and its reciprocal are normal float32 numbers; a GPU may take smaller ones for zero.
COLDEST, HOTTEST = 2.0**-126, 2.0**126


class Model(Protocol):
    """What sampling asks of a model. `language_model.LanguageModel` has it, and so may a model of your own."""

    training: bool  # whether dropout is on; `eval` and `train` switch it, as in torch.nn.Module

    @property
    def cfg(self) -> GPTConfig:
        """Its settings. Read: is_causal, without which a model cannot continue a text."""

    @property
    def context_size(self) -> int | None:
        """How many tokens back the model sees; None for one without a limit."""

    def eval(self) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...

    def new_cache(self, batch_size: int) -> Any:
        """An empty cache for `batch_size` sequences, whose `length` counts the tokens in it; None where there is none.

        With the methods of `generate_graph.GraphedCache`, a CUDA graph can use it. Asked once, before the first token,
        and only while the sequence is shorter than `context_size`, or with a stride, which sets `length` to 0 where the
        cache shall be filled anew.
        """

    def next_logits(self, idx: Tensor, cache: Any = None) -> Tensor:
        """idx (B, T) int64 or int32 -> (B, V) floating point: the logits of the token after idx.

        With a cache, idx are the tokens after those in it, and are added to it.
        """


def next_token(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """logits (B, V) -> token ids (B, 1), as `stream` draws them. Raises ValueError for logits that are not finite."""
    token, largest = _draw(logits, temperature, top_k, top_p, generator)
    _check_finite(largest, "logits")
    return token


def _draw(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """logits (B, V) -> (token ids (B, 1), largest logits (B, 1)). A token is valid if that logit is finite."""
    largest, likeliest = logits.max(-1, keepdim=True)  # the first of those that are equal
    if temperature < COLDEST:
        return likeliest, largest
    logits, largest = (t if t.dtype == torch.float64 else t.float() for t in (logits, largest))
    scaled = (logits - largest) / min(temperature, HOTTEST)  # (B, V), at most 0, so that nothing overflows
    if top_k is not None and top_k < logits.shape[-1]:
        scaled = scaled.masked_fill(~_largest(logits, top_k), -torch.inf)
    probs = torch.softmax(scaled, dim=-1)
    if top_p is not None and top_p < 1.0:
        order = logits.argsort(descending=True, stable=True)  # not of probs, which a high temperature makes equal
        ordered = probs.gather(-1, order)
        left_out = ordered.cumsum(-1) - ordered >= top_p  # the tokens before it have the mass already
        left_out[:, 0] = False
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered.masked_fill(left_out, 0.0))
    # The same bits as a draw of torch.multinomial, without its checks, which would wait for a GPU. Each token gets a
    # waiting time, exponential with rate p_i, which is E / p_i with E of rate 1: token i is the first with probability
    # p_i. The bound keeps E above 0, because argmax would take 0 / 0.
    waiting = torch.empty_like(probs).exponential_(generator=generator).clamp_(min=COLDEST)
    return (probs / waiting).argmax(-1, keepdim=True), largest


def _largest(logits: Tensor, k: int) -> Tensor:
    """A mask (B, V) of the k largest logits of each row: exactly k, of equal ones the first."""
    smallest = logits.topk(k).values[:, -1:]
    above, equal = logits > smallest, logits == smallest
    return above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


def _check_finite(largest: Tensor, what: str) -> None:
    """Raise ValueError if a row's maximum in `largest` (B, 1) is nan or inf (one logit is) or -inf (all are)."""
    for row, value in enumerate(largest.flatten().tolist()):
        if not math.isfinite(value):
            kind = "all are -inf" if value < 0 else f"one is {value}"
            raise ValueError(f"{what}: in row {row}, {kind}; expected finite numbers, or -inf for some of the tokens")


Draw = Callable[[Tensor], tuple[Tensor, Tensor]]  # `_draw` with its settings
CachedStep = Callable[[Tensor, Any], tuple[Tensor, Tensor]]  # (tokens after those in the cache, cache) -> as `_draw`


def _checked(
    model: Model, idx: Tensor, max_new_tokens: Any, temperature: Any = 1.0, top_k: Any = None, top_p: Any = None
) -> tuple[int, dict[str, Any]]:
    """max_new_tokens, and the settings of `_draw`, as Python's numbers. Raises ValueError naming the wrong argument."""
    if not isinstance(idx, Tensor) or idx.ndim != 2 or idx.dtype not in (torch.int64, torch.int32):
        raise ValueError("idx: expected token ids of shape (B, T), int64")
    if idx.shape[1] == 0:
        raise ValueError("idx: the prompt is empty; give at least one token")
    n = as_int_argument("max_new_tokens", max_new_tokens, 0)
    degree = as_float(temperature)
    if degree is None or not 0.0 <= degree < math.inf:
        raise ValueError(f"temperature: expected a number of at least 0, got {temperature!r}")
    k = None if top_k is None else as_int_argument("top_k", top_k, 1)
    p = as_float(top_p)
    if top_p is not None and (p is None or not 0.0 < p <= 1.0):
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")
    if not model.cfg.is_causal:
        raise ValueError("model: generation needs is_causal=True")
    return n, {"temperature": degree, "top_k": k, "top_p": p}


def _checked_stride(model: Model, stride: Any) -> int | None:
    if stride is None:
        return None
    limit = model.context_size
    if limit is None:
        raise ValueError("stride: this model reads a text of any length and never drops a token; leave it out")
    n = as_int_argument("stride", stride, 1)
    if n > limit:
        raise ValueError(f"stride: expected at most {limit}, the tokens of the model's context, got {n}")
    return n


def stream(
    model: Model,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    cuda_graph: bool = False,
    stride: int | None = None,
) -> Iterator[Tensor]:
    """Yield each next token (B, 1) that continues idx (B, T), int64 or int32, in the dtype of idx.

    temperature: divides the logits; 0, or anything below 2**-126, takes the likeliest token. top_k: sample among the k
    likeliest tokens. top_p: sample among the fewest whose probabilities sum to p (Holtzman et al. 2020). Of equally
    likely tokens all three take those with the lowest ids. generator: a random generator on the device of idx, which
    makes the sample repeatable. use_cache=False computes the whole context at each step, to compare with. cuda_graph:
    while the cache serves a token, launch its kernels at once (see generate_graph.py); the model's tensors must then
    stay where they are until the last token.

    stride: how many of the oldest tokens leave a full context at once, 1 to `block_size`. The keys and values of those
    that stay are computed anew, once, and the cache serves the next tokens until it is full again. By default one token
    leaves at each step, and nothing is cached. A stride changes the text after `block_size` tokens: a new token sees
    the last `block_size - stride + 1` to `block_size` tokens, by default always `block_size`. Positions count from the
    first token that it sees, in both cases, so a stride of 1 gives the text of the default.

    The model is in evaluation mode while a token is computed, and in its own mode again when it is yielded.

    Raises ValueError naming the argument at the call, and, while sampling, for logits of which one is nan or inf or
    all of a row are -inf. On a GPU that error comes one token late, so that the next step need not wait for the check.
    """
    n, settings = _checked(model, idx, max_new_tokens, temperature, top_k, top_p)
    draw = partial(_draw, generator=generator, **settings)
    stride = _checked_stride(model, stride)
    if not cuda_graph:
        return _stream(model, idx, n, draw, use_cache, stride)
    from .cuda_graph import recorder
    from .generate_graph import GraphedTokens

    return _stream(model, idx, n, draw, use_cache, stride, GraphedTokens(model, draw, generator, recorder(idx.device)))


def stream_names(model: Model, idx: Tensor, max_new_tokens: int, boundary: int, **options: Any) -> Iterator[Tensor]:
    """`stream` for a model of names. idx (1, T) begins with the token `boundary`, which starts and ends every name.

    After each end the context is that token alone, so that no name is context of the next, as in training.
    options: temperature, top_k, top_p, generator and stride of `stream`.
    """
    generator, stride = options.pop("generator", None), _checked_stride(model, options.pop("stride", None))
    n, settings = _checked(model, idx, max_new_tokens, **options)
    return _stream_names(model, idx, n, boundary, partial(_draw, generator=generator, **settings), stride)


def _stream_names(
    model: Model, idx: Tensor, max_new_tokens: int, boundary: int, draw: Draw, stride: int | None
) -> Iterator[Tensor]:
    while max_new_tokens > 0:
        for token in _stream(model, idx, max_new_tokens, draw, True, stride):
            max_new_tokens -= 1
            yield token
            if int(token) == boundary:
                idx = token
                break


def _stream(
    model: Model,
    idx: Tensor,
    max_new_tokens: int,
    draw: Draw,
    use_cache: bool,
    stride: int | None,
    by_graph: CachedStep | None = None,
) -> Iterator[Tensor]:
    was_training = model.training
    limit = model.context_size
    cached_up_to = math.inf if limit is None or stride is not None else limit
    step = by_graph or (lambda new, cache: draw(model.next_logits(new, cache)))
    new = idx if limit is None else idx[:, -limit:]  # the tokens that are not in the cache
    context = [new]  # in pieces, which are joined where all of it is computed at once
    n_context = new.shape[1]
    cache = None
    late = 0 if idx.is_cpu else 1  # on a GPU a token is checked once the next one's kernels have been launched
    unread: list[tuple[Tensor, str]] = []
    try:
        for position in range(idx.shape[1], idx.shape[1] + max_new_tokens):
            if model.training:  # asked at each token: the caller may train the model between two of them
                model.eval()
            with torch.no_grad():
                if limit is not None and stride is not None and n_context > limit:
                    new = _joined(context, limit + 1 - stride)
                    context, n_context = [new], new.shape[1]
                    if cache is not None:
                        cache.length = 0
                if use_cache and cache is None and position < cached_up_to:
                    cache = model.new_cache(idx.shape[0])
                    new = new if cache is None else _joined(context, limit)
                if cache is not None and cache.length < cached_up_to:
                    token, largest = step(new, cache)
                else:
                    context = [_joined(context, limit)]
                    token, largest = draw(model.next_logits(context[0]))
            unread.append((largest, f"model: its logits for position {position}"))
            if len(unread) > late:
                _check_finite(*unread.pop(0))
            new = token.to(idx.dtype)
            if cache is not None and limit is None:
                context = []  # it is never computed again
            context.append(new)
            n_context += 1
            if was_training:
                model.train()
            yield new
        for check in unread:
            _check_finite(*check)
    finally:
        if model.training != was_training:
            model.train(was_training)


def _joined(context: list[Tensor], limit: int | None) -> Tensor:
    """Pieces (B, T_i) of a context as one tensor, of the last `limit` tokens."""
    whole = context[0] if len(context) == 1 else torch.cat(context, dim=1)
    return whole if limit is None else whole[:, -limit:]
