"""The pictures: bars of ratios for an op, the roofline of a device, and that of one case before and now."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.files import atomic_path
from fastgpt.report import pyplot

from . import cells
from .rows import OURS, CaseKey, Results, Row, by_case, peers_of

TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.67, 0.8, 1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)


def ratio_figure(op: str, rows: Sequence[Row]) -> Any:
    """Bars of the peers' ratios, case by case, from 1 (equal) outwards on a logarithmic axis."""
    plt = pyplot()
    drawn = [row for row in rows if row.implementation != OURS and row.ratio]
    peers = peers_of(drawn)
    groups = [(case, [found[peer] for peer in peers if peer in found]) for case, found in by_case(drawn).items()]
    colors = {peer: plt.get_cmap("tab10" if len(peers) <= 10 else "tab20")(i) for i, peer in enumerate(peers)}
    lines = sum(len(bars) + 1 for _, bars in groups)
    figure, axes = plt.subplots(figsize=(9, 1.3 + 0.24 * lines), layout="constrained")
    y, labels = 0.0, []
    for case, bars in groups:
        labels.append((y + (len(bars) - 1) / 2, _label(case, drawn)))
        for row in bars:
            _bar(axes, y, row, colors[row.implementation])
            y += 1
        y += 1
    axes.axvline(1.0, color="black", linewidth=1.2)
    axes.set_yticks([at for at, _ in labels], [text for _, text in labels], fontsize=8)
    axes.set_ylim(y - 1.3, -0.7)
    _ratio_axis(axes, drawn)
    axes.set_title(f"{op}: peer's time / FastGPT's time", fontsize=10, loc="left")
    used = [plt.Rectangle((0, 0), 1, 1, color=colors[peer]) for peer in peers]
    figure.legend(used, peers, loc="outside lower center", ncols=min(4, len(peers)), fontsize=8, frameon=False)
    return figure


def _bar(axes: Any, y: float, row: Row, color: Any) -> None:
    """A bar from 1 to the ratio, and a line over the percentiles; pale where they lie on both sides of 1 (noise)."""
    low, high = row.ratio_p20 or row.ratio, row.ratio_p80 or row.ratio
    axes.barh(y, row.ratio - 1, left=1, height=0.8, color=color, alpha=0.35 if low <= 1 <= high else 0.9)
    axes.plot([low, high], [y, y], color="black", linewidth=1.4, solid_capstyle="butt")
    end = max(high, row.ratio, 1)
    said = f"{row.ratio:.{2 if row.ratio < 10 else 0}f}"
    axes.annotate(said, (end, y), (4, 0), textcoords="offset points", va="center", fontsize=7)


def _label(case: CaseKey, rows: Sequence[Row]) -> str:
    """The shape, and below it what differs between the cases of this op."""
    told = [case.direction] if len({row.direction for row in rows}) > 1 else []
    told += [case.dtype] if len({row.dtype for row in rows}) > 1 else []
    return "\n".join([case.shape, ", ".join(told)]) if told else case.shape


def _ratio_axis(axes: Any, rows: Sequence[Row]) -> None:
    ends = [end for row in rows for end in (row.ratio, row.ratio_p20, row.ratio_p80) if end]
    low, high = min([*ends, 0.8]), max([*ends, 1.25])
    low, high = low * (low / high) ** 0.03, high * (high / low) ** 0.07  # room for the numbers at the ends of the bars
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.set_xlabel("FastGPT slower  ←  1 = equal  →  FastGPT faster", fontsize=8)


def roofline_figure(device: str, results: Results) -> Any:
    """Rows whose bytes and operations are known, as points under the ceilings that the runs measured."""
    plt = pyplot()
    points = list(_points(results))
    ceilings = [run.ceilings for run in results.runs]
    roofs = [(c["bytes_per_s"], c["flops_per_s"]) for c in ceilings if c.get("bytes_per_s") and c.get("flops_per_s")]
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    knees = [flops / copy for copy, flops in roofs]
    low = min([x for _, _, x, _ in points] + knees) / 3
    high = max([x for _, _, x, _ in points] + knees) * 3
    for i, (copy, flops) in enumerate(roofs):
        label = f"copy {copy / 1e9:.1f} GB/s, matrix product {cells.flop_rate(flops)}"
        knee = flops / copy
        style = {"color": "black", "linewidth": 1.2, "linestyle": ("-", "--", ":", "-.")[i % 4]}
        axes.plot([low, knee, high], [low * copy, flops, flops], label=label, **style)
    ops = list(dict.fromkeys(op for op, _, _, _ in points))
    colors = {op: plt.get_cmap("tab10")(i % 10) for i, op in enumerate(ops)}
    for op in ops:
        for filled in (False, True):
            x, y = ([point[axis] for point in points if point[:2] == (op, filled)] for axis in (2, 3))
            style = {"markerfacecolor": colors[op] if filled else "none", "markeredgecolor": colors[op]}
            axes.plot(x, y, "o", markersize=6, label=op if filled else None, **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_xlabel("arithmetic intensity, operations per byte (the least that must move)")
    axes.set_ylabel("achieved operations per second")
    axes.set_title(f"{device}: filled FastGPT, hollow its best peer", fontsize=10, loc="left")
    axes.grid(color="0.9")
    axes.legend(fontsize=8, loc="lower right")
    return figure


def _points(results: Results) -> Iterator[tuple[str, bool, float, float]]:
    """(op, whether it is FastGPT's, intensity, operations per second) of FastGPT and its best peer in each case."""
    for found in by_case(results.rows).values():
        ours = found.get(OURS)
        if ours is None or not ours.bytes or not ours.flops:
            continue
        intensity = ours.flops / ours.bytes
        yield ours.op, True, intensity, ours.flops / ours.median_ms * 1e3
        if ours.best_peer in found:
            yield ours.op, False, intensity, ours.flops / found[ours.best_peer].median_ms * 1e3


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


def case_roofline_figure(case: CaseRoofline) -> Any:
    """The limits as lines, FastGPT before and now and its peers as points one above the other."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    knee = case.flops_per_s / case.bytes_per_s
    low, high = min(case.intensity, knee) / 6, max(case.intensity, knee) * 6
    of_memory = {"label": f"memory, {case.bytes_per_s / 1e9:.3g} GB/s"}
    of_products = {"label": f"matrix products, {cells.flop_rate(case.flops_per_s)}"}
    limit, other = (of_products, of_memory) if case.is_of_products else (of_memory, of_products)
    limit |= {"linewidth": 2.4, "label": f"its limit: {case.limit}"}
    other |= {"linewidth": 1.0, "linestyle": "--"}
    axes.plot([low, knee], [low * case.bytes_per_s, case.flops_per_s], color="black", **of_memory)
    axes.plot([knee, high], [case.flops_per_s] * 2, color="black", **of_products)
    ours = [("FastGPT before", case.before_ms, "none"), ("FastGPT now", case.now_ms, "tab:blue")]
    for name, ms, fill in ours:
        style = {"markersize": 9, "markerfacecolor": fill, "markeredgecolor": "tab:blue"}
        axes.plot([case.intensity], [case.flops / ms * 1e3], "o", label=f"{name}, {cells.short(ms):g} ms", **style)
    for i, (name, ms) in enumerate(case.peers_ms.items()):
        color = plt.get_cmap("tab10")(1 + i % 9)
        label = f"{name}, {cells.short(ms):g} ms"
        axes.plot([case.intensity], [case.flops / ms * 1e3], "x", markersize=7, color=color, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_xlabel("operations per byte (the least that must move)", fontsize=8)
    axes.set_ylabel("operations per second", fontsize=8)
    axes.set_title(case.title, fontsize=10, loc="left")
    axes.grid(color="0.9")
    figure.legend(loc="outside right center", fontsize=7.5, frameon=False)
    return figure


def save(figure: Any, path: Path) -> None:
    """A picture as a file, whole or not at all; the figure is closed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, facecolor="white")
    pyplot().close(figure)
