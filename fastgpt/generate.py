"""Sampling, one token at a time, with a cache of keys and values.

While the sequence fits `block_size`, a step computes one new token against the cache. Past it the context is the last
`block_size` tokens, as in the lecture: every token's position then moves by one each step, learned position
embeddings change with it, and so does everything in the cache; the window is computed afresh. A recurrent model's
cache is its state, which no length of text outgrows.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .model import LanguageModel

# Between these a temperature and its reciprocal are normal float32 numbers: what a GPU may divide by.
COLDEST, HOTTEST = 2.0**-126, 2.0**126


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
    """(token ids (B, 1), largest logits (B, 1)). Where a row's largest logit is not finite, its token means nothing."""
    largest, likeliest = logits.max(-1, keepdim=True)  # the first of those that are equal
    if temperature < COLDEST:
        return likeliest, largest
    logits, largest = (t if t.dtype == torch.float64 else t.float() for t in (logits, largest))
    scaled = (logits - largest) / min(temperature, HOTTEST)  # at most 0, so that nothing overflows
    if top_k is not None and top_k < logits.shape[-1]:
        scaled = scaled.masked_fill(~_largest(logits, top_k), -torch.inf)
    probs = torch.softmax(scaled, dim=-1)
    if top_p is not None and top_p < 1.0:
        order = logits.argsort(descending=True, stable=True)  # not of probs: a high temperature makes them equal
        ordered = probs.gather(-1, order)
        left_out = ordered.cumsum(-1) - ordered >= top_p  # by the mass of the tokens ahead
        left_out[:, 0] = False
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered.masked_fill(left_out, 0.0))
    # One draw of torch.multinomial, to the bit, without its checks, for which a GPU would be waited for. An exponential
    # of rate p is E / p with E of rate 1, and the token with the smallest one is token i with probability p_i.
    waiting = torch.empty_like(probs).exponential_(generator=generator).clamp_(min=COLDEST)  # 0 / 0 would win
    return (probs / waiting).argmax(-1, keepdim=True), largest


def _largest(logits: Tensor, k: int) -> Tensor:
    """Which are the k largest of each row (B, V): exactly k, of equal ones the first."""
    smallest = logits.topk(k).values[:, -1:]
    above, equal = logits > smallest, logits == smallest
    return above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


def _check_finite(largest: Tensor, what: str) -> None:
    """`largest` (B, 1) tells of whole rows: it is nan or inf where one logit is, and -inf where all are."""
    for row, value in enumerate(largest.flatten().tolist()):
        if not math.isfinite(value):
            kind = "all are -inf" if value < 0 else f"one is {value}"
            raise ValueError(f"{what}: in row {row}, {kind}; expected finite numbers, or -inf for some of the tokens")


def _integer(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or _is_bool(value):
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    return number


def _number(name: str, value: Any) -> float:
    """`value` as a float, nan if it is no real number: of Python, NumPy or a tensor of one number."""
    if _is_bool(value) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


def _checked(
    model: LanguageModel, idx: Tensor, max_new_tokens: Any, temperature: Any, top_k: Any, top_p: Any
) -> tuple[int, float, int | None, float | None]:
    """The four settings as plain numbers. Raises ValueError naming the argument that cannot be used."""
    if not isinstance(idx, Tensor) or idx.ndim != 2 or idx.dtype not in (torch.int64, torch.int32):
        raise ValueError("idx: expected token ids of shape (B, T), int64")
    if idx.shape[1] == 0:
        raise ValueError("idx: the prompt is empty; give at least one token")
    n = _integer("max_new_tokens", max_new_tokens, 0)
    degree = _number("temperature", temperature)
    if not 0.0 <= degree < math.inf:
        raise ValueError(f"temperature: expected a number of at least 0, got {temperature!r}")
    k = None if top_k is None else _integer("top_k", top_k, 1)
    p = None if top_p is None else _number("top_p", top_p)
    if p is not None and not 0.0 < p <= 1.0:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")
    if not model.cfg.is_causal:
        raise ValueError("model: generation needs is_causal=True")
    return n, degree, k, p


def stream(
    model: LanguageModel,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yield each next token (B, 1) that continues idx (B, T).

    temperature: divides the logits; 0, or anything below 2**-126, is greedy. top_k: sample among the k likeliest.
    top_p: among the fewest whose mass reaches p (Holtzman et al. 2020). Of equally likely tokens all three take those
    of the lowest ids. generator: makes it repeatable. use_cache=False recomputes the whole context each step, to
    compare with. The model is put into eval mode for the time, and its mode restored.

    Raises ValueError naming the argument, and for logits that are not finite (-inf is, for some of a row's tokens). On
    a GPU the second kind surfaces one token late, so that no token is waited for.
    """
    settings = _checked(model, idx, max_new_tokens, temperature, top_k, top_p)
    return _stream(model, idx, *settings, generator, use_cache)


def stream_names(model: LanguageModel, idx: Tensor, max_new_tokens: int, boundary: int, **options) -> Iterator[Tensor]:
    """`stream` for a model of names: idx (1, T) begins with the start token, and after each end token it starts anew.

    So no name is context of the next one, as in training. options: temperature, top_k, top_p and generator of `stream`.
    """
    settings = options.get("temperature", 1.0), options.get("top_k"), options.get("top_p")
    n, *_ = _checked(model, idx, max_new_tokens, *settings)
    return _stream_names(model, idx, n, boundary, options)


def _stream_names(model, idx, max_new_tokens, boundary, options):
    while max_new_tokens > 0:
        for token in stream(model, idx, max_new_tokens, **options):
            max_new_tokens -= 1
            yield token
            if int(token) == boundary:
                idx = token
                break


def _stream(model, idx, max_new_tokens, temperature, top_k, top_p, generator, use_cache):
    was_training = model.training
    limit = model.context_size
    context = idx if limit is None else idx[:, -limit:]
    cache = None
    late = 0 if idx.is_cpu else 1  # on a GPU a token's check is read when the next one has been launched
    unread: list[tuple[Tensor, str]] = []
    try:
        for position in range(idx.shape[1], idx.shape[1] + max_new_tokens):
            if model.training:  # asked here, not once: the caller may train between two tokens of a generator
                model.eval()
            with torch.no_grad():
                if use_cache and cache is None and (limit is None or context.shape[1] < limit):
                    cache = model.new_cache(idx.shape[0])
                if cache is not None and (limit is None or cache.length < limit):
                    logits = model.next_logits(context[:, cache.length :], cache)
                else:
                    logits = model.next_logits(context)
                token, largest = _draw(logits, temperature, top_k, top_p, generator)
            unread.append((largest, f"model: its logits for position {position}"))
            if len(unread) > late:
                _check_finite(*unread.pop(0))
            context = torch.cat([context, token.to(context.dtype)], dim=1)
            context = context if limit is None else context[:, -limit:]
            if was_training:
                model.train()
            yield token.to(idx.dtype)
        for check in unread:
            _check_finite(*check)
    finally:
        if model.training != was_training:
            model.train(was_training)
