"""What the benchmarks share: who was measured, how long a call takes, and how fast this device is at best.

A time is the median of repeated calls between CUDA events, the L2 cache flushed before each, so that a kernel reads
its inputs from memory as it would in a model. Every raw time is kept.
"""

import json
import platform
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

REPETITIONS = 30


def environment() -> dict[str, Any]:
    """Device, driver, versions and commit: a number without them says nothing."""
    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    root = Path(__file__).resolve().parent.parent
    facts["commit"] = _output("git", "-C", str(root), "rev-parse", "HEAD")
    facts["uncommitted_changes"] = bool(_output("git", "-C", str(root), "status", "--porcelain"))
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["compute_capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["clocks"] = _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader")
    return facts


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def times_ms(call: Callable[[], Any], repetitions: int = REPETITIONS) -> list[float]:
    """The raw times of `call` on the current device, in milliseconds, after warm-up."""
    for _ in range(5):
        call()
    flush = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda")
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions)]
    torch.cuda.synchronize()
    for start, end in zip(starts, ends, strict=True):
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]


def summary(raw: list[float]) -> dict[str, Any]:
    ordered = sorted(raw)
    return {
        "median_ms": statistics.median(ordered),
        "p10_ms": ordered[len(ordered) // 10],
        "p90_ms": ordered[-1 - len(ordered) // 10],
        "raw_ms": [round(t, 5) for t in raw],
    }


def copy_bandwidth() -> float:
    """GB/s of a device copy, read and write: the roof of the memory-bound kernels."""
    x = torch.empty(2**28, dtype=torch.int32, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() * 4 / statistics.median(times_ms(lambda: y.copy_(x))) / 1e6


def matmul_rate() -> float:
    """TFLOP/s of an 8192^3 bfloat16 product: the roof of the others."""
    x = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    return 2 * 8192**3 / statistics.median(times_ms(lambda: x @ x, 10)) / 1e9


def compare(
    row: dict[str, Any], peers: dict[str, Callable[[], Any]], work: float, unit: str, ours: str = "fastgpt"
) -> dict[str, Any]:
    """`row` with each peer's times, its rate (`work` per ms, scaled to `unit`), and how often ours is as fast."""
    results: dict[str, Any] = {}
    for name, call in peers.items():
        try:
            results[name] = summary(times_ms(call))
            results[name][unit] = work / results[name]["median_ms"]
        except Exception as error:  # a peer that cannot run this shape is a result too
            results[name] = {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    mine = results[ours].get("median_ms")
    ratios = {n: r["median_ms"] / mine for n, r in results.items() if n != ours and mine and "median_ms" in r}
    print(f"{row}: {unit} " + ", ".join(f"{n} {r.get(unit, 0):.0f}" for n, r in results.items()), flush=True)
    return row | {"results": results, "speedup_over": ratios}


def check(name: str, ours: torch.Tensor, peer: torch.Tensor, oracle: torch.Tensor, atol: float) -> None:
    """Parity in the same run, or no row: at most twice the error of PyTorch's own op."""
    error, allowed = (ours - oracle).abs().max().item(), 2 * (peer - oracle).abs().max().item() + atol
    if not error <= allowed:
        raise AssertionError(f"{name}: error {error:.3e} is above {allowed:.3e}; no time is reported")


def run(measure: Callable[[bool], list[dict[str, Any]]], out: Path | None, quick: bool) -> None:
    """Measure and write one JSON file; without a GPU, say so."""
    report: dict[str, Any] = {"environment": environment()}
    if torch.cuda.is_available():
        report["copy_gb_per_s"], report["matmul_tflop_per_s"] = copy_bandwidth(), matmul_rate()
        report["rows"] = measure(quick)
    else:
        report["skipped"] = "no CUDA device: nothing was timed"
        print(report["skipped"])
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1))
