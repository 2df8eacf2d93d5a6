"""The figures that documents quote, read from the files of rows: nothing is copied by hand.

    python -m fastgpt.benchmarks.quotes README.md      rewrite what stands between the marks (make results)

In a document,

    <!-- results: train_step amd-epyc-2-cores -->
    ...
    <!-- end of results -->

names one of QUOTES and a file of benchmarks/results. A test compares what stands between with what this would write.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from fastgpt.report import cell, markdown_table

from . import cells
from .reader import OURS, Results, ResultsError, Row, by_case, device_of, read


def train_step(results: Results) -> str:
    """Milliseconds of a step, and how many times FastGPT's each peer takes."""
    rows = _rows_of("train_step", results)
    peers = list(dict.fromkeys(row["implementation"] for row in rows if row["implementation"] != OURS))
    body = []
    for (_, shape, _, _), found in by_case(rows).items():
        if OURS in found:
            ratios = [
                cells.times(found[peer]["ratio"]) if peer in found and found[peer]["ratio"] else None for peer in peers
            ]
            body.append([shape, f"{cell(cells.short(found[OURS]['median_ms']))} ms", *ratios])
    return cells.aligned(markdown_table(["one training step", OURS, *peers], body)) + f"\n\n{_origin(rows)}"


def recipe(results: Results) -> str:
    """The loss that a preset ends at, and how long it trained."""
    rows = _rows_of("recipe", results)
    ours = rows[0]
    loss, steps = (ours["extra"].get(key) for key in ("val_loss", "steps"))
    if loss is None or steps is None:
        raise ResultsError("the row of 'recipe' lacks val_loss or steps in \"extra\"")
    text = (
        f"`fastgpt train --preset {ours['shape']} --data tinyshakespeare` ends, after {steps} steps and "
        f"{ours['median_ms'] / 1e3:.0f} seconds of training, at a validation loss of {loss:.3f} nats per character "
        f"({_origin(rows).rstrip('.')})."
    )
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _rows_of(op: str, results: Results) -> list[Row]:
    rows = [row for row in results.rows if row["op"] == op]
    if not any(row["implementation"] == OURS for row in rows):
        raise ResultsError(f"these results have no row of FastGPT's for {op!r}")
    return rows


def _origin(rows: Sequence[Row]) -> str:
    """Device, versions, day and commit of the rows that a document quotes."""
    row = rows[0]
    parts = [device_of(row), row["dtype"]]
    parts += [f"{key} {row[key]}" for key in ("torch", "triton", "cuda") if row[key]]
    parts += [row["date"]] if row["date"] else []
    parts += [f"commit {cells.commit(row['commit'])}"] if row["commit"] else []
    return ", ".join(parts) + "."


QUOTES: dict[str, Callable[[Results], str]] = {"train_step": train_step, "recipe": recipe}
_QUOTED = re.compile(r"(<!-- results: (\S+) (\S+) -->\n)(.*?)(<!-- end of results -->)", re.DOTALL)


def with_quotes(text: str, results: Path) -> str:
    """The document with every quoted figure as the files in `results` have it now."""

    def renewed(match: re.Match[str]) -> str:
        start, name, file, _, end = match.groups()
        if name not in QUOTES:
            raise ResultsError(f"results: {name}: expected one of {', '.join(QUOTES)}")
        return start + QUOTES[name](read([results / f"{file}.jsonl"])) + "\n" + end

    return _QUOTED.sub(renewed, text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="quotes", description="Rewrite the figures that documents quote from results."
    )
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
