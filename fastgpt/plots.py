"""How every picture looks: one width, one palette, lines told apart without their colours, labels that do not overlap.

    @styled
    def draw(runs):
        figure, [[axes]] = panels(3.6)
        for number, run in enumerate(runs):
            axes.plot(run["steps"], run["losses"], label=run["name"], **line_style(number))
        label_ends(axes)
        return figure

    png(draw(runs))  # the bytes of a file

A picture is 6 inches wide and its letters have 10 points or more, so that it can be read on a phone, 400 pixels wide.
The colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart.

matplotlib is optional and slow to import, so the functions that need it import it. They do not use pyplot, and change
no setting of matplotlib beyond a call: in a notebook, other figures look as before.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

WIDTH = 6.0  # inches
DPI = 200
FONT_SIZE = 10.0  # points; the least size of a letter

INK, FAINT, GRID = "#222222", "#8a8a8a", "#e4e4e4"
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
PALETTE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, INK)
MARKERS = "os^DvP*X"
DASHES = ("-", "--", "-.", ":")

_STYLE = {
    "font.size": FONT_SIZE,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": FONT_SIZE,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "lines.linewidth": 1.7,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": FONT_SIZE,
    "legend.handlelength": 3.2,  # room for dashes
}

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Point = tuple[float, float]


class PlotError(RuntimeError):
    """A picture that cannot be drawn; the message says what is missing and how to get it."""


def need_matplotlib() -> None:
    """Raise PlotError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PlotError("matplotlib is not installed: pip install 'fastgpt-kernels[plot]'") from None


def styled(draw: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A function whose figures are drawn in the style of this module. Raises PlotError where matplotlib is missing."""

    @functools.wraps(draw)
    def in_style(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        need_matplotlib()
        from matplotlib import style

        with style.context(["default", _STYLE]), _boxes_for_missing_letters():
            return draw(*args, **kwargs)

    return in_style


@contextlib.contextmanager
def _boxes_for_missing_letters() -> Iterator[None]:
    """Where the font lacks a letter, it draws a box; that is no reason for a warning, as the numbers are right."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def panels(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure of WIDTH x `height` inches, and an array (rows, columns) of panels; `options` are Figure.subplots'."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def line_style(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of line `number`, from 0: of up to 28 lines, no two are alike without their colours."""
    return {
        "color": PALETTE[number % len(PALETTE)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[(number + number // len(MARKERS)) % len(DASHES)],
    }


def ordered_colours(n: int) -> list[Any]:
    """`n` colours from dark to light, for lines that have an order, such as learning rates."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.85 * i / max(1, n - 1)) for i in range(n)]


def png(figure: Any) -> bytes:
    """The picture as a PNG file, 200 pixels an inch, on white. Its colours are few, so its file is small."""
    from PIL import Image  # matplotlib needs it, so it is there

    drawn, packed = io.BytesIO(), io.BytesIO()
    with _boxes_for_missing_letters():
        figure.savefig(drawn, format="png", dpi=DPI, facecolor="white")
    image = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(packed, format="png", optimize=True)
    return packed.getvalue()


# ---- values that a panel does not show ----

ABOVE = "hollow: above, or not finite"


def plot_up_to(axes: Any, top: float, x: Sequence[float], y: Sequence[float], **style: Any) -> bool:
    """A line whose points above `top`, and those that are NaN, are hollow markers on the upper edge of the panel.

    Returns whether there are such points; a legend should then name them ABOVE. The panel is to end at `top`.
    """
    outside = [not value <= top for value in y]
    axes.plot(x, [math.nan if out else value for out, value in zip(outside, y, strict=True)], **style)
    at = [place for out, place in zip(outside, x, strict=True) if out]
    hollow = {**style, "linestyle": "none", "label": None, "markerfacecolor": "white"}
    if at:
        (line,) = axes.plot(at, [top] * len(at), clip_on=False, zorder=3, **hollow)
        line.set_in_layout(False)
    return bool(at)


def name_above(axes: Any) -> None:
    """An entry of the legend for the hollow markers of `plot_up_to`."""
    axes.plot([], [], "o", color=FAINT, markerfacecolor="white", label=ABOVE)


def say(axes: Any, text: str) -> None:
    """A sentence in the panel, where a reader would look for a curve that is not there."""
    axes.text(0.03, 0.05, text, transform=axes.transAxes, parse_math=False)


# ---- labels ----


def label_ends(axes: Any) -> None:
    """Write the label of each line right of its end, in place of a legend. To be called when everything is drawn."""
    ends = []
    for line in axes.lines:
        points = [(x, y) for x, y in line.get_xydata().tolist() if math.isfinite(x) and math.isfinite(y)]
        if points and not line.get_label().startswith("_"):
            ends.append((points[-1], line.get_label(), line.get_color()))
    label_right(axes, ends)


def label_right(axes: Any, labels: Iterable[tuple[Point, str, Any]]) -> None:
    """Write texts right of the panel, one above the other, each with a line of its colour to its point."""
    low, high = axes.get_ylim()
    labels = [((x, min(max(y, low), high)), text, colour) for (x, y), text, colour in labels]
    axes.figure.draw_without_rendering()  # which gives the panel its place
    panel = axes.get_window_extent()
    wanted = [axes.transData.transform(point)[1] for point, _, _ in labels]
    heights = apart(wanted, 1.3 * FONT_SIZE * axes.figure.dpi / 72, panel.y0, panel.y1)
    for (point, text, colour), height in zip(labels, heights, strict=True):
        axes.annotate(
            text,
            point,
            (1.05, (height - panel.y0) / panel.height),
            textcoords="axes fraction",
            va="center",
            parse_math=False,  # a dollar sign in a text begins no formula
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3},
        )


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places at least `gap` from each other, near those wanted and in their order; from `low` to `high` if they fit."""
    groups: list[list[int]] = []  # of neighbours that touch

    def lowest(group: list[int]) -> float:
        length = gap * (len(group) - 1)
        middle = sum(wanted[i] for i in group) / len(group)
        return max(low, min(middle - length / 2, high - length))

    for i in sorted(range(len(wanted)), key=lambda i: wanted[i]):
        groups.append([i])
        while len(groups) > 1 and lowest(groups[-2]) + gap * len(groups[-2]) > lowest(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    places = {i: lowest(group) + gap * rank for group in groups for rank, i in enumerate(group)}
    return [places[i] for i in range(len(wanted))]


def label_points(axes: Any, labels: Iterable[tuple[Point, str, Any]]) -> None:
    """Write each text of (point, text, colour) near its point, where it hides no point and no other text.

    A text for which there is no such place is left out. The first ones have the choice.
    """
    import numpy as np
    from matplotlib.text import Text

    labels = list(labels)
    axes.figure.draw_without_rendering()
    pixels = axes.figure.dpi / 72  # in a point
    (left, bottom), (right, top) = axes.get_window_extent().get_points()
    centres = axes.transData.transform([point for point, _, _ in labels])
    taken = np.hstack([centres - pixels, centres + pixels])  # boxes: left, bottom, right and top
    for point, text, colour in labels:
        label = axes.annotate(
            text, point, (0, 0), textcoords="offset points", ha="center", va="center", color=colour, parse_math=False,
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 1},
        )  # fmt: skip
        label.get_window_extent()  # places it, and includes the line to the point
        box = Text.get_window_extent(label).extents
        for dx, dy in _places_around((box[2] - box[0]) / 2 / pixels):
            x0, y0, x1, y1 = box + np.array([dx, dy, dx, dy]) * pixels
            over = (taken[:, 0] < x1) & (x0 < taken[:, 2]) & (taken[:, 1] < y1) & (y0 < taken[:, 3])
            if left <= x0 and bottom <= y0 and x1 <= right and y1 <= top and not over.any():
                label.set_position((dx, dy))
                taken = np.vstack([taken, [x0, y0, x1, y1]])
                break
        else:
            label.remove()


def _places_around(half_width: float) -> Iterable[Point]:
    """Offsets in points, on ellipses that grow; a text of twice `half_width` does not touch its own point."""
    for distance in (9, 14, 20, 28, 38, 50):
        for turn in range(16):
            angle = math.pi * (1 + turn) / 8
            yield (distance + half_width - 3) * math.cos(angle), distance * math.sin(angle)
