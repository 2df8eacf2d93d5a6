"""The pictures: ratios of an op's peers, the roofline of a machine op by op, and that of one case before and now."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.files import atomic_path
from fastgpt.plots import BLUE, FAINT, INK, VERMILION, label_right, line_style, panels, png, styled

from . import cells
from .rows import OURS, CaseKey, Results, Row, by_case, peers_of

TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.67, 0.8, 1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # a text that no line runs through


@styled
def ratio_figure(op: str, rows: Sequence[Row]) -> Any:
    """A point for each peer of each case at its ratio; on the logarithmic axis, 2 is as far from 1 as 0.5 is."""
    drawn = [row for row in rows if row.implementation != OURS and row.ratio]
    peers = peers_of(drawn)
    headings, points, line = {}, {}, 0.0
    for case, found in by_case(drawn).items():
        headings[line] = _label(case, drawn)
        of_case = [found[peer] for peer in peers if peer in found]
        points.update({line + 1 + i: row for i, row in enumerate(of_case)})
        line += len(of_case) + 1.4
    figure, [[axes]] = panels(1.1 + 0.215 * line)
    axes.axvline(1.0, color=INK, linewidth=1.2)
    for y, row in points.items():
        _point(axes, y, row, line_style(peers.index(row.implementation)))
    axes.set_yticks([*points], [row.implementation for row in points.values()])
    axes.set_ylim(line - 0.6, -0.8)
    _ratio_axis(axes, drawn)
    axes.set_title(f"{op}: a peer's time / FastGPT's time")
    figure.draw_without_rendering()  # which gives the panel its place
    left = figure.transFigure.transform((0.01, 0.0))[0]
    for y, text in headings.items():
        x = axes.transAxes.inverted().transform((left, 0.0))[0]
        place = {"transform": axes.get_yaxis_transform(), "va": "center", "in_layout": False}
        axes.text(x, y, text, weight="bold", bbox=ON_WHITE, **place)
    return figure


def _point(axes: Any, y: float, row: Row, style: Mapping[str, Any]) -> None:
    """A line over the percentiles and a point at the ratio; hollow where they lie on both sides of 1 (noise)."""
    low, high = row.ratio_p20 or row.ratio, row.ratio_p80 or row.ratio
    is_noise = low <= 1 <= high
    axes.plot([low, high], [y, y], color=style["color"], linewidth=1.4, solid_capstyle="butt")
    fill = "white" if is_noise else style["color"]
    axes.plot(row.ratio, y, style["marker"], color=style["color"], markerfacecolor=fill, markersize=6)
    said = f"{row.ratio:.{2 if row.ratio < 10 else 0}f}{' (noise)' if is_noise else ''}"
    axes.annotate(said, (max(high, row.ratio), y), (6, 0), textcoords="offset points", va="center", bbox=ON_WHITE)


def _label(case: CaseKey, rows: Sequence[Row]) -> str:
    """The shape, and what differs between the cases of this op."""
    told = [case.direction] if len({row.direction for row in rows}) > 1 else []
    told += [case.dtype] if len({row.dtype for row in rows}) > 1 else []
    return ", ".join([case.shape, *told])


def _ratio_axis(axes: Any, rows: Sequence[Row]) -> None:
    ends = [end for row in rows for end in (row.ratio, row.ratio_p20, row.ratio_p80) if end]
    low, high = min([*ends, 0.8]), max([*ends, 1.25])
    low, high = low * (low / high) ** 0.03, high * (high / low) ** 0.2  # room for the numbers beside the points
    ticks = _ticks(low, high)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(False, axis="y")
    axes.set_xlabel("FastGPT slower  ←  1 = equal  →  FastGPT faster")


def _ticks(low: float, high: float) -> list[float]:
    """Those of TICKS that fit between `low` and `high`, the nearest to 1 first, a ninth of the axis apart."""
    gap, kept = math.log(high / low) / 9, [1.0]
    for tick in sorted(TICKS, key=lambda tick: abs(math.log(tick))):
        if low <= tick <= high and all(abs(math.log(tick / other)) >= gap for other in kept):
            kept.append(tick)
    return sorted(kept)


# --- rooflines -------------------------------------------------------------------------------------------------------


@styled
def roofline_figure(results: Results) -> Any:
    """A panel for each op whose bytes and operations are known: its cases, under the ceiling of its newest run."""
    ours = [row for row in results.rows if row.implementation == OURS and row.bytes and row.flops]
    ours = [row for row in ours if results.ceilings_of(row)]
    ops = list(dict.fromkeys(row.op for row in ours))
    columns = min(2, len(ops))
    rows = -(-len(ops) // columns)
    figure, axes = panels(0.6 + 2.4 * rows, rows, columns, sharex=True, sharey=True)
    for panel, op in zip(axes.flat, ops, strict=False):
        _roofline(panel, op, [row for row in ours if row.op == op], results)
    for panel in axes.flat[len(ops) :]:
        panel.remove()
    for panel in axes[:, 0]:
        panel.set_ylabel("operations per second")
    for panel in axes.flat[max(0, len(ops) - columns) : len(ops)]:
        panel.set_xlabel("operations per byte")
        panel.tick_params(labelbottom=True)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


def _roofline(axes: Any, op: str, rows: Sequence[Row], results: Results) -> None:
    """Intensities are operations per byte that has to move at least."""
    copy, product = (results.ceilings_of(rows[0])[key] for key in ("bytes_per_s", "flops_per_s"))
    found = by_case(results.rows)
    peers = [(row, found[row.case][row.best_peer]) for row in rows if row.best_peer in found[row.case]]
    at = [row.flops / row.bytes for row in rows]
    knee = product / copy
    low, high = min([*at, knee]) / 3, max([*at, knee]) * 3
    axes.plot([low, knee, high], [low * copy, product, product], color=INK, label="ceiling")
    theirs = [row.flops / peer.median_ms * 1e3 for row, peer in peers]
    hollow = {"color": VERMILION, "markerfacecolor": "none", "label": "its best peer"}
    axes.plot([row.flops / row.bytes for row, _ in peers], theirs, "s", **hollow)
    axes.plot(at, [row.flops / row.median_ms * 1e3 for row in rows], "o", color=BLUE, label="FastGPT")
    axes.set(xscale="log", yscale="log")
    axes.set_title(f"{op}\n{copy / 1e9:.0f} GB/s, {cells.flop_rate(product)}")


@dataclass(frozen=True)
class CaseRoofline:
    """One case under the two limits of a machine."""

    title: str
    flops: float  # operations of one call
    intensity: float  # operations per byte
    bytes_per_s: float
    flops_per_s: float
    limit: str  # in words
    is_of_products: bool  # the limit of this case; the other limit is drawn thin
    before_ms: float
    now_ms: float
    peers_ms: Mapping[str, float]


@styled
def case_roofline_figure(case: CaseRoofline) -> Any:
    """The limits as lines, FastGPT before and now and its peers as points one above the other."""
    figure, [[axes]] = panels(4.4)
    knee = case.flops_per_s / case.bytes_per_s
    low, high = min(case.intensity, knee) / 6, max(case.intensity, knee) * 6
    of_memory = {"color": FAINT, "label": f"memory, {case.bytes_per_s / 1e9:.3g} GB/s"}
    of_products = {"color": FAINT, "label": f"matrix products, {cells.flop_rate(case.flops_per_s)}"}
    limit, other = (of_products, of_memory) if case.is_of_products else (of_memory, of_products)
    limit |= {"color": INK, "linewidth": 2.6, "label": f"its limit: {case.limit}"}
    other |= {"linewidth": 1.2, "linestyle": "--"}
    axes.plot([low, knee], [low * case.bytes_per_s, case.flops_per_s], **of_memory)
    axes.plot([knee, high], [case.flops_per_s] * 2, **of_products)
    ours = {"FastGPT before": ("o", BLUE, "white", case.before_ms), "FastGPT now": ("o", BLUE, BLUE, case.now_ms)}
    theirs = {}
    for number, (name, ms) in enumerate(case.peers_ms.items(), 1):
        style = line_style(number)
        theirs[name] = (style["marker"], style["color"], style["color"], ms)
    labels = []
    for name, (marker, colour, fill, ms) in (ours | theirs).items():
        rate = case.flops / ms * 1e3
        axes.plot([case.intensity], [rate], marker, color=colour, markerfacecolor=fill, markersize=7)
        labels.append(((case.intensity, rate), f"{name}, {cells.short(ms):g} ms", colour))
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set(xlabel="operations per byte (the least that must move)", ylabel="operations per second")
    axes.set_title(case.title)
    figure.legend(loc="outside lower left")
    label_right(axes, labels)
    return figure


def save(figure: Any, path: Path) -> None:
    """A picture as a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(png(figure))
