"""What the pictures of the studies share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..report import pyplot


def panels(width: float, height: float, rows: int = 1, columns: int = 1, **shared: Any) -> tuple[Any, Any]:
    """A figure, its size in inches, and an array (rows, columns) of panels, each with a light grid."""
    figure, axes = pyplot().subplots(
        rows, columns, figsize=(width, height), constrained_layout=True, squeeze=False, **shared
    )
    for panel in axes.flat:
        panel.grid(alpha=0.3)
    return figure, axes


def or_nan(values: Sequence[float | None]) -> list[float]:
    """The values of a curve: NaN, which leaves a gap, where a loss was not finite and results.json holds None."""
    return [math.nan if value is None else value for value in values]
