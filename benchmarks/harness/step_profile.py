"""Where the time of a training step goes: the seconds of its operations, by kind of work.

torch.profiler records every operation with its own time, without that of the operations that it calls. The kind of an
operation follows from its name, or else from the nearest operation that called it; in the backward pass, from the
operation of the forward pass whose gradient it computes. All that comes after the backward pass is the optimizer's.
What is left of a step's time is Python's, with the way from Python to the operations, and the profiler's own.
"""

import re
import statistics
import time
from typing import Any

from torch.profiler import ProfilerActivity, profile

from .measure import Call

STEPS = 5
# In this order: what is within attention is attention's, whatever it is called.
ATTENTION = re.compile(r"attention|bmm|masked_fill|(?<!log_)softmax")
KINDS = {
    "loss": re.compile(r"cross_entropy|nll_loss|log_softmax|logsoftmax"),
    "products": re.compile(r"\bmm|addmm|matmul|linear(?!_cross)"),
    "norms": re.compile(r"layer_?norm"),
    "activation": re.compile(r"gelu|relu|activation"),
    "embedding": re.compile(r"embedding"),
    "dropout": re.compile(r"dropout|bernoulli|random_"),
}
COLUMNS = (
    "products",
    "attention",
    "activation",
    "norms",
    "dropout",
    "loss",
    "embedding",
    "optimizer",
    "other",
    "python",
)


def ms_by_kind(step: Call, steps: int = STEPS) -> dict[str, float]:
    """Milliseconds of a step by kind of work, the medians of some steps; and of the whole step while it is profiled."""
    found = [_profiled(step) for _ in range(steps)]
    return {kind: round(1e3 * statistics.median(one[kind] for one in found), 4) for kind in (*COLUMNS, "profiled step")}


def _profiled(step: Call) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
    found = dict.fromkeys(COLUMNS, 0.0) | {"profiled step": seconds}
    events = recorded.events()
    kinds = _Kinds(events)
    for event in events:
        found[kinds.of(event)] += event.self_cpu_time_total / 1e6
    found["python"] = max(0.0, seconds - sum(found[kind] for kind in COLUMNS))
    return found


class _Kinds:
    """The kinds of the operations of one step."""

    def __init__(self, events: Any) -> None:
        backward = [event for event in events if event.name.startswith("autograd::engine")]
        self.end_of_backward = max((event.time_range.end for event in backward), default=float("inf"))
        self.start_of_backward = min((event.time_range.start for event in backward), default=float("inf"))
        self.forward: dict[int, str] = {}
        for event in events:
            if event.sequence_nr >= 0 and event.time_range.start < self.start_of_backward:
                kind = self._by_name(event)
                if kind is not None:
                    self.forward[event.sequence_nr] = kind

    def of(self, event: Any) -> str:
        if event.time_range.start >= self.end_of_backward:
            return "optimizer"
        return self._by_name(event) or self._by_gradient(event) or "other"

    def _by_name(self, event: Any) -> str | None:
        names = [one.name.lower() for one in _with_callers(event)]
        if any(ATTENTION.search(name) for name in names):
            return "attention"
        return next((kind for name in names for kind, pattern in KINDS.items() if pattern.search(name)), None)

    def _by_gradient(self, event: Any) -> str | None:
        numbers = (one.sequence_nr for one in _with_callers(event))
        return next((self.forward[number] for number in numbers if number in self.forward), None)


def _with_callers(event: Any) -> list[Any]:
    found = []
    while event is not None:
        found.append(event)
        event = event.cpu_parent
    return found
