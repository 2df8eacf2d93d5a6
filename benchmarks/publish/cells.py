"""How the figures of rows are written: three digits, the unit, and the spread beside the median."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from fastgpt.machine import short_commit
from fastgpt.report import cell

from .rows import Line, Row


def short(value: Any, digits: int = 3) -> Any:
    """A float with `digits` significant digits; anything else as it is."""
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def milliseconds(row: Row) -> str:
    """The median, and the 20th and 80th percentile of the rounds."""
    middle, low, high = (cell(short(value)) for value in (row.median_ms, row.p20_ms, row.p80_ms))
    has_spread = row.p20_ms != row.p80_ms and None not in (row.p20_ms, row.p80_ms)
    return f"{middle} ({low} – {high})" if has_spread else middle


def ratio(row: Row) -> str | None:
    """The median, and the 20th and 80th percentile of the rounds."""
    if row.ratio is None:
        return None
    low, high = row.ratio_p20, row.ratio_p80
    spread = "" if low == high or None in (low, high) else f" ({low:.2f} – {high:.2f})"
    return factor(row.ratio) + spread


def factor(value: float) -> str:
    return f"{value:.2f}x"


def percent(fraction: float | None) -> str | None:
    return None if fraction is None else f"{100 * fraction:.2g} %" if fraction < 0.1 else f"{100 * fraction:.0f} %"


def flop_rate(per_s: float) -> str:
    return f"{per_s / 1e12:.0f} TFLOP/s" if per_s >= 1e13 else f"{per_s / 1e9:.0f} GFLOP/s"


def file_stem(text: str) -> str:
    """The text as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def origin(lines: Iterable[Line], keys: Sequence[str]) -> list[str]:
    """Where figures come from: for each key of a `Line` its name and the values that the lines have."""
    parts, lines = [], list(lines)
    for key in keys:
        values = list(dict.fromkeys(value for line in lines if (value := getattr(line, key)) is not None))
        if key == "clocks_mhz" and values:
            ends = dict.fromkeys(f"{end:.0f}" for end in (min(values), max(values)))
            parts.append(f"clocks {' to '.join(ends)} MHz")
        elif values:
            shown = dict.fromkeys(short_commit(value) if key == "commit" else str(value) for value in values)
            parts.append(f"{key} {' and '.join(shown)}")
    return parts
