"""Trust at first use: `auto` takes a kernel on a GPU only after it gave the right results there.

The first call of each variant of a kernel (variants.py) runs a self-test: a small call of the same variant, on the
kernel and on PyTorch's own op, forward and each gradient that is asked for, both compared with the op's formula in
float64 by the rule of `fastgpt parity`. The kernel runs twice, and has to give the same bits. The outcome is kept on
disk (kept_outcomes.py). Where a kernel is wrong, a warning says so with the figures, and PyTorch serves.

A call that names its backend runs without it. FASTGPT_SELF_TEST=0 leaves it out.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import reference
from .accuracy import ATOL, exact, max_error, outputs_and_gradients, tolerance
from .compared_heads import heads_of, results_of_heads
from .dropout import without_rows
from .kept_outcomes import Outcome, keep, machine, read
from .library import in_backward
from .variants import Attention, Call, Draw, calls_of, small_call
from .yardsticks import yardstick_for

# The devices on which `auto` runs self-tests: those whose kernels were not run where they were written.
SELF_TESTED = {"cuda"}
# The sums are longer than in the cases of `fastgpt parity`, whose tolerances are those of short ones.
LONGER_SUMS = 2.5
Run = Callable[..., Any]

_setting = os.environ.get("FASTGPT_SELF_TEST") or "1"
_outcomes: dict[tuple[str, torch.device], Outcome] = {}
_said: set[tuple[str, torch.device]] = set()


def is_on() -> bool:
    """Whether kernels have to pass; ValueError where FASTGPT_SELF_TEST is neither 0 nor 1."""
    if _setting not in ("0", "1"):
        raise ValueError(f"FASTGPT_SELF_TEST: expected 0 or 1, got {_setting!r}")
    return _setting == "1"


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records what is launched, and a self-test would become a part of it."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def without_modes(device: torch.device, function: Callable[[], Any]) -> Any:
    """function() on `device` where no trace, mode, transform, autocast, grad mode or `rows_from` of the caller is.

    This is in a thread of its own. Within a backward pass it is in this thread, because autograd has one for each GPU,
    which would wait for the other one, and the other one for it.
    """

    def run() -> Any:
        on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        no_autocast = torch.autocast(device.type, enabled=False)
        with on_device, no_autocast, torch.inference_mode(False), torch.enable_grad(), without_rows():
            return function()

    if in_backward():
        return run()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def why_not(op: str, backend: str, run_of: Callable[[Call], Run], device: torch.device, facts: tuple) -> str | None:
    """Why a self-test forbids the calls that `facts` describe; None where the kernel is right. It warns of failures.

    `run_of` gives the implementation that serves a call.
    """
    for call in calls_of(op, facts):
        variant = call.variant(device)
        outcome = find(op, backend, variant, device) or _test(op, backend, run_of(call), device, call, variant)
        if not outcome.passed:
            _warn(op, backend, variant, device, outcome, getattr(call, "instead", "PyTorch serves"))
            what = "its self-test failed on this device" if outcome.is_kept else "no self-test was possible"
            return f"{what}: {outcome.figures}"
    return None


def name_of(op: str, backend: str, variant: str) -> str:
    return f"{op}, {backend}: {variant}"


def known_outcomes(device: torch.device) -> dict[str, Outcome]:
    """Every outcome for `device`, from this process and from earlier ones, by `name_of` the variant."""
    return read(device) | {name: outcome for (name, of), outcome in _outcomes.items() if of == device}


def find(op: str, backend: str, variant: str, device: torch.device) -> Outcome | None:
    """The outcome that is known, from this process or from an earlier one; None where the variant was never tried."""
    name = name_of(op, backend, variant)
    if (name, device) not in _outcomes and (kept := read(device).get(name)):
        _outcomes[name, device] = kept
    return _outcomes.get((name, device))


def is_known(op: str, backend: str, device: torch.device, facts: tuple) -> bool:
    """Whether `why_not` can answer without a self-test."""
    return all(find(op, backend, call.variant(device), device) for call in calls_of(op, facts))


def _test(op: str, backend: str, run: Run, device: torch.device, call: Call, variant: str) -> Outcome:
    small = small_call(call, device)
    outcome: Outcome = without_modes(device, partial(measure, op, backend, run, device, small))
    name = name_of(op, backend, variant)
    _outcomes[name, device] = outcome
    if outcome.is_kept:
        keep(device, name, outcome)
    return outcome


def measure(op: str, backend: str, run: Run, device: torch.device, call: Call) -> Outcome:
    """The kernel's results for `call`, and those of PyTorch, compared with the formula."""
    try:
        tensors, options = call.inputs(Draw(device))
        arguments = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        copies = {name: tensor.clone() for name, tensor in arguments.items()}
        expected = _compared(getattr(reference, op), call, arguments, options, exact)
        yardstick = yardstick_for(op, backend, device.type, "dropout_p" in options)
        torchs = _compared(yardstick, call, arguments, options, lambda tensor: tensor)
    except Exception as error:  # no memory is free; PyTorch has no deterministic way where one is demanded; ...
        return Outcome(False, f"PyTorch's part of it: {_first_line(error)}", is_kept=False)
    try:
        options |= _all_options(op, call, arguments | options)
        ours, again = (_results(run, call, arguments, options) for _ in range(2))
        changed = [name for name, tensor in arguments.items() if not torch.equal(tensor, copies[name])]
        if changed:
            return Outcome(False, f"{', '.join(changed)}: the kernel has written to it")
        outcome = _compare(heads_of(call, ours) if isinstance(call, Attention) else ours, torchs, expected, call.dtype)
        return outcome if not outcome.passed else _whole(call, ours, again) or outcome
    except torch.OutOfMemoryError as error:
        return Outcome(False, _first_line(error), is_kept=False)
    except Exception as error:  # a compiler or a driver may raise anything
        return Outcome(False, f"it raised {type(error).__name__}: {_first_line(error)}")


def _whole(call: Call, ours: dict[str, Tensor], again: dict[str, Tensor]) -> Outcome | None:
    """What is wrong with values that need not have been compared with the formula."""
    infinite = [name for name, value in ours.items() if isinstance(call, Attention) and not value.isfinite().all()]
    if infinite:
        return Outcome(False, f"{', '.join(infinite)}: not finite in a head that is not among the compared ones")
    differing = [name for name, value in ours.items() if not torch.equal(value, again[name])]
    if differing:
        return Outcome(False, f"{', '.join(differing)}: two runs on the same inputs gave different bits")
    return None


def _all_options(op: str, call: Call, given: dict[str, Any]) -> dict[str, Any]:
    """Every other argument that an implementation gets: those that are `given`, and the op's defaults."""
    parameters = inspect.signature(getattr(reference, op)).parameters.values()
    known = {*given, "first_row"}  # this one is of the formula alone
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in known}
    read_as = getattr(call, "read_as", None)
    return defaults | ({} if read_as is None else {"read_as": read_as})


def _compared(
    function: Run,
    call: Call,
    arguments: dict[str, Tensor],
    options: dict[str, Any],
    convert: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """The results of the formula or of PyTorch, on converted tensors; of attention, those of a few heads."""
    if isinstance(call, Attention):
        upstream = _upstream(call.output_shape, call.dtype, _generator(arguments))
        return results_of_heads(function, call, arguments, options, upstream, convert)
    return _results(function, call, {name: convert(tensor) for name, tensor in arguments.items()}, options)


def _generator(arguments: dict[str, Tensor]) -> torch.Generator:
    return torch.Generator(next(iter(arguments.values())).device).manual_seed(1)


def _upstream(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Numbers that are exact in every dtype, so that all functions that are compared get the same gradient."""
    draws = torch.randint(17, shape, generator=generator, device=generator.device, dtype=torch.int8)
    return draws.to(dtype) / 8.0 - 1.0


def _results(function: Run, call: Call, arguments: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """The outputs of function(**arguments, **options) and the gradients that are asked for, by name."""
    tensors = list(arguments.values())
    dtype = getattr(call, "autocast", None) if tensors[0].dtype != torch.float64 else None
    generator = _generator(arguments)

    def upstream_of(out: Tensor) -> Tensor:
        if out.ndim == 0:  # of a loss; gradients of a mean would vanish beside the tolerance without this factor
            return torch.full_like(out, 256.0)
        return _upstream(out.shape, out.dtype, generator)

    with torch.autocast(tensors[0].device.type, dtype=dtype, enabled=dtype is not None):
        return outputs_and_gradients(function, arguments, options, call.asked_for(), upstream_of)


def _compare(
    ours: dict[str, Tensor], torchs: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype
) -> Outcome:
    """The figures of the worst value: its error, and what is allowed."""
    worst, figures, passed = -1.0, "", True
    for name, oracle in expected.items():
        value = ours[name]
        if value.shape != oracle.shape:
            return Outcome(False, f"{name}: shape {tuple(value.shape)}, expected {tuple(oracle.shape)}")
        coarsest = max(value.dtype, dtype, key=lambda of: ATOL[of])
        error, torch_error = max_error(value, oracle), max_error(torchs[name], oracle)
        allowed = 2.0 * torch_error + LONGER_SUMS * tolerance(coarsest, oracle)
        if error / allowed > worst:
            worst = error / allowed
            figures = f"{name}: error {error:.1e}, allowed {allowed:.1e} (PyTorch's {torch_error:.1e})"
        passed = passed and error <= allowed
    return Outcome(passed, figures)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _warn(
    op: str, backend: str, variant: str, device: torch.device, outcome: Outcome, instead: str = "PyTorch serves"
) -> None:
    name = name_of(op, backend, variant)
    if (name, device) in _said:
        return
    _said.add((name, device))
    facts = ", ".join(f"{what} {value}" for what, value in (machine(device) or {}).items())
    if outcome.is_kept:
        what = f"SELF-TEST FAILED: {op} on the {backend} backend is not right on this machine; {instead}"
        remedy = "please report this line; FASTGPT_BACKEND=torch leaves out all kernels"
    else:
        what = f"no self-test of {op} on the {backend} backend was possible; in this process {instead}"
        remedy = "FASTGPT_BACKEND=torch leaves out all kernels"
    warnings.warn(f"fastgpt: {what}; variant: {variant}; {outcome.figures}; {facts}; {remedy}", stacklevel=2)
