"""The machine: which device a name stands for, and the facts that are recorded with results."""

from __future__ import annotations

import datetime
import functools
import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from . import __version__

SOURCE_TREE = Path(__file__).resolve().parent.parent  # an installed package has site-packages there instead


class DeviceError(RuntimeError):
    """A device that cannot be used here; the message says why."""


# ---- devices ----


def resolve_device(name: str) -> torch.device:
    """The device called `name`, once it has held a number; "auto" is a CUDA or ROCm GPU, else Apple's, else the CPU."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"device: {name!r} cannot be used here: expected auto, cpu, cuda, cuda:1, mps, ...") from None
    try:
        if device.type == "meta":
            raise RuntimeError("its tensors have shapes but no numbers")
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        # For a device that this PyTorch was built without, its message is pages of dispatcher internals.
        unknown = isinstance(error, (NotImplementedError, ImportError)) or "INTERNAL ASSERT" in str(error)
        reason = "this PyTorch was built without it" if unknown else str(error).splitlines()[0]
        raise DeviceError(f"device: {name!r} cannot be used here: {reason}; take auto or cpu") from None
    return device


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name(_cpuinfo()) or platform.processor() or platform.machine()


def processor_name(cpuinfo: str) -> str | None:
    """Name, family and model from the text of /proc/cpuinfo; None where it has no name.

    The name alone is not enough: virtual machines call several generations of processors "AMD EPYC".
    """
    keys = ("model name", "cpu family", "model")
    found = (re.search(rf"^{key}\s*:\s*(.+)$", cpuinfo, flags=re.MULTILINE) for key in keys)
    name, family, model = (match and match[1].strip() for match in found)
    return f"{name} (family {family}, model {model})" if name and family and model else name


def device_slug(device: torch.device) -> str:
    """The device as a file name: nvidia-h100-80gb-hbm3, amd-epyc-family-26-model-2-2-cores."""
    name = device_name(device)
    if device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        name += f" {cores} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def clocks_mhz(device: torch.device) -> float | None:
    """The present clock of the GPU's multiprocessors, or the mean of the processor's cores; None where unknown."""
    if device.type == "cuda":
        clock = _nvidia_smi("clocks.sm")
        return float(clock.split()[0]) if clock and clock.split()[0].isdigit() else None
    clocks = [float(mhz) for mhz in re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", _cpuinfo(), flags=re.MULTILINE)]
    return round(sum(clocks) / len(clocks), 1) if clocks else None


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return ""


def _nvidia_smi(field: str) -> str | None:
    return _output_of("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "-i", "0")


def memory_in_use(device: torch.device) -> int | None:
    """Bytes that this process takes now; on a CUDA device the most that its tensors took. None where it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        return None


# ---- versions ----


def package_version(name: str) -> str | None:
    """The version of the package that is imported as `name`; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
    try:  # the distribution may have another name: Triton's nightly builds are called pytorch-triton
        return importlib.import_module(name).__version__
    except ImportError:
        return None


@functools.cache
def commit(tree: Path = SOURCE_TREE) -> str | None:
    """The commit of the source tree, followed by "+" where a file of it has changed since.

    Files that are not tracked do not count as changes; nor do benchmarks/results, to which a benchmark adds while it
    runs. For an installed package, for sources that were copied without their history, and for sources that lie inside
    the repository of another project, it is what FASTGPT_COMMIT says, or None.
    """
    git = ("git", "-C", str(tree))
    if _output_of(*git, "ls-files", "--full-name", "fastgpt/machine.py") != "fastgpt/machine.py":
        return os.environ.get("FASTGPT_COMMIT") or None
    head = _output_of(*git, "rev-parse", "HEAD")
    changes = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return head and head + ("+" if _output_of(*git, *changes) else "")


def short_commit(commit: str | None) -> str | None:
    """Ten characters of the hash are enough to read; the "+" of changed files stays."""
    return commit and commit[:10] + "+" * commit.endswith("+")


def facts(device: torch.device) -> dict[str, Any]:
    """The facts that are recorded with every result: device, versions, commit and date; None where one is unknown."""
    on_gpu = device.type == "cuda"
    return {
        "device": device_name(device),
        "driver": _nvidia_smi("driver_version") if on_gpu else None,
        "clocks_mhz": clocks_mhz(device),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "cuda": torch.version.cuda if on_gpu else None,
        "fastgpt": __version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def _output_of(*command: str) -> str | None:
    """The output of the command; None where the command is missing or fails."""
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=20, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
