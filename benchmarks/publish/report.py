"""Rows as something to read: docs/results.md with its pictures, and one HTML page that needs no other file.

    fastgpt bench --report --results benchmarks/results --out docs     results.md, results/*.png, results/report.html

Both have the same tables and pictures. For each machine: FastGPT against the best peer of each case, then every op with
all its peers, then the fastest copy and matrix product of the machine, then the peers that were not measured.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastgpt.files import atomic_path
from fastgpt.report import Report, markdown_table

from . import cells
from .pictures import ratio_figure, roofline_figure
from .rows import OURS, Results, ResultsError, Row, Run, by_case, peers_of

WAYS = ("read", "write", "copy", "add")  # of moving bytes, as a run's ceilings name them
RATES = {"gb_per_s": "GB/s", "tflop_per_s": "TFLOP/s", "tokens_per_s": "tokens/s"}
FACTS = ("driver", "clocks_mhz", "python", "torch", "triton", "cuda", "commit", "date")  # said once for a machine

TITLE = "Benchmark results"
ABOUT = [
    "Each line is one piece of work, which FastGPT and its peers did in turns, in one process, in an order drawn anew "
    "for each round. It was timed only after FastGPT's results had passed the comparison with the float64 oracle. The "
    "backward pass starts from random gradients; for a loss, from 1, as in `loss.backward()`. Times are medians, with "
    "the 20th and 80th percentile in brackets. A ratio is the peer's time over FastGPT's, the median over the rounds: "
    "above 1 FastGPT is faster. Where the percentiles of the ratio lie on both sides of 1, the verdict is noise.",
    "The error ratio is FastGPT's error over PyTorch's own error plus half the stated tolerance; a result passes up to "
    "2. The fraction of the roofline is the least time that this machine needs for the work, over the time that it "
    "took. The least time is that of moving the bytes that have to move, or of the products, whichever is longer, at "
    "the speeds that were measured in the same run at the sizes of the work. In older rows, which do not name their "
    "limit, they are the speeds of one copy from memory and of one large product; work that fits into caches can be "
    "above them.",
]


def markdown(results: Results, pictures: str | None = "results") -> str:
    """The text of results.md; its pictures lie in the folder `pictures` beside it. None: a text without pictures."""
    parts = [f"# {TITLE}", "Written by `fastgpt bench --report` from the files of rows; not by hand.", *ABOUT]
    for table in all_tables(results):
        parts += [f"{'#' * table.level} {table.heading}", *table.notes]
        parts += [markdown_table(table.headers, table.rows)] if table.rows else []
        parts += [f"![{table.caption}]({pictures}/{table.picture}.png)"] if table.picture and pictures else []
    return "\n\n".join(part for part in parts if part) + "\n"


def page(results: Results) -> Report:
    """The same as one HTML file."""
    made = Report(TITLE, " · ".join(results.machines()))
    for text in ABOUT:
        made.paragraph(text)
    for table in all_tables(results):
        made.heading(table.heading)
        for note in table.notes:
            made.paragraph(note)
        if table.rows:
            made.table(table.headers, table.rows)
        if table.picture and table.draw:
            made.figure(table.draw(), table.picture, table.caption)
    return made


def write(results: Results, out: Path) -> Path:
    """`out`/results.md, and in `out`/results the pictures and report.html, whose path is returned."""
    if not results.rows:
        raise ResultsError("these files hold no rows: nothing to report")
    html = page(results).write(out / "results")
    with atomic_path(out / "results.md") as temporary:
        temporary.write_text(markdown(results), encoding="utf-8")
    return html


# --- the tables ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """One table under one heading, for the Markdown and for the HTML page."""

    heading: str
    notes: list[str]
    headers: list[str]
    rows: list[list[Any]]
    picture: str | None = None  # the name of its file, without .png
    caption: str = ""
    draw: Callable[[], Any] | None = None
    level: int = 3  # of the heading


def all_tables(everything: Results) -> Iterator[Table]:
    """Of each machine a summary, a table for each op, the machine's speed, and the peers that were not measured."""
    for machine in everything.machines():
        results = everything.of_machine(machine)
        yield _summary(machine, results)
        ops = dict.fromkeys(row.op for row in results.rows)
        tables = [_op_table(machine, op, results) for op in ops] + [_ceilings(machine, results), _absent(results)]
        yield from (table for table in tables if table.rows)


def _summary(machine: str, results: Results) -> Table:
    """FastGPT against the fastest peer of each case, op by op."""
    rows: list[list[Any]] = []
    compared = [row for row in results.rows if row.implementation == OURS and row.ratio]
    for op, direction in dict.fromkeys((row.op, row.direction) for row in compared):
        ours = [row for row in compared if (row.op, row.direction) == (op, direction)]
        counts = [sum(row.verdict == verdict for row in ours) for verdict in ("faster", "noise", "slower")]
        ratios = [row.ratio for row in ours]
        mean = statistics.geometric_mean(ratios)
        rows.append([op, direction, len(ours), *counts, *map(cells.factor, (min(ratios), mean, max(ratios)))])
    headers = ["op", "direction", "cases", "faster", "noise", "slower", "lowest ratio", "geometric mean", "highest"]
    facts = ", ".join(cells.origin(results.rows, FACTS))
    return Table(machine, [f"{facts}."] if facts else [], headers, rows, level=2)


def _op_table(machine: str, op: str, results: Results) -> Table:
    """A line for each case: FastGPT's own figures, then the ratio of each peer."""
    rows = results.of_op(op)
    peers = peers_of(rows)
    columns = _columns([row for row in rows if row.implementation == OURS])
    body = []
    for case, found in by_case(rows).items():
        ours = [make(found[OURS]) if OURS in found else None for _, make in columns]
        theirs = [cells.ratio(found[peer]) if peer in found else None for peer in peers]
        body.append([case.shape, case.dtype, case.direction, *ours, *theirs])
    headers = ["shape", "dtype", "direction", *(name for name, _ in columns), *peers]
    constant, shown = _constant_and_shown(headers, body)
    return Table(
        op,
        [", ".join(constant) + "."] if constant else [],
        [headers[i] for i in shown],
        [[line[i] for i in shown] for line in body],
        f"{cells.file_stem(machine)}-{cells.file_stem(op)}" if any(row.ratio for row in rows) and peers else None,
        f"{op}: time of each peer over FastGPT's; the lines span the 20th to 80th percentile of the rounds",
        partial(ratio_figure, op, rows),
    )


def _constant_and_shown(headers: list[str], body: list[list[Any]]) -> tuple[list[str], list[int]]:
    """What is equal in every line, to be said once above the table, and the columns that are left and not empty."""
    constant, shown = [], []
    for i, header in enumerate(headers):
        values = {line[i] for line in body}
        if header in ("dtype", "direction", "backend") and len(values) == 1 and None not in values:
            value = values.pop()
            constant += [] if value == "none" else [f"backend {value}" if header == "backend" else value]
        elif values != {None}:
            shown.append(i)
    return constant, shown


def _columns(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], Any]]]:
    """The columns of FastGPT's own figures: their headers, and what makes a cell of a row."""
    rates = []
    for key in dict.fromkeys(key for row in rows for key, value in row.extra.items() if not isinstance(value, dict)):
        name, factor = RATES.get(key, key.replace("_", " ")), 1
        if key == "tflop_per_s" and all((row.extra.get(key) or 0) < 1 for row in rows):
            name, factor = "GFLOP/s", 1000
        rates.append((name, partial(_extra, key, factor)))
    return [
        ("backend", lambda row: row.backend),
        ("fastgpt ms", cells.milliseconds),
        ("without hiding the host", lambda row: cells.short(row.eager_ms)),
        ("as a graph", lambda row: cells.short(row.graph_ms)),
        ("host's share", lambda row: cells.percent(row.host_share)),
        *rates,
        ("of the roofline", lambda row: cells.percent(row.roofline_fraction)),
        ("its limit", lambda row: row.ceiling),
        ("peak MB", _peak_mb),
        ("error ratio", lambda row: cells.short(row.parity_error_ratio, 2)),
        ("verdict", _verdict),
    ]


def _peak_mb(row: Row) -> Any:
    """None for a CUDA graph, too: its memory is taken when it is recorded, and none when it is launched."""
    known = row.peak_bytes is not None and not row.shape.endswith("CUDA graph")
    return cells.short(row.peak_bytes / 1e6) if known else None


def _extra(key: str, factor: int, row: Row) -> Any:
    value = row.extra.get(key)
    return cells.short(value * factor) if isinstance(value, float) else value


def _verdict(row: Row) -> str | None:
    if row.verdict is None or row.best_peer is None:
        return None
    return f"{row.verdict} {'against' if row.verdict == 'noise' else 'than'} {row.best_peer}"


def _ceilings(machine: str, results: Results) -> Table:
    rows = []
    for run in results.runs:
        copy, product = (run.ceilings.get(key) for key in ("bytes_per_s", "flops_per_s"))
        if copy and product:
            speeds = [f"{copy / 1e9:.1f} GB/s", cells.flop_rate(product)]
            rows.append([", ".join(run.ops), run.ceilings.get("dtype"), *speeds, _by_size(run), run.date])
    drawn = bool(rows) and any(row.bytes and row.flops and results.ceilings_of(row) for row in results.rows)
    return Table(
        "The machine's ceilings",
        [
            "The fastest copy from memory and the fastest matrix product of each run. Where a run measured more sizes, "
            "the last column has how fast so many bytes are read, written, copied and added up. A row's fraction of "
            "the roofline refers to its own run."
        ],
        ["ops of the run", "dtype", "copy", "matrix product", "GB/s by size: read / written / copied / added", "date"],
        rows,
        f"{cells.file_stem(machine)}-roofline" if drawn else None,
        "Achieved operations per second over operations per byte moved, of FastGPT and its best peer, op by op, under "
        "the ceiling of the op's newest run",
        partial(roofline_figure, results),
    )


def _by_size(run: Run) -> str | None:
    """The speeds of the sizes that are powers of two: each run has them."""
    speeds: dict[int, list[str]] = {}
    for way in WAYS:
        for measured, size, rate in run.ceilings.get("moved", []):
            if measured == way and size & (size - 1) == 0:
                speeds.setdefault(size, []).append(f"{rate / 1e9:.0f}")
    told = [f"{size / 2**20:g} MiB: {' / '.join(rates)}" for size, rates in sorted(speeds.items())]
    return "; ".join(told) or None


def _absent(results: Results) -> Table:
    """Which peers were not measured, and why."""
    ops: dict[tuple[str, str], list[str]] = {}
    for run in results.runs:
        for op, peers in run.absent.items():
            for peer, reason in peers.items() if isinstance(peers, dict) else ():
                ops.setdefault((peer, str(reason).rstrip(".")), []).append(op)
    rows = [[peer, ", ".join(dict.fromkeys(found)), why] for (peer, why), found in sorted(ops.items())]
    return Table("Peers that were not measured", [], ["peer", "in", "because"], rows)
