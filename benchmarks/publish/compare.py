"""Did FastGPT become slower? Two files (or folders) of results, BASE and HEAD, case by case.

    python -m fastgpt.benchmarks.publish.compare BASE HEAD [--threshold 0.1] [--if-comparable] [--out TABLE.md]

A machine is not equally fast on two days, but FastGPT and its peers took turns on it. So where both runs measured the
same peers with the same PyTorch, Triton and CUDA, FastGPT's time is compared in multiples of each peer's time, and more
than half of the peers must agree. Otherwise the times themselves are compared. Either way a change counts only if it is
larger than the threshold and each run's median lies outside the other run's 20th to 80th percentile.

Exit codes: 0 no slowdown, 1 a slowdown, 2 bad usage: a file that cannot be read, or nothing that can be compared (0
with --if-comparable).
"""

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgpt.benchmarks.publish import cells
from fastgpt.benchmarks.publish.rows import OURS, CaseKey, Results, ResultsError, Row, Spread, by_case, peers_of, read
from fastgpt.report import markdown_table

THRESHOLD = 0.1  # between two runs of one commit on a quiet machine the ratio of a row changes by a few per cent
MIN_ROUNDS = 3  # with fewer rounds the percentiles say nothing
VERDICTS = ("slower", "undecided", "faster", "same")


class NothingToCompare(ResultsError):
    """The two have no machine, or no case, in common."""


@dataclass(frozen=True)
class Change:
    """One case in both runs. `factor`: HEAD's time over BASE's, as `measured` says."""

    case: CaseKey
    base_ms: float
    head_ms: float
    factor: float
    measured: str
    verdict: str  # one of VERDICTS


@dataclass(frozen=True)
class RunComparison:
    """What two runs say of each other."""

    changes: list[Change]
    missing: list[CaseKey]  # in HEAD
    new: list[CaseKey]  # not in BASE
    other_machines: list[str]  # measured by one run only

    @property
    def slower(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == "slower"]


def judge(base: Spread, head: Spread, threshold: float) -> str:
    """ "slower" or "faster" where the change is beyond the threshold and both spreads; else "same"."""
    for verdict, fast, slow in (("slower", base, head), ("faster", head, base)):
        if slow.median > fast.median * (1 + threshold) and slow.median > fast.p80 and fast.median < slow.p20:
            return verdict
    return "same"


def compare_runs(base: Results, head: Results, threshold: float = THRESHOLD) -> RunComparison:
    """Every case that FastGPT has in both. Raises NothingToCompare where there is none."""
    base_cases = {case: rows for case, rows in by_case(base.rows).items() if OURS in rows}
    head_cases = {case: rows for case, rows in by_case(head.rows).items() if OURS in rows}
    both = [case for case in base_cases if case in head_cases]
    machines = set(base.machines()) & set(head.machines())
    if not both:
        names = (" and ".join(results.machines()) or "nothing" for results in (base, head))
        what = "the same device but no case in common" if machines else "BASE measured {}, HEAD {}".format(*names)
        raise NothingToCompare(f"nothing to compare: {what}")
    return RunComparison(
        [_change(case, base_cases[case], head_cases[case], threshold) for case in both],
        [case for case in base_cases if case not in head_cases and case.machine in machines],
        [case for case in head_cases if case not in base_cases and case.machine in machines],
        sorted(set(base.machines()) ^ set(head.machines())),
    )


def _change(case: CaseKey, base: dict[str, Row], head: dict[str, Row], threshold: float) -> Change:
    ours = base[OURS], head[OURS]
    # Peers under another PyTorch, Triton or CUDA are other programs, so that ratios to them cannot be compared.
    same_versions = all(getattr(ours[0], name) == getattr(ours[1], name) for name in ("torch", "triton", "cuda"))
    peers = [name for name in peers_of(base.values()) if same_versions and name in head]
    costs = {name: (_by_ratio(base[name]), _by_ratio(head[name])) for name in peers}
    costs = {name: pair for name, pair in costs.items() if None not in pair}
    measured = "against " + ", ".join(costs) if costs else "by time"
    pairs = list(costs.values()) or [(_by_time(ours[0]), _by_time(ours[1]))]
    verdicts = [judge(old, new, threshold) if old and new else "undecided" for old, new in pairs]
    factors = [new.median / old.median for old, new in pairs if old and new]
    factor = statistics.median(factors) if factors else ours[1].median_ms / ours[0].median_ms
    agreed = next((verdict for verdict, count in Counter(verdicts).items() if count > len(verdicts) / 2), "same")
    return Change(case, ours[0].median_ms, ours[1].median_ms, factor, measured, agreed)


def _by_ratio(peer: Row) -> Spread | None:
    """FastGPT's time in multiples of the peer's: the inverse of the row's ratio."""
    ratio = peer.ratio, peer.ratio_p80, peer.ratio_p20
    if not all(ratio) or (peer.rounds or 0) < MIN_ROUNDS:
        return None
    return Spread(*(1 / value for value in ratio))


def _by_time(row: Row) -> Spread | None:
    if row.p20_ms is None or row.p80_ms is None or (row.rounds or 0) < MIN_ROUNDS:
        return None
    return Spread(row.median_ms, row.p20_ms, row.p80_ms)


def change_table(comparison: RunComparison) -> str:
    """Every change, the slower ones first, as a Markdown table that reads well as plain text too."""
    rows = []
    for c in sorted(comparison.changes, key=lambda change: (VERDICTS.index(change.verdict), -change.factor)):
        ms = (f"{value:.4g}" for value in (c.base_ms, c.head_ms))
        rows.append([*c.case[1:], *ms, f"{100 * (c.factor - 1):+.1f} %", c.verdict, c.measured])
    headers = ["op", "shape", "dtype", "direction", "base ms", "head ms", "change", "verdict", "measured"]
    return markdown_table(headers, rows)


def summary(comparison: RunComparison, threshold: float) -> str:
    """The table, and in words what it does not show."""
    machines = list(dict.fromkeys(change.case.machine for change in comparison.changes))
    parts = [f"FastGPT's time on {' and on '.join(machines)}, HEAD against BASE:", change_table(comparison)]
    unmatched = {
        "missing in HEAD": [" / ".join(case[1:]) for case in comparison.missing],
        "not in BASE": [" / ".join(case[1:]) for case in comparison.new],
        "not comparable, measured by one of the two only": comparison.other_machines,
    }
    parts += ["\n- ".join([f"{what}:", *names]) for what, names in unmatched.items() if names]
    counts = Counter(change.verdict for change in comparison.changes)
    in_order = ("slower", "faster", "same", "undecided")
    counted = ", ".join(f"{counts[verdict]} {verdict}" for verdict in in_order if counts[verdict])
    parts.append(f"{counted} (beyond {100 * threshold:g} % and both spreads)")
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compare", description="Did FastGPT become slower from BASE to HEAD?")
    parser.add_argument("base", type=Path, metavar="BASE", help="a file of rows, or a folder of such files (*.jsonl)")
    parser.add_argument("head", type=Path, metavar="HEAD", help="the same of the newer run")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="smallest change that counts (default 0.1)")
    parser.add_argument("--out", type=Path, help="a Markdown file to write the same text to")
    parser.add_argument("--if-comparable", action="store_true", help="exit with 0 where there is nothing to compare")
    options = parser.parse_args(argv)
    if not 0 <= options.threshold < 10:  # NaN fails too
        parser.error(f"--threshold: expected a fraction such as 0.1, got {options.threshold}")
    try:
        base, head = read([options.base]), read([options.head])
        comparison = compare_runs(base, head, options.threshold)
        text = f"BASE: {_versions_of(base)}\nHEAD: {_versions_of(head)}\n\n" + summary(comparison, options.threshold)
        if options.out:
            options.out.write_text(text + "\n", encoding="utf-8")
    except (ResultsError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 0 if options.if_comparable and isinstance(error, NothingToCompare) else 2
    print(text)
    return 1 if comparison.slower else 0


def _versions_of(results: Results) -> str:
    return ", ".join(cells.origin(results.rows, ("commit", "torch", "triton", "cuda", "date"))) or "unknown"


if __name__ == "__main__":
    sys.exit(main())
