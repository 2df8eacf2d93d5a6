"""Generation by a CUDA graph: the kernels of one token, its draw included, in one launch.

A token of a small model takes a GPU less time than the launches of its kernels take the host. The graph of one token
serves all of them, because nothing in it changes but the contents of tensors: the token before is copied into one, the
length of the cache into another. A graph belongs to one cache, and so to one batch size.

`CHECKED_TOKENS` tokens are computed twice, by the graph and without it, and those without it are yielded. Where a graph
cannot be recorded, or gives something else, generation goes on without it, and `GraphedTokens.reason` says why.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from . import cuda_graph
from .ops.arguments import autocast_dtype

if TYPE_CHECKING:
    from .generate import Model

CHECKED_TOKENS = 4
# How far the graph's logits, and what it adds to the cache, may be from those without it, relative to these, in the
# Euclidean norm. Its attention splits the keys otherwise, so the last bits differ.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 3e-2}


class GraphedCache(Protocol):
    """What a cache has so that a graph can use it. `cache.KVCache` has it."""

    length: int

    def length_on_device(self, position: Tensor) -> contextlib.AbstractContextManager[None]:
        """In this context the length is `position`, 0-dim int64, and is read on the device. It does not grow."""

    def entry(self, index: int) -> Tensor:
        """What the cache holds of token `index`."""


class GraphedTokens:
    """(the token before, cache) -> what `draw` gives for its logits: by a graph, once that was checked."""

    def __init__(
        self,
        model: Model,
        draw: Callable[[Tensor], tuple[Tensor, ...]],
        generator: Any,  # torch.Generator or None
        recorder: cuda_graph.Recorder,
    ) -> None:
        self._model, self._draw, self._generator, self._recorder = model, draw, generator, recorder
        self._replay: Callable[[], tuple[Tensor, ...]] | None = None
        self._tokens_to_check = CHECKED_TOKENS
        self.reason: str | None = None  # why tokens are computed without a graph

    def __call__(self, new: Tensor, cache: Any) -> tuple[Tensor, ...]:
        if self.reason is not None or cache.length == 0 or new.shape[1] != 1:  # a prompt has any length
            return self._draw(self._model.next_logits(new, cache))
        if self._replay is None:
            self._replay = self._recorded(new, cache)
        if self._replay is None:
            return self._draw(self._model.next_logits(new, cache))
        self._new.copy_(new)
        self._position.fill_(cache.length)
        if self._tokens_to_check > 0:
            return self._checked(self._replay, new, cache)
        _, *drawn = self._replay()
        cache.length += 1
        return tuple(tensor.clone() for tensor in drawn)  # the next replay writes into the same tensors

    def _recorded(self, new: Tensor, cache: Any) -> Callable[[], tuple[Tensor, ...]] | None:
        reason = cuda_graph.why_not_recorded(self._model)
        if not hasattr(cache, "length_on_device"):
            reason = f"its cache, a {type(cache).__name__}, cannot keep its length on the device"
        elif autocast_dtype(new) is not None:
            reason = "autocast is on, which keeps copies of the weights only for a while"
        if reason is None:
            self._new = new.clone()
            self._position = torch.full((), cache.length, dtype=torch.int64, device=new.device)

            def run() -> tuple[Tensor, ...]:
                with cache.length_on_device(self._position):
                    logits = self._model.next_logits(self._new, cache)
                return logits, *self._draw(logits)

            try:
                with self._drawing_again():
                    self._recorder.warm_up(run)
                return self._recorder.record(run, self._generator)
            except Exception as error:  # a driver or a compiler may raise anything
                reason = cuda_graph.words(error)
        self._give_up(reason)
        return None

    def _checked(self, replay: Callable[[], tuple[Tensor, ...]], new: Tensor, cache: Any) -> tuple[Tensor, ...]:
        """The token by the graph, and without it, which is what counts; both write the same place of the cache."""
        index = cache.length
        cache.entry(index).zero_()
        with self._drawing_again():
            logits, token, *_ = replay()
        logits, entry = logits.clone(), cache.entry(index).clone()
        with self._drawing_again():
            same_draw = torch.equal(token, self._draw(logits)[0])
        expected = self._model.next_logits(new, cache)
        result = self._draw(expected)
        problem = None if same_draw else "it draws another token from the same logits"
        problem = problem or _difference("its logits", logits, expected)
        problem = problem or _difference("what it adds to the cache", entry, cache.entry(index))
        self._tokens_to_check -= 1
        if problem is not None:
            self._give_up(f"it does not do what is done without it: {problem}")
        return result

    @contextlib.contextmanager
    def _drawing_again(self) -> Iterator[None]:
        """What is drawn in this context is drawn once more after it."""
        generator = self._generator or cuda_graph.default_generator(self._new.device)
        state = generator.get_state()
        try:
            yield
        finally:
            generator.set_state(state)

    def _give_up(self, reason: str | None) -> None:
        assert reason is not None
        self.reason = cuda_graph.said("generation", reason)
        self._replay = None


def _difference(what: str, found: Tensor, expected: Tensor) -> str | None:
    """By how much they differ, where that is too much; None else."""
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return f"{what} are not finite elsewhere"
    found, expected_values = (torch.nan_to_num(x.double(), 0.0, 0.0, 0.0) for x in (found, expected))
    error, size = float((found - expected_values).norm()), float(expected_values.norm())
    if error <= TOLERANCE[expected.dtype] * size:
        return None
    return f"{what} differ by {error:.3g} in the Euclidean norm, of {size:.3g}"
