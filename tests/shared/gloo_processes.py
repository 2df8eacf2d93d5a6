"""The fixture `gloo`: several processes of one group of torch.distributed, which call a function together."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest


def _join_and_call(rank: int, n: int, store: str, pipe: Any, function: Callable, args: tuple) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, n), rank=rank, world_size=n)
    try:
        pipe.send((function(rank, n, *args), None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))
        raise SystemExit(1) from None  # which ends the connections that the others wait at
    dist.destroy_process_group()


@pytest.fixture
def gloo(tmp_path) -> Callable[..., list[Any]]:
    """`gloo(n, function, *args)` calls `function(rank, n, *args)` in n processes of one group; returns the results.

    `function` is that of a module of tests/shared, which the processes can import. An error in any of them is raised
    here. With `may_die` the results are those of the processes that came to their end.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.checkpoint", "fastgpt.training.loop"])

    def run(n: int, function: Callable, *args: Any, may_die: bool = False, limit_s: float = 120) -> list[Any]:
        store = str(tmp_path / f"store-{os.urandom(4).hex()}")
        pipes = [context.Pipe(duplex=False) for _ in range(n)]
        children = [
            context.Process(target=_join_and_call, args=(rank, n, store, pipes[rank][1], function, args), daemon=True)
            for rank in range(n)
        ]
        for child, (_, sender) in zip(children, pipes, strict=True):
            child.start()
            sender.close()
        end = time.monotonic() + limit_s
        outcomes: list[tuple[Any, str | None] | None] = []
        for rank, (receiver, _) in enumerate(pipes):
            try:
                outcome = receiver.recv() if receiver.poll(max(end - time.monotonic(), 0)) else (None, "took too long")
            except EOFError:  # killed
                outcome = None if may_die else (None, f"process {rank} died")
            outcomes.append(outcome)
        for child in children:
            child.join(max(end - time.monotonic(), 0.1))
            child.kill()
        # Where one fails the others lose their connection to it: its own error is the one to show.
        errors = sorted((error for _, error in filter(None, outcomes) if error), key=lambda error: "gloo" in error)
        assert not errors, errors[0]
        return [result for result, _ in filter(None, outcomes)]

    return run
