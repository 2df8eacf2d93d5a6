"""Which implementation of an op runs: one preference table, three ways to override it, one way to ask.

An op's file registers its implementations with :func:`register`. A call then picks one:

1. ``backend="name"`` of the call, else ``with use_backend("name")``, else ``FASTGPT_BACKEND``, else ``"auto"``;
2. ``"auto"`` walks ``PREFERENCE[device][op]``, fastest first, and takes the first backend that can serve;
3. a named backend that cannot serve raises :class:`BackendError` with its reason.

Whether a backend works *here* (driver, compiler, build) is found out by running it once, see :func:`unavailable`;
whether it serves *this call* (dtype, shape) is its own ``supports`` function, which returns None or a reason.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..config import BACKENDS
from .library import assume_constant_result

# Fastest first. A device that is not listed runs on "torch".
PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {
    "cuda": {
        "attention": ("triton", "torch"),
        "layer_norm": ("triton", "torch"),
        "add_layer_norm": ("triton", "torch"),
        "embedding": ("native", "torch"),
        "cross_entropy": ("native", "torch"),
        "linear_cross_entropy": ("native", "torch"),
    },
    "cpu": {
        "attention": ("torch",),
        "layer_norm": ("torch",),
        "add_layer_norm": ("torch",),
        "embedding": ("native", "torch"),
        "cross_entropy": ("native", "torch"),
        "linear_cross_entropy": ("native", "torch"),
    },
}
OPS = tuple(PREFERENCE["cpu"])


class BackendError(ValueError):
    """A backend that was asked for by name cannot serve this call."""


@dataclass(frozen=True)
class _Implementation:
    run: Callable[..., Any]
    supports: Callable[..., str | None]  # the op's own arguments -> None, or why not


_registry: dict[tuple[str, str], _Implementation] = {}
_smoke_tests: dict[str, Callable[[str], None]] = {}  # backend -> runs once on a device type, raises if it cannot
_availability: dict[tuple[str, str], str | None] = {}
_warned: set[tuple[str, str, str]] = set()


def _always(*args: Any, **kwargs: Any) -> None:
    return None


def register(op: str, backend: str, run: Callable[..., Any], supports: Callable[..., str | None] = _always) -> None:
    """Make `run` the implementation of `op` on `backend`. `supports` takes the op's arguments: None, or why not."""
    _registry[op, backend] = _Implementation(run, supports)


def register_smoke_test(backend: str, run_once: Callable[[str], None]) -> None:
    """`run_once(device_type)` launches the smallest real call of `backend` and raises if that fails."""
    _smoke_tests[backend] = run_once


def _run_smoke_test(backend: str, device_type: str) -> None:
    """In a thread of its own, which no trace, mode, transform or autocast of the caller reaches."""
    from concurrent.futures import ThreadPoolExecutor

    is_cuda = device_type == "cuda"
    device = torch.cuda.current_device() if is_cuda else None  # a thread's own, too

    def run() -> None:
        with torch.cuda.device(device) if is_cuda else contextlib.nullcontext():
            _smoke_tests[backend](device_type)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(run).result()


@assume_constant_result
def unavailable(backend: str, device_type: str) -> str | None:
    """Why `backend` cannot run on `device_type` on this machine, or None if it ran. The answer is kept."""
    key = (backend, device_type)
    if key not in _availability:
        if backend == "torch":
            _availability[key] = None
        elif backend not in _smoke_tests:
            _availability[key] = f"the {backend} backend is not part of this installation"
        else:
            try:
                _run_smoke_test(backend, device_type)
                _availability[key] = None
            except Exception as error:  # whatever a driver, compiler or loader raises is the answer to the question
                _availability[key] = str(error).strip().split("\n")[0] or type(error).__name__
    return _availability[key]


def _checked(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(
            f"{source}: unknown backend {name!r}; expected one of 'auto', {', '.join(map(repr, BACKENDS))}"
        )
    return name


_override = os.environ.get("FASTGPT_BACKEND") or "auto"  # checked at its first use: an import has nobody to tell


class use_backend:
    """Run every op inside the ``with`` block on one backend; the setting belongs to the process, not to a thread.

    >>> with fastgpt.use_backend("torch"):
    ...     logits, loss = model(idx, targets)
    """

    def __init__(self, name: str) -> None:
        self.name = _checked(name, "use_backend")
        self._outer: list[str] = []

    def __enter__(self) -> use_backend:
        global _override
        self._outer.append(_override)
        _override = self.name
        return self

    def __exit__(self, *exc: object) -> None:
        global _override
        _override = self._outer.pop()


def requested(backend: str = "auto") -> str:
    """The backend a call with ``backend=backend`` asks for, once `use_backend` and FASTGPT_BACKEND are counted in."""
    return _checked(backend, "backend") if backend != "auto" else _checked(_override, "FASTGPT_BACKEND")


def implements(backend: str, op: str) -> bool:
    """Whether there is an implementation of `op` on `backend` at all, here or elsewhere."""
    return (op, backend) in _registry


def _reason_against(op: str, backend: str, device_type: str, args: tuple, kwargs: dict) -> str | None:
    implementation = _registry.get((op, backend))
    if implementation is None:
        return f"{op} has no {backend} implementation"
    return unavailable(backend, device_type) or implementation.supports(*args, **kwargs)


def dispatch(op: str, backend: str, *args: Any, **kwargs: Any) -> Any:
    """Run `op` on the backend this call takes; the device is that of the first argument, a tensor."""
    device_type = "cpu" if args[0].is_cpu else args[0].device.type  # a device's type costs 10 us out of cold caches
    if backend != "auto" or _override != "auto":
        name = requested(backend)
        reason = _reason_against(op, name, device_type, args, kwargs)
        if reason is not None:
            raise BackendError(f"backend={name!r} was asked for, but cannot run {op} here: {reason}")
        return _registry[op, name].run(*args, **kwargs)
    for name in PREFERENCE.get(device_type, {}).get(op, ("torch",)):
        if name == "torch":  # serves everything
            break
        reason = _reason_against(op, name, device_type, args, kwargs)
        if reason is None:
            return _registry[op, name].run(*args, **kwargs)
        _say_once(op, name, reason)
    return _registry[op, "torch"].run(*args, **kwargs)


def _say_once(op: str, backend: str, reason: str) -> None:
    if torch.compiler.is_compiling() or (op, backend, reason) in _warned:
        return
    _warned.add((op, backend, reason))
    warnings.warn(f"fastgpt: {op} does not take the {backend} backend: {reason}", stacklevel=4)


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`explain`: `backend` is taken; `reasons` says why each backend of ours before it is not."""

    op: str
    backend: str
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.op}: runs on {self.backend}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def explain(op: str, *args: Any, backend: str = "auto", **kwargs: Any) -> Explanation:
    """Which backend the call ``op(*args, **kwargs)`` takes, and where that is "torch", why no kernel of ours.

    `op` is an op's name; the other arguments are those of the op itself, tensors included. Nothing is computed.
    Raises ValueError for an unknown op and BackendError where a backend asked for by name cannot serve.
    """
    if op not in OPS:
        raise ValueError(f"op: unknown op {op!r}; expected one of {', '.join(map(repr, OPS))}")
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    if not tensors:
        raise TypeError(f"explain({op!r}, ...) takes the arguments of {op}, and none of those given is a tensor")
    try:
        inspect.signature(getattr(importlib.import_module("fastgpt.ops"), op)).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"explain({op!r}, ...) takes the arguments of {op}: {error}") from None
    device_type = tensors[0].device.type
    name = requested(backend)
    if name != "auto":
        reason = _reason_against(op, name, device_type, args, kwargs)
        if reason is not None:
            raise BackendError(f"backend={name!r} was asked for, but cannot run {op} here: {reason}")
        return Explanation(op, name, {})
    reasons: dict[str, str] = {}
    for name in PREFERENCE.get(device_type, {}).get(op, ("torch",)):
        if name == "torch":
            break
        reason = _reason_against(op, name, device_type, args, kwargs)
        if reason is None:
            return Explanation(op, name, reasons)
        reasons[name] = reason
    for name in BACKENDS:
        if name != "torch" and name not in reasons and implements(name, op):
            reason = unavailable(name, device_type)
            reasons[name] = reason or f"on {device_type} it is for tests, and taken only where it is asked for"
    return Explanation(op, "torch", reasons)
