"""How much of a call's time on a GPU is the host's: the call as a program makes it, and replayed as a CUDA graph.

The times of a comparison do not show it. There the L2 cache is overwritten before each call, which should take an H100
some 90 microseconds (256 MiB at 3 TB/s); meanwhile the host prepares the call, so that this much of its work is hidden.
Here calls follow each other without that. A replay launches the same kernels without Python, the dispatcher and the
launchers.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastgpt import cuda_graph

from .measure import Call, Clock

CALLS = 3  # in one graph: as many as there are sets of inputs, which the calls of a contender take in turn
ROUNDS = 5
TURN_S = 0.02  # how long one round goes on


@dataclass(frozen=True)
class HostTimes:
    """Seconds of one call. `replayed` is None where the call could not be captured, and `reason` says why."""

    eager: float
    replayed: float | None
    reason: str | None = None


def captured(call: Call) -> Callable[[], object]:
    """A function that replays CALLS calls as one CUDA graph.

    Some peers ask the device for a value, which fails. The recorder of `fastgpt train --cuda-graph` puts right what
    that leaves behind, so that the next case can be measured.
    """
    recorder = cuda_graph.recorder(torch.device("cuda"))

    def calls() -> None:
        for _ in range(CALLS):
            call()

    recorder.warm_up(calls)
    return recorder.record(calls)


def host_times(call: Call, clock: Clock, capture: Callable[[Call], Callable[[], object]] = captured) -> HostTimes:
    """`clock` must not hide anything: it times calls that follow each other."""
    eager = _seconds(call, clock)
    try:
        replayed = _seconds(capture(call), clock) / CALLS
    except Exception as error:  # the call asks the device for a value, say, which a graph cannot do
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        return HostTimes(eager, None, reason)
    return HostTimes(eager, replayed)


def _seconds(call: Call, clock: Clock) -> float:
    """The median of some rounds, each of so many calls that it lasts."""
    first = clock([call, call], [1, CALLS])[1] / CALLS
    n = CALLS * max(1, min(100, round(TURN_S / CALLS / max(first, 1e-9))))
    return statistics.median(clock([call], [n])[0] / n for _ in range(ROUNDS))
