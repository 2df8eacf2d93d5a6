"""Five kernels under Nsight Compute: how much of the memory's bandwidth and of the tensor cores each of them uses.

    python -m fastgpt.benchmarks.gpu_check.counters NAME [--dry-run]     runs one case, for ncu to look at

The profiler is switched on for one call, after calls that compile; --dry-run makes that call with small tensors where
there is no GPU. The card's clocks are left alone (--clock-control none).
"""

import argparse
import csv
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

MODULE = "fastgpt.benchmarks.gpu_check.counters"
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "LaunchStats")
METRICS = ("gpu__time_duration.sum", "dram__bytes.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed")
# The names of the tensor cores' pipes differ between chips; the busiest one is what counts.
TENSOR = re.compile(r"sm__(inst_executed_)?pipe_tensor\w*\.avg\.pct_of_peak_sustained_(active|elapsed)")
# In which Nsight Compute says that this user may not read counters.
NOT_ALLOWED = "ERR_NVGPUCTRPERM"
SCALE = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "ns": 1.0, "nsecond": 1.0, "us": 1e3, "usecond": 1e3}
SCALE |= {"ms": 1e6, "msecond": 1e6, "s": 1e9, "second": 1e9, "%": 1.0}


@dataclass(frozen=True)
class Case:
    """A kernel as its source names it, and what launches it on tensors of the size that `is_small` asks for."""

    kernel: str
    source: str  # the module below fastgpt.triton_kernels, or the file in csrc/
    make: Callable[[bool, str], Callable[[], Any]]


def _attention(backward: bool, is_small: bool, device: str) -> Callable[[], Any]:
    import torch

    from fastgpt import ops

    B, H, T, D = (1, 1, 20, 16) if is_small else (16, 12, 1024, 64)
    q, k, v = (torch.randn(B, T, H, D, dtype=torch.bfloat16, device=device).transpose(1, 2) for _ in "qkv")
    if not backward:
        return lambda: ops.attention(q, k, v, backend="triton")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = ops.attention(*leaves, backend="triton")
    upstream = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)


def _layer_norm(backward: bool, is_small: bool, device: str) -> Callable[[], Any]:
    import torch

    from fastgpt import ops

    rows, width = (4, 16) if is_small else (32768, 768)
    x = torch.randn(rows, width, dtype=torch.bfloat16, device=device)
    weight, bias = torch.randn(2, width, dtype=torch.bfloat16, device=device)
    if not backward:
        return lambda: ops.layer_norm(x, weight, bias, backend="triton")
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    out = ops.layer_norm(*leaves, backend="triton")
    upstream = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)


def _cross_entropy(is_small: bool, device: str) -> Callable[[], Any]:
    import torch

    from fastgpt import ops

    rows, classes = (4, 37) if is_small else (8192, 50304)
    logits = torch.randn(rows, classes, dtype=torch.bfloat16, device=device).requires_grad_()
    targets = torch.randint(classes, (rows,), device=device)
    return lambda: ops.cross_entropy(logits, targets, backend="native")


CASES = {
    "attention_forward": Case("forward_kernel", "attention_forward", lambda *how: _attention(False, *how)),
    "attention_grad_kv": Case("grad_kv_kernel", "attention_backward", lambda *how: _attention(True, *how)),
    "layer_norm_forward": Case("forward_kernel", "layer_norm", lambda *how: _layer_norm(False, *how)),
    "layer_norm_backward": Case("backward_kernel", "layer_norm", lambda *how: _layer_norm(True, *how)),
    "cross_entropy": Case("cross_entropy_kernel", "cross_entropy.cu", _cross_entropy),
}


def command(ncu: str, name: str) -> tuple[str, ...]:
    """ncu on one case: every section's metrics in CSV, of the kernel's one launch while the profiler is on."""
    options = ["--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    options += [word for section in SECTIONS for word in ("--section", section)]
    options += ["--metrics", ",".join(METRICS), "--kernel-name", f"regex:^{CASES[name].kernel}$"]
    return (ncu, *options, sys.executable, "-m", MODULE, name)


def read(printed: str) -> dict[str, Any]:
    """The counters in what ncu printed, or why there are none."""
    if NOT_ALLOWED in printed:
        return {"result": "skipped", "reason": f"this user may not read the GPU's counters ({NOT_ALLOWED})"}
    lines = printed.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return {"result": "failed", "reason": "ncu printed no table; its output is in the log"}
    header, units, *launches = csv.reader(line for line in lines[first:] if line.startswith('"'))
    if not launches:
        return {"result": "failed", "reason": "ncu saw no launch of the kernel"}
    row = dict(zip(header, launches[0], strict=False))
    unit = dict(zip(header, units, strict=False))
    known = {name: _number(value, unit.get(name, "")) for name, value in row.items()}
    nanoseconds, moved = known.get(METRICS[0]), known.get(METRICS[1])
    tensor = [value for name, value in known.items() if TENSOR.search(name) and value is not None]
    counters = {
        "kernel": row.get("Kernel Name"),
        "launches": len(launches),
        "time_us": nanoseconds and nanoseconds / 1e3,
        "gb_per_s": moved / nanoseconds if moved and nanoseconds else None,
        "dram_percent": known.get(METRICS[2]),
        "tensor_percent": max(tensor, default=None),
        "registers": known.get("launch__registers_per_thread"),
    }
    return {"counters": counters}


def _number(value: str, unit: str) -> float | None:
    """In bytes, nanoseconds or as it is; ncu writes 1,234.5 and "n/a"."""
    try:
        return float(value.replace(",", "")) * SCALE.get(unit, 1.0)
    except ValueError:
        return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="One call of a kernel, with the profiler on.")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--dry-run", action="store_true", help="with small tensors, where there is no GPU")
    options = parser.parse_args(argv)
    import torch

    case = CASES[options.case]
    if options.dry_run:
        print(" ".join(command("ncu", options.case)))
        case.make(True, "cpu")()
        return 0
    call = case.make(False, "cuda")
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
