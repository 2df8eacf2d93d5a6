"""How the figures of rows are written: three digits, the unit, and the spread beside the median."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastgpt.report import cell

from .reader import Row

FACTS = ("driver", "clocks_mhz", "python", "torch", "triton", "cuda", "commit", "date")


def short(value: Any, digits: int = 3) -> Any:
    """A float with `digits` significant digits; anything else as it is."""
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def milliseconds(row: Row) -> str:
    """The median, and from where to where the rounds lay."""
    middle, low, high = (cell(short(row[key])) for key in ("median_ms", "p20_ms", "p80_ms"))
    return (
        middle
        if row["p20_ms"] == row["p80_ms"] or None in (row["p20_ms"], row["p80_ms"])
        else f"{middle} ({low} – {high})"
    )


def ratio(row: Row) -> str | None:
    if row["ratio"] is None:
        return None
    low, high = row["ratio_p20"], row["ratio_p80"]
    return (
        times(row["ratio"]) if low == high or None in (low, high) else f"{times(row['ratio'])} ({low:.2f} – {high:.2f})"
    )


def times(factor: float) -> str:
    return f"{factor:.2f}x"


def percent(fraction: float | None) -> str | None:
    return None if fraction is None else f"{100 * fraction:.2g} %" if fraction < 0.1 else f"{100 * fraction:.0f} %"


def flop_rate(per_s: float) -> str:
    return f"{per_s / 1e12:.0f} TFLOP/s" if per_s >= 1e13 else f"{per_s / 1e9:.0f} GFLOP/s"


def commit(digits: str) -> str:
    """Ten digits; the "+" of a tree with files that were changed since stays."""
    return digits[:10] + ("+" if digits.endswith("+") else "")


def slug(text: str) -> str:
    """As part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def facts(rows: Sequence[Row]) -> str:
    """Versions, clocks, commits and days of some rows, as one sentence."""
    parts = []
    for key in FACTS:
        values = list(dict.fromkeys(row[key] for row in rows if row.get(key) is not None))
        if key == "clocks_mhz" and values:
            ends = [f"{end:.0f}" for end in (min(values), max(values))]
            parts.append(f"clocks {' to '.join(dict.fromkeys(ends))} MHz")
        elif values:
            names = dict.fromkeys(commit(value) if key == "commit" else str(value) for value in values)
            parts.append(f"{key} {' and '.join(names)}")
    return ", ".join(parts) + "." if parts else ""


def aligned(markdown: str) -> str:
    """A Markdown table whose cells are padded to their columns' widths, for a screen."""
    head, rule, *body = ([*line[2:-2].split(" | ")] for line in markdown.splitlines())
    widths = [max(map(len, column)) for column in zip(head, rule, *body, strict=True)]
    right = [mark.endswith(":") for mark in rule]

    def line(row: list[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        return "| " + " | ".join(padded) + " |"

    dashes = ["-" * (w - r) + ":" * r for w, r in zip(widths, right, strict=True)]
    return "\n".join(map(line, (head, dashes, *body)))
