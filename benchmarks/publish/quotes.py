"""The figures that documents quote are written by this module, from the files of rows.

    python -m fastgpt.benchmarks.publish.quotes README.md      rewrite the text between the marks (make results)

In a document,

    <!-- results: train_step amd-epyc-2-cores -->
    ...
    <!-- end of results -->

names one of QUOTES and a file of benchmarks/results. `gpu` stands for all rows there that a GPU has made, and where
there are none, the text says so.

    <!-- plan of 1 8 64 GPUs: --preset gpt2-xl -->
    ...
    <!-- end of plan -->

stands for tables of what `fastgpt plan` says with these options. A test compares the text between the marks with what
would be written there.
"""

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastgpt.report import cell, markdown_table

from . import cells, scale
from .rows import OURS, Results, ResultsError, Row, by_case, peers_of, read


def beside_peers(op: str, what: str, results: Results) -> str:
    """FastGPT's milliseconds in each case of the op, and each peer's time as a multiple of them."""
    rows = _rows_of(op, results)
    peers = peers_of(rows)
    body = []
    for case, found in by_case(rows).items():
        if OURS in found:
            ours = f"{cell(cells.short(found[OURS].median_ms))} ms"
            body.append([case.shape, ours, *(_factor(found.get(peer)) for peer in peers)])
    return _table([what, OURS, *peers], body, rows)


def _factor(row: Row | None) -> str | None:
    """A peer's ratio; "(noise)" where it may as well be 1."""
    if row is None or row.ratio is None:
        return None
    return cells.factor(row.ratio) + (" (noise)" if row.verdict == "noise" else "")


def time_to_loss(results: Results) -> str:
    """How long a preset trains until it reaches a loss, and each peer's time as a multiple of that."""
    rows = _rows_of("time_to_loss", results)
    ours = next(row for row in rows if row.implementation == OURS)
    peers = [
        f"{row.implementation} takes {cells.ratio(row)} as long"
        for row in rows
        if row.implementation != OURS and row.ratio and row.case == ours.case
    ]
    told = f"`{ours.shape}`: {_seconds(ours)} of training, {_extra(ours, 'steps')} steps"
    return _sentence("; ".join([told, *peers]), rows)


def recipe(results: Results) -> str:
    """The loss that a preset ends at, and how long it trained."""
    rows = _rows_of("recipe", results)
    ours = rows[0]
    command = f"`fastgpt train --preset {ours.shape} --data tinyshakespeare`"
    trained = f"after {_extra(ours, 'steps')} steps and {_seconds(ours)} of training"
    loss = f"a validation loss of {_extra(ours, 'val_loss'):.3f} nats per character"
    return _sentence(f"{command} ends, {trained}, at {loss}", rows)


def native_ops(results: Results) -> str:
    """The compiled kernels against PyTorch's own ops, forward and backward: times, ratio, memory at the peak."""
    body = []
    for op in ("cross_entropy", "linear_cross_entropy", "embedding"):
        for case, found in by_case(_rows_of(op, results)).items():
            if case.direction == "forward+backward" and {OURS, "torch"} <= found.keys():
                ours, torch = found[OURS], found["torch"]
                peaks = [f"{row.peak_bytes / 1e6:.1f} MB" if row.peak_bytes else None for row in (ours, torch)]
                times = [cells.milliseconds(ours), cells.milliseconds(torch), cells.ratio(torch)]
                body.append([f"{op} {case.shape}", *times, *peaks])
    headers = ["forward + backward", "native, ms", "torch, ms", "ratio", "memory at the peak", "torch's"]
    return _table(headers, body, _rows_of("cross_entropy", results))


GPU_OPS = ("attention", "layer_norm", "add_layer_norm", "cross_entropy", "linear_cross_entropy", "embedding")
NOT_MEASURED = "On GPUs: not measured yet, because no GPU has run these kernels. `make gpu-check` measures them."


def gpu_ops(results: Results) -> str:
    """Every case of every op against its fastest peer: the kernels alone, in CUDA graphs, and calls from Python."""
    ours, body = [], []
    for op in GPU_OPS:
        for case, found in by_case(results.of_op(op)).items():
            if OURS in found:
                ours.append(found[OURS])
                compared = (_against_fastest(found, time) for time in ("graph_ms", "median_ms"))
                body.append([f"{op} {case.direction}", case.shape, *(cell for cells in compared for cell in cells)])
    if not ours:
        raise ResultsError("these results have no row of FastGPT's for any op")
    of_each = ["fastgpt, ms", "fastest peer", "its ratio"]
    return _table(["op", "shape", *(f"{how}: {name}" for how in ("graph", "call") for name in of_each)], body, ours)


def _against_fastest(found: dict[str, Row], time: str) -> list[Any]:
    """FastGPT's time of a case, the fastest peer and its time as a multiple; `time` names the field of both."""
    times = {name: value for name, row in found.items() if (value := getattr(row, time)) is not None}
    ours = times.pop(OURS, None)
    if ours is None or not times:
        return [cells.short(ours), None, None]
    peer = min(times, key=lambda name: times[name])
    return [cells.short(ours), peer, cells.factor(times[peer] / ours)]


def gpu_models(results: Results) -> str:
    """One sentence: the fastest way to train and to run the first model of each benchmark, and the character recipe."""
    told, found = [], []
    for op, what in (("train_step", "training"), ("generate", "generation")):
        ours = [row for row in results.of_op(op) if row.implementation == OURS and row.extra.get("tokens_per_s")]
        first = [row for row in ours if row.shape.split(", ")[0] == ours[0].shape.split(", ")[0]]
        if first:
            row = max(first, key=lambda row: row.extra["tokens_per_s"])
            told.append(f"{what}, `{row.shape}`: {cell(cells.short(row.extra['tokens_per_s']))} tokens/s")
            found.append(row)
            if row.best_peer and row.ratio:
                told[-1] += f" ({row.best_peer} takes {cells.factor(row.ratio)})"
    if trained := [row for row in results.of_op("recipe") if row.implementation == OURS]:
        row = min(trained, key=lambda row: row.median_ms)
        told.append(f"`{row.shape}`: {_seconds(row)}")
        found.append(row)
    if not found:
        raise ResultsError("these results have no row of FastGPT's for a model")
    return _sentence("On a GPU: " + "; ".join(told), found)


def scaled(results: Results) -> str:
    """What one and two processes hold, compute and exchange, and how long a step takes, beside the plan of it."""
    rows = [row for row in _rows_of("scale", results) if row.implementation == OURS]
    return f"{scale.beside_plans(rows)}\n\n{_origin(rows)}."


def data(results: Results) -> str:
    """What a text costs by its size: to prepare, to start on and in a step, in time and memory."""
    rows = [row for row in _rows_of("data", results) if row.implementation == OURS]
    by_size: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_size.setdefault(row.shape.split(" of ")[0], {})[row.direction] = row
    body = []
    for size, parts in by_size.items():
        if missing := {"prepare", "start", "step"} - parts.keys():
            raise ResultsError(f"the rows of 'data' for {size} lack {', '.join(sorted(missing))}")
        prepare, start, step = (parts[part] for part in ("prepare", "start", "step"))
        memory = [f"{_extra(prepare, 'peak_mb')} MB", f"{_extra(step, 'own_mb')} MB"]
        body.append([size, _time(prepare), memory[0], _time(start), _time(step), memory[1]])
    headers = ["text", "to prepare", "memory", "to start", "batch of a step", "memory without maps"]
    return _table(headers, body, rows)


def _time(row: Row) -> str:
    ms = row.median_ms
    return f"{cell(cells.short(ms / 1e3))} s" if ms >= 100 else f"{cell(cells.short(ms))} ms"


def _table(headers: Sequence[str], body: Sequence[Sequence[Any]], rows: Sequence[Row]) -> str:
    return f"{markdown_table(headers, body)}\n\n{_origin(rows)}."


def _sentence(text: str, rows: Sequence[Row]) -> str:
    return textwrap.fill(f"{text} ({_origin(rows)}).", 120, break_long_words=False, break_on_hyphens=False)


def _seconds(row: Row) -> str:
    return f"{cell(cells.short(row.median_ms / 1e3))} seconds"


def _extra(row: Row, key: str) -> Any:
    if row.extra.get(key) is None:
        raise ResultsError(f'the row of {row.op!r} has no {key!r} in "extra"')
    return row.extra[key]


def _rows_of(op: str, results: Results) -> list[Row]:
    rows = results.of_op(op)
    if not any(row.implementation == OURS for row in rows):
        raise ResultsError(f"these results have no row of FastGPT's for {op!r}")
    return rows


def _origin(rows: Sequence[Row]) -> str:
    """Machine, versions, day and commit of the rows that a document quotes."""
    first = rows[0]
    versions = cells.origin([first], ("torch", "triton", "cuda"))
    parts = [first.machine, first.dtype, *versions, first.date, *cells.origin([first], ("commit",))]
    return ", ".join(part for part in parts if part)


QUOTES: dict[str, Callable[[Results], str]] = {
    "train_step": partial(beside_peers, "train_step", "one training step"),
    "patch": partial(beside_peers, "patch", "one training step of GPT-2"),
    "generate": partial(beside_peers, "generate", "one sequence"),
    "time_to_loss": time_to_loss,
    "recipe": recipe,
    "native_ops": native_ops,
    "scale": scaled,
    "data": data,
    "gpu_ops": gpu_ops,
    "gpu_models": gpu_models,
}
_QUOTED = re.compile(r"(<!-- results: (\S+) (\S+) -->\n)(.*?)(<!-- end of results -->)", re.DOTALL)
_PLANNED = re.compile(r"(<!-- plan of ([\d ]+) GPUs: (.*?) -->\n)(.*?)(<!-- end of plan -->)", re.DOTALL)


def with_quotes(text: str, results: Path) -> str:
    """The document with the text between its marks replaced by what the files in `results` say now."""

    def renewed(match: re.Match[str]) -> str:
        start, name, file, _, end = match.groups()
        if name not in QUOTES:
            raise ResultsError(f"results: {name}: expected one of {', '.join(QUOTES)}")
        quoted = of_gpus(name, results) if file == "gpu" else QUOTES[name](read([results / f"{file}.jsonl"]))
        return start + quoted + "\n" + end

    def planned(match: re.Match[str]) -> str:
        start, gpus, options, _, end = match.groups()
        return start + scale.planned([int(n) for n in gpus.split()], options) + "\n" + end

    return _PLANNED.sub(planned, _QUOTED.sub(renewed, text))


def of_gpus(name: str, results: Path) -> str:
    """The quote of each GPU's rows, one below the other."""
    found = read([results])
    gpus = dict.fromkeys(row.machine for row in found.rows if row.cuda is not None)
    return "\n\n".join(QUOTES[name](found.of_machine(gpu)) for gpu in gpus) or NOT_MEASURED


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="quotes", description="Rewrite the figures that documents quote.")
    parser.add_argument("documents", type=Path, nargs="+", metavar="DOCUMENT.md")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="a folder of rows")
    options = parser.parse_args(argv)
    try:
        for document in options.documents:
            text = with_quotes(document.read_text(encoding="utf-8"), options.results)
            document.write_text(text, encoding="utf-8")
    except (ResultsError, OSError) as error:
        print(f"quotes: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
