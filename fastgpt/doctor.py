"""`fastgpt doctor`: devices, versions, and for each op the backend that is taken on this machine, with the reason."""

from __future__ import annotations

import platform
import warnings
from typing import Any

import torch

from . import __version__, ops, patching
from .cuda_graph import words
from .machine import device_name, package_version, resolve_device
from .ops import native, self_test
from .ops.backend import (
    BACKENDS,
    BackendError,
    check_preference,
    preferred,
    self_test_typical_variants,
    typical_variants,
    unavailable,
    use_backend,
)
from .ops.decode import reason_against_decode
from .ops.linear import linear_choice
from .parity.cases import Draw, parity_cases
from .parity.complete import can_be_measured, half_added, public_ops
from .threads import describe_load
from .training import graph
from .training.step import Precision

PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers")


def report(run_self_tests: bool = False, backend: str = "auto") -> str:
    """The text of `fastgpt doctor`: one fact a line, of the machine and then of each device.

    With `run_self_tests`, the self-tests of common calls run first. `backend` is preferred, as --backend of training.
    """
    first, preference = _preference(backend)
    with use_backend(first):
        return _report(run_self_tests, preference)


def _preference(name: str) -> tuple[str, str]:
    """The backend that is preferred, and a line that says so, or why it is refused: then "auto" is what runs."""
    try:
        check_preference(name, "--backend")
        first = preferred() if name == "auto" else name
    except BackendError as error:
        return "auto", f"backend preferred: none, it is refused: {error}"
    return first, f"backend preferred: {'none' if first == 'auto' else first}"


def _report(run_self_tests: bool, preference: str) -> str:
    lines = [
        f"fastgpt: {__version__}",
        f"Python: {platform.python_version()}",
        f"system: {platform.platform()}",
        *(f"{name}: {package_version(name) or 'not installed'}" for name in PACKAGES),
        f"CPU: {device_name(torch.device('cpu'))}",
        f"CPU instructions: {torch.backends.cpu.get_cpu_capability()}",
        f"threads: {torch.get_num_threads()}",
        f"load: {describe_load(torch.get_num_threads())}",
        *_gpu(),
    ]
    auto = resolve_device("auto")
    precision = Precision(auto)
    lines += [
        f"--device auto: {auto}",
        f"--dtype auto: {precision.name} ({precision.why})",
        f"--cuda-graph: {_cuda_graph(auto)}",
        preference,
        _tuned_table(),
        _patching(),
    ]
    if run_self_tests and auto.type not in self_test.SELF_TESTED:
        lines.append("--self-test: has nothing to do, because there is no CUDA device here")
    for device in dict.fromkeys(("cpu", auto.type)):
        found = _ops(device) + _backends(device) + (_matrix_products() if device == "cpu" else [])
        found += _self_tests(device, run_self_tests)
        lines += ["", f"On {device}:", *(f"  {line}" for line in found)]
    return "\n".join(lines)


def _gpu() -> list[str]:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        gpu = f"GPU: {torch.cuda.get_device_name()}"
        return [gpu, f"GPU architecture: sm_{major}{minor}", f"CUDA of this PyTorch: {torch.version.cuda}"]
    if torch.backends.mps.is_available():
        return ["GPU: Apple's; every op runs on it by PyTorch's own kernels"]
    return ["GPU: none that this PyTorch can use"]


def _cuda_graph(device: torch.device) -> str:
    """Whether training by a CUDA graph works; this is found out by training a small model."""
    if device.type != "cuda":
        return "needs a CUDA device"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason is in the line
        try:
            reason = graph.try_out(device)
        except Exception as error:  # a driver or a compiler may raise anything
            reason = words(error)
    works = "works: for a small model it gave what training without it gives"
    return works if reason is None else f"does not work here: {reason}"


def _tuned_table() -> str:
    """Which table of launch configurations the kernels follow, and how many of its entries are for this GPU."""
    try:
        from .triton_kernels import tuned
    except ImportError:  # from a source tree that is not installed
        return "tuned table: none, this source tree is not installed"
    if not torch.cuda.is_available():
        return tuned.describe(None)
    major, minor = torch.cuda.get_device_capability()
    return tuned.describe(10 * major + minor)


def _patching() -> str:
    """What `fastgpt.patch` takes here; `fastgpt.explain(model)` says it of one model."""
    version = package_version("transformers")
    theirs = "transformers is not installed" if version is None else f"of transformers {version}: a GPT-2"
    return f"fastgpt.patch: models of PyTorch's layers; {theirs}; it was tested with {patching.TESTED_WITH}"


def example_call(op: str, device: str) -> dict[str, Any]:
    """The arguments of a typical call of `op`, to ask `explain` about: those of its first parity case."""
    case = parity_cases(op)[0]
    return case.arguments(Draw(torch.float32, device)) | case.options


def _ops(device: str) -> list[str]:
    """Per op the backend that is taken, and why no faster one is; of an op that is being added, what it lacks."""
    lines, lacks = [], half_added()
    for op in public_ops():
        try:
            if op not in lacks or can_be_measured(op):
                lines += str(ops.explain(op, **example_call(op, device))).splitlines()
        except ValueError as error:
            lines.append(f"{op}: {error}")
        if op in lacks:
            lines.append(f"{op}: {lacks[op]}")
    return lines


def _backends(device: str) -> list[str]:
    """Whether each backend works; this is found out by running it."""
    lines = []
    for backend in BACKENDS:
        reason = unavailable(backend, device)
        if reason is not None:
            lines.append(f"backend {backend}: does not work here: {reason}")
        else:
            details = f" ({native.describe(device)})" if backend == "native" else ""
            lines.append(f"backend {backend}: works{details}")
    return lines


def _matrix_products() -> list[str]:
    """Which matrix products on a CPU the extension computes, and why PyTorch's library computes the others."""
    if unavailable("native", "cpu") is not None:
        return ["matrix products: by PyTorch's library, because the native backend does not work here"]
    reason = native.reason_for_library("matmul")
    faster = "its own kernel was measured to be faster than the matrix library on processors like this one"
    choices = {
        "linear_cross_entropy": (reason is None, reason or faster),
        "linear in float32, in training": linear_choice("matmul"),
        "a few rows, in generation": linear_choice("linear"),
        "Muon, in float32": linear_choice("orthogonal"),
    }
    lines = [f"maker of the processor: {native.cpu_maker()}"]
    for what, (own, why) in choices.items():
        lines.append(f"matrix products of {what}: by {'the extension' if own else 'the library'} ({why})")
    reason = reason_against_decode()
    lines.append(f"a token of a GPT, in generation: by {'one op' if reason is None else f'op after op ({reason})'}")
    return lines


def _self_tests(device_type: str, run: bool) -> list[str]:
    """Which variants of the kernels were right on this GPU, which were not, and which common ones were never tried."""
    is_on = self_test.is_on()
    has_kernels = any(unavailable(backend, device_type) is None for backend in BACKENDS if backend != "torch")
    if device_type not in self_test.SELF_TESTED or not has_kernels:
        return []
    if not is_on:
        return ["self-tests: left out, by FASTGPT_SELF_TEST=0"]
    device = torch.empty(0, device=device_type).device
    if run:
        self_test_typical_variants(device)
    known = self_test.known_outcomes(device)
    lines = [
        f"self-test {'passed' if outcome.passed else 'FAILED'}: {name} ({outcome.figures})"
        for name, outcome in sorted(known.items())
    ]
    common = [self_test.name_of(op, backend, call.variant(device)) for op, backend, call in typical_variants(device)]
    return lines + [f"self-test never tried: {name}" for name in common if name not in known]
