"""Several processes on this machine that compute together over gloo, one thread each, as a benchmark starts them."""

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch


def together(n: int, function: Callable[..., Any], *args: Any, seconds: float = 120.0) -> list[Any]:
    """What `function(*args)` returns in each of n processes, which are one group of torch.distributed.

    Raises RuntimeError with the text of the first error in any of them, or where they take more than `seconds`; then
    all of them have been ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastgpt.benchmarks.harness.counted", "torch.distributed.fsdp"])
    with TemporaryDirectory() as folder, contextlib.ExitStack() as ended:
        store = str(Path(folder) / "store")
        results = {}
        for rank in range(n):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_process, args=(theirs, rank, n, store, seconds, function, args))
            process.start()
            ended.callback(process.join)
            ended.callback(process.kill)
            theirs.close()  # its end is then told by an end of file
            results[ours] = rank
        found = dict(_collected(results, seconds))
        return [found[rank] for rank in range(n)]


def _collected(results: dict[Connection, int], seconds: float) -> Iterator[tuple[int, Any]]:
    """(rank, what it returned), in the order in which they end."""
    waiting = dict(results)
    while waiting:
        ready = wait(list(waiting), timeout=seconds)
        if not ready:
            raise RuntimeError(f"processes {sorted(waiting.values())} have not ended after {seconds:g} s")
        for connection in ready:
            rank = waiting.pop(connection)
            try:
                error, result = connection.recv()
            except EOFError:
                error, result = "it has ended without a result", None
            if error:
                raise RuntimeError(f"process {rank}: {error}")
            yield rank, result


def _process(
    connection: Connection,
    rank: int,
    n: int,
    store: str,
    seconds: float,
    function: Callable[..., Any],
    args: tuple,
) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, n), rank=rank, world_size=n, timeout=timedelta(seconds=seconds)
        )
        result = function(*args)
        dist.destroy_process_group()
        connection.send((None, result))
    except Exception:
        connection.send((traceback.format_exc(), None))
