"""Sampling, one token at a time, with a cache of keys and values.

While the sequence fits `block_size`, a step computes one new token against the cache. Past it the context is the last
`block_size` tokens, as in the lecture: every token's position then moves by one each step, learned position
embeddings change with it, and so does everything in the cache; the window is computed afresh. A recurrent model's
cache is its state, which no length of text outgrows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .model import LanguageModel


def next_token(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """logits (B, V) -> token ids (B, 1). Temperature 0 takes the largest; top-p is Holtzman et al. 2020."""
    if temperature == 0.0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    probs = torch.softmax(logits, dim=-1)
    if top_p is not None and top_p < 1.0:
        ordered, order = probs.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # the mass of the tokens ahead: the first is always kept
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered.masked_fill(before >= top_p, 0.0))
    return torch.multinomial(probs, 1, generator=generator)


def _check(
    model: LanguageModel, idx: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if not isinstance(idx, Tensor) or idx.ndim != 2 or idx.dtype not in (torch.int64, torch.int32):
        raise ValueError("idx: expected token ids of shape (B, T), int64")
    if idx.shape[1] == 0:
        raise ValueError("idx: the prompt is empty; give at least one token")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected an integer of at least 0, got {max_new_tokens!r}")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected a number of at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected an integer of at least 1, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
    if not model.cfg.is_causal:
        raise ValueError("model: generation needs is_causal=True")


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

    temperature: 0 is greedy. top_k: sample among the k likeliest. top_p: among the fewest whose mass reaches p.
    generator: makes it repeatable. use_cache=False recomputes the whole context each step, to compare with.
    The model is put into eval mode for the time, and its mode restored. Raises ValueError naming the argument.
    """
    _check(model, idx, max_new_tokens, temperature, top_k, top_p)
    return _stream(model, idx, max_new_tokens, temperature, top_k, top_p, generator, use_cache)


def stream_names(model: LanguageModel, idx: Tensor, max_new_tokens: int, boundary: int, **options) -> Iterator[Tensor]:
    """`stream` for a model of names: idx (1, T) begins with the start token, and after each end token it starts anew.

    So no name is context of the next one, as in training. options: temperature, top_k, top_p and generator of `stream`.
    """
    _check(model, idx, max_new_tokens, options.get("temperature", 1.0), options.get("top_k"), options.get("top_p"))
    return _stream_names(model, idx, max_new_tokens, boundary, options)


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
    try:
        for _ in range(max_new_tokens):
            model.eval()  # here, not once: the caller may train between two tokens of a generator
            with torch.no_grad():
                if use_cache and cache is None and (limit is None or context.shape[1] < limit):
                    cache = model.new_cache(idx.shape[0])
                if cache is not None and (limit is None or cache.length < limit):
                    logits = model.next_logits(context[:, cache.length :], cache)
                else:
                    logits = model.next_logits(context)
                token = next_token(logits, temperature, top_k, top_p, generator)
            context = torch.cat([context, token.to(context.dtype)], dim=1)
            context = context if limit is None else context[:, -limit:]
            model.train(was_training)
            yield token.to(idx.dtype)
    finally:
        model.train(was_training)
