"""What the suite writes: JSON lines, in benchmarks/results/<device>.jsonl or the file given by --rows.

A line with "kind": "row" is one implementation in one comparison. Every row has every key; what is not known is null.

    op, shape, dtype         what was done: "attention", "B8 H6 T256 D64 causal", "float32"
    direction                "forward", "forward+backward", "step", "generate", "train" or "import"
    implementation           "fastgpt", or the peer's name
    backend                  of a fastgpt row: the backend that served it
    median_ms, p20_ms, p80_ms, rounds     of one call
    ratio, ratio_p20, ratio_p80           peer row: the peer's time over fastgpt's, pair by pair of the same round;
                             fastgpt row: that of its best peer
    best_peer                fastgpt row: the peer with the smallest median
    verdict                  fastgpt against that peer: "faster", "slower", or "noise" (the percentiles straddle 1)
    bytes, flops             the least memory traffic and the operations of one call
    roofline_fraction        max(bytes / copy bandwidth, flops / matrix product rate) / median
    peak_bytes               how far memory rises during one call, its results included
    parity_error_ratio       error against the float64 oracle, over PyTorch's plus half the tolerance; up to 2 passes
    extra                    more figures by name: tokens_per_s, tflop_per_s, gb_per_s, val_loss
    device, driver, clocks_mhz, threads, cpu_capability, python, torch, triton, cuda, fastgpt, commit, date

A line with "kind": "run" describes a run of the suite: the same facts of the machine, and

    ops                      what it measured
    ceilings                 bytes_per_s, flops_per_s, dtype: the fastest copy and matrix product of that run
    absent                   {op: {peer, or "peer, shape, direction" where others were measured: why not}}

A new row replaces the older one of the same op, shape, dtype, implementation and direction; a new run those runs of
which it measured every op again.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fastgpt
from fastgpt.benchmarks.harness.measure import Ceilings
from fastgpt.files import atomic_path

# Where this is an installed package it is no source tree, and of no use.
SOURCE_TREE = Path(__file__).resolve().parent.parent.parent

MEASURED = (
    "op", "shape", "dtype", "direction", "implementation", "backend", "median_ms", "p20_ms", "p80_ms", "rounds",
    "ratio", "ratio_p20", "ratio_p80", "best_peer", "verdict", "bytes", "flops", "roofline_fraction", "peak_bytes",
    "parity_error_ratio", "extra",
)  # fmt: skip
FACTS = (
    "device", "driver", "clocks_mhz", "threads", "cpu_capability", "python", "torch", "triton", "cuda", "fastgpt",
    "commit", "date",
)  # fmt: skip
KEYS = ("kind", *MEASURED, *FACTS)
IDENTITY = ("op", "shape", "dtype", "implementation", "direction")


def facts(device: torch.device) -> dict[str, Any]:
    """The machine, the versions and the commit: without them a number says nothing."""
    on_gpu = device.type == "cuda"
    return {
        "device": device_name(device),
        "driver": _nvidia("driver_version") if on_gpu else None,
        "clocks_mhz": clocks_mhz(device),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda if on_gpu else None,
        "fastgpt": fastgpt.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        cpuinfo = ""
    return cpu_name(cpuinfo) or platform.processor() or platform.machine()


def cpu_name(cpuinfo: str) -> str | None:
    """The processor by its name, family and model: virtual machines call several generations "AMD EPYC" alike."""
    found = {
        key: re.search(rf"^{key}\s*:\s*(.+)$", cpuinfo, flags=re.MULTILINE)
        for key in ("model name", "cpu family", "model")
    }
    name, family, model = (match and match[1].strip() for match in found.values())
    return f"{name} (family {family}, model {model})" if name and family and model else name


def slug(device: torch.device) -> str:
    """The device as a file name: nvidia-h100-80gb-hbm3, amd-epyc-family-26-model-2-2-cores."""
    name = device_name(device)
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        name += f" {cores} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def default_path(device: torch.device) -> Path:
    """benchmarks/results/<device>.jsonl in a source tree; from an installed package, the same under this folder."""
    in_tree = (SOURCE_TREE / "setup.py").is_file()
    return (SOURCE_TREE if in_tree else Path.cwd()) / "benchmarks" / "results" / f"{slug(device)}.jsonl"


def clocks_mhz(device: torch.device) -> float | None:
    """The clock of the multiprocessors, or the mean of the cores', at this moment."""
    if device.type == "cuda":
        clock = _nvidia("clocks.sm")
        return float(clock.split()[0]) if clock and clock.split()[0].isdigit() else None
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    clocks = [float(mhz) for mhz in re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", cpuinfo, flags=re.MULTILINE)]
    return round(sum(clocks) / len(clocks), 1) if clocks else None


def _nvidia(field: str) -> str | None:
    return _output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "-i", "0")


@functools.cache
def _commit() -> str | None:
    """Of the source tree, "+" where files of it were changed since; None for an installed package."""
    if not (SOURCE_TREE / ".git").exists():
        return None
    git = ("git", "-C", str(SOURCE_TREE))
    changes = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    commit = _output(*git, "rev-parse", "HEAD")
    return commit and commit + ("+" if _output(*git, *changes) else "")


@functools.cache
def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=20, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


# --- the file --------------------------------------------------------------------------------------------------------


def read(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows, runs) of a file; of one that is not there, none."""
    if not path.exists():
        return [], []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [x for x in lines if x["kind"] == "row"], [x for x in lines if x["kind"] == "run"]


def write(path: Path, rows: Sequence[dict[str, Any]], run: dict[str, Any]) -> None:
    """Put `rows` and their `run` into the file, in place of those they replace; whole or not at all."""
    kept_rows, runs = read(path)
    replaced = {_identity(row) for row in rows}
    kept_rows = [row for row in kept_rows if _identity(row) not in replaced]
    runs = [other for other in runs if not set(other["ops"]) <= set(run["ops"])]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        lines = [json.dumps(line) for line in (*runs, run, *kept_rows, *rows)]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in IDENTITY)


def run_line(
    ops: Sequence[str], ceilings: Ceilings, absent: dict[str, dict[str, str]], machine: dict
) -> dict[str, Any]:
    return {"kind": "run", "ops": list(ops), "ceilings": asdict(ceilings), "absent": absent, **machine}
