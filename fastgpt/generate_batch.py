"""Sequences of unequal lengths that are continued together, and come and go between any two tokens.

A step computes one new token of every sequence. Sequences whose new token is their only one without keys and values
share one call of the model, which reads its weights once for all of them; this is where a batch gains. A prompt is
computed alone when it comes, and so there is no padding. What has no rows of its own length is still right: contexts
of one length that are computed as a whole share a call, and each recurrent state is continued alone.

    batch = Batch(model, 8)
    slot = batch.add(tokenizer.encode("ROMEO. "), temperature=0.8, generator=torch.Generator().manual_seed(1))
    token = batch.step()[slot].token
    batch.remove(slot)
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .config import as_int_argument
from .draw import DrawSettings, checked_settings, draw, log_probabilities, not_finite, seen_tokens

if TYPE_CHECKING:
    from .generate import Model


class Drawn(NamedTuple):
    """A new token. Log-probabilities, where they were asked for, are in nats and those of the model itself."""

    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] = []  # noqa: RUF012  (the likeliest tokens, and their log-probabilities)


@dataclass
class _Sequence:
    context: list[int]  # the tokens that the next one follows from
    n_new: int  # how many of them, the last ones, are not in the cache
    position: int  # of the next token in the text
    settings: DrawSettings
    generator: torch.Generator | None
    logprobs: int | None
    cache: Any = None  # its own, where there are no rows
    seen: Tensor | None = None  # (V,), bool: its tokens so far, for the repetition penalty
    prompt: list[int] = field(default_factory=list)  # from which `seen` is made


class Batch:
    """Up to `size` sequences of one model, each in a slot. To be used from one thread.

    stride: as in `generate.stream`: how many of the oldest tokens leave a full context at once; by default each step
    computes the last `block_size` tokens of such a sequence again. The model is in evaluation mode while a step
    computes, and then in its own mode again.

    A sequence's tokens are those that `generate.stream` would draw for it alone with the same generator; only the last
    bits of its logits depend on how many sequences are computed together.
    """

    def __init__(self, model: Model, size: int, *, stride: int | None = None, use_cache: bool = True) -> None:
        """Raises ValueError naming the argument. use_cache=False computes whole contexts, to compare with."""
        self._model, self._size = model, as_int_argument("size", size, 1)
        if not model.cfg.is_causal:
            raise ValueError("model: generation needs is_causal=True")
        self._stride, self._limit = checked_stride(model, stride), model.context_size
        self._sequences: dict[int, _Sequence] = {}
        self._use_cache = use_cache
        self._device: torch.device | None = None  # the model's, asked at each step
        new_rows = getattr(model, "new_rows", None)
        self._rows: Any = new_rows(self._size) if use_cache and new_rows is not None else None

    @property
    def free(self) -> int:
        """How many sequences can be added now."""
        return self._size - len(self._sequences)

    def add(
        self,
        tokens: Sequence[int] | Tensor,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        repetition_penalty: float = 1.0,
        logprobs: int | None = None,
    ) -> int:
        """The slot of a new sequence that goes on from `tokens`, at least one; nothing is computed yet.

        The settings are those of `generate.stream`. `generator` is on the model's device, and belongs to this sequence
        alone if its tokens shall not depend on the others. logprobs: with each new token comes its log-probability, and
        those of so many of the likeliest tokens.

        Raises ValueError naming the argument; `size` where no slot is free.
        """
        ids = _checked_tokens(tokens, self._model.cfg.vocab_size)
        settings = checked_settings(temperature, top_k, top_p, repetition_penalty)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        n_top = None if logprobs is None else as_int_argument("logprobs", logprobs, 0)
        if self.free == 0:
            raise ValueError(f"size: all {self._size} slots are taken; remove a sequence first")
        slot = next(slot for slot in range(self._size) if slot not in self._sequences)
        context = list(ids) if self._limit is None else ids[-self._limit :]
        sequence = _Sequence(context, len(context), len(ids), settings, generator, n_top)
        if settings.repetition_penalty != 1.0:
            sequence.prompt = ids
        self._sequences[slot] = sequence
        if self._rows is not None:
            self._rows.clear(slot)
        elif self._use_cache and (self._limit is None or self._stride is not None or len(ids) < self._limit):
            sequence.cache = self._model.new_cache(1)
        return slot

    def remove(self, slot: int) -> None:
        """End the sequence in `slot`, which another one may then take. Raises ValueError where there is none."""
        if slot not in self._sequences:
            raise ValueError(
                f"slot: expected one of {sorted(self._sequences)}, in which there are sequences, got {slot!r}"
            )
        del self._sequences[slot]

    def step(self) -> dict[int, Drawn]:
        """One new token of every sequence, by its slot.

        Raises ValueError for logits of which one is nan or inf or all are -inf. The batch is then of no more use.
        """
        if not self._sequences:
            return {}
        self._device = _device_of(self._model)
        with torch.no_grad(), _evaluating(self._model):
            for slot, sequence in self._sequences.items():
                self._move_window(slot, sequence)
            slots, logits = self._logits()
            drawn = self._draw(slots, logits)
        for slot, result in drawn.items():
            sequence = self._sequences[slot]
            if sequence.cache is not None and self._limit is None:
                sequence.context.clear()  # it is never computed again
            sequence.context.append(result.token)
            sequence.n_new, sequence.position = sequence.n_new + 1, sequence.position + 1
        return drawn

    def _move_window(self, slot: int, sequence: _Sequence) -> None:
        """Drop the oldest tokens of a context that has become too long, and with them what the cache holds."""
        if self._limit is None or len(sequence.context) <= self._limit:
            return
        sequence.context = sequence.context[-(self._limit + 1 - (self._stride or 1)) :]
        sequence.n_new = len(sequence.context)
        if self._rows is not None:
            self._rows.lengths[slot] = 0
        elif sequence.cache is not None and self._stride is not None:
            sequence.cache.length = 0

    def _is_cached(self, sequence: _Sequence) -> bool:
        """Whether a cache serves the next token: not where the exact window moves at each step."""
        if self._rows is None and sequence.cache is None:
            return False
        return self._limit is None or self._stride is not None or sequence.position <= self._limit

    def _logits(self) -> tuple[list[int], Tensor]:
        """The slots in their order, and the logits (n, V) of their next tokens."""
        alone, together, whole = [], [], defaultdict(list)
        for slot, sequence in sorted(self._sequences.items()):
            if not self._is_cached(sequence):
                whole[len(sequence.context)].append(slot)
            elif self._rows is not None and sequence.n_new == 1:
                together.append(slot)
            else:
                alone.append(slot)
        pieces = [([slot], self._of_one(slot, self._sequences[slot])) for slot in alone]
        pieces += [(slots, self._model.next_logits(self._tokens(slots, length))) for length, slots in whole.items()]
        if together:
            new = self._tokens(together, 1)
            pieces.append((together, self._model.next_logits(new, self._rows.choose(together, new.device))))
        for slots, _ in pieces:
            for slot in slots:
                self._sequences[slot].n_new = 0
        if len(pieces) == 1:
            return pieces[0]
        slots = [slot for group, _ in pieces for slot in group]
        order = sorted(range(len(slots)), key=slots.__getitem__)
        return [slots[i] for i in order], torch.cat([logits for _, logits in pieces])[order]

    def _of_one(self, slot: int, sequence: _Sequence) -> Tensor:
        """The logits (1, V) after all new tokens of one sequence, which join its cache."""
        new = self._tokens([slot], sequence.n_new)
        if self._rows is None:
            return self._model.next_logits(new, sequence.cache)
        cache = self._rows.only(slot)
        logits = self._model.next_logits(new, cache)
        self._rows.keep(slot, cache)
        return logits

    def _tokens(self, slots: list[int], n: int) -> Tensor:
        """The last n tokens of each, (len(slots), n), on the model's device."""
        return torch.tensor([self._sequences[slot].context[-n:] for slot in slots], device=self._device)

    def _draw(self, slots: list[int], logits: Tensor) -> dict[int, Drawn]:
        """A token of each row; rows that are drawn by the same settings at once."""
        groups = defaultdict(list)
        for row, slot in enumerate(slots):
            groups[self._sequences[slot].settings].append(row)
        drawn: dict[int, Drawn] = {}
        for settings, rows in groups.items():
            of_group = logits if len(rows) == len(slots) else logits[rows]
            drawn |= self._draw_group([slots[row] for row in rows], of_group, settings)
        return {slot: drawn[slot] for slot in slots}

    def _draw_group(self, slots: list[int], logits: Tensor, settings: DrawSettings) -> dict[int, Drawn]:
        sequences = [self._sequences[slot] for slot in slots]
        seen = None
        if settings.repetition_penalty != 1.0:
            seen = torch.stack([_seen(sequence, logits) for sequence in sequences])
        tokens, largest = draw(logits, settings, [sequence.generator for sequence in sequences], seen)
        for slot, sequence, value in zip(slots, sequences, largest.flatten().tolist(), strict=True):
            if not math.isfinite(value):
                where = f"its logits for position {sequence.position} of the sequence in slot {slot}"
                raise ValueError(f"model: {where}: {not_finite(value)}")
        results = [Drawn(token) for token in tokens.flatten().tolist()]
        asked = [row for row, sequence in enumerate(sequences) if sequence.logprobs is not None]
        if asked:
            for row, log_probs in zip(asked, log_probabilities(logits[asked]), strict=True):
                results[row] = _with_log_probabilities(results[row].token, log_probs, sequences[row].logprobs or 0)
        for sequence, result in zip(sequences, results, strict=True):
            if sequence.seen is not None:
                sequence.seen[result.token] = True
        return dict(zip(slots, results, strict=True))


def checked_stride(model: Model, stride: Any) -> int | None:
    if stride is None:
        return None
    limit = model.context_size
    if limit is None:
        raise ValueError("stride: this model reads a text of any length and never drops a token; leave it out")
    n = as_int_argument("stride", stride, 1)
    if n > limit:
        raise ValueError(f"stride: expected at most {limit}, the tokens of the model's context, got {n}")
    return n


def _checked_tokens(tokens: Any, vocab_size: int) -> list[int]:
    """The ids as Python's integers; ValueError where they are no sequence of at least one id of the vocabulary."""
    if isinstance(tokens, Tensor):
        if tokens.ndim != 1 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens: expected ids (T,), int64, got {tuple(tokens.shape)} {tokens.dtype}")
        ids = tokens.tolist()
    elif isinstance(tokens, (str, bytes)) or not isinstance(tokens, Sequence):
        raise ValueError(f"tokens: expected a list of ids or a tensor (T,), got {type(tokens).__name__}")
    else:
        ids = [as_int_argument("tokens", token) for token in tokens]
    if not ids:
        raise ValueError("tokens: the prompt is empty; give at least one token")
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise ValueError(f"tokens: expected ids in [0, {vocab_size}), got {wrong}")
    return ids


def _seen(sequence: _Sequence, logits: Tensor) -> Tensor:
    """(V,), bool: the tokens of a sequence so far, those that have left its context included."""
    if sequence.seen is None:
        prompt = torch.tensor([sequence.prompt], device=logits.device)
        sequence.seen = seen_tokens(prompt, logits.shape[-1])[0]
    return sequence.seen


def _with_log_probabilities(token: int, log_probs: Tensor, n_top: int) -> Drawn:
    values, ids = log_probs.topk(min(n_top, len(log_probs)))
    return Drawn(token, float(log_probs[token]), list(zip(ids.tolist(), values.tolist(), strict=True)))


def _device_of(model: Any) -> torch.device | None:
    """Where a model's tokens belong; None, the default device, for a model without parameters."""
    parameters = getattr(model, "parameters", None)
    first = None if parameters is None else next(iter(parameters()), None)
    return None if first is None else first.device


@contextlib.contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if model.training != was_training:
            model.train(was_training)
