"""How the CPU benchmarks time: contenders in turn in one process, medians and their ratios, peak memory."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fastgpt
from fastgpt.ops import native


def interleaved(contenders: dict[str, Callable[[], object]], seconds: float = 10.0) -> dict[str, list[float]]:
    """Milliseconds of each contender: A B A B ..., after one warm-up each, at least five rounds."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(next(iter(times.values()))) < 5:
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def show(title: str, times: dict[str, list[float]], baseline: str = "torch") -> None:
    reference = statistics.median(times[baseline])
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        row = f"{middle:9.2f} ms  ({low:.2f} - {high:.2f}, n={len(values)})  {reference / middle:6.2f}x"
        print(f"{title:<42} {name:<8} {row}", flush=True)


def peak_bytes(run: Callable[[], object]) -> int:
    """How far the resident memory rises above where it was while `run` runs (Linux)."""

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def machine() -> str:
    """Processor, threads, versions, commit: without them a number says nothing."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = found[0] if found else model
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    return (
        f"{model}, {torch.get_num_threads()} threads; Python {platform.python_version()}, torch {torch.__version__}, "
        f"fastgpt {fastgpt.__version__} at {commit}; native: {native.describe('cpu')}"
    )


def agree(name: str, ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
    """Exit unless our error against float64 is at most twice PyTorch's, plus a few units in the last place."""
    allowed = 2 * float((theirs.double() - exact).abs().max()) + 2e-6 * max(1.0, float(exact.abs().max()))
    error = float((ours.double() - exact).abs().max())
    if not error <= allowed:
        sys.exit(f"{name}: parity failed, error {error:.3g} where {allowed:.3g} is allowed; no timing is reported")
