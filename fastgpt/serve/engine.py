"""One thread that owns the model, and continues all present texts together, a token at a time.

Requests join and leave between any two tokens (continuous batching, as in Orca, Yu et al. 2022): a new text does not
wait until the longest of the others has ended. Everything that uses the model runs on this thread, so that none of it
needs a lock. What comes out is handed to a callback; `app.py` brings it to the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..data.completions import end_token
from ..data.layouts import boundary_token
from ..generate_batch import Batch, Drawn
from ..generate_text import Sample
from ..language_model import LanguageModel
from ..tokenizer import Tokenizer
from .errors import ApiError, busy

MOST_CALLS = 16  # that wait for the thread


class Token(NamedTuple):
    """A drawn token, and where its text begins in the completion."""

    drawn: Drawn
    offset: int


class Piece(NamedTuple):
    """What a text has got since the last piece. `finish`: "stop", "length", or None while it goes on."""

    text: str
    tokens: list[Token]
    finish: str | None = None
    error: BaseException | None = None


@dataclass(eq=False)
class Text:
    """A text to be continued. `deliver` is called on the engine's thread, with pieces, and then with no more."""

    prompt: list[int]
    max_new_tokens: int
    settings: dict[str, Any]  # of `Batch.add`
    seed: int
    stops: Sequence[str]
    deliver: Callable[[Piece], None]
    n_drawn: int = 0
    is_cancelled: bool = False
    sample: Any = None
    _undelivered: deque[tuple[Drawn, int, int]] = field(default_factory=deque)  # token, begin and end of its text
    _n_characters: int = 0  # of the text of all tokens, with what is held back
    _n_delivered: int = 0

    def push(self, drawn: Drawn) -> Piece:
        """The piece that is certain with this token, which may be the last."""
        self.n_drawn += 1
        begin = self._n_characters
        text = self.sample.push(drawn.token)
        self._n_characters = self._n_delivered + len(text) + self.sample.n_held
        self._undelivered.append((drawn, begin, self._n_characters))
        if self.sample.ended:
            return self._last(text, "stop")
        if self.n_drawn == self.max_new_tokens:
            text += self.sample.finish()
            return self._last(text, "stop" if self.sample.stopped else "length")
        self._n_delivered += len(text)
        tokens = []
        while self._undelivered and self._undelivered[0][2] <= self._n_delivered:
            tokens.append(self._next())
        return Piece(text, tokens)

    def _last(self, text: str, finish: str) -> Piece:
        """With the tokens whose text begins before the stop text; all of them where there is none."""
        self._n_delivered += len(text)
        tokens = []
        while self._undelivered:
            if self.sample.stopped and self._undelivered[0][1] >= self._n_delivered:
                break
            tokens.append(self._next())
        return Piece(text, tokens, finish)

    def _next(self) -> Token:
        drawn, begin, _ = self._undelivered.popleft()
        return Token(drawn, min(begin, self._n_delivered))


class Engine:
    """Continues up to `size` texts at a time, while up to `queue` wait for their turn, first come, first served.

    stride: as in `generate.stream`: how many of a full context's oldest tokens leave it at once. `context` is entered
    by the thread, and so are the settings of a thread that PyTorch keeps, as the preferred backend.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        size: int = 8,
        queue: int = 64,
        stride: int | None = None,
        context: contextlib.AbstractContextManager | None = None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._size, self._queue, self._stride = size, queue, stride
        self._context = context or contextlib.nullcontext()
        self._device = next(model.parameters()).device
        self._end = _end_of_text(tokenizer, model.layout)
        self._batch = self._new_batch()
        self._present: dict[int, Text] = {}
        self._waiting: deque[Text] = deque()
        self._calls: deque[tuple[Future, Callable[..., Any], tuple]] = deque()
        self._changed = threading.Condition()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="fastgpt engine", daemon=True)

    @property
    def capacity(self) -> int:
        """The most texts that are continued or wait at a time."""
        return self._size + self._queue

    def start(self) -> None:
        self._thread.start()

    def begin_to_stop(self) -> None:
        """Let the thread end after the token that it computes. Texts that were not complete get an error."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify()

    def stop(self) -> None:
        """The same, and wait until it has ended."""
        self.begin_to_stop()
        if self._thread.ident is not None:
            self._thread.join()

    def submit(self, texts: Sequence[Text]) -> None:
        """Continue these texts, all or none. Raises ApiError where too many wait already."""
        with self._changed:
            if self._is_stopped:
                raise ApiError(503, "the server is stopping")
            taken = len(self._waiting) + len(self._present)
            if taken + len(texts) > self.capacity:
                raise busy(f"{taken} texts are being continued or wait, of at most {self.capacity}; try again later")
            self._waiting.extend(texts)
            self._changed.notify()

    def cancel(self, texts: Sequence[Text]) -> None:
        """Nobody reads these texts any longer: they give up their places at the next token."""
        with self._changed:
            for text in texts:
                text.is_cancelled = True
            self._changed.notify()

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args), run on the engine's thread, between two tokens. Raises what it raises."""
        future: Future = Future()
        with self._changed:
            if self._is_stopped:
                raise ApiError(503, "the server is stopping")
            if len(self._calls) >= MOST_CALLS:
                raise busy("too many requests wait for the model; try again later")
            self._calls.append((future, function, args))
            self._changed.notify()
        return await asyncio.wrap_future(future)

    # ---- the thread ----

    def _run(self) -> None:
        with self._context:
            while self._wait_for_work():
                self._run_calls()
                self._let_join_and_leave()
                self._step()
        with self._changed:
            texts, self._waiting = [*self._present.values(), *self._waiting], deque()
            calls, self._calls = list(self._calls), deque()
        stopped = ApiError(503, "the server is stopping")
        for text in texts:
            text.deliver(Piece("", [], error=stopped))
        for future, _, _ in calls:
            future.set_exception(stopped)

    def _wait_for_work(self) -> bool:
        """Returns False once the engine is to stop."""
        with self._changed:
            while not (self._is_stopped or self._calls or self._waiting or self._present):
                self._changed.wait()
            return not self._is_stopped

    def _run_calls(self) -> None:
        while self._calls:
            future, function, args = self._calls.popleft()
            if not future.set_running_or_notify_cancel():  # whoever asked has gone
                continue
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)

    def _let_join_and_leave(self) -> None:
        with self._changed:
            for slot in [slot for slot, text in self._present.items() if text.is_cancelled]:
                self._leave(slot)
            joining: list[Text] = []
            while self._waiting and len(joining) < self._batch.free:
                text = self._waiting.popleft()
                if not text.is_cancelled:
                    joining.append(text)
            for text in joining:
                self._join(text)

    def _join(self, text: Text) -> None:
        try:
            text.sample = Sample(0, self._tokenizer, list(text.stops), self._end)
            generator = torch.Generator(self._device).manual_seed(text.seed)
            slot = self._batch.add(text.prompt, generator=generator, **text.settings)
        except Exception as error:  # of this text alone
            text.deliver(Piece("", [], error=error))
        else:
            self._present[slot] = text

    def _leave(self, slot: int) -> None:
        self._batch.remove(slot)
        del self._present[slot]

    def _step(self) -> None:
        if not self._present:
            return
        try:
            drawn = self._batch.step()
        except Exception as error:  # a fault of the model, or no memory: the batch is of no more use
            failed = list(self._present.values())
            with self._changed:
                self._present, self._batch = {}, self._new_batch()
            for text in failed:
                text.deliver(Piece("", [], error=error))
            return
        for slot, token in drawn.items():
            text = self._present[slot]
            try:
                piece = text.push(token)
            except Exception as error:  # of this text alone
                piece = Piece("", [], error=error)
            if piece.finish is not None or piece.error is not None:
                with self._changed:
                    self._leave(slot)
            text.deliver(piece)

    def _new_batch(self) -> Batch:
        return Batch(self._model, self._size, stride=self._stride)


def _end_of_text(tokenizer: Tokenizer, layout: str) -> int | None:
    """The token that ends a text: a name and a completion end by themselves, and a text goes on without end."""
    if layout == "names":
        return boundary_token(tokenizer)
    return end_token(tokenizer) if layout == "completions" else tokenizer.end_of_text
