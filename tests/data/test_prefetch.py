"""Prefetching: the batches are those that are drawn directly, and the thread ends."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from fastgpt.data.layouts import Blocks, random_batch
from fastgpt.data.prefetch import Prefetcher

TOKENS = np.arange(1000, dtype=np.uint16)


def test_prefetched_batches_are_the_direct_ones() -> None:
    with Prefetcher(Blocks(TOKENS, 8), 4, seed=3, start_step=100) as batches:
        for step, (x, y) in zip(range(100, 120), batches, strict=False):
            direct_x, direct_y = random_batch(TOKENS, 8, 4, 3, step)
            assert torch.equal(x, direct_x) and torch.equal(y, direct_y)


def test_several_steps_a_call() -> None:
    with Prefetcher(Blocks(TOKENS, 8), 4, seed=3, start_step=6, steps_per_call=3) as batches:
        next(batches)
        x, y = next(batches)
    assert x.shape == y.shape == (3, 4, 8)
    for i in range(3):
        assert torch.equal(x[i], random_batch(TOKENS, 8, 4, 3, 9 + i)[0])


def test_resuming_draws_the_same_batches() -> None:
    def take(start: int, count: int) -> list[torch.Tensor]:
        with Prefetcher(Blocks(TOKENS, 8), 4, seed=3, start_step=start) as batches:
            return [next(batches)[0] for _ in range(count)]

    for resumed, straight in zip(take(7, 5), take(0, 12)[7:], strict=True):
        assert torch.equal(resumed, straight)


def test_it_runs_no_further_ahead_than_depth(monkeypatch) -> None:
    steps: list[int] = []
    batch = Blocks.batch

    def counted(self, batch_size, seed, step, *more):
        steps.append(step)
        return batch(self, batch_size, seed, step, *more)

    monkeypatch.setattr(Blocks, "batch", counted)
    with Prefetcher(Blocks(TOKENS, 8), 4, seed=3, depth=2) as batches:
        next(batches)
        time.sleep(0.1)
        assert 1 <= len(steps) <= 4  # one taken, two ready, one in hand


def test_without_the_thread_several_are_cut_when_none_is_left(monkeypatch) -> None:
    steps: list[int] = []
    batch = Blocks.batch
    expected = [random_batch(TOKENS, 8, 4, 3, step)[0] for step in range(5, 12)]
    monkeypatch.setattr(
        Blocks, "batch", lambda self, n, seed, step, *_: steps.append(step) or batch(self, n, seed, step)
    )
    n_threads = threading.active_count()
    with Prefetcher(Blocks(TOKENS, 8), 4, seed=3, start_step=5, depth=3, threaded=False) as batches:
        assert threading.active_count() == n_threads and not steps
        for i, (want, (x, y)) in enumerate(zip(expected, batches, strict=False)):
            assert torch.equal(x, want) and torch.equal(y, x + 1)
            assert steps == list(range(5, 5 + 3 * (i // 3 + 1)))
    assert list(batches) == []
    batches.close()


def test_close_ends_the_thread() -> None:
    batches = Prefetcher(Blocks(TOKENS, 8), 4, seed=3)
    next(batches)
    batches.close()
    batches.close()
    assert not batches._thread.is_alive()
    assert list(batches) == []


def test_close_wakes_a_waiting_consumer(monkeypatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(Blocks, "batch", lambda *_: release.wait(300) and (TOKENS, TOKENS))
    batches = Prefetcher(Blocks(TOKENS, 8), 4, seed=3)
    got: list = []
    consumer = threading.Thread(target=lambda: got.extend(batches))
    consumer.start()
    closer = threading.Thread(target=batches.close)
    closer.start()
    consumer.join(300)
    release.set()
    closer.join(300)
    assert got == [] and not consumer.is_alive() and not batches._thread.is_alive()


@pytest.mark.parametrize("threaded", [True, False])
def test_an_error_reaches_the_consumer_after_the_batches_before_it(threaded: bool) -> None:
    class Failing(Blocks):
        def batch(self, batch_size, seed, step, *more):
            if step == 2:
                raise OSError("the disk is gone")
            return super().batch(batch_size, seed, step)

    with Prefetcher(Failing(TOKENS, 8), 4, seed=3, depth=4, threaded=threaded) as batches:
        next(batches)
        next(batches)
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                next(batches)
    assert not threaded or not batches._thread.is_alive()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_prefetching_to_a_gpu() -> None:
    with Prefetcher(Blocks(TOKENS, 8), 4, seed=3, device="cuda") as batches:
        for step, (x, y) in zip(range(20), batches, strict=False):
            assert x.is_cuda and torch.equal(x.cpu(), random_batch(TOKENS, 8, 4, 3, step)[0])
            assert torch.equal(y, x + 1)


def test_only_cuda_gets_asynchronous_copies(monkeypatch):
    """Elsewhere the memory they read is not pinned, and may be used again before they have read it."""
    to, asked = torch.Tensor.to, []

    def noted(tensor, device, non_blocking=False):
        asked.append(non_blocking)
        return to(tensor, device)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    with Prefetcher(Blocks(TOKENS, 16), 4, seed=1, device="meta") as batches:
        next(batches)
    assert asked == [False, False]
