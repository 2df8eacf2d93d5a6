"""A few steps of a run under PyTorch's profiler, for `fastgpt train --profile`: a trace, and the ops that took longest.

The trace is a file that ui.perfetto.dev and chrome://tracing open. Each step is an event called "step 11", with the ops
and kernels below it. The profiler reads clocks and names, no numbers: the run is the same with it, only slower there.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..files import FileError, atomic_path

WARM_UP = 10  # steps in which kernels are chosen, compiled and recorded, and caches fill
PROFILED = 5  # steps in the trace
LARGEST = 10  # ops in the table


class StepProfile:
    """Watches the steps of a run that is at `step` and ends at `max_steps`, and writes a trace into its `folder`."""

    def __init__(self, folder: Path, device: torch.device, step: int, max_steps: int) -> None:
        left = max_steps - step
        self.path, self._on_gpu = folder / "trace.json.gz", device.type == "cuda"
        self.first = step + 1 + max(min(WARM_UP, left - PROFILED), 0)
        self.last = min(self.first + PROFILED - 1, max_steps)
        self._profiler: Any = None
        self._taken = step  # the last step that is in the trace

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the step `number`."""
        if not self.first <= number <= self.last:
            yield
            return
        if number == self.first:
            self._start()
        with torch.profiler.record_function(f"step {number}"):
            yield
            if self._on_gpu:
                torch.cuda.synchronize()  # so that its kernels are the step's in the trace
        self._taken = number
        if number == self.last:
            self._profiler.stop()

    def is_complete(self) -> bool:
        """Whether all steps are recorded, and `close` has not been called yet."""
        return self._profiler is not None and self._taken == self.last

    def _start(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it writes lines of its own to stderr
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        self._profiler = profile(activities=activities)
        self._profiler.start()

    def close(self) -> list[str]:
        """Write the trace of the steps so far, also of a run that was stopped amid them; the lines to show.

        Writing takes longer than a step, so it is for the caller to say when.
        """
        if self._profiler is None:
            return []
        if not self.is_complete():
            self._profiler.stop()
        profiler, self._profiler = self._profiler, None
        n_steps = self._taken - self.first + 1
        if n_steps < 1:  # the first of them has failed
            return []
        try:
            self._write(profiler)
        except (FileError, OSError, RuntimeError) as error:  # training goes on
            return [f"--profile: no trace: {error}"]
        events = [event for event in profiler.key_averages() if not event.key.startswith("step ")]
        return [
            f"profile: {self.path} is a trace of the steps {self.first} to {self._taken}; ui.perfetto.dev opens it",
            *table(events, n_steps, self._on_gpu),
        ]

    def _write(self, profiler: Any) -> None:
        with tempfile.TemporaryDirectory() as folder, atomic_path(self.path) as temporary:
            plain = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(plain))
            with open(plain, "rb") as source, gzip.open(temporary, "wb") as target:
                shutil.copyfileobj(source, target)


def table(events: list[Any], n_steps: int, on_gpu: bool) -> list[str]:
    """The ops that took longest by themselves, without what they call; one line each, below a heading."""
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"  # in microseconds
    times = {event.key: getattr(event, attribute) for event in events}
    calls = {event.key: event.count for event in events}
    total = sum(times.values()) or 1.0
    lines = [f"{'ms a step':>11} {'share':>6} {'calls':>6}  op, {'on the GPU' if on_gpu else 'on the CPU'}"]
    for name in sorted(times, key=lambda name: -times[name])[:LARGEST]:
        milliseconds = times[name] / 1000 / n_steps
        lines.append(f"{milliseconds:11.3f} {times[name] / total:6.1%} {calls[name] / n_steps:6.0f}  {name[:80]}")
    return lines
