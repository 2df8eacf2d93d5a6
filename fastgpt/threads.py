"""Threads on a CPU: how many a command takes, and how they wait for one another. Importing this needs no PyTorch.

PyTorch's threads and those of our kernels are OpenMP's. One that has nothing to do spins for a while before it sleeps.
Beside another busy program, a thread then spins on a core that the thread it waits for cannot get. How long they spin
is read when PyTorch is loaded, so the command line says it before. It never changes a result. The number of threads
does: PyTorch divides some sums among them. A run therefore records it.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path

# What says how long libgomp's threads spin. In between its own number and none, every number that was tried made a step
# slower, by 2 to 12 % on a quiet machine, or by more beside a busy program.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
NUMBER = "OMP_NUM_THREADS"
_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def choose_waiting(environment: MutableMapping[str, str] = os.environ) -> None:
    """Threads sleep at once where other programs need their cores now; PyTorch is to be loaded in this environment.

    On two cores of an AMD EPYC, a step of shakespeare-char-cpu beside a busy program then takes as long as with one
    thread, and half as long as with threads that spin; beside a program of higher priority, a thirtieth. On a quiet
    machine it would take a third longer, so there they spin. What a user has set stays.
    """
    is_set = any(name in environment for name in WAITING)
    if not is_set and busy_cores() + available_cores() > (os.cpu_count() or 1):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"


def available_cores() -> int:
    """The cores that this process may use: its affinity, and a container's quota of time, rounded up."""
    return max(1, min([_affinity(), *_quotas()]))


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quotas() -> list[int]:
    """The quotas of this process's control groups, versions 1 and 2, in cores; none where there is no limit."""
    found = []
    with contextlib.suppress(OSError, ValueError):  # no such file; "max", which is no limit
        quota, period = (_CGROUP / "cpu.max").read_text(encoding="ascii").split()
        found.append(math.ceil(int(quota) / int(period)))
    with contextlib.suppress(OSError, ValueError):
        quota, period = (
            (_CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period")
        )
        if int(quota) > 0:
            found.append(math.ceil(int(quota) / int(period)))
    return found


def busy_cores(samples: int = 5, pause_s: float = 0.002) -> int:
    """How many threads of other programs run all the time: the fewest in several looks. 0 where that is not known."""
    fewest = None
    for number in range(samples):
        if number:
            time.sleep(pause_s)
        try:
            running = (
                int((_PROC / "loadavg").read_text(encoding="ascii").split()[3].partition("/")[0]) - 1
            )  # without this one
        except (OSError, ValueError, IndexError):
            return 0
        fewest = running if fewest is None else min(fewest, running)
        if fewest <= 0:
            break
    return max(fewest or 0, 0)


@contextlib.contextmanager
def use_threads(threads: int | None) -> Iterator[None]:
    """Operations on a CPU take so many threads, here and in the processes that are started meanwhile.

    None leaves the number to PyTorch, which takes one for each core, or as many as OMP_NUM_THREADS says. It does not
    know of a container's quota, so that is the number where there is a smaller one.
    """
    if threads is None and (NUMBER in os.environ or min(_quotas(), default=math.inf) >= _affinity()):
        yield
        return
    threads = available_cores() if threads is None else threads
    loaded = sys.modules.get("torch")  # which reads the environment when it is loaded
    before, kept = loaded.get_num_threads() if loaded else None, os.environ.get(NUMBER)
    os.environ[NUMBER] = str(threads)
    if loaded:
        loaded.set_num_threads(threads)
    try:
        yield
    finally:
        if loaded:
            loaded.set_num_threads(before)
        if kept is None:
            del os.environ[NUMBER]
        else:
            os.environ[NUMBER] = kept


def describe_load(threads: int) -> str:
    """One line for `fastgpt doctor`: whether other programs, or a quota, slow so many threads."""
    cores, busy, all_cores = available_cores(), busy_cores(), os.cpu_count() or 1
    if threads > cores:
        return f"{threads} threads share {cores} cores, and each step waits for the slowest: give --threads {cores}"
    if busy + threads > all_cores:
        fewer = max(1, all_cores - busy)
        return (
            f"other programs keep {min(busy, all_cores)} of {all_cores} cores busy, so that {threads} threads wait for "
            f"one another: end them, or give --threads {fewer}"
        )
    return f"nothing that slows {threads} threads on {cores} cores"
