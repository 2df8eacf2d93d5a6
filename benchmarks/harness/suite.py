"""One comparison from beginning to end: accuracy, rounds in turn, memory, rows.

Accuracy comes first and decides: where FastGPT's error against the float64 oracle is above twice PyTorch's plus the
tolerance (`fastgpt.parity` has the rule), `ParityError` is raised, nothing is timed and nothing is written. A peer
that cannot run here, or that computes something else, is left out, and the reason is written down with the run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastgpt import machine
from fastgpt.benchmarks.publish.rows import OURS, Row, Run, write

from . import ceilings, measure
from .ceilings import Ceilings, Demand
from .host import HostTimes, captured, host_times
from .measure import Call, Clock
from .step_profile import ms_by_kind

MAX_ERROR_RATIO = 2.0
REHEARSAL = "rehearsal, not a measurement"  # the device of its rows
MAX_PEER_ERROR_RATIO = 20.0  # a peer may be less accurate; beyond this it does not compute the same thing


class ParityError(AssertionError):
    """FastGPT's result is wrong, so that its time means nothing."""


@dataclass(frozen=True)
class Setting:
    """Where and how thoroughly to measure. conftest.py fills it from the command line."""

    device: torch.device
    seconds: float = 1.0  # per contender and comparison
    min_rounds: int = 5
    min_time: float = 1e-4  # a call that is faster is repeated until it takes so many seconds
    quick: bool = False
    nanogpt: str | None = None
    lecture: str | None = None
    data: str = "shakespeare"
    rehearsal: bool = False  # small shapes and a false clock, to see that everything runs; the rows say so

    @property
    def clock(self) -> Clock:
        return measure.rehearsed_clock if self.rehearsal else measure.clock_of(self.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of an op's arguments, and of a model's matrix products."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(kw_only=True)
class Work:
    """What is compared: the same work, done by FastGPT and by its peers."""

    op: str
    shape: str
    direction: str
    dtype: str
    contenders: dict[str, Call]  # "fastgpt" among them
    error_ratio: Callable[[str], float | None]  # of a contender's results; None where it cannot be told
    absent: dict[str, str] = field(default_factory=dict)  # peers that are not contenders, and why
    remark: str | None = None  # what a reader of the times has to know
    backend: str | None = None  # that serves FastGPT's op
    demand: Demand = field(default_factory=Demand)  # the least that one call has to move and to multiply
    tokens: int | None = None  # that one call trains on or writes
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)  # more figures, by contender
    profiled: Sequence[str] = ()  # contenders whose time is told by kind of work, too
    warmups: int = 1  # rounds that are not counted, after the first call of all
    min_rounds: int | None = None  # None: the setting's
    # A call returns its own seconds, as of a process that it starts: there are `min_rounds` rounds and no warm-up, and
    # memory is not measured.
    reports_seconds: bool = False
    one_call: bool = False  # of an op: on a GPU the host's share is measured, too


class Suite:
    """A run of the suite: what was measured so far, and the file that it goes to (None: nowhere)."""

    def __init__(self, setting: Setting, path: Path | None) -> None:
        self.setting, self.path = setting, path
        self.rows: list[Row] = []
        self.demands: list[Demand] = []  # of the rows
        self.absent: dict[str, dict[str, str]] = {}
        self.remarks: list[str] = []
        self.facts = machine.facts(setting.device)
        if setting.rehearsal:
            self.facts |= {"device": REHEARSAL, "cuda": "none"}
        self.ceilings: Ceilings | None = None

    def measure_contenders(self, work: Work) -> dict[str, list[float]]:
        """Seconds by contender and round. Raises ParityError; whatever is raised, no row is written."""
        contenders, error_ratios = self.check_contenders(work)
        self._measure_ceilings(work.demand)
        setting, device = self.setting, self.setting.device
        rounds = {"min_rounds": setting.min_rounds if work.min_rounds is None else work.min_rounds}
        if work.reports_seconds:
            times = measure.interleave(contenders, measure.reported_clock, seconds=0.0, warmups=0, **rounds)
            peaks = {}
        else:
            rounds |= {"seconds": setting.seconds, "min_time": setting.min_time, "warmups": work.warmups}
            times = measure.interleave(contenders, setting.clock, **rounds)
            peaks = {name: measure.peak_bytes(call, device) for name, call in contenders.items()}
            for name in set(work.profiled) & contenders.keys():
                work.extra.setdefault(name, {})["ms_by_kind"] = ms_by_kind(contenders[name])
        self.rows += self.make_rows(work, times, error_ratios, peaks, self._host_times(work, contenders))
        self.demands += [work.demand] * len(times)
        self._compare_with_ceilings(work.demand)
        if self.path is not None:
            ops = list(dict.fromkeys(row.op for row in self.rows))
            run = Run(ops=ops, ceilings=self.ceilings.to_json(), absent=self.absent, **self.facts)
            write(self.path, self.rows, run)
        return times

    def _host_times(self, work: Work, contenders: dict[str, Call]) -> dict[str, HostTimes]:
        if not work.one_call or not (self.setting.rehearsal or self.setting.device.type == "cuda"):
            return {}
        clock, capture = measure.rehearsed_clock, lambda call: call
        if not self.setting.rehearsal:
            clock, capture = measure.DeviceClock(overwrites_cache=False), captured
        found = {name: host_times(call, clock, capture) for name, call in contenders.items()}
        reasons = {name: times.reason for name, times in found.items() if times.reason}
        case = f"{work.op} {work.shape}, {work.direction}"
        self.remarks += [f"{case}: {name} has no graph: {reason}" for name, reason in reasons.items()]
        return found

    def _measure_ceilings(self, demand: Demand, again: bool = False) -> None:
        """At the sizes of the work that were not measured in this run, or at all of them `again`."""
        if self.setting.rehearsal:
            self.ceilings = ceilings.MADE_UP
            return
        now = ceilings.measure_ceilings(self.setting.device, demand, None if again else self.ceilings)
        if self.ceilings is not None:
            now.merge(self.ceilings)
        self.ceilings = now

    def _compare_with_ceilings(self, demand: Demand) -> None:
        """The fractions of all rows, because ceilings only rise. Where the newest rows are faster than their ceiling,
        the machine may have been slow while that was measured: it is measured again. What is still faster is told."""
        self._set_fractions()
        if self.setting.rehearsal:
            return
        if any(row.roofline_fraction and row.roofline_fraction > 1.0 for row in self.rows):
            self._measure_ceilings(demand, again=True)
            self._set_fractions()
        for row in self.rows:
            if row.roofline_fraction and row.roofline_fraction > 1.0:
                fault = f"{row.op} {row.shape}, {row.direction}: {row.implementation} is faster than its ceiling"
                fault += f" ({row.ceiling}), so that the ceiling is not one"
                self.remarks += [fault] if fault not in self.remarks else []

    def _set_fractions(self) -> None:
        for row, demand in zip(self.rows, self.demands, strict=True):
            if (bound := self.ceilings.bound(demand)) is not None:
                row.ceiling = bound.name
                row.roofline_fraction = _digits(bound.seconds / (row.median_ms / 1e3))

    def check_contenders(self, work: Work) -> tuple[dict[str, Call], dict[str, float | None]]:
        """The contenders that run and compute the same, and their error ratios. Only a peer may be left out."""
        absent = self.absent.setdefault(work.op, {})
        absent.update(work.absent)
        if work.remark and work.remark not in self.remarks:
            self.remarks.append(work.remark)
        present: dict[str, Call] = {}
        ratios: dict[str, float | None] = {}
        for name in (OURS, *(name for name in work.contenders if name != OURS)):
            try:
                ratios[name] = _checked_error_ratio(work, name)
                if not work.reports_seconds:
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
        self,
        work: Work,
        times: dict[str, list[float]],
        errors: dict[str, float | None],
        peaks: dict[str, int | None],
        hosts: dict[str, HostTimes],
    ) -> list[Row]:
        """One row per contender, FastGPT's first."""
        facts = self.facts | {"clocks_mhz": machine.clocks_mhz(self.setting.device)}
        spreads = {name: measure.spread_of(values) for name, values in times.items()}
        best = min((name for name in times if name != OURS), key=lambda name: spreads[name].median, default=None)
        rows = []
        for name, seconds in spreads.items():
            is_ours = name == OURS
            against = best if is_ours else name
            ratio = None if against is None else measure.ratio_of(times[against], times[OURS])
            host = hosts.get(name)
            rows.append(Row(
                op=work.op, shape=work.shape, dtype=work.dtype, direction=work.direction, implementation=name,
                backend=work.backend if is_ours else None, rounds=len(times[name]),
                median_ms=_digits(seconds.median * 1e3), p20_ms=_digits(seconds.p20 * 1e3),
                p80_ms=_digits(seconds.p80 * 1e3), eager_ms=_digits(host and host.eager * 1e3),
                graph_ms=_digits(host and host.replayed and host.replayed * 1e3), ratio=_digits(ratio and ratio.median),
                ratio_p20=_digits(ratio and ratio.p20), ratio_p80=_digits(ratio and ratio.p80),
                best_peer=best if is_ours else None, verdict=measure.verdict_of(ratio) if ratio else None,
                bytes=work.demand.n_bytes, flops=work.demand.flops,
                peak_bytes=peaks.get(name), parity_error_ratio=_digits(errors.get(name)),
                extra=_rates(work, seconds.median) | work.extra.get(name, {}), **facts,
            ))  # fmt: skip
        return rows


def _checked_error_ratio(work: Work, name: str) -> float | None:
    ratio = work.error_ratio(name)
    limit = MAX_ERROR_RATIO if name == OURS else MAX_PEER_ERROR_RATIO
    if ratio is not None and not ratio <= limit:  # a ratio that is NaN is refused too
        raise ParityError(
            f"{work.op} {work.shape}: the error of {name} is {ratio:.3g} times PyTorch's; "
            f"at most {limit:g} is allowed, and no time is kept"
        )
    return ratio


def _rates(work: Work, seconds: float) -> dict[str, float | None]:
    rates = {
        "gb_per_s": (work.demand.n_bytes, 1e9),
        "tflop_per_s": (work.demand.flops, 1e12),
        "tokens_per_s": (work.tokens, 1.0),
    }
    return {name: _digits(amount / seconds / unit) for name, (amount, unit) in rates.items() if amount}


def _digits(value: float | None) -> float | None:
    """Five significant digits: more would be noise in the file's history."""
    return None if value is None else float(f"{value:.5g}")
