"""Which implementation of an op runs: a table of preferences, three ways to override it, and `explain` to ask for it.

An op's file registers its implementations with :func:`register`. A call then picks one:

1. ``"auto"`` walks ``PREFERENCE[op][device]`` and takes the first backend that can serve;
2. ``with use_backend("name")``, else ``FASTGPT_BACKEND``, puts the backend that it names before these, and "torch" in
   the place of all: no other backend has every op. One that can serve nothing on this machine is refused;
3. ``backend="name"`` of the call takes this backend alone. Where it cannot serve, :class:`BackendError` has the reason.

Whether a backend works on this machine (driver, compiler, build) is found out by running it once, see
:func:`unavailable`. Whether it serves a certain call (dtype, shape) is answered by the ``supports`` function that was
registered with it, which returns None or a reason. On a GPU, 1. and 2. then take it only where its results were right
in a self-test, which the first such call runs, see self_test.py.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import multiprocessing
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..config import BACKENDS
from . import dtensor, self_test
from .library import assume_constant_result
from .variants import CALLS, FACTS, Call, typical_calls, with_unknown_sizes

# The backends of each op on each device, in order of preference. On CPUs the fastest is first, by measurement. On GPUs
# our own is first; docs/kernels.md has the times of one. On a device that is not listed, an op runs on "torch".
PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {
    "attention": {"cuda": ("triton", "torch"), "cpu": ("native", "torch")},
    "layer_norm": {"cuda": ("triton", "torch"), "cpu": ("torch",)},
    "add_layer_norm": {"cuda": ("triton", "torch"), "cpu": ("native", "torch")},
    "activation": {"cuda": ("torch",), "cpu": ("native", "torch")},
    "embedding": {"cuda": ("native", "torch"), "cpu": ("native", "torch")},
    "cross_entropy": {"cuda": ("native", "torch"), "cpu": ("native", "torch")},
    "linear_cross_entropy": {"cuda": ("native", "torch"), "cpu": ("native", "torch")},
    "linear_log_probs": {"cuda": ("native", "torch"), "cpu": ("native", "torch")},
}
OPS = tuple(PREFERENCE)


class BackendError(ValueError):
    """A backend that was asked for by name cannot serve. `reason` is the part of the message that says why."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class Absent(str):
    """A reason of `supports` that holds for every call on a device: there is no kernel. Nobody is warned of it."""


class SwitchedOff(ImportError):
    """A backend was left out of the installation because it was not wanted. Nobody is warned of it."""


class Slower(str):
    """A reason of `unproved` that is a measurement: another backend is faster for this call. Nobody is warned of it."""


@dataclass(frozen=True)
class _Implementation:
    run: Callable[..., Any]
    supports: Callable[..., str | None]  # the op's own arguments -> None, or why not
    unproved: Callable[..., str | None]  # the same arguments -> None, or why "auto" leaves it to the next backend


_registry: dict[tuple[str, str], _Implementation] = {}
_smoke_tests: dict[str, Callable[[str], None]] = {}  # backend -> runs once on a device type, raises if it cannot
_availability: dict[tuple[str, str], str | None] = {}
_warned: set[tuple[str, str, str]] = set()


def _always(*args: Any, **kwargs: Any) -> None:
    return None


def register(
    op: str,
    backend: str,
    run: Callable[..., Any],
    supports: Callable[..., str | None] = _always,
    unproved: Callable[..., str | None] = _always,
) -> None:
    """Make `run` the implementation of `op` on `backend`.

    `run` gets every argument of the op, after the op has checked it. `supports` gets the arguments that a caller of
    the op or of `explain` gave, and returns None, or the reason why `run` does not serve them. `unproved` returns None,
    or the reason why `run`, which serves them, has not been shown to be the faster one: "auto" then passes it over.
    """
    _registry[op, backend] = _Implementation(run, supports, unproved)
    PREFERENCE.setdefault(op, {})  # an op that has no line there yet runs on "torch"


def register_smoke_test(backend: str, run_once: Callable[[str], None]) -> None:
    """`run_once(device_type)` launches the smallest real call of `backend` and raises if that fails."""
    _smoke_tests[backend] = run_once


def _run_smoke_test(backend: str, device_type: str) -> None:
    """Run it in a thread of its own, where no trace, mode, transform or autocast of the caller is active."""
    from concurrent.futures import ThreadPoolExecutor

    is_cuda = device_type == "cuda"
    device = torch.cuda.current_device() if is_cuda else None  # each thread has its own current device

    def run() -> None:
        with torch.cuda.device(device) if is_cuda else contextlib.nullcontext():
            _smoke_tests[backend](device_type)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(run).result()


@assume_constant_result
def unavailable(backend: str, device_type: str) -> str | None:
    """Why `backend` cannot run on `device_type` on this machine, or None if it ran. It is tried once per process."""
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
            except Exception as error:  # a driver, a compiler or a loader may raise anything
                reason = str(error).strip().split("\n")[0] or type(error).__name__
                _availability[key] = Absent(reason) if isinstance(error, SwitchedOff) else reason
    return _availability[key]


def _checked(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(
            f"{source}: unknown backend {name!r}; expected one of 'auto', {', '.join(map(repr, BACKENDS))}"
        )
    return name


# The backend that is preferred. It is checked at first use, so that the error reaches a caller.
_override = os.environ.get("FASTGPT_BACKEND") or "auto"
_accepted = {"auto"}


class use_backend:
    """Prefer one backend inside the ``with`` block; the setting belongs to the process, not to a thread.

    An op that has no such backend, and a call that it cannot serve, run as without it; "torch" serves every call.
    Raises ValueError for an unknown name, BackendError for a backend that can serve nothing on this machine.

    >>> with fastgpt.use_backend("torch"):
    ...     logits, loss = model(idx, targets)
    """

    def __init__(self, name: str) -> None:
        self.name = name
        check_preference(name, "use_backend")
        self._outer: list[str] = []

    def __enter__(self) -> use_backend:
        global _override
        self._outer.append(_override)
        _override = self.name
        return self

    def __exit__(self, *exc: object) -> None:
        global _override
        _override = self._outer.pop()


@assume_constant_result
def check_preference(name: str, source: str, device_type: str | None = None) -> None:
    """Refuse to prefer a backend that is unknown, or that can serve nothing on `device_type`; None: on this machine.

    `source`, an argument or a variable of the environment, is where the name comes from: the message begins with it.
    """
    _checked(name, source)
    if name == "auto":
        return
    found = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    reasons = {device: unavailable(name, device) for device in ((device_type,) if device_type else found)}
    if None not in reasons.values():
        reason = "; ".join(f"on {device}: {reason}" for device, reason in reasons.items())
        raise BackendError(f"{source}: {name!r} can serve no op {reason}; take 'auto', or another backend", reason)
    _accepted.add(name)


def preferred() -> str:
    """The backend that `use_backend` or FASTGPT_BACKEND names; "auto" where neither does."""
    if _override not in _accepted:  # then it is the environment's
        check_preference(_override, "FASTGPT_BACKEND")
    return _override


def implements(backend: str, op: str) -> bool:
    """Whether `op` has an implementation on `backend`, which may not run on this machine."""
    return (op, backend) in _registry


def _candidates(op: str, device_type: str) -> tuple[str, ...]:
    """The backends to try where one is preferred: it comes first, where it has the op."""
    first = _override if _override in _accepted else preferred()
    if first == "torch":
        return ("torch",)
    usual = PREFERENCE[op].get(device_type, ("torch",))
    if first == usual[0] or (op, first) not in _registry:
        return usual
    return first, *[name for name in usual if name != first]


def choose(op: str, backend: str, device_type: str, args: tuple, kwargs: dict) -> tuple[str, dict[str, str]]:
    """The backend on which ``op(*args, **kwargs)`` runs, and for each one tried before it why it does not run there.

    Raises BackendError where the call itself names a backend, which cannot serve.
    """
    is_strict, first = backend != "auto", _override
    if is_strict:
        names: tuple[str, ...] = (_checked(backend, "backend"),)
    elif first == "auto":
        names = PREFERENCE[op].get(device_type, ("torch",))
    else:
        names = _candidates(op, device_type)
    reasons: dict[str, str] = {}
    for name in names:
        if name == "torch":  # it serves every call
            break
        implementation = _registry.get((op, name))
        if implementation is None:
            reason: str | None = f"{op} has no {name} implementation"
        else:
            reason = unavailable(name, device_type) or implementation.supports(*args, **kwargs)
            if reason is None and not is_strict:
                if name != first:
                    reason = implementation.unproved(*args, **kwargs)
                if reason is None and device_type in self_test.SELF_TESTED:
                    reason = _distrusted(op, name, args, kwargs)
        if reason is None:
            return name, reasons
        if is_strict:
            said = f"backend={name!r} was asked for, but cannot run {op} here: {reason}"
            raise BackendError(f"{said}; leave backend= out, and one that can takes the call", reason)
        reasons[name] = reason
    return "torch", reasons


def usual(op: str, device_type: str) -> str:
    """The backend that most calls of `op` take on a kind of device: the first to be tried that works there."""
    return next(name for name in _candidates(op, device_type) if unavailable(name, device_type) is None)


_UNTRIED = "it has had no self-test yet, and a CUDA graph is being captured; make such a call once before the capture"
_MOST_VERDICTS = 4096  # the sizes of a call, of which generation has new ones at every token, are a part of the key
_verdicts: dict[tuple, str | None] = {}


def _distrusted(op: str, backend: str, args: tuple, kwargs: dict) -> str | None:
    """Why a self-test forbids this call, or None. What is known already takes a look into a dictionary."""
    if op not in FACTS or op not in CALLS:
        return "it has no self-test yet: variants.py has no section for it" if self_test.is_on() else None
    facts = FACTS[op](*args, **kwargs)
    device = (args[0] if args else next(iter(kwargs.values()))).device
    if torch.compiler.is_compiling():
        return _verdict(op, backend, device, with_unknown_sizes(facts))
    try:
        return _verdicts[op, backend, device, facts]
    except KeyError:
        pass
    except TypeError:  # sizes are symbols, which have no hash
        facts = with_unknown_sizes(facts)
    verdict = _verdict(op, backend, device, facts)
    if verdict is not _UNTRIED:
        if len(_verdicts) >= _MOST_VERDICTS:
            _verdicts.clear()
        _verdicts[op, backend, device, facts] = verdict
    return verdict


@assume_constant_result
def _verdict(op: str, backend: str, device: torch.device, facts: tuple) -> str | None:
    if not self_test.is_on():
        return None
    if self_test.is_capturing(device) and not self_test.is_known(op, backend, device, facts):
        return _UNTRIED

    def run_of(call: Call) -> Callable[..., Any]:
        return _registry[getattr(call, "route", op), backend].run

    reason = self_test.why_not(op, backend, run_of, device, facts)
    if reason is not None:
        _warned.add((op, backend, reason))  # the self-test has said it, louder
    return reason


def typical_variants(device: torch.device) -> list[tuple[str, str, Call]]:
    """(op, backend, call) for common calls of each kernel that `auto` prefers on `device` and that runs there."""
    return [
        (op, backend, call)
        for op in FACTS
        for backend in PREFERENCE.get(op, {}).get(device.type, ())
        if backend != "torch" and unavailable(backend, device.type) is None
        for call in typical_calls(op)
    ]


def self_test_typical_variants(device: torch.device) -> None:
    """Run the self-tests of `typical_variants` whose outcome is not known yet."""
    for op, backend, call in typical_variants(device):
        _verdict(op, backend, device, tuple(call))


def dispatch(op: str, backend: str, *args: Any, **kwargs: Any) -> Any:
    """Run `op` on the backend that `choose` names; the device is that of the first argument, a tensor."""
    if dtensor.is_loaded() and dtensor.has_local_tensors(op, args):
        return dtensor.on_local_tensors(op, partial(dispatch, op, backend), *args, **kwargs)
    device_type = "cpu" if args[0].is_cpu else args[0].device.type  # reading `device.type` takes 10 us with cold caches
    name, reasons = choose(op, backend, device_type, args, kwargs)
    if reasons:
        for unused, reason in reasons.items():
            _say_once("" if reason == _availability.get((unused, device_type)) else op, unused, reason)
    try:
        implementation = _registry[op, name]
    except KeyError:
        raise _half_added(op) from None
    return implementation.run(*args, **kwargs)


def _half_added(op: str) -> BackendError:
    remedy = f"in fastgpt/ops/{op}.py, which fastgpt/ops/__init__.py imports, add register({op!r}, 'torch', ...)"
    return BackendError(f"{op} is half-added: it has no torch backend, on which any op can run; {remedy}")


def _say_once(op: str, backend: str, reason: str) -> None:
    """Warn that `op` does not take the backend; without a name of an op, that none does. Not in helpers' processes."""
    if torch.compiler.is_compiling() or isinstance(reason, (Absent, Slower)) or (op, backend, reason) in _warned:
        return
    _warned.add((op, backend, reason))
    if multiprocessing.parent_process() is not None:
        return
    subject = f"{op} does not take the {backend} backend" if op else f"the {backend} backend does not run here"
    warnings.warn(f"fastgpt: {subject}: {reason}; FASTGPT_BACKEND=torch asks for PyTorch alone", stacklevel=4)


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`explain`: the call runs on `backend`; `reasons` says for each other one why it does not."""

    op: str
    backend: str
    reasons: dict[str, str]
    preferred: str = "auto"

    def __str__(self) -> str:
        lines = [f"{self.op}: runs on {self.backend}"]
        if self.preferred != "auto":
            lines[0] += ", which is preferred" if self.preferred == self.backend else f"; {self.preferred} is preferred"
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def explain(op: str, *args: Any, backend: str = "auto", **kwargs: Any) -> Explanation:
    """Which backend the call ``op(*args, **kwargs)`` runs on, and why not the preferred one or one of our kernels.

    `op` is an op's name; the other arguments are those of the op itself, tensors included. They are not
    computed with; on a GPU the self-test of the call's variant runs, if it has not run yet.
    Raises ValueError for an unknown op and BackendError where a backend asked for by name cannot serve.
    """
    function = getattr(importlib.import_module("fastgpt.ops"), op, None)
    if not inspect.isfunction(function):
        if op not in OPS:
            raise ValueError(f"op: unknown op {op!r}; expected one of {', '.join(map(repr, OPS))}")
        raise ValueError(f"op: {op!r} is half-added: fastgpt/ops/__init__.py does not export its function")
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    if not tensors:
        raise TypeError(f"explain({op!r}, ...) takes the arguments of {op}, and none of those given is a tensor")
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"explain({op!r}, ...) takes the arguments of {op}: {error}") from None
    device_type = tensors[0].device.type
    taken, reasons = choose(op, backend, device_type, args, kwargs)
    if not implements(taken, op):
        raise _half_added(op)
    first = preferred() if backend == "auto" else "auto"
    if first not in ("auto", "torch") and not implements(first, op):
        reasons = {first: f"it has no {op}"} | reasons
    if taken == "torch" and "torch" not in (backend, first):
        for name in BACKENDS:
            if name != "torch" and name not in reasons and implements(name, op):
                reason = unavailable(name, device_type)
                reasons[name] = reason or f"on {device_type} it runs only where it is preferred or asked for"
    return Explanation(op, taken, reasons, first)
