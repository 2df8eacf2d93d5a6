"""Compares the emulated CUDA kernels with the formulas in float64, in several orders of the threads.

emulate.py builds the libraries and calls `python checks.py JOBS`: a JSON list of libraries, each with a key of DEVICES
and the orders of the threads, or with "misuse" and its cases. What was found is printed as JSON.

In this process ops.cross_entropy, ops.embedding and ops.linear_cross_entropy call the emulated kernels for tensors on
the CPU, where fastgpt._C has its own. Each device is emulated in a process of its own, because the code that launches
the kernels may keep what it has asked of the device.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import types
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TextIO

import torch
from torch import Tensor

from emulated_cases import BF16, DEVICES, Case, draw


def prepare() -> None:
    """Import fastgpt such that its ops take the emulated kernels for tensors on the CPU."""
    torch.set_num_threads(1)
    extension = types.ModuleType("fastgpt._C")
    extension.instruction_set = lambda: "emulated"
    extension.cpu_maker = lambda: "other"  # so that matrix products are PyTorch's
    sys.modules["fastgpt._C"] = extension

    implement = torch.library.Library.impl

    def implement_on_cpu(library, name, function, key="", **options):
        return implement(library, name, function, "CPU" if key == "CUDA" else key, **options)

    torch.library.Library.impl = implement_on_cpu  # what is registered for CUDA, here in Python
    import fastgpt.ops  # noqa: F401

    torch.library.Library.impl = implement


class Emulator:
    """The library of the emulated kernels. Loading it registers them."""

    def __init__(self, path: str) -> None:
        torch.ops.load_library(path)
        self.library = ctypes.CDLL(path)
        self.library.emulator_launches.restype = ctypes.c_char_p
        self.kernels = kernels_of(path)

    def set_order(self, order: int) -> None:
        self.library.emulator_set_order(order)

    def set_device(self, shared_memory: int, has_clusters: bool) -> None:
        reserved = min(1024, shared_memory // 4)
        self.library.emulator_set_device(shared_memory, shared_memory + reserved, reserved, has_clusters)

    def set_elsewhere(self, tensor: Tensor | None) -> None:
        """Let `tensor` be on another device, for what asks in C++."""
        self.library.emulator_set_elsewhere(ctypes.c_void_p(0 if tensor is None else tensor.data_ptr()))

    def launches(self) -> list[str]:
        """The kernels launched since the last call; of a cluster, with its number of blocks."""
        found = []
        for line in self.library.emulator_launches().decode().splitlines():
            address, _, _, _, blocks, _ = map(int, line.split())
            found.append(self.kernels[address] + (f" in clusters of {blocks}" if blocks > 1 else ""))
        return found


@functools.cache
def kernels_of(path: str) -> dict[int, str]:
    """Every kernel that was compiled, each instance of a template: its address in the library, and its name."""
    listing = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    kernels = {}
    for line in listing.splitlines():
        address, kind, name = line.split(" ", 2)
        name = name.replace("(anonymous namespace)::", "").replace("fastgpt::", "").removeprefix("void ")
        match = re.match(r"\w+_kernel(<.*?>)?(?=\([^()]*\)$)", name.replace("(Held)", ""))  # no lambda in it
        if match and kind in "tT":
            kernels[int(address, 16)] = match.group().replace("c10::", "")
    return kernels


# --- a case and its comparison ---------------------------------------------------------------------------------------


def wrong(got: Tensor, exact: Tensor, slack: Tensor | float) -> str | None:
    """What is wrong with a result. It may be off by a rounding to its dtype, and by float32's errors."""
    relative = 1e-5 + (torch.finfo(got.dtype).eps if got.dtype != torch.float32 else 0.0)
    value, exact = got.detach().double(), exact.detach()
    if value.shape != exact.shape:
        return f"shape {tuple(value.shape)}, expected {tuple(exact.shape)}"
    same = (value == exact) | (value.isnan() & exact.isnan())
    bad = ~same & ~((value - exact).abs() <= relative * exact.abs() + slack)
    if not bad.any():
        return None
    at = tuple(bad.nonzero()[0].tolist())
    return f"{int(bad.sum())} of {bad.numel()} values, the first at {at}: {value[at]:.9g}, expected {exact[at]:.9g}"


def bits(results: list[Tensor]) -> int:
    """A checksum of the bits of all results."""
    flat = [result.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for result in results]
    return functools.reduce(lambda checksum, part: zlib.crc32(part, checksum), flat, 0)


def compare(emulator: Emulator, case: Case, orders: list[int]) -> tuple[list[str], Counter[str]]:
    """The failures of a case, and how often it launched each kernel."""
    failures, launched, exact, first = [], Counter(), case.exact(), None
    slacks = case.slack if isinstance(case.slack, list) else [case.slack] * len(exact)
    for order in orders:
        emulator.set_order(order)
        try:
            results = case.run()
        except RuntimeError as error:
            failures.append(f"{case.name}, order {order}: {error}")
            continue
        finally:
            launches = emulator.launches()
        launched.update(launches)
        if not launches:
            failures.append(f"{case.name}: no emulated kernel ran")
        for number, (got, want, slack) in enumerate(zip(results, exact, slacks, strict=True)):
            if reason := wrong(got, want, slack):
                failures.append(f"{case.name}, order {order}, result {number}: {reason}")
        if first is None:
            first = bits(results)
        elif bits(results) != first:
            failures.append(f"{case.name}: the order {order} gives other bits than {orders[0]}")
    return failures, launched


# --- what has to be refused ------------------------------------------------------------------------------------------


def refused(emulator: Emulator) -> Iterator[str]:
    """What the kernels, and the code that launches them, should have refused and did not."""
    logits, targets, table = draw(3, 9), torch.tensor([0, 9, 1]), draw(4, 8)
    ops = torch.ops.fastgpt

    def expect(message: str, call: Callable[..., object], *arguments: object) -> str | None:
        try:
            call(*arguments)
        except RuntimeError as error:
            return None if message in str(error) else f"expected {message!r}, got {error}"
        finally:
            emulator.launches()
        return f"expected {message!r}, got no error"

    def loss(reduction: int, weight: Tensor | None = None, token_weight: Tensor | None = None) -> object:
        options = -100, reduction, 0.0, 0.0, 0.0, True, False
        return ops.cross_entropy_native(logits, targets, weight, token_weight, *options)

    for reduction in (1, 2):
        yield expect("target out of range", loss, reduction)
    yield expect("token out of range", ops.embedding_native, torch.tensor([[0, 4]]), table, None, 0)
    emulator.set_elsewhere(targets)
    device = "targets: expected on the device of logits"
    yield expect(device, loss, 2)
    yield expect(device, ops.cross_entropy_chunk_, logits, targets, draw(3), -100, 0.0, 0.0, 0.0, True, False)
    weight, token_weight = draw(9), draw(3)
    emulator.set_elsewhere(weight)
    yield expect("weight: expected on the device of logits", loss, 2, weight)
    emulator.set_elsewhere(token_weight)
    yield expect("token_weight: expected on the device of logits", loss, 2, None, token_weight)
    emulator.set_elsewhere(None)
    for wrong_weight in (draw(4), draw(3, dtype=BF16), draw(3, 1)):
        yield expect("token_weight: expected float32 (N,)", loss, 2, None, wrong_weight)


# --- the processes ---------------------------------------------------------------------------------------------------


def check_device(library: str, orders: list[int], device: str) -> dict:
    shared_memory, has_clusters, cases = DEVICES[device]
    emulator = Emulator(library)
    emulator.set_device(shared_memory, has_clusters)
    failures, launched, count = list(filter(None, refused(emulator))), Counter(), 0
    for case in cases():
        of_case, launches = compare(emulator, case, orders)
        failures += of_case
        launched += launches
        count += 1
    return {"cases": count, "failures": failures, "launched": launched, "kernels": sorted(emulator.kernels.values())}


def check_misuse(library: str, names: list[str]) -> dict:
    """What the emulator answers to each case of misuse.cu."""
    misuse = Emulator(library).library.misuse
    misuse.restype = ctypes.c_char_p
    return {name: misuse(name.encode()).decode() for name in names}


def in_a_fork(errors: TextIO, call: Callable[..., object], *arguments: object) -> dict:
    """call(*arguments) in a copy of this process. Where the copy is stopped, that is one failure."""
    with tempfile.TemporaryFile("w+") as results:
        if (child := os.fork()) == 0:
            os.dup2(errors.fileno(), 2)
            json.dump(call(*arguments), results)
            results.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        results.seek(0)
        if status == 0:
            return json.load(results)
    errors.seek(0)
    said = [line for line in errors if "SUMMARY: " in line or "runtime error: " in line or "Error: " in line]
    return {"cases": 0, "failures": [*said, f"the process ended with status {status}"], "launched": {}, "kernels": []}


def main() -> None:
    jobs = json.loads(sys.argv[1])
    os.environ.pop("LD_PRELOAD", None)  # a sanitizer, which is for this process alone
    prepare()
    found = []
    for library, what, details in jobs:
        check = check_misuse if what == "misuse" else functools.partial(check_device, device=what)
        with tempfile.TemporaryFile("w+") as errors:
            found.append(in_a_fork(errors, check, library, details))
    print(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # ThreadSanitizer would stop at what libtorch does at exit


if __name__ == "__main__":
    main()
