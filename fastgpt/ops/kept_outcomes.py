"""The outcomes of self-tests, kept on disk: one file for each device, driver and set of versions.

The folder is `self-tests` in the cache (FASTGPT_CACHE, else XDG_CACHE_HOME/fastgpt, else ~/.cache/fastgpt). A file that
is missing, damaged or of another machine holds no outcome, and the self-tests run again. Where nothing can be written,
this is said once, and they run again in the next process.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import json
import subprocess
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import ConfigError
from ..files import FileError, atomic_path, cache_dir

PACKAGE = Path(__file__).resolve().parent.parent


class Outcome(NamedTuple):
    """Of one self-test. `figures`: the largest error and what is allowed, or what went wrong."""

    passed: bool
    figures: str
    is_kept: bool = True  # False for what may be over soon: no memory was free, say


@functools.cache
def machine(device: torch.device) -> dict[str, str] | None:
    """What an outcome holds for; None where the driver is not known, so that a change of it would not show."""
    name, driver = torch.backends.cpu.get_cpu_capability(), "none"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name, driver = f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}", _driver()
    if not driver:
        return None
    versions = {"fastgpt": _version("fastgpt-kernels"), "torch": torch.__version__, "triton": _version("triton")}
    return {"device": name, "driver": driver, **versions, "kernels": _hash_of_kernels()}


def _driver() -> str:
    """The line by which the driver's module names itself, or the version that nvidia-smi prints; else empty."""
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split("\n")[0]
    except OSError:
        pass
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        pass
    try:  # Triton's nightly builds have another name
        return str(importlib.import_module(distribution.partition("-")[0]).__version__)
    except ImportError:
        return "none"


def _hash_of_kernels() -> str:
    """Changes with the Triton kernels, the table that configures them, the compiled extension, and what calls them."""
    from ..triton_kernels import tuned

    kernels = Path(tuned.__file__).parent
    files = [*kernels.glob("*.py"), *PACKAGE.glob("_C*"), *Path(__file__).parent.glob("*.py")]
    entries = sorted(f"{entry.key} {entry.choices}" for entry in tuned.table().entries.values())
    digest = hashlib.sha256("\n".join(entries).encode())
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _path(of: dict[str, str]) -> Path:
    return cache_dir() / "self-tests" / f"{hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]}.json"


def read(device: torch.device) -> dict[str, Outcome]:
    """The kept outcomes for `device`, by the names of the variants."""
    of = machine(device)
    if of is None:
        return {}
    try:
        content: Any = json.loads(_path(of).read_text(encoding="utf-8"))
        if content["machine"] != of:
            return {}
        found = {str(name): Outcome(kept["passed"], kept["figures"]) for name, kept in content["outcomes"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ConfigError):
        return {}
    return {name: kept for name, kept in found.items() if type(kept.passed) is bool and type(kept.figures) is str}


def keep(device: torch.device, name: str, outcome: Outcome) -> None:
    """Add the outcome to those that are kept. Two processes that do so at once may lose one, which is tried again."""
    of = machine(device)
    if of is None:
        return
    outcomes = read(device) | {name: outcome}
    as_json = {name: {"passed": kept.passed, "figures": kept.figures} for name, kept in sorted(outcomes.items())}
    try:
        with atomic_path(_path(of)) as temporary:
            temporary.write_text(json.dumps({"machine": of, "outcomes": as_json}, indent=1) + "\n", encoding="utf-8")
    except (FileError, ConfigError) as error:
        what = "the outcomes of self-tests are not kept, and the next process runs them again"
        _say_once(f"fastgpt: {what}: {error}; set FASTGPT_CACHE to a writable folder")


@functools.cache
def _say_once(text: str) -> None:
    warnings.warn(text, stacklevel=2)
