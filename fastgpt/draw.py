"""One token from its logits: temperature, top-k, top-p, the repetition penalty, and the draw itself.

What a sampler does with a model is in generate.py; here the logits are given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import as_float, as_int_argument

# Between these a temperature and its reciprocal are normal float32 numbers; a GPU may take smaller ones for zero.
COLDEST, HOTTEST = 2.0**-126, 2.0**126

Generators = torch.Generator | Sequence[torch.Generator | None] | None  # one for all rows, or one for each


class DrawSettings(NamedTuple):
    """How a token is drawn, as `generate.stream` explains it."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0


def checked_settings(
    temperature: Any = 1.0, top_k: Any = None, top_p: Any = None, repetition_penalty: Any = 1.0
) -> DrawSettings:
    """The settings as Python's numbers. Raises ValueError naming the wrong one."""
    degree = as_float(temperature)
    if degree is None or not 0.0 <= degree < math.inf:
        raise ValueError(f"temperature: expected a number of at least 0, got {temperature!r}")
    k = None if top_k is None else as_int_argument("top_k", top_k, 1)
    p = as_float(top_p)
    if top_p is not None and (p is None or not 0.0 < p <= 1.0):
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")
    penalty = as_float(repetition_penalty)
    if penalty is None or not 0.0 < penalty < math.inf:
        raise ValueError(f"repetition_penalty: expected a number above 0, got {repetition_penalty!r}")
    return DrawSettings(degree, k, p, penalty)


def checked_generators(generator: Any, n_rows: int) -> Generators:
    """Raises ValueError unless it is None, a generator, or a list of one for each of `n_rows` rows."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if not isinstance(generator, (list, tuple)):
        raise ValueError(f"generator: expected a torch.Generator or a list of them, got {type(generator).__name__}")
    for entry in generator:
        if entry is not None and not isinstance(entry, torch.Generator):
            raise ValueError(f"generator: expected a list of torch.Generators, got a {type(entry).__name__} in it")
    if len(generator) != n_rows:
        raise ValueError(f"generator: expected one, or {n_rows}, one for each row; got {len(generator)}")
    given = [id(entry) for entry in generator if entry is not None]
    if len(set(given)) < len(given):
        raise ValueError("generator: one is in the list twice; give each row one of its own, or one for all rows")
    return list(generator)


def next_token(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: Generators = None,
    repetition_penalty: float = 1.0,
    context: Tensor | None = None,
) -> Tensor:
    """logits (B, V) -> token ids (B, 1), as `generate.stream` draws them.

    context (B, T), int64, are the tokens that count for the repetition penalty. Raises ValueError for logits that are
    not finite, and for a penalty without a context.
    """
    settings = DrawSettings(temperature, top_k, top_p, repetition_penalty)
    if repetition_penalty != 1.0 and context is None:
        raise ValueError("context: is missing; give the tokens (B, T) that the repetition penalty counts")
    token, largest = Draw(settings, generator, context)(logits)[:2]
    check_finite(largest, "logits")
    return token


class Draw:
    """logits (B, V) -> (token ids (B, 1), largest logits (B, 1)), one token of each row after the other.

    A token is valid if its row's largest logit is finite. `context` (B, T) are the tokens from which the repetition
    penalty counts on. With `logprobs` a third result is the log-probability (B, 1), float32, of each token by the
    logits as they are given.
    """

    def __init__(
        self,
        settings: DrawSettings,
        generator: Generators = None,
        context: Tensor | None = None,
        logprobs: bool = False,
    ) -> None:
        self._settings, self._generator, self._logprobs = settings, generator, logprobs
        self._context = None if settings.repetition_penalty == 1.0 else context
        self._seen: Tensor | None = None

    def __call__(self, logits: Tensor) -> tuple[Tensor, ...]:
        if self._context is not None and self._seen is None:
            self._seen = seen_tokens(self._context, logits.shape[-1])
        token, largest = draw(logits, self._settings, self._generator, self._seen)
        if self._seen is not None:
            self._seen.scatter_(1, token, True)
        if not self._logprobs:
            return token, largest
        return token, largest, log_probabilities(logits).gather(-1, token).float()


def draw(
    logits: Tensor, settings: DrawSettings, generator: Generators = None, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """logits (B, V) -> (token ids (B, 1), largest logits (B, 1)). seen (B, V), bool: the tokens of each row so far."""
    temperature, top_k, top_p, penalty = settings
    largest, likeliest = logits.max(-1, keepdim=True)  # the first of those that are equal
    given = largest
    if seen is not None:
        logits = _penalised(logits, seen, penalty)
        largest, likeliest = logits.max(-1, keepdim=True)
    if temperature < COLDEST:
        return likeliest, given
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
    waiting = _exponential(torch.empty_like(probs), generator).clamp_(min=COLDEST)
    return (probs / waiting).argmax(-1, keepdim=True), given


def _exponential(out: Tensor, generator: Generators) -> Tensor:
    """Fill `out` (B, V) from one generator, or each row from its own, as it would be filled alone."""
    if generator is None or isinstance(generator, torch.Generator):
        return out.exponential_(generator=generator)
    for row, own in zip(out.split(1), generator, strict=True):
        row.exponential_(generator=own)
    return out


def _largest(logits: Tensor, k: int) -> Tensor:
    """A mask (B, V) of the k largest logits of each row: exactly k, of equal ones the first."""
    smallest = logits.topk(k).values[:, -1:]
    above, equal = logits > smallest, logits == smallest
    return above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


def _penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """The logits with those of `seen` tokens divided by the penalty where they are positive, and multiplied else.

    Nothing overflows to an infinity, and a token that the model excludes by -inf stays excluded.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    bound = torch.finfo(logits.dtype).max
    changed = torch.where(logits > 0, logits / penalty, logits * penalty).clamp(-bound, bound)
    return torch.where(seen & (logits > -torch.inf), changed, logits)


def seen_tokens(context: Tensor, vocab_size: int) -> Tensor:
    """context (B, T) -> (B, V), bool: which tokens occur in each row."""
    seen = torch.zeros(context.shape[0], vocab_size, dtype=torch.bool, device=context.device)
    return seen.scatter_(1, context.long(), True)


def log_probabilities(logits: Tensor) -> Tensor:
    """logits (B, V) -> the log-probabilities (B, V) of the model's own distribution, in at least float32."""
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def check_finite(largest: Tensor, what: str) -> None:
    """Raise ValueError if a row's maximum in `largest` (B, 1) is nan or inf (one logit is) or -inf (all are)."""
    for row, value in enumerate(largest.flatten().tolist()):
        if not math.isfinite(value):
            raise ValueError(f"{what}: in row {row}, {not_finite(value)}")


def not_finite(largest: float) -> str:
    """What is wrong with logits of which this is the largest."""
    kind = "all are -inf" if largest < 0 else f"one is {largest}"
    return f"{kind}; expected finite numbers, or -inf for some of the tokens"
