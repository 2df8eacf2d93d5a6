"""What runs on this machine, and why: devices, versions, and per op the backend that is taken."""

from __future__ import annotations

import platform
from typing import Any

import torch

from . import __version__, ops
from .machine import package_version, resolve_device
from .ops import native
from .ops.backend import BACKENDS, OPS, requested, unavailable
from .ops.linear import linear_choice
from .training.step import Precision


def example_call(op: str, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Small arguments of `op`: a typical call, to ask `explain` about."""
    x = torch.zeros(4, 16, device=device)
    tokens = torch.zeros(1, 4, dtype=torch.int64, device=device)
    heads = torch.zeros(1, 2, 4, 16, device=device)
    vector = torch.ones(16, device=device)
    calls: dict[str, tuple[Any, ...]] = {
        "attention": (heads, heads, heads),
        "layer_norm": (x, vector, vector),
        "add_layer_norm": (x, x, vector, vector),
        "embedding": (tokens, x, x),
        "cross_entropy": (x, tokens[0]),
        "linear_cross_entropy": (x, x, tokens[0]),
    }
    return calls[op], {}


def report() -> str:
    """The text of `fastgpt doctor`."""
    lines = [
        f"fastgpt {__version__}, Python {platform.python_version()}, {platform.platform()}",
        ", ".join(
            f"{name} {package_version(name) or 'not installed'}"
            for name in ("torch", "triton", "numpy", "safetensors", "tokenizers")
        ),
        f"CPU: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
    ]
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        major, minor = torch.cuda.get_device_capability()
        lines.append(f"GPU: {torch.cuda.get_device_name()}, sm_{major}{minor}, CUDA {torch.version.cuda}")
    elif torch.backends.mps.is_available():
        devices.append("mps")
        lines.append("GPU: Apple's, on which the ops run on PyTorch")
    else:
        lines.append("GPU: none that this PyTorch can use")
    auto = resolve_device("auto")
    lines.append(f"device auto: {auto}, where dtype auto trains in {Precision(auto)}")
    lines.append(f"backend asked for: {requested()}")
    for device in devices:
        lines += ["", f"On {device}:"]
        for op in OPS:
            args, kwargs = example_call(op, device)
            try:
                lines += [f"  {line}" for line in str(ops.explain(op, *args, **kwargs)).splitlines()]
            except ValueError as error:
                lines.append(f"  {op}: {error}")
        for backend in BACKENDS:
            reason = unavailable(backend, device)
            how = f" ({native.describe(device)})" if backend == "native" and reason is None else ""
            lines.append(f"  backend {backend}: {'ran' if reason is None else reason}{how}")
        if device == "cpu":
            lines += _products()
    return "\n".join(lines)


def _products() -> list[str]:
    """Which matrix products of a CPU are the extension's, and why the others are left to PyTorch's library."""
    if unavailable("native", "cpu") is not None:
        return ["  matrix products: PyTorch's library"]
    reason = native.reason_for_library("matmul")
    faster = "its own kernel was measured to be faster than the matrix library on processors like this one"
    choices = {
        "linear_cross_entropy": (reason is None, reason or faster),
        "a few rows, in generation": linear_choice(),
    }
    lines = [f"  processor's maker: {native.cpu_maker()}"]
    for what, (own, why) in choices.items():
        lines.append(f"  products of {what}: {'the extension' if own else 'the library'} ({why})")
    return lines
