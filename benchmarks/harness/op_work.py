"""The work of one op. Its benchmark says which sizes, arguments and peers there are; this module makes the contenders.

A benchmark is a short file: a subclass of `OpShape`, and the shapes to measure on each kind of device, in
`bench_softmax = op_benchmark(cpu=[...], cuda=[...])`.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import Tensor

from fastgpt import ops, parity
from fastgpt.benchmarks.publish.rows import OURS
from fastgpt.ops import reference
from fastgpt.ops.backend import PREFERENCE, Explanation
from fastgpt.parity.complete import half_added

from .accuracy import PeerCheck, op_error_ratio
from .ceilings import Demand, Product, Traffic
from .measure import Call
from .peers import Makers, Peer, make_present
from .suite import ParityError, Setting, Work

DIRECTIONS = ("forward", "forward+backward")


class OpShape:
    """One case of an op. A subclass is a frozen dataclass of sizes; its `str` names the case in the rows."""

    op: ClassVar[str]  # a name in fastgpt.ops; of an internal op, the name that its cases have in fastgpt.parity

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the op."""
        return {}

    @property
    def function(self) -> Callable[..., Any]:
        if not hasattr(reference, self.op):
            raise ParityError(f"{self.op} is {half_added()[self.op]}; without a formula it is not measured")
        return getattr(ops, self.op)

    def explain(self, *arguments: Tensor) -> Explanation:
        """Which backend takes the call, and why no faster one does."""
        return ops.explain(self.op, *arguments, **self.options)

    def arguments(self, draw: parity.Draw) -> dict[str, Tensor]:
        """Random arguments, in the op's own order."""
        raise NotImplementedError

    def few(self) -> Self:
        """The same case with fewer rows, which the float64 oracle computes in little time."""
        raise NotImplementedError

    def tiny(self) -> Self:
        """The same case for a rehearsal, which takes no time on a CPU."""
        return self.few()

    def peers(self, device: torch.device) -> Makers:
        raise NotImplementedError

    def elements_moved(self, backward: bool) -> tuple[float, float]:
        """The least that has to be read, and written, in elements of the dtype; `backward`: by both passes."""
        raise NotImplementedError

    def flops(self, backward: bool) -> float | None:
        """Operations of the matrix products; `backward`: of both passes. None: there are none."""
        return None

    def products(self, backward: bool) -> list[Product]:
        """Those of the products whose speed on this machine limits the op."""
        return []

    def demand(self, backward: bool, itemsize: int) -> Demand:
        read, written = self.elements_moved(backward)
        footprint = sum(self.elements_moved(backward=False))  # the passes of backward move some of it again
        traffic = Traffic(*(itemsize * elements for elements in (read, written, footprint)))
        return Demand(traffic, self.flops(backward), tuple(self.products(backward)))


def op_benchmark(cpu: Sequence[OpShape], cuda: Sequence[OpShape], directions: Sequence[str] = DIRECTIONS) -> Callable:
    """A benchmark of an op, as pytest collects it: the shapes for each kind of device, in each direction."""

    @pytest.mark.shapes(cpu=cpu, cuda=cuda)
    @pytest.mark.parametrize("direction", directions)
    def bench(run_work, setting, shape, direction):
        run_work(op_work(setting, shape, direction))

    return bench


class DeviceDraw(parity.Draw):
    """Random inputs that the device makes fast; `parity.Draw` makes the same numbers on every device, slowly."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.dtype, self.device = setting.dtype, setting.device.type
        self.generator = torch.Generator(setting.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=dtype or self.dtype, device=self.device)

    def index(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)


def op_work(setting: Setting, shape: OpShape, direction: str) -> Work:
    """FastGPT's op and its peers on the arguments of `shape`.

    Forward is timed without gradients; forward+backward takes the gradients of every argument that can have one.
    """
    options, backward = shape.options, direction != "forward"
    torch.compiler.reset()  # after too many graphs of one function torch.compile runs it uncompiled
    copies = 3 if setting.device.type == "cuda" else 1  # taken in turn, so that none is found in the GPU's L2 cache
    inputs = [list(shape.arguments(DeviceDraw(setting, seed)).values()) for seed in range(copies)]
    # With the gradients that are asked for, because a kernel may serve a call without them and not the one with them.
    taken = shape.explain(*(map(_leaf, inputs[0]) if backward else inputs[0]))
    ours = {OURS: lambda: Peer(functools.partial(shape.function, **options))}
    present, absent = make_present(ours | shape.peers(setting.device))
    contenders = {}
    for name, peer in present.items():
        own = [[t.clone() for t in tensors] for tensors in inputs] if peer.overwrites else inputs
        contenders[name] = (_forward_and_backward if backward else _forward)(peer.function, own)
    is_random = options.get("dropout_p", 0.0) > 0.0
    case = parity.ParityCase(shape.op, str(shape), shape.few().arguments, options | ({"seed": 7} if is_random else {}))
    check = PeerCheck(case, setting)

    def error_ratio_of(name: str) -> float | None:
        if name == OURS:
            return op_error_ratio(case, taken.backend, setting)
        return None if is_random else check.error_ratio(present[name], direction)

    return Work(
        op=shape.op, shape=str(shape), direction=direction, dtype=setting.dtype_name, backend=taken.backend,
        contenders=contenders, error_ratio=error_ratio_of, absent=absent, remark=_fallback(setting.device.type, taken),
        demand=shape.demand(backward, setting.dtype.itemsize), one_call=True,
    )  # fmt: skip


def _fallback(device_type: str, taken: Explanation) -> str | None:
    """What a reader of the times has to know where FastGPT has kernels for the device and PyTorch was measured."""
    ours = PREFERENCE.get(taken.op, {}).get(device_type, (*taken.reasons, taken.backend))[0]
    if taken.backend == ours:
        return None
    reason = taken.reasons.get(ours, f"backend {taken.backend} was asked for")
    return f"{taken.op} was measured on {taken.backend}, not on {ours}: {reason}"


def _forward(function: Callable[..., Any], inputs: list[list[Tensor]]) -> Call:
    turn = itertools.cycle(inputs)

    def call() -> None:
        with torch.no_grad():
            function(*next(turn))

    return call


def _forward_and_backward(function: Callable[..., Any], inputs: list[list[Tensor]]) -> Call:
    turn = itertools.cycle([[_leaf(t) for t in tensors] for tensors in inputs])
    upstream: list[Tensor | None] = []

    def call() -> None:
        tensors = next(turn)
        out = function(*tensors)
        out = out if isinstance(out, tuple) else (out,)
        if not upstream:  # random gradients; for a loss None, which means 1 as in loss.backward()
            upstream.extend(None if y.ndim == 0 else torch.randn_like(y) for y in out)
        torch.autograd.grad(out, [t for t in tensors if t.requires_grad], upstream)

    return call


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor
