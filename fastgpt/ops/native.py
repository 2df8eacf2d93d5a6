"""The compiled extension: how it is loaded at the first call, tried once, and why it cannot be used where it cannot."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import shlex
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .backend import Slower, SwitchedOff, register_smoke_test
from .library import assume_constant_result
from .source_hash import source_hash

PACKAGE = Path(__file__).resolve().parent.parent
MODULES = {"cpu": "_C", "cuda": "_C_cuda"}


def build_error(module: str) -> str | None:
    """The reason that the installation wrote down because it could not build `module`; None where it wrote none."""
    try:
        lines = (PACKAGE / "_build_error.txt").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    about = [line for line in lines if line.startswith(f"fastgpt.{module}:")] or lines
    return about[0].removeprefix("the extension: ").removeprefix(f"fastgpt.{module}: ") if about else None


# What the installation writes down, which has to be told with what to do about it, or not to be told.
BUILT_APART = "it was built apart from PyTorch"
SWITCHED_OFF = "switched off by FASTGPT_NATIVE=0"


def rebuild_command(distribution: str = "fastgpt-kernels") -> str:
    """The command that builds the extension from where the package came from, whatever folder it is given in.

    pip notes where it installed a package from (PEP 610). Where that is gone, the sources have to be got again.
    """
    command = "pip install --no-build-isolation --no-deps --force-reinstall"
    try:
        origin = json.loads(importlib.metadata.distribution(distribution).read_text("direct_url.json") or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        origin = {}
    url = origin.get("url", "")
    if "vcs_info" in origin:
        return f"{command} {shlex.quote(origin['vcs_info']['vcs'] + '+' + url)}"
    path = Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
    if url.startswith("file:") and (path / "setup.py").is_file():
        editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
        return f"{command} {editable}{shlex.quote(str(path))}"
    return f"{command} . in a copy of FastGPT's sources"


def load(device_type: str) -> ModuleType:
    """The extension module of `device_type`; loading it registers its ops. ImportError says why it is not there."""
    name = MODULES.get(device_type)
    if name is None:
        raise ImportError(f"the extension has no kernels for {device_type}")
    if name == "_C_cuda" and torch.version.cuda is None:
        raise ImportError("this PyTorch has no CUDA")
    try:
        return importlib.import_module(f"fastgpt.{name}")
    except ModuleNotFoundError:
        reason = build_error(name) or "this installation was made without it"
        if reason == BUILT_APART:
            reason += f"; with a C++ compiler, this builds it: {rebuild_command()}"
        kind = SwitchedOff if reason == SWITCHED_OFF else ImportError
        raise kind(f"fastgpt.{name} is not built: {reason}") from None
    except ImportError as error:
        raise ImportError(
            f"fastgpt.{name} does not load: {error}; it was built for torch {build_info()['torch']}, so install "
            "fastgpt-kernels again"
        ) from None


# The kernels that replace PyTorch's matrix library, each with the makers on whose processors it was measured to be
# faster than MKL. On other processors the library is used. A short measurement at the first call would serve more
# machines, but it could decide differently in the next process, and a resumed run would no longer end in the same bits.
FASTER_THAN_LIBRARY = {"matmul": ("amd",), "linear": ("amd",), "orthogonal": ("amd",)}


def reason_for_library(kernel: str) -> str | None:
    """Why a product is left to PyTorch's matrix library here, or None where the extension's `kernel` takes it."""
    return _reason_for_library(kernel, cpu_maker(), load("cpu").instruction_set(), torch.backends.mkl.is_available())


@functools.cache
def _reason_for_library(kernel: str, maker: str, instructions: str, has_mkl: bool) -> str | None:
    makers = FASTER_THAN_LIBRARY[kernel]
    if maker not in makers:
        return (
            f"its own kernel was measured to be faster on processors of {', '.join(makers)}; this one's maker: {maker}"
        )
    if not has_mkl:
        return "its own kernel was measured to be faster than MKL, and this PyTorch has another matrix library"
    if instructions == "generic":
        return "its own kernel was measured with AVX2 and AVX-512; this processor has neither"
    return None


@functools.cache
def cpu_maker() -> str:
    """The processor's maker: "amd", "intel" or "other"."""
    return load("cpu").cpu_maker()


@assume_constant_result  # a compiled graph asks for it once
def instruction_set() -> str:
    """Which vector instructions the kernels for CPUs use: "avx512", "avx2" or "generic"."""
    return load("cpu").instruction_set()


def slower_without_avx(*args: Any, **kwargs: Any) -> str | None:
    """Why "auto" leaves a call to PyTorch, whose kernels have vectors of their own, where ours have narrow ones."""
    if instruction_set() == "generic":
        return Slower("it was measured to be faster with AVX2 and AVX-512; this processor has neither")
    return None


def load_at_first_call(op: str) -> Callable[..., Any]:
    """An implementation of `fastgpt::op` in Python that loads the extension, and calls the extension's kernel.

    An exported program, say, calls the op without this package, which would have loaded the extension. Once it is
    loaded, PyTorch prefers its kernels to this implementation.
    """
    return functools.partial(_load_and_call, op)


def _load_and_call(op: str, *args: Any) -> Any:
    device_type = next(value for value in args if isinstance(value, torch.Tensor)).device.type
    if f"fastgpt.{MODULES.get(device_type)}" in sys.modules:
        raise NotImplementedError(f"fastgpt::{op} has no kernel for these tensors on {device_type}")
    load(device_type)
    return getattr(torch.ops.fastgpt, op)(*args)


def build_info() -> dict[str, str]:
    """Compiler, flags, torch and CUDA of the build; each "unknown" where fastgpt._build_info is missing, too."""
    try:
        return importlib.import_module("fastgpt._build_info").build_info()
    except ImportError:
        return dict.fromkeys(("compiler", "flags", "torch", "cuda", "cuda_architectures", "source_hash"), "unknown")


def is_stale() -> bool:
    """Whether the sources beside the package are not those that the extension was built from."""
    sources = PACKAGE.parent / "csrc"
    if not (sources / "kernels.h").is_file():
        return False
    return build_info()["source_hash"] not in (source_hash(sources), "unknown")


def describe(device_type: str) -> str:
    """One line for `fastgpt doctor`: the instructions in use and how the extension was built, or why it is missing."""
    try:
        module = load(device_type)
    except ImportError as error:
        return str(error)
    info = build_info()
    uses = module.instruction_set() if device_type == "cpu" else info["cuda_architectures"]
    stale = "; STALE: csrc/ has changed since, build again" if is_stale() else ""
    return f"{uses}, built by {info['compiler']} with torch {info['torch']}{stale}"


def _run_once(device_type: str) -> None:
    load(device_type)
    table = torch.eye(4, 8, dtype=torch.float32, device=device_type)
    out = torch.ops.fastgpt.embedding_native(torch.tensor([[3, 0]], device=device_type), table, None, 0)
    if not torch.equal(out, table[[3, 0]][None]):
        raise RuntimeError("the extension's embedding gives a wrong result on this machine")
    logits = torch.eye(2, dtype=torch.float32, device=device_type)
    targets = torch.tensor([0, 1], device=device_type)
    options = -100, 2, 0.0, 0.0, 0.0, True, False
    _, gradient, _ = torch.ops.fastgpt.cross_entropy_native(logits, targets, None, None, *options)
    if not torch.allclose(gradient, logits.softmax(1) - logits, atol=1e-5):
        raise RuntimeError("the extension's cross_entropy gives a wrong result on this machine")
    if device_type == "cuda":
        follow_table(torch.device("cuda", torch.cuda.current_device()))


_plan_setters: dict[str, Callable[[torch.device, list[Any]], None]] = {}


def takes_plans(kernel: str, set_plans: Callable[[torch.device, list[Any]], None]) -> None:
    """Have `set_plans(device, plans)` called with the plans that a tuned table (triton_kernels/tuned.py) has."""
    _plan_setters[kernel] = set_plans


def follow_table(device: torch.device) -> None:
    """Give the CUDA kernels on `device` the plans of the tuned table, now and whenever another table is in use."""
    from ..triton_kernels import tuned

    major, minor = torch.cuda.get_device_capability(device)

    def set_all() -> None:
        for kernel, set_plans in _plan_setters.items():
            set_plans(device, tuned.plans(kernel, 10 * major + minor))

    set_all()
    tuned.on_change(set_all)


register_smoke_test("native", _run_once)
