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
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import types
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TextIO

import torch
from torch import Tensor


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


@dataclass
class Case:
    name: str
    run: Callable[[], list[Tensor]]  # by the kernels
    exact: Callable[[], list[Tensor]]  # in float64
    slack: list[Tensor | float] | float = 2e-7  # what is allowed beyond the rounding to the result's dtype, absolutely


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


# --- the cases -------------------------------------------------------------------------------------------------------

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows(C: int, dtype: torch.dtype, offset: int | None, n: int) -> tuple[Tensor, Tensor]:
    """Logits (n, C), `offset` values after the start of longer rows, or packed; and targets, one of them ignored."""
    logits = 3.0 * draw(n, C, seed=C)
    targets = torch.randint(C, (n,), generator=torch.Generator().manual_seed(C))
    targets[0], targets[-1] = 0, C - 1
    if n > 2:
        targets[1] = -100
        logits[1] = math.nan  # an ignored row counts for nothing
    if offset is None:
        return logits.to(dtype), targets
    wide = torch.full((n, C + 11), math.nan, dtype=dtype)
    wide[:, offset : offset + C] = logits
    return wide[:, offset : offset + C], targets


def cross_entropy(
    C: int, dtype=F32, *, offset=None, n=3, weighted=False, smoothing=0.0, reduction="mean", passes=1, change=None
) -> Case:
    """The loss, and the gradient of each backward pass: the second one through a kept graph computes it anew."""
    from fastgpt.ops import cross_entropy, reference

    logits, targets = rows(C, dtype, offset, n)
    if change is not None:
        change(logits)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    weight = draw(C, seed=1).abs().to(dtype) if weighted else None
    upstream = torch.linspace(0.5, 1.5, n) if reduction == "none" else torch.tensor(1.0)

    def outcome(op, x: Tensor, weight: Tensor | None) -> list[Tensor]:
        x = x.detach().requires_grad_(passes > 0)
        loss = op(x, targets, weight=weight, **options)
        scaled = upstream.to(loss.dtype)
        return [loss, *(torch.autograd.grad(loss, x, scaled, retain_graph=True)[0] for _ in range(passes))]

    traits = [f"offset {offset}", f"smoothing {smoothing}", "weighted" if weighted else "", reduction]
    return Case(
        f"cross_entropy {n} x {C} {dtype} {' '.join(traits)}, {passes} backward",
        lambda: outcome(cross_entropy, logits, weight),
        lambda: outcome(reference.cross_entropy, logits.double(), None if weight is None else weight.double()),
        slack=1e-6 if C > 10000 else 2e-7,
    )


def chunk(C: int, dtype=F32, smoothing=0.0, with_grad=True) -> Case:
    """linear_cross_entropy's op: the losses of a chunk of logits, which their gradient overwrites."""
    from fastgpt.ops import reference

    logits, targets = rows(C, dtype, None, 3)
    scale = torch.tensor([0.5, 1.0, 2.0])

    def run() -> list[Tensor]:
        overwritten = logits.clone()
        losses = torch.ops.fastgpt.cross_entropy_chunk_(overwritten, targets, scale, -100, smoothing, with_grad)
        return [losses, overwritten]

    def exact() -> list[Tensor]:
        x = logits.double().requires_grad_()
        losses = reference.cross_entropy(x, targets, reduction="none", label_smoothing=smoothing)
        return [losses, torch.autograd.grad(losses, x, scale.double())[0] if with_grad else x]

    return Case(f"cross_entropy_chunk_ {C} {dtype} smoothing {smoothing}", run, exact)


def linear_cross_entropy(V: int, reduction: str) -> Case:
    from fastgpt.ops import linear_cross_entropy, reference

    x, weight = draw(5, 8), draw(V, 8, seed=1)
    targets = torch.tensor([0, V - 1, -100, V // 2, 1])

    def outcome(op, *inputs: Tensor) -> list[Tensor]:
        inputs = [value.detach().requires_grad_() for value in inputs]
        loss = op(*inputs, targets, label_smoothing=0.1, reduction=reduction)
        return [loss, *torch.autograd.grad(loss.sum(), inputs)]

    return Case(
        f"linear_cross_entropy {V} {reduction}",
        lambda: outcome(linear_cross_entropy, x, weight),
        lambda: outcome(reference.linear_cross_entropy, x.double(), weight.double()),
        slack=5e-6,
    )


def embedding(V: int, C: int, B: int, T: int, dtype=F32, *, frequent=0.0, P=0, position=0, offset=0) -> Case:
    """The sum of two tables' rows and both gradients. `frequent` is the share of one token; the tables begin `offset`
    values after a multiple of 16 bytes."""
    from fastgpt.ops import embedding, reference

    random = torch.Generator().manual_seed(V * C + B)
    tokens = torch.randint(V, (B, T), generator=random)
    tokens[torch.rand(B, T, generator=random) < frequent] = V // 2
    flat = draw((V + P) * C + offset, seed=C, dtype=dtype)[offset:]
    tables = [flat[: V * C].view(V, C)] + ([flat[V * C :].view(P, C)] if P else [])
    upstream = draw(B, T, C, seed=B, dtype=dtype)

    def outcome(op, tables: list[Tensor], upstream: Tensor) -> list[Tensor]:
        tables = [table.detach().requires_grad_() for table in tables]
        out = op(tokens, *tables, position_offset=position if P else 0)
        return [out, *torch.autograd.grad(out, tables, upstream)]

    exact = [table.double() for table in tables]
    sums = outcome(reference.embedding, exact, upstream.double().abs())  # of the absolute values that are added
    return Case(
        f"embedding V {V} C {C} B {B} T {T} {dtype} frequent {frequent} P {P}+{position} offset {offset}",
        lambda: outcome(embedding, tables, upstream),
        lambda: outcome(reference.embedding, exact, upstream.double()),
        slack=[2e-7, *(1e-6 * value for value in sums[1:])],
    )


def sum_sorted(C: int, dtype: torch.dtype, keys: torch.dtype, chunk: int) -> Case:
    """The op that sums rows of equal tokens: with any chunk, and with keys of 64 bits, which huge vocabularies need."""
    V, n = 5, 300
    tokens = torch.randint(V, (n,), generator=torch.Generator().manual_seed(C)) * 2 % V
    keys_in_order, order = torch.sort(tokens.to(keys), stable=True)
    grad = draw(n, C, seed=C, dtype=dtype)

    def exact(grad: Tensor) -> Tensor:
        return torch.zeros(V, C, dtype=torch.float64).index_add_(0, tokens, grad.double())

    return Case(
        f"embedding_sum_sorted {n} x {C} {dtype} {keys} in chunks of {chunk}",
        lambda: [torch.ops.fastgpt.embedding_sum_sorted(grad, keys_in_order, order, V, chunk)],
        lambda: [exact(grad)],
        slack=[1e-6 * exact(grad.abs())],
    )


def scale_gradient(n: int, dtype: torch.dtype, factor: float, offset: int) -> Case:
    """The gradient times a factor; zeros stay zeros. `offset`: values after a multiple of 16 bytes."""
    values = draw(n + offset, seed=n, dtype=dtype)
    values[offset] = 0.0

    def run() -> list[Tensor]:
        whole = values.clone()
        torch.ops.fastgpt.scale_gradient_(whole[offset:], torch.tensor(factor))
        return [whole]

    def exact() -> list[Tensor]:
        whole = values.double()
        part = whole[offset:]
        part.copy_(torch.where(part == 0, part, (part * factor).to(dtype).double()))
        return [whole]

    return Case(f"scale_gradient_ {n} {dtype} times {factor} offset {offset}", run, exact, slack=0.0)


def make_infinite(logits: Tensor) -> None:
    """Single values and a whole row of -inf, +inf, NaN, and the largest numbers."""
    logits[0, 1:3] = -math.inf
    logits[2] = -math.inf
    logits[3, 5] = math.inf
    logits[4, 6] = math.nan
    logits[5, 7], logits[5, 8] = torch.finfo(logits.dtype).max, torch.finfo(logits.dtype).min


# Rows of 3 KB of shared memory take every path at lengths that cost little: up to 128 values of float32 are kept in
# registers, up to about 512 by one block, up to about 4000 by a cluster.
SMALL, H100 = 3072, 232448
REGISTERS, BLOCK, CLUSTER, NOWHERE = (1, 65, 127, 128), (129, 257, 500), (1000, 1601, 4099), (9001,)


def small_device() -> Iterator[Case]:
    for C in (*REGISTERS, *BLOCK, *CLUSTER, *NOWHERE):
        for dtype in (F32, BF16, F16):
            yield cross_entropy(C, dtype, smoothing=0.1, weighted=True, offset=1)
            yield cross_entropy(C, dtype, reduction="sum", passes=2)
        yield cross_entropy(C, smoothing=0.1, weighted=True, reduction="none", passes=1)
        yield cross_entropy(C, BF16, offset=8, reduction="none", passes=1)
        yield cross_entropy(C, smoothing=0.1, passes=0)
        yield cross_entropy(C, BF16, offset=3, passes=0)
        yield chunk(C, smoothing=0.1)
        yield chunk(C, F16)
    yield cross_entropy(65, n=300)  # two blocks of row_weights_kernel
    for C in (100, 300, 1000):
        yield cross_entropy(C, n=7, change=make_infinite, reduction="none")
        yield cross_entropy(C, BF16, n=7, change=make_infinite, reduction="sum", offset=1)
    yield chunk(1000, with_grad=False)
    yield linear_cross_entropy(300, "mean")
    yield linear_cross_entropy(1000, "none")
    yield from embeddings()
    for dtype in (F32, BF16, F16):
        for n, factor, offset in (
            (1, 0.5, 0),
            (7, 0.5, 3),
            (5000, 0.5, 0),
            (5001, 3.0, 1),
            (64, math.inf, 0),
            (64, 1.0, 5),
        ):
            yield scale_gradient(n, dtype, factor, offset)


def embeddings() -> Iterator[Case]:
    for dtype in (F32, BF16, F16):
        yield embedding(1, 1, 1, 1, dtype)
        yield embedding(7, 33, 3, 100, dtype, P=128, position=5)
        yield embedding(7, 34, 3, 100, dtype, P=128, position=5)
        yield embedding(50, 8, 5, 129, dtype, frequent=0.5, P=200, position=71)
        yield embedding(2, 24, 5, 200, dtype, frequent=0.9, P=200)
        yield embedding(1, 16, 4, 64, dtype, offset=1)
        yield embedding(5, 520, 3, 128, dtype, frequent=0.97, P=128, offset=8)
        for C in (33, 34, 64):
            yield sum_sorted(C, dtype, torch.int64, chunk=16)
            yield sum_sorted(C, dtype, torch.int32, chunk=128)
    yield embedding(300, 1100, 1, 70, BF16, frequent=0.2, P=70)
    yield embedding(3, 768, 2, 64, P=64)


def h100() -> Iterator[Case]:
    """The lengths of rows that models have, and one too long for a cluster: two rows of each, of which both count."""
    for C, dtype in ((65, F32), (1000, BF16), (50257, F32), (50304, BF16), (128256, F32), (500000, F32)):
        yield cross_entropy(C, dtype, n=2)
        yield cross_entropy(C, dtype, n=1, passes=0)


def without_clusters() -> Iterator[Case]:
    for C, dtype in ((50304, F32), (128256, F32)):
        yield cross_entropy(C, dtype, n=2)


def few() -> Iterator[Case]:
    """What a fault put into the kernels on purpose has to be seen by."""
    yield cross_entropy(300)
    yield cross_entropy(1000)
    yield embedding(50, 8, 5, 129, frequent=0.5)


def with_plans() -> Iterator[Case]:
    """Every number of threads and of blocks that a plan may name, for rows that fill three groups of copies or less."""
    for threads, choices in {128: (0, 1), 256: (0, 1, 2, 4, 8), 512: (0, 1, 2, 4, 8)}.items():
        for blocks in choices:
            for dtype in (F32, BF16, F16):
                yield planned(cross_entropy(9001, dtype, n=1, smoothing=0.1), threads, blocks)
            yield planned(cross_entropy(1601, offset=1, smoothing=0.1, weighted=True), threads, blocks)
            yield planned(cross_entropy(1601, BF16, offset=3, reduction="none"), threads, blocks)


def planned(case: Case, threads: int, blocks: int) -> Case:
    """The case with a plan for its calls; a loss alone and a gradient alone take one pass, which keeps no row."""
    from fastgpt.ops.cross_entropy import set_cuda_plans

    of_calls = itertools.product((2, 4), (1, 2), (2000, 10000))  # element sizes, passes, classes: a plan is for a range
    plans = [(size, passes, most, threads, blocks if passes == 2 else 0) for size, passes, most in of_calls]

    def run() -> list[Tensor]:
        set_cuda_plans("cpu", plans)
        try:
            return case.run()
        finally:
            set_cuda_plans("cpu", [])

    return replace(case, name=f"{case.name}, {threads} threads, {blocks} blocks", run=run)


DEVICES = {
    "few cases": (SMALL, True, few),
    "small device": (SMALL, True, small_device),
    "H100": (H100, True, h100),
    "H100 without clusters": (H100, False, without_clusters),
    "H100 with plans": (H100, True, with_plans),
}


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

    for reduction in (1, 2):
        yield expect("target out of range", ops.cross_entropy_native, logits, targets, None, -100, reduction, 0.0, True)
    yield expect("token out of range", ops.embedding_native, torch.tensor([[0, 4]]), table, None, 0)
    emulator.set_elsewhere(targets)
    device = "targets: expected on the device of logits"
    yield expect(device, ops.cross_entropy_native, logits, targets, None, -100, 2, 0.0, True)
    yield expect(device, ops.cross_entropy_chunk_, logits, targets, draw(3), -100, 0.0, True)
    weight = draw(9)
    emulator.set_elsewhere(weight)
    device = "weight: expected on the device of logits"
    yield expect(device, ops.cross_entropy_native, logits, targets, weight, -100, 2, 0.0, True)
    emulator.set_elsewhere(None)


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
