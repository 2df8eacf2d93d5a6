"""Did FastGPT become slower? Two files (or folders) of results, BASE and HEAD, case by case.

    python -m fastgpt.benchmarks.publish.compare BASE HEAD [--threshold 0.1] [--if-comparable] [--out TABLE.md]

A machine is not equally fast on two days, but FastGPT and its peers took turns on it: where both runs measured the same
peers with the same PyTorch, Triton and CUDA, what is compared is FastGPT's time in multiples of each peer's, and more
than half of the peers must agree. Otherwise it is the time itself. Either way a change counts only if it is larger than
the threshold and each run's median lies outside the other run's 20th to 80th percentile.

Exit codes: 0 no slowdown, 1 a slowdown, 2 bad usage: a file that cannot be read, or nothing that can be compared (0
with --if-comparable).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgpt.benchmarks.harness.measure import Spread
from fastgpt.benchmarks.publish import cells
from fastgpt.benchmarks.publish.reader import OURS, Results, ResultsError, Row, case_of, device_of, read
from fastgpt.report import markdown_table

THRESHOLD = 0.1  # between two runs of one commit on a quiet machine the ratio of a row moves by some percent
MIN_ROUNDS = 3  # with fewer there is no spread to speak of

Case = tuple[str, ...]


class NothingToCompare(ResultsError):
    """The two have no device, or no case, in common."""


@dataclass(frozen=True)
class Change:
    """One case in both runs. `factor`: HEAD's time over BASE's, as `measured` says."""

    case: Case
    base_ms: float
    head_ms: float
    factor: float
    measured: str
    verdict: str  # "slower", "faster", "same", or "undecided"


@dataclass(frozen=True)
class Comparison:
    changes: list[Change]
    missing: list[Case]  # in HEAD
    new: list[Case]  # not in BASE
    other_devices: list[str]  # measured by one run only

    @property
    def slower(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == "slower"]


def judge(base: Spread, head: Spread, threshold: float) -> str:
    """ "slower" or "faster" where the change is beyond the threshold and both spreads; else "same"."""
    if head.median > base.median * (1 + threshold) and head.median > base.p80 and base.median < head.p20:
        return "slower"
    if base.median > head.median * (1 + threshold) and base.median > head.p80 and head.median < base.p20:
        return "faster"
    return "same"


def compare(base: Results, head: Results, threshold: float = THRESHOLD) -> Comparison:
    """Every case that FastGPT has in both. Raises NothingToCompare where there is none."""
    ours_base, ours_head = _cases(base), _cases(head)
    both = [case for case in ours_base if case in ours_head]
    devices = set(base.devices()) & set(head.devices())
    if not both:
        names = (" and ".join(results.devices()) or "nothing" for results in (base, head))
        what = "the same device but no case in common" if devices else "BASE measured {}, HEAD {}".format(*names)
        raise NothingToCompare(f"nothing to compare: {what}")
    return Comparison(
        [_change(case, ours_base[case], ours_head[case], threshold) for case in both],
        [case for case in ours_base if case not in ours_head and case[0] in devices],
        [case for case in ours_head if case not in ours_base and case[0] in devices],
        sorted(set(base.devices()) ^ set(head.devices())),
    )


def _cases(results: Results) -> dict[Case, dict[str, Row]]:
    """(device, op, shape, dtype, direction) -> implementation -> row, where FastGPT is one of them."""
    cases: dict[Case, dict[str, Row]] = {}
    for row in results.rows:
        cases.setdefault((device_of(row), *case_of(row)), {})[row["implementation"]] = row
    return {case: rows for case, rows in cases.items() if OURS in rows}


def _change(case: Case, base: dict[str, Row], head: dict[str, Row], threshold: float) -> Change:
    ours = base[OURS], head[OURS]
    peers = [] if _versions(ours[0]) != _versions(ours[1]) else [name for name in base if name in head]
    costs = {name: (_by_ratio(base[name]), _by_ratio(head[name])) for name in peers if name != OURS}
    costs = {name: pair for name, pair in costs.items() if None not in pair}
    if not costs:
        costs = {"": (_by_time(ours[0]), _by_time(ours[1]))}
    verdicts = [judge(old, new, threshold) if old and new else "undecided" for old, new in costs.values()]
    factors = [new.median / old.median for old, new in costs.values() if old and new]
    factor = statistics.median(factors) if factors else ours[1]["median_ms"] / ours[0]["median_ms"]
    agreed = next((v for v in dict.fromkeys(verdicts) if verdicts.count(v) > len(verdicts) / 2), "same")
    measured = "against " + ", ".join(costs) if "" not in costs else "by time"
    return Change(case, ours[0]["median_ms"], ours[1]["median_ms"], factor, measured, agreed)


def _versions(row: Row) -> tuple[str | None, ...]:
    """A peer under another PyTorch is another program."""
    return row["torch"], row["triton"], row["cuda"]


def _by_ratio(peer: Row) -> Spread | None:
    """FastGPT's time in multiples of the peer's: the inverse of the row's ratio."""
    ratio = peer["ratio"], peer["ratio_p80"], peer["ratio_p20"]
    if not all(ratio) or (peer["rounds"] or 0) < MIN_ROUNDS:
        return None
    return Spread(*(1 / value for value in ratio))


def _by_time(row: Row) -> Spread | None:
    if row["p20_ms"] is None or row["p80_ms"] is None or (row["rounds"] or 0) < MIN_ROUNDS:
        return None
    return Spread(row["median_ms"], row["p20_ms"], row["p80_ms"])


def table(comparison: Comparison) -> str:
    """What changed, first what became slower, in columns that are straight on a screen; it is Markdown too."""
    order = ("slower", "undecided", "faster", "same")
    changes = sorted(comparison.changes, key=lambda change: (order.index(change.verdict), -change.factor))
    rows = []
    for c in changes:
        _, *work = c.case
        ms = (f"{value:.4g}" for value in (c.base_ms, c.head_ms))
        rows.append([*work, *ms, f"{100 * (c.factor - 1):+.1f} %", c.verdict, c.measured])
    headers = ["op", "shape", "dtype", "direction", "base ms", "head ms", "change", "verdict", "measured"]
    return cells.aligned(markdown_table(headers, rows))


def summary(comparison: Comparison, threshold: float) -> str:
    """The table, and in words what it does not show."""
    devices = list(dict.fromkeys(change.case[0] for change in comparison.changes))
    parts = [f"FastGPT's time on {' and on '.join(devices)}, HEAD against BASE:", table(comparison)]
    for cases, what in ((comparison.missing, "missing in HEAD"), (comparison.new, "not in BASE")):
        if cases:
            parts.append("\n".join([f"{what}:", *("- " + " / ".join(case[1:]) for case in cases)]))
    if comparison.other_devices:
        listed = "\n".join(f"- {device}" for device in comparison.other_devices)
        parts.append(f"not comparable, measured by one of the two only:\n{listed}")
    counts = dict.fromkeys(("slower", "faster", "same", "undecided"), 0)
    for change in comparison.changes:
        counts[change.verdict] += 1
    counted = ", ".join(f"{number} {verdict}" for verdict, number in counts.items() if number)
    parts.append(f"{counted} (beyond {100 * threshold:g} % and both spreads)")
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compare", description="Did FastGPT become slower from BASE to HEAD?")
    parser.add_argument("base", type=Path, metavar="BASE", help="a file of rows, or a folder of such files (*.jsonl)")
    parser.add_argument("head", type=Path, metavar="HEAD", help="the same, newer")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="smallest change that counts (default 0.1)")
    parser.add_argument("--out", type=Path, help="a Markdown file to write the same text to")
    parser.add_argument("--if-comparable", action="store_true", help="nothing to compare is no error")
    options = parser.parse_args(argv)
    if not 0 <= options.threshold < 10:  # NaN fails too
        parser.error(f"--threshold: expected a fraction such as 0.1, got {options.threshold}")
    try:
        base, head = read([options.base]), read([options.head])
        comparison = compare(base, head, options.threshold)
        text = f"BASE: {_origin(base)}\nHEAD: {_origin(head)}\n\n" + summary(comparison, options.threshold)
        if options.out:
            options.out.write_text(text + "\n", encoding="utf-8")
    except (ResultsError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 0 if options.if_comparable and isinstance(error, NothingToCompare) else 2
    print(text)
    return 1 if comparison.slower else 0


def _origin(results: Results) -> str:
    """The versions, commits and days that the rows name."""
    found = []
    for key in ("commit", "torch", "triton", "cuda", "date"):
        values = dict.fromkeys(str(row[key])[:10] if key == "commit" else row[key] for row in results.rows if row[key])
        found += [f"{key} {' and '.join(values)}"] if values else []
    return ", ".join(found) or "unknown"


if __name__ == "__main__":
    sys.exit(main())
