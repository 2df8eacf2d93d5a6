"""One comparison, from beginning to end: parity, rounds in turn, memory, rows.

Parity comes first and decides: where FastGPT's error against the float64 oracle is above twice PyTorch's plus the
tolerance (`fastgpt.parity` has the rule), `ParityError` is raised, nothing is timed and nothing is written. A peer
that cannot run here, or that computes something else, is left out, and why is written down with the run.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastgpt
from fastgpt import ops, parity
from fastgpt.benchmarks.publish import rows as results
from fastgpt.ops import reference
from fastgpt.ops.backend import PREFERENCE, Explanation

from .measure import Call, Ceilings, Clock, clock_of, interleave, measure_ceilings, peak_bytes, ratio, spread, verdict
from .peers import Absent, Peer

OURS = "fastgpt"
MAX_ERROR_RATIO = 2.0
MAX_PEER_ERROR_RATIO = 20.0  # a peer may be rougher; beyond this it does not compute the same thing


class ParityError(AssertionError):
    """Our result is wrong, so that its time means nothing."""


@dataclass(frozen=True)
class Setting:
    """Where and how thoroughly to measure; from the command line, see conftest.py."""

    device: torch.device
    seconds: float = 1.0  # per contender and comparison
    min_rounds: int = 5
    min_time: float = 1e-4
    quick: bool = False
    nanogpt: str | None = None
    lecture: str | None = None
    data: str = "shakespeare"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


@dataclass(kw_only=True)
class Work:
    """What is compared: the same work, by FastGPT and by its peers."""

    op: str
    shape: str
    direction: str
    dtype: str
    contenders: dict[str, Call]  # "fastgpt" among them
    error_ratio: Callable[[str], float | None]  # of a contender's results; None where it cannot be told
    absent: dict[str, str] = field(default_factory=dict)
    remark: str | None = None  # for whoever reads the times
    backend: str | None = None
    n_bytes: float | None = None
    flops: float | None = None
    tokens: int | None = None  # done by one call
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)  # by contender
    clock: Clock | None = None  # None: the device's
    warmups: int = 1  # rounds, after the first call that shows whether a contender runs
    seconds: float | None = None  # per contender, and rounds at least; None: the setting's
    min_rounds: int | None = None
    measure_memory: bool = True


class Suite:
    """A run: what was measured so far, and the file it goes to (None: nowhere)."""

    def __init__(self, setting: Setting, path: Path | None) -> None:
        self.setting, self.path = setting, path
        self.rows: list[dict[str, Any]] = []
        self.absent: dict[str, dict[str, str]] = {}
        self.remarks: list[str] = []
        self.facts = results.facts(setting.device)
        self.ceilings: Ceilings | None = None

    def measure(self, work: Work) -> dict[str, list[float]]:
        """Seconds by contender and round. Raises ParityError; whatever raises, no row is written."""
        contenders, error_ratios = self.check(work)
        self._look_at_the_ceilings()
        setting = self.setting
        times = interleave(
            contenders, work.clock or clock_of(setting.device),
            seconds=setting.seconds if work.seconds is None else work.seconds,
            min_rounds=setting.min_rounds if work.min_rounds is None else work.min_rounds,
            min_time=setting.min_time if work.clock is None else 0.0, warmups=work.warmups,
        )  # fmt: skip
        peaks = {
            name: peak_bytes(call, setting.device) if work.measure_memory else None for name, call in contenders.items()
        }
        machine = self.facts | {"clocks_mhz": results.clocks_mhz(setting.device)}
        self.rows += make_rows(work, times, error_ratios, peaks, self.ceilings, machine)
        if self.path is not None:
            done = list(dict.fromkeys(row["op"] for row in self.rows))
            results.write(self.path, self.rows, results.run_line(done, self.ceilings, self.absent, self.facts))
        return times

    def _look_at_the_ceilings(self) -> None:
        """Before each comparison: the best of the run counts, for the rows that are there already too."""
        now = measure_ceilings(self.setting.device)
        self.ceilings = now if self.ceilings is None else self.ceilings.or_better(now)
        for row in self.rows:
            row["roofline_fraction"] = _digits(
                self.ceilings.fraction(row["median_ms"] / 1e3, row["bytes"], row["flops"])
            )

    def check(self, work: Work) -> tuple[dict[str, Call], dict[str, float | None]]:
        """The contenders that run and compute the same, and their error ratios. Only a peer may be left out."""
        absent = self.absent.setdefault(work.op, {})
        absent.update(work.absent)
        if work.remark and work.remark not in self.remarks:
            self.remarks.append(work.remark)
        present: dict[str, Call] = {}
        ratios: dict[str, float | None] = {}
        for name in (OURS, *(name for name in work.contenders if name != OURS)):
            try:
                ratios[name] = work.error_ratio(name)
                limit = MAX_ERROR_RATIO if name == OURS else MAX_PEER_ERROR_RATIO
                if ratios[name] is not None and not ratios[name] <= limit:
                    raise ParityError(
                        f"{work.op} {work.shape}: the error of {name} is {ratios[name]:.3g} times PyTorch's; "
                        f"at most {limit:g} is allowed, and no time is kept"
                    )
                if work.clock is None:
                    work.contenders[name]()
            except Exception as error:
                if name == OURS:
                    raise
                reason = str(error).strip().splitlines()[0][:200] if str(error) else repr(error)
                absent[f"{name}, {work.shape}, {work.direction}"] = reason
                continue
            present[name] = work.contenders[name]
        return present, ratios


def make_rows(
    work: Work,
    times: Mapping[str, list[float]],
    error_ratios: Mapping[str, float | None],
    peaks: Mapping[str, int | None],
    ceilings: Ceilings,
    machine: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """One row per contender, FastGPT's first, with the keys of `rows.KEYS`."""
    spreads = {name: spread(values) for name, values in times.items()}
    peers = [name for name in times if name != OURS]
    best = min(peers, key=lambda name: spreads[name].median, default=None)
    made = []
    for name, one in spreads.items():
        against = best if name == OURS else name
        ratios = ratio(times[against], times[OURS]) if against is not None else None
        row = {
            "kind": "row", "op": work.op, "shape": work.shape, "dtype": work.dtype, "direction": work.direction,
            "implementation": name, "backend": work.backend if name == OURS else None,
            "median_ms": _digits(one.median * 1e3), "p20_ms": _digits(one.p20 * 1e3), "p80_ms": _digits(one.p80 * 1e3),
            "rounds": len(times[name]),
            "ratio": _digits(ratios and ratios.median), "ratio_p20": _digits(ratios and ratios.p20),
            "ratio_p80": _digits(ratios and ratios.p80),
            "best_peer": best if name == OURS else None, "verdict": verdict(ratios) if ratios else None,
            "bytes": work.n_bytes, "flops": work.flops,
            "roofline_fraction": _digits(ceilings.fraction(one.median, work.n_bytes, work.flops)),
            "peak_bytes": peaks.get(name), "parity_error_ratio": _digits(error_ratios.get(name)),
            "extra": _rates(work, one.median) | work.extra.get(name, {}),
        }  # fmt: skip
        made.append({key: {**row, **machine}[key] for key in results.KEYS})
    return made


def _rates(work: Work, seconds: float) -> dict[str, float]:
    rates = {"gb_per_s": (work.n_bytes, 1e9), "tflop_per_s": (work.flops, 1e12), "tokens_per_s": (work.tokens, 1.0)}
    return {name: _digits(amount / seconds / unit) for name, (amount, unit) in rates.items() if amount}


def _digits(value: float | None) -> float | None:
    """Five significant digits: more would be noise in the file's history."""
    return None if value is None else float(f"{value:.5g}")


# --- the work of one op ----------------------------------------------------------------------------------------------


class DeviceDraw(parity.Draw):
    """Random inputs made on the device, fast; `parity.Draw` makes the same numbers everywhere, slowly."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.dtype, self.device = setting.dtype, setting.device.type
        self.generator = torch.Generator(setting.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=dtype or self.dtype, device=self.device)

    def index(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)


Arguments = Callable[[parity.Draw], dict[str, Tensor]]


def op_work(
    setting: Setting,
    op: str,
    shape: str,
    direction: str,
    *,
    arguments: Arguments,
    few: Arguments,
    peers: Mapping[str, Callable[[], Peer]],
    options: Mapping[str, Any] | None = None,
    n_bytes: float | None = None,
    flops: float | None = None,
) -> Work:
    """The op called `op` on `arguments`, in the op's own order; `few` are fewer rows of them, for the float64 oracle.

    `peers` are functions of the same arguments. Forward is timed without gradients; forward+backward takes the
    gradients of everything that has one.
    """
    options = dict(options or {})
    torch.compiler.reset()  # one graph too many for the same function, and torch.compile runs it eagerly
    inputs = [list(arguments(DeviceDraw(setting, seed)).values()) for seed in range(_copies(setting))]
    taken = ops.explain(op, *inputs[0], **options)
    ours = Peer(functools.partial(getattr(ops, op), **options))
    present, absent = {OURS: ours}, {}
    for name, make in peers.items():
        try:
            present[name] = make()
        except Absent as reason:
            absent[name] = str(reason)
    contenders = {}
    for name, peer in present.items():
        own = [[t.clone() for t in tensors] for tensors in inputs] if peer.overwrites else inputs
        contenders[name] = _call(peer.function, own, direction)
    is_random = options.get("dropout_p", 0.0) > 0.0
    case = parity.ParityCase(op, shape, few, options | ({"seed": 7} if is_random else {}))
    check = PeerCheck(case, setting)

    def error_ratio_of(name: str) -> float | None:
        if name == OURS:
            return our_error_ratio(case, taken.backend, setting)
        return None if is_random else check.error_ratio(present[name], direction)

    return Work(
        op=op, shape=shape, direction=direction, dtype=str(setting.dtype).removeprefix("torch."), backend=taken.backend,
        contenders=contenders, error_ratio=error_ratio_of, absent=absent, n_bytes=n_bytes, flops=flops,
        remark=_fallback(setting.device.type, taken),
    )  # fmt: skip


def _fallback(device_type: str, taken: Explanation) -> str | None:
    """What a reader of the times has to know where the device has kernels of ours, and PyTorch was measured."""
    ours = PREFERENCE[device_type][taken.op][0]
    if taken.backend == ours:
        return None
    reason = taken.reasons.get(ours, f"backend {taken.backend} was asked for")
    return f"{taken.op} was measured on {taken.backend}, not on {ours}: {reason}"


def our_error_ratio(case: parity.ParityCase, backend: str, setting: Setting) -> float:
    """The largest, over outputs and gradients, of error / (PyTorch's error + tolerance / 2). Up to 2 passes."""
    checked = parity.measure_case(case, backend, setting.dtype, setting.device.type)
    for row in checked:
        if row.reason:
            raise ParityError(f"{case.op} {case.name}, {row.value}: {row.reason}; no time is kept")
    return max(error_ratio(row.ours, row.torch, row.atol) for row in checked)


class PeerCheck:
    """The same for peers, which take the arguments by position; the oracle is asked once for all of them."""

    def __init__(self, case: parity.ParityCase, setting: Setting) -> None:
        self.case, self.setting = case, setting

    @functools.cached_property
    def known(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
        """The arguments, what the oracle makes of them, and PyTorch's error in each value plus half the tolerance."""
        case, setting = self.case, self.setting
        drawn = case.arguments(parity.Draw(setting.dtype, setting.device.type))
        exact = {name: parity.exact_copy(tensor) for name, tensor in drawn.items()}
        oracle = parity.outputs_and_gradients(getattr(reference, case.op), case, exact, case.options)
        torchs = parity.outputs_and_gradients(parity.YARDSTICKS[case.op], case, drawn, case.options)
        errors = {
            name: parity.max_error(torchs[name], value) + parity.tolerance(setting.dtype, value) / 2
            for name, value in oracle.items()
        }
        return drawn, oracle, errors

    def error_ratio(self, peer: Peer, direction: str) -> float:
        """Of its outputs alone where no gradient is timed."""
        drawn, oracle, errors = self.known
        if peer.overwrites:
            drawn = {name: tensor.clone() for name, tensor in drawn.items()}
        if direction == "forward":
            with torch.no_grad():
                out = peer.function(*drawn.values())
            values = dict(zip(("out", "h"), out if isinstance(out, tuple) else (out,), strict=False))
        else:
            values = parity.outputs_and_gradients(lambda **named: peer.function(*named.values()), self.case, drawn, {})
        return max(parity.max_error(value, oracle[name]) / errors[name] for name, value in values.items())


def error_ratio(error: float, torch_error: float, atol: float) -> float:
    return error / (torch_error + atol / 2) if math.isfinite(error) else math.inf


def model_error_ratio(model: fastgpt.GPT, x: Tensor, y: Tensor, compiled: bool = False) -> float:
    """Of the loss and every gradient, each as a part of its largest: our backends against the torch backend's error.

    The oracle is the model in float64; dropout is off. On a GPU both run under bfloat16 autocast, as in training.
    `compiled`: ours goes through torch.compile.
    """
    exact = copy.deepcopy(model).eval().double()
    with fastgpt.use_backend("torch"):
        exact_loss = exact(x, y)[1]
    exact_loss.backward()
    errors = {}
    for backend in ("auto", "torch"):
        copied = copy.deepcopy(model).eval()
        run = torch.compile(copied.loss) if compiled and backend == "auto" else copied.loss
        with fastgpt.use_backend(backend), torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            loss = run(x, y)
        loss.backward()
        pairs = [(loss.detach(), exact_loss.detach())]
        pairs += [(p.grad, q.grad) for p, q in zip(copied.parameters(), exact.parameters(), strict=True)]
        errors[backend] = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)
    return error_ratio(errors["auto"], errors["torch"], parity.ATOL[torch.bfloat16 if x.is_cuda else torch.float32])


def _copies(setting: Setting) -> int:
    """Sets of inputs that are taken in turn: on a GPU three, so that none is found in the L2 cache."""
    return 3 if setting.device.type == "cuda" else 1


def _call(function: Callable[..., Any], inputs: list[list[Tensor]], direction: str) -> Call:
    turn = itertools.cycle(inputs)
    if direction == "forward":

        def forward() -> None:
            with torch.no_grad():
                function(*next(turn))

        return forward

    turn = itertools.cycle([[_leaf(t) for t in tensors] for tensors in inputs])
    upstream: list[Tensor | None] = []

    def forward_and_backward() -> None:
        tensors = next(turn)
        out = function(*tensors)
        out = out if isinstance(out, tuple) else (out,)
        if not upstream:
            upstream.extend(None if y.ndim == 0 else torch.randn_like(y) for y in out)  # a loss's is 1: loss.backward()
        torch.autograd.grad(out, [t for t in tensors if t.requires_grad], upstream)

    return forward_and_backward


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor
