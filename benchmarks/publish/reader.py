"""Reads the rows that the suite wrote, for report.py and compare.py; what the keys mean is in rows.py.

Files travel: they come from another machine, another version, an upload that broke off. So each line is checked, and
what is wrong is named with its file and line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Case = tuple[str, str, str, str]
OURS = "fastgpt"

NAMES = ("op", "shape", "dtype", "implementation", "direction", "device")  # a row without one of them says nothing
TIMES = ("median_ms",)
NUMBERS = (
    "p20_ms", "p80_ms", "rounds", "ratio", "ratio_p20", "ratio_p80", "roofline_fraction", "bytes", "flops",
    "peak_bytes", "parity_error_ratio", "threads",
)  # fmt: skip
TEXTS = (
    "backend", "best_peer", "verdict", "driver", "cpu_capability", "python", "torch", "triton", "cuda", "fastgpt",
    "commit", "date",
)  # fmt: skip


class ResultsError(ValueError):
    """Results that cannot be read; the message names the file and the line."""


@dataclass
class Results:
    """All rows and runs of some files, in the order in which they were read."""

    rows: list[Row] = field(default_factory=list)
    runs: list[Row] = field(default_factory=list)

    def devices(self) -> list[str]:
        return list(dict.fromkeys(device_of(row) for row in self.rows))

    def of(self, device: str) -> Results:
        """What was measured on one of `devices()`."""
        return Results(*([x for x in lines if device_of(x) == device] for lines in (self.rows, self.runs)))


def device_of(line: Row) -> str:
    """What must be equal for times to be compared: the GPU; on a CPU also its threads and instruction set."""
    if line["cuda"] is not None:
        return line["device"]
    threads = f"{line['threads']} thread{'s' if line['threads'] != 1 else ''}" if line["threads"] else None
    return ", ".join(part for part in (line["device"], line["cpu_capability"], threads) if part)


def case_of(row: Row) -> Case:
    """The work, whoever does it: op, shape, dtype, direction."""
    return row["op"], row["shape"], row["dtype"], row["direction"]


def by_case(rows: Sequence[Row]) -> dict[Case, dict[str, Row]]:
    """case -> implementation -> row, in the order of the rows."""
    cases: dict[Case, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(case_of(row), {})[row["implementation"]] = row
    return cases


def read(paths: Iterable[Path]) -> Results:
    """Rows and runs of files, and of every *.jsonl of folders. A row replaces an earlier one of the same identity."""
    rows: dict[tuple[str, ...], Row] = {}
    runs = []
    for file in _files(paths):
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ResultsError(f"{file}: cannot be read: {reason}") from None
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                checked = _checked(json.loads(line, parse_constant=_not_a_number))
            except ValueError as error:  # json's own errors are ValueErrors too
                raise ResultsError(f"{file}, line {number}: {error}") from None
            if checked["kind"] == "run":
                runs.append(checked)
            else:
                rows[(device_of(checked), *case_of(checked), checked["implementation"])] = checked
    return Results(list(rows.values()), runs)


def _files(paths: Iterable[Path]) -> list[Path]:
    files = []
    for path in paths:
        if path.is_dir():
            found = sorted(path.glob("*.jsonl"))
            if not found:
                raise ResultsError(f"{path}: this folder holds no results (*.jsonl)")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise ResultsError(f"{path}: no such file or folder")
    return files


def _not_a_number(constant: str) -> None:
    raise ValueError(f"{constant} is not a measurement")


def _checked(line: Any) -> Row:
    """The line with every key that is read later. Keys that are not known here are left as they are."""
    if not isinstance(line, dict) or line.get("kind") not in ("row", "run"):
        raise ValueError('expected an object with "kind": "row" or "run"')
    is_row = line["kind"] == "row"
    for key in NAMES if is_row else ("device",):
        if not isinstance(line.get(key), str) or not line[key]:
            raise ValueError(f"{key}: expected text, got {line.get(key)!r}")
    for key in TIMES if is_row else ():
        if not _is_number(line.get(key)) or line[key] <= 0:
            raise ValueError(f"{key}: expected a number above 0, got {line.get(key)!r}")
    for key in NUMBERS:
        if line.setdefault(key, None) is not None and (not _is_number(line[key]) or line[key] < 0):
            raise ValueError(f"{key}: expected a number or null, got {line[key]!r}")
    for key in TEXTS:
        if line.setdefault(key, None) is not None and not isinstance(line[key], str):
            raise ValueError(f"{key}: expected text or null, got {line[key]!r}")
    for key in ("extra", "ceilings", "absent"):
        if line.get(key) is None:
            line[key] = {}
        if not isinstance(line[key], dict):
            raise ValueError(f"{key}: expected an object or null, got {line[key]!r}")
    return line


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
