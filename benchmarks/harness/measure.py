"""How times are taken: contenders in turn, one clock for each kind of device, peak memory.

A round runs every contender once, in an order drawn for it: A B C, B C A, A C B, ... What slows a machine down for a
while slows neighbours alike, so ratios are taken inside a round, and the median of the rounds' ratios is reported with
their 20th and 80th percentile. The order changes, because a call finds in the caches what the one before it has left
there. When the two percentiles lie on different sides of 1, the verdict is "noise": neither is faster.

On a CPU the time is the wall clock's. On a GPU it is the device's own, between two events around the call; the L2 cache
is overwritten before each call, so that a kernel reads its inputs from memory as it would in a model.
"""

import contextlib
import ctypes
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastgpt.benchmarks.publish.rows import Spread
from fastgpt.ops.backend import unavailable

Call = Callable[[], object]

MAX_ROUNDS = 3000  # enough to measure the fastest calls for a second too, within which a machine's speed changes
L2_FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of any GPU


# --- clocks ----------------------------------------------------------------------------------------------------------


# Runs calls one after the other, each as many times as the second list says; returns the seconds that each took in all.
Clock = Callable[[Sequence[Call], Sequence[int]], list[float]]


def wall_clock(calls: Sequence[Call], iterations: Sequence[int]) -> list[float]:
    """For a CPU, where a call has finished when it returns."""
    times = []
    for call, n in zip(calls, iterations, strict=True):
        start = time.perf_counter()
        for _ in range(n):
            call()
        times.append(time.perf_counter() - start)
    return times


class DeviceClock:
    """For a GPU: CUDA events around the calls. Overwriting the cache also hides the launch of the call (host.py)."""

    def __init__(self, overwrites_cache: bool = True) -> None:
        self.flush = torch.empty(L2_FLUSH_BYTES if overwrites_cache else 0, dtype=torch.int8, device="cuda")

    def __call__(self, calls: Sequence[Call], iterations: Sequence[int]) -> list[float]:
        events = []
        for call, n in zip(calls, iterations, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            for _ in range(n):
                call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]


def reported_clock(calls: Sequence[Call], iterations: Sequence[int]) -> list[float]:
    """For work that knows its own time, such as a process that is started for it: a call returns its seconds."""
    return [float(call()) for call in calls]  # type: ignore[arg-type]


def rehearsed_clock(calls: Sequence[Call], iterations: Sequence[int]) -> list[float]:
    """For a rehearsal: every call runs once, and is said to have taken a millisecond."""
    for call in calls:
        call()
    return [1e-3 * n for n in iterations]


def clock_of(device: torch.device) -> Clock:
    return DeviceClock() if device.type == "cuda" else wall_clock


def interleave(
    contenders: dict[str, Call], clock: Clock, *, seconds: float, min_rounds: int, warmups: int, min_time: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of one call, by contender and round.

    Every contender is called `warmups` times first. Then rounds are run for `seconds` per contender, at least
    `min_rounds` of them; a call that was faster than `min_time` is repeated within its turn until it takes as long.
    """
    calls = list(contenders.values())
    iterations = [1] * len(calls)
    warm = [min_time] * len(calls)
    for _ in range(warmups):
        warm = clock(calls, iterations)
    iterations = [max(1, math.ceil(min_time / max(t, 1e-9))) for t in warm]
    rounds: list[list[float]] = []
    order, draw = list(range(len(calls))), random.Random(0)
    stop = time.perf_counter() + seconds * len(calls)
    while len(rounds) < min_rounds or (time.perf_counter() < stop and len(rounds) < MAX_ROUNDS):
        draw.shuffle(order)
        times = dict(zip(order, clock([calls[i] for i in order], [iterations[i] for i in order]), strict=True))
        rounds.append([times[i] / n for i, n in enumerate(iterations)])
    return {name: list(times) for name, times in zip(contenders, zip(*rounds, strict=True), strict=True)}


# --- what the times say ----------------------------------------------------------------------------------------------


def spread_of(values: Sequence[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(statistics.median(values), fifths[0], fifths[-1])


def ratio_of(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    """The peer's time over ours, taken inside each round."""
    return spread_of([b / a for b, a in zip(theirs, ours, strict=True)])


def verdict_of(ratio: Spread) -> str:
    """FastGPT against the peer: "faster", "slower", or "noise" where the percentiles lie on both sides of 1."""
    if ratio.p20 > 1.0:
        return "faster"
    return "slower" if ratio.p80 < 1.0 else "noise"


# --- memory ----------------------------------------------------------------------------------------------------------


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """How far memory rises above where it was while `call` runs; None where that cannot be read.

    On a GPU PyTorch's allocator counts it. On a CPU it is the resident memory of the process (Linux only). Memory that
    earlier calls have freed is given back to the system first: reused pages would not be counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _give_memory_back()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before)
    except OSError:
        return None


def _give_memory_back() -> None:
    if unavailable("native", "cpu") is None:
        # The extension keeps its last four freed buffers; four small ones take their place.
        small = [torch.ops.fastgpt.large_buffer(torch.empty(0), 2**11, 2**11) for _ in range(4)]
        del small
    with contextlib.suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
