"""docs/performance.md: where the time of a training step goes, how far it is from the machine's limit, what was tried.

    python -m fastgpt.benchmarks.publish.performance --results benchmarks/results --out docs

All of it follows from files that are committed: the rows of a device; the rows of the same device before the changes,
in a file of the same name in benchmarks/results/before; and the levers in benchmarks/results/levers.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.files import FileError, atomic_path
from fastgpt.report import cell, markdown_table

from . import cells
from .levers import Lever, read_levers
from .pictures import CaseRoofline, case_roofline_figure, save
from .rows import OURS, Results, ResultsError, Row, by_case, read

PICTURES = "images"  # beside the page
PREFIX = "performance-"  # of a picture's file
OPS = ("train_step", "generate")
TITLE = "Where the time goes, and what was tried"
ABOUT = [
    "Written by `make results` from the committed rows and levers; not by hand. [Benchmarks](benchmarks.md) explains "
    "how rows are measured, and [results.md](results.md) has all of them.",
]
ROOFLINE = [
    "A processor can do two things to a tensor: move its bytes, and calculate with them. How fast it does each at best "
    "can be measured, and gives a piece of work a least time: no program can be faster than moving the bytes that have "
    "to move, nor than the calculations that have to be made. Drawn over the operations that a program makes with each "
    "byte, the two limits look like a roof: on the left, where there are few operations for each byte, the speed of "
    "memory is the limit; on the right, that of calculating.",
    "A training step lies far to the right. Almost all of its operations are matrix products: for each token and each "
    "weight of a linear layer, one multiplication and one addition in the forward pass, and twice as many in the "
    "backward pass. Every weight is read once and used for all the tokens of a batch. So a step can hardly be faster "
    "than its products, and what else it does (attention, norms, the activation, the optimizer) should add little. "
    "Generating one token after another lies far to the left: each token needs every weight, and uses it once. So a "
    "token can hardly be faster than reading the weights.",
    "The pictures show a hollow circle where FastGPT was before the changes below, a filled one where it is now, and "
    "another mark for each of its peers. The thick line is the limit of this very work, measured at its sizes.",
]
KINDS = (
    "The milliseconds of one training step by kind of work, as torch.profiler counts them. Products are those of the "
    "linear layers, the head's included; those within attention are attention's. Optimizer is all that comes after the "
    "backward pass: clipping, the update and clearing the gradients. Other is additions, copies and the like; python "
    "is the time between operations. The profiler itself makes a step somewhat longer."
)
LEVERS = (
    "A lever is a change that was predicted to save time. Each was measured before and after, on its own; so gains do "
    "not add up, and the times of different tables are not of one program. What did not pay was dropped, and is listed "
    "all the same, so that nobody needs to try it again. Lines are what a lever costs in code."
)


@dataclass(frozen=True)
class Picture:
    """What is drawn, the name of its file and the words below it."""

    name: str
    caption: str
    roofline: CaseRoofline


def markdown(results: Path) -> str:
    """The text of performance.md, from a folder of results."""
    parts = [f"# {TITLE}", *ABOUT, "## The limit of a machine", *ROOFLINE]
    for name, now, before in _devices(results):
        parts += _of_device(name, now, before)
    levers = read_levers(results / "levers")
    if levers:
        parts += ["## What was tried", LEVERS]
    for subject, entries in levers.items():
        parts += [f"### {subject.replace('_', ' ').replace('-', ' ').capitalize()}", *_lever_table(entries)]
    return "\n\n".join(parts) + "\n"


def pictures(results: Path) -> list[Picture]:
    return [picture for name, now, before in _devices(results) for picture in _pictures_of(name, now, before)]


def write(results: Path, out: Path) -> None:
    """`out`/performance.md and its pictures in `out`/images; pictures of cases that are gone are removed."""
    text, made = markdown(results), pictures(results)
    names = {f"{picture.name}.png" for picture in made}
    for old in (out / PICTURES).glob(f"{PREFIX}*.png"):
        if old.name not in names:
            old.unlink()
    for picture in made:
        save(case_roofline_figure(picture.roofline), out / PICTURES / f"{picture.name}.png")
    with atomic_path(out / "performance.md") as temporary:
        temporary.write_text(text, encoding="utf-8")


def _devices(results: Path) -> Iterator[tuple[str, Results, Results]]:
    """The name, the rows and the earlier rows of each device."""
    for file in sorted(results.glob("*.jsonl")):
        earlier = results / "before" / file.name
        yield file.stem, read([file]), read([earlier]) if earlier.exists() else Results()


def _of_device(name: str, now: Results, before: Results) -> list[str]:
    """Nothing where there is nothing to show."""
    parts = []
    if kinds := _kinds_table(now):
        parts += ["### A training step by kind of work", KINDS, kinds]
    if pairs := _pairs(now, before):
        parts += ["### Before and now", _before_table(pairs)]
    for picture in _pictures_of(name, now, before):
        parts.append(f"![{picture.caption}]({PICTURES}/{picture.name}.png)")
    return [f"## {' and '.join(now.machines())}", *parts] if parts else []


# --- a step by kind of work ------------------------------------------------------------------------------------------


def _kinds_table(results: Results) -> str | None:
    rows = [row for row in results.rows if row.extra.get("ms_by_kind")]
    if not rows:
        return None
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.extra["ms_by_kind"]))
    headers = ["step", "", "measured ms", *kinds]
    body = [[row.shape, row.implementation, _ms(row.median_ms), *_kinds_of(row, kinds)] for row in rows]
    origin = ", ".join(cells.origin(rows, ("torch", "commit", "date")))
    return f"{markdown_table(headers, body)}\n\n{origin}."


def _kinds_of(row: Row, kinds: Sequence[str]) -> Iterator[str | None]:
    for kind in kinds:
        ms = row.extra["ms_by_kind"].get(kind)
        yield None if ms is None else _ms(ms)


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}" if value >= 0.1 else f"{value:.1f}"


# --- before and after ------------------------------------------------------------------------------------------------


def _pairs(now: Results, before: Results) -> list[tuple[Row, Row]]:
    """FastGPT's row of each case before and now, where it was measured again."""
    earlier = {row.case: row for row in before.rows if row.implementation == OURS and row.op in OPS}
    pairs = [(earlier[row.case], row) for row in now.rows if row.implementation == OURS and row.case in earlier]
    return [(old, new) for old, new in pairs if old.commit != new.commit]


def _before_table(pairs: Sequence[tuple[Row, Row]]) -> str:
    body = []
    for old, new in pairs:
        limit = f"{cells.percent(new.roofline_fraction)} of {new.ceiling}" if new.ceiling else None
        peer = f"{new.best_peer}, {cells.ratio(new)}" if new.best_peer else None
        ours = [cells.milliseconds(old), cells.milliseconds(new), cells.factor(old.median_ms / new.median_ms)]
        body.append([new.op, new.shape, *ours, limit, peer])
    headers = ["", "case", "before, ms", "now, ms", "gain", "of its limit now", "fastest peer now"]
    commits = [", ".join(cells.origin(rows, ("commit", "date"))) for rows in zip(*pairs, strict=True)]
    return f"{markdown_table(headers, body)}\n\nBefore: {commits[0]}. Now: {commits[1]}."


def _pictures_of(name: str, now: Results, before: Results) -> list[Picture]:
    found = []
    for old, new in _pairs(now, before):
        roofline = _roofline_of(old, new, now)
        if roofline is not None:
            stem = f"{PREFIX}{name}-{cells.file_stem(new.op)}-{cells.file_stem(new.shape)}"
            times = [cell(cells.short(row.median_ms)) for row in (old, new)]
            caption = f"{new.op} {new.shape}: {times[0]} ms before, {times[1]} ms now"
            found.append(Picture(stem, caption, roofline))
    return found


def _roofline_of(old: Row, new: Row, now: Results) -> CaseRoofline | None:
    """None where the row does not say by what it is limited."""
    ceilings = now.ceilings_of(new)
    if not (ceilings and new.bytes and new.flops and new.roofline_fraction and new.ceiling):
        return None
    least_s = new.roofline_fraction * new.median_ms / 1e3
    is_of_products = new.ceiling.startswith("products")
    peers = {row.implementation: row.median_ms for row in by_case(now.rows)[new.case].values()}
    del peers[OURS]
    return CaseRoofline(
        title=f"{new.op} {new.shape}",
        intensity=new.flops / new.bytes,
        flops=new.flops,
        bytes_per_s=ceilings["bytes_per_s"] if is_of_products else new.bytes / least_s,
        flops_per_s=new.flops / least_s if is_of_products else ceilings["flops_per_s"],
        limit=new.ceiling,
        is_of_products=is_of_products,
        before_ms=old.median_ms,
        now_ms=new.median_ms,
        peers_ms=peers,
    )


# --- levers ----------------------------------------------------------------------------------------------------------


def _lever_table(levers: Sequence[Lever]) -> list[str]:
    """Those that were kept come first. A device that all have is said once, above the table."""
    ordered = sorted(levers, key=lambda lever: not lever.kept)
    devices = list(dict.fromkeys(lever.device for lever in levers))
    headers = ["lever", "case", "predicted", "before", "after", "gain", "", "why", "lines", "commit"]
    body = [_cells_of(lever) for lever in ordered]
    if len(devices) == 1:
        return [f"Measured on {devices[0]}.", markdown_table(headers, body)]
    body = [[*line, lever.device] for line, lever in zip(body, ordered, strict=True)]
    return [markdown_table([*headers, "device"], body)]


def _cells_of(lever: Lever) -> list[Any]:
    times = [f"{cells.short(float(value), 4):g} {lever.unit}" for value in (lever.before, lever.after)]
    predicted = lever.predicted if isinstance(lever.predicted, str) else f"{lever.predicted:g} {lever.unit}"
    verdict = "kept" if lever.kept else "dropped"
    return [
        lever.name,
        lever.case,
        predicted,
        *times,
        _gain(lever),
        verdict,
        lever.why,
        lever.lines,
        f"`{lever.commit[:10]}`",
    ]


def _gain(lever: Lever) -> str | None:
    """Of a time or a rate; other quantities, such as a loss, have no factor that says something."""
    if lever.unit in ("s", "ms", "us", "µs"):
        return cells.factor(lever.before / lever.after)
    return cells.factor(lever.after / lever.before) if lever.unit.endswith("/s") else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="performance", description="Write performance.md and its pictures.")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="a folder of rows")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="a folder for the page")
    options = parser.parse_args(argv)
    try:
        write(options.results, options.out)
    except (ResultsError, FileError) as error:
        print(f"performance: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
