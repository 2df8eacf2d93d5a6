"""Batches that are cut ahead: by a background thread while a GPU works, or several at once where a CPU trains."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from ..config import as_int_argument
from .layouts import ALL_ROWS, Examples


class Prefetcher:
    """Iterates without end over `examples.batch` from `start_step` on, cut by a thread, `depth` ahead.

    Without the thread, `depth` batches are cut whenever none is left. That suits training on a CPU: there the thread
    would take a core from the step, and the interpreter's lock, which costs more than it saves.

        with Prefetcher(corpus.examples("train", 256), 64, seed=1, device="cuda") as batches:
            for step, (x, y) in zip(range(1000), batches): ...

    Gives (B, T) tensors; with `rows`, those of the batch, which is what a process takes of one that several share; with
    `steps_per_call` above one, the batches of that many steps stacked, (steps, B, T). For a CUDA device the thread
    fills pinned memory. The copy is queued on the stream of the thread that takes the batch, so that it is in order
    with the work that reads it.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        steps_per_call: int = 1,
        device: str | torch.device = "cpu",
        depth: int = 2,
        threaded: bool = True,
        order: str = "random",
        rows: slice = ALL_ROWS,
    ) -> None:
        self._examples, self._seed, self._order = examples, as_int_argument("seed", seed), order
        self._rows = rows
        self._batch_size = as_int_argument("batch_size", batch_size, least=1)
        self._next_step = as_int_argument("start_step", start_step)
        self._steps_per_call = as_int_argument("steps_per_call", steps_per_call, least=1)
        self._depth = as_int_argument("depth", depth, least=1)
        self._device = torch.device(device)
        self._ready: deque[tuple[Tensor, Tensor]] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._produce, name="fastgpt-prefetch", daemon=True)
            self._thread.start()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        with self._changed:
            if self._thread is None and not self._ready and not self._closed:
                self._cut_several()
            self._changed.wait_for(lambda: self._ready or self._error or self._closed)
            if self._closed:
                raise StopIteration
            if not self._ready:
                assert self._error is not None
                raise self._error
            x, y = self._ready.popleft()
            self._changed.notify_all()
        pinned = self._device.type == "cuda"  # without: an Apple GPU may read memory that is given back already
        return x.to(self._device, non_blocking=pinned), y.to(self._device, non_blocking=pinned)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread, the iteration and the batches that were not taken. Closing twice is fine."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _produce(self) -> None:
        try:
            while True:
                batch = self._make()
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
                    if self._closed:
                        return
                    self._ready.append(batch)
                    self._changed.notify_all()
        except BaseException as error:  # whatever it is, it belongs to the consumer, who would otherwise wait for ever
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _cut_several(self) -> None:
        """What was cut before an error is given out before it, as with the thread."""
        try:
            for _ in range(self._depth):
                self._ready.append(self._make())
        except Exception as error:
            self._error = error

    def _make(self) -> tuple[Tensor, Tensor]:
        steps = range(self._next_step, self._next_step + self._steps_per_call)
        of_step = self._examples.batch
        batches = [of_step(self._batch_size, self._seed, step, self._order, self._rows) for step in steps]
        self._next_step = steps.stop
        x, y = batches[0] if len(batches) == 1 else (torch.stack(part) for part in zip(*batches, strict=True))
        if self._device.type != "cuda":
            return x, y
        with torch.cuda.device(self._device):
            return x.pin_memory(), y.pin_memory()
