"""Measure all cases, and report the results as a table, as JSON and as an exit code."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import machine
from ..config import ConfigError
from ..ops.backend import BACKENDS, BackendError, implements
from .cases import parity_cases
from .complete import can_be_measured, half_added, public_ops
from .measure import DTYPES, ParityRow, SkippedCase, dtype_name, measure_case


@dataclass
class ParityReport:
    """What was measured, on what, and what was skipped."""

    device: str
    rows: list[ParityRow] = field(default_factory=list)
    skips: list[SkippedCase] = field(default_factory=list)
    half_added: dict[str, str] = field(default_factory=dict)  # ops that lack a part, and which one
    seconds: float = 0.0

    @property
    def failures(self) -> list[ParityRow]:
        return [row for row in self.rows if not row.passed]

    def as_dict(self) -> dict[str, Any]:
        facts = machine.facts(torch.device(self.device))
        packages = ("fastgpt", "torch", "python", "triton", "cuda")
        return {
            "device": self.device,
            "device_name": facts["device" if self.device == "cuda" else "cpu_capability"],
            "platform": platform.platform(),
            "versions": {name: facts[name] for name in packages if facts[name] is not None},
            "rule": "ours <= 2 * torch + atol; all errors are the largest absolute ones against the float64 oracle",
            "passed": not self.failures,
            "seconds": round(self.seconds, 2),
            "rows": [_finite(dataclasses.asdict(row) | {"ratio": row.ratio}) for row in self.rows],
            "skipped": [dataclasses.asdict(skip) for skip in self.skips],
            "half_added": self.half_added,
        }

    def __str__(self) -> str:
        """A line per op, backend and dtype, then each failure, then what was skipped."""
        heading = f"{'op':21}{'backend':9}{'dtype':10}{'cases':>5}{'values':>7}{'error':>10}{'torch':>10}{'ratio':>7}"
        lines = [heading + "  worst ratio at"]
        for (op, backend, dtype), rows in _grouped(self.rows, lambda row: (row.op, row.backend, row.dtype)).items():
            # The ratio of two errors that are both within atol is a matter of chance, and is not reported.
            apart = [row for row in rows if row.ours > row.atol]
            worst = max(apart, key=lambda row: row.ratio or math.inf, default=None)
            error, torch_error = max(row.ours for row in rows), max(row.torch for row in rows)
            n_cases, failed = len({row.case for row in rows}), sum(not row.passed for row in rows)
            ratio = f"{worst.ratio or math.inf:.2f}" if worst else "-"
            where = f"{worst.case}: {worst.value}" if worst else "all within atol"
            lines.append(
                f"{op:21}{backend:9}{dtype:10}{n_cases:5}{len(rows):7}{error:10.1e}{torch_error:10.1e}{ratio:>7}  "
                f"{where}{f'  {failed} FAILED' if failed else ''}"
            )
        for row in self.failures:
            what = row.reason or f"error {row.ours:.2e} > 2 * {row.torch:.2e} + {row.atol:.1e}"
            lines.append(f"FAILED {row.op}, {row.backend}, {row.dtype}, {row.case}, {row.value}: {what}")
        for (op, backend, reason), skips in _grouped(self.skips, lambda s: (s.op, s.backend, s.reason)).items():
            dtypes = ", ".join(dict.fromkeys(skip.dtype for skip in skips))
            lines.append(f"skipped {op}, {backend} ({len(skips)} calls, {dtypes}): {reason}")
        for op, lacks in self.half_added.items():
            lines.append(f"{'' if can_be_measured(op) else 'not measured: '}{op}: {lacks}")
        n_cases = len({(row.op, row.case) for row in self.rows})
        lines.append(
            f"{n_cases} cases, {len(self.rows)} values on {self.device}, {len(self.failures)} failed, "
            f"{len(self.skips)} calls skipped, {self.seconds:.1f} s"
        )
        return "\n".join(lines)


def _grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """The row with infinities as text, because JSON has no number for them."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def run_parity(
    device: str = "cpu",
    *,
    backends: Sequence[str] = BACKENDS,
    names: Sequence[str] = (),
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> ParityReport:
    """Measure the ops called `names` on `backends` in `dtypes`; what a backend does not serve is listed as skipped.

    Without `names`, all ops that have cases.
    """
    report, start = ParityReport(device), time.perf_counter()
    report.half_added = {op: lacks for op, lacks in half_added().items() if not names or op in names}
    for backend, dtype, case in itertools.product(backends, dtypes, parity_cases(*names)):
        if not implements(backend, case.op) or (case.op in report.half_added and not can_be_measured(case.op)):
            continue
        where = (case.op, backend, dtype_name(dtype), case.name)
        try:
            report.rows += measure_case(case, backend, dtype, device)
        except BackendError as error:
            report.skips.append(SkippedCase(*where, error.reason))
        except Exception as error:  # a call that raises is a failure to report, and the other cases go on
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            report.rows.append(ParityRow(*where, "call", math.inf, 0.0, 0.0, False, reason))
    report.seconds = time.perf_counter() - start
    return report


def main(device: str = "cpu", out: str | None = None, only: Sequence[str] = ()) -> int:
    """The `fastgpt parity` command: print the report, write it as JSON to `out`; 0 if all passed, else 1.

    `only`: the ops to measure; without them, all that have cases. One that cannot be measured yet does not pass.
    """
    known = dict.fromkeys([*public_ops(), *(case.op for case in parity_cases())])
    for op in only:
        if op not in known:
            raise ConfigError(f"--only: unknown op {op!r}; expected some of {', '.join(known)}")
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device: expected cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: this PyTorch finds no CUDA device; `fastgpt doctor` shows what it finds")
    if out is not None:
        if Path(out).is_dir() or not Path(out).resolve().parent.is_dir():
            raise ConfigError(f"--out {out}: expected a file in a folder that exists")
        open(out, "ab").close()  # a file that cannot be written is reported now, not after a minute of work
    report = run_parity(device, names=only)
    print(report)
    if out is not None:
        Path(out).write_text(json.dumps(report.as_dict(), indent=1) + "\n", encoding="utf-8")
    unproved = [op for op in only if op in report.half_added and not can_be_measured(op)]
    return 1 if report.failures or unproved else 0
