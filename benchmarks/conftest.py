"""The suite as a pytest session: its options, the `bench` fixture, and what is printed at the end.

The rounds are ours, because contenders have to take turns; pytest-benchmark is handed the times of each, so that its
table, its JSON (--benchmark-json), its storage (--benchmark-save) and comparison (--benchmark-compare) work on them,
and it says how thoroughly to measure: --benchmark-max-time (seconds for each contender of a comparison),
--benchmark-min-rounds, --benchmark-min-time; with --benchmark-disable everything is checked and nothing is timed.

A benchmark file lists its cases by device type: an argument called `case` takes those of CASES, one called `decoding`
those of DECODINGS. --quick takes the first of each list.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastgpt.benchmarks.harness.suite import OURS, Setting, Suite, Work
from fastgpt.benchmarks.publish import rows


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastgpt")
    group.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    group.addoption("--rows", metavar="FILE", help="JSON lines; default: benchmarks/results/<device>.jsonl")
    group.addoption("--quick", action="store_true", help="the first case of each file, few rounds")
    group.addoption("--nanogpt", metavar="DIR", help="a checkout of karpathy/nanoGPT, to compare with")
    group.addoption("--lecture", metavar="FILE", help="gpt.py of karpathy/ng-video-lecture, to compare with")
    group.addoption("--data", metavar="TEXT", default="shakespeare", help="what to train on: as `fastgpt train --data`")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.device == "auto":
        config.option.device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.option.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(
            "--device cuda: this PyTorch finds no CUDA device; `fastgpt doctor` shows what it finds"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=replay))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.option
    for name in metafunc.fixturenames:
        if by_device := getattr(metafunc.module, f"{name.upper()}S", None):
            cases = by_device[option.device]
            metafunc.parametrize(name, cases[:1] if option.quick else cases, ids=str)


@pytest.fixture(scope="session")
def setting(pytestconfig: pytest.Config) -> Setting:
    option = pytestconfig.option
    return Setting(
        device=torch.device(option.device), quick=option.quick, nanogpt=option.nanogpt, lecture=option.lecture,
        data=option.data, seconds=0.2 if option.quick else float(option.benchmark_max_time),
        min_rounds=min(3, option.benchmark_min_rounds) if option.quick else option.benchmark_min_rounds,
        min_time=float(option.benchmark_min_time),
    )  # fmt: skip


@pytest.fixture(scope="session")
def suite(pytestconfig: pytest.Config, setting: Setting) -> Suite:
    path = Path(pytestconfig.option.rows).absolute() if pytestconfig.option.rows else rows.default_path(setting.device)
    pytestconfig.stash[SUITE] = Suite(setting, path)
    return pytestconfig.stash[SUITE]


SUITE = pytest.StashKey[Suite]()


# --- to pytest-benchmark ---------------------------------------------------------------------------------------------


class Replay:
    """A timer for pytest-benchmark under which its next rounds take the times that were measured already."""

    def __init__(self) -> None:
        self.now, self.times, self.running = 0.0, [], False

    def __call__(self) -> float:
        if self.running:
            self.now += self.times.pop(0)
        self.running = not self.running
        return self.now


replay = Replay()


@pytest.fixture
def bench(suite: Suite, benchmark) -> Callable[[Work], None]:
    """Run a comparison and hand every contender's times to pytest-benchmark, one entry each in a group."""

    def run(work: Work) -> None:
        if benchmark.disabled:
            suite.check(work)
            benchmark(lambda: None)
            return
        times = suite.measure(work)
        group = f"{work.op} {work.shape} {work.dtype} {work.direction}"
        entries = {
            name: benchmark if name == OURS else copy.copy(benchmark) for name in times
        }  # a fixture makes but one
        for name, values in times.items():
            entry = entries[name]
            entry.name, entry.group, entry.extra_info = name, group, {}
            entry.fullname += f":{name}"
            replay.times = list(values)
            entry.pedantic(lambda: None, rounds=len(values))

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    suite = config.stash.get(SUITE, None)
    if suite is None:
        return
    say = terminalreporter.write_line
    terminalreporter.section("FastGPT against its best peer")
    for row in suite.rows:
        if row["implementation"] == OURS:
            line = f"{row['op']} {row['shape']}, {row['dtype']}, {row['direction']}: {row['median_ms']:.4g} ms"
            if row["best_peer"]:
                line += (
                    f", {row['best_peer']} takes {row['ratio']:.2f}x ({row['ratio_p20']:.2f} - {row['ratio_p80']:.2f})"
                )
                line += f": {row['verdict']}"
            if row["roofline_fraction"]:
                line += f"; {row['roofline_fraction']:.0%} of the roofline"
            say(line)
    for op, peers in suite.absent.items():
        for name, reason in peers.items():
            say(f"absent from {op}: {name}, {reason}")
    for remark in suite.remarks:
        say(f"NOTE: {remark}")
    if suite.rows:
        say(f"rows: {suite.path}")
