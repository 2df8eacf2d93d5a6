"""The suite as a pytest session: its options, the `run_work` fixture, and what is printed at the end.

The suite runs the rounds itself, because contenders have to take turns. pytest-benchmark is handed the times of each
contender, so that its table, its JSON (--benchmark-json), its storage (--benchmark-save) and comparison
(--benchmark-compare) work on them. Its options say how thoroughly to measure: --benchmark-max-time (seconds for each
contender of a comparison), --benchmark-min-rounds, --benchmark-min-time; with --benchmark-disable everything is checked
and nothing is timed.

A benchmark lists its shapes by kind of device, `@pytest.mark.shapes(cpu=[...], cuda=[...])`, and runs once for each
(argument `shape`); --quick takes the first. --rehearse takes what a GPU would measure, made small, and runs it on the
CPU with a clock that is false, to see before a GPU is rented that everything runs; the rows name no device.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastgpt.benchmarks.command import DEFAULT_ROWS
from fastgpt.benchmarks.harness.suite import OURS, Setting, Suite, Work
from fastgpt.benchmarks.publish.rows import Row
from fastgpt.machine import SOURCE_TREE, device_slug

SUITE = pytest.StashKey[Suite]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastgpt")
    group.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    group.addoption("--rows", metavar="FILE", help="JSON lines; default: runs/bench/<device>.jsonl")
    group.addoption("--publish", action="store_true", help="rows go to benchmarks/results, where they are committed")
    group.addoption("--quick", action="store_true", help="the first shape of each benchmark, few rounds")
    group.addoption("--rehearse", action="store_true", help="a GPU's shapes made small, on the CPU, with a false clock")
    group.addoption("--nanogpt", metavar="DIR", help="a checkout of karpathy/nanoGPT, to compare with")
    group.addoption("--lecture", metavar="FILE", help="gpt.py of karpathy/ng-video-lecture, to compare with")
    group.addoption("--data", metavar="TEXT", default="shakespeare", help="what to train on, as in `fastgpt train`")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.rehearse:
        config.option.device = "cpu"
    if config.option.device == "auto":
        config.option.device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.option.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: this PyTorch finds no CUDA device; `fastgpt doctor` says more")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=replay))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.option
    if marked := metafunc.definition.get_closest_marker("shapes"):
        shapes = marked.kwargs[option.device]
        if option.rehearse:
            shapes = list(dict.fromkeys(shape.tiny() for shape in marked.kwargs["cuda"] if hasattr(shape, "tiny")))
        metafunc.parametrize("shape", shapes[:1] if option.quick else shapes, ids=str)


@pytest.fixture(scope="session")
def setting(pytestconfig: pytest.Config) -> Setting:
    option = pytestconfig.option
    seconds, rounds = float(option.benchmark_max_time), option.benchmark_min_rounds
    if option.rehearse:
        seconds, rounds = 0.0, 1
    elif option.quick:
        seconds, rounds = 0.2, min(3, rounds)
    return Setting(
        device=torch.device(option.device), quick=option.quick, nanogpt=option.nanogpt, lecture=option.lecture,
        data=option.data, seconds=seconds, min_rounds=rounds, min_time=float(option.benchmark_min_time),
        rehearsal=option.rehearse,
    )  # fmt: skip


@pytest.fixture(scope="session")
def suite(pytestconfig: pytest.Config, setting: Setting) -> Suite:
    asked = pytestconfig.option.rows
    default = None if setting.rehearsal else default_rows(setting.device, pytestconfig.option.publish)
    path = Path(asked).absolute() if asked else default
    return pytestconfig.stash.setdefault(SUITE, Suite(setting, path))


def default_rows(device: torch.device, publish: bool) -> Path:
    """runs/bench/<device>.jsonl; with `publish` the same file in benchmarks/results, whose rows are committed.

    Both are in the source tree; of an installed package, they are below the working directory.
    """
    tree = SOURCE_TREE if (SOURCE_TREE / "setup.py").is_file() else Path.cwd()
    return tree / ("benchmarks/results" if publish else DEFAULT_ROWS) / f"{device_slug(device)}.jsonl"


# --- to pytest-benchmark ---------------------------------------------------------------------------------------------


_readings: list[float] = []  # start and end of each round, of what was measured already


def replay() -> float:
    """The timer that pytest-benchmark reads before and after each of its rounds."""
    return _readings.pop(0)


@pytest.fixture
def run_work(suite: Suite, benchmark) -> Callable[[Work], None]:
    """Run a comparison and hand every contender's times to pytest-benchmark, one entry each in a group."""

    def run(work: Work) -> None:
        if benchmark.disabled:
            suite.check_contenders(work)
            benchmark(lambda: None)
            return
        times = suite.measure_contenders(work)
        # A fixture makes one entry; the peers get copies of it, which are made before it is used.
        entries = {name: benchmark if name == OURS else copy.copy(benchmark) for name in times}
        for name, entry in entries.items():
            entry.name, entry.extra_info = name, {}
            entry.group = f"{work.op} {work.shape} {work.dtype} {work.direction}"
            entry.fullname += f":{name}"
            _readings[:] = [reading for seconds in times[name] for reading in (0.0, seconds)]
            entry.pedantic(lambda: None, rounds=len(times[name]))

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if SUITE not in config.stash:
        return
    suite = config.stash[SUITE]
    terminalreporter.section("FastGPT against its best peer")
    told = _rehearsed if suite.setting.rehearsal else _told
    lines = [told(row) for row in suite.rows if row.implementation == OURS]
    for op, peers in suite.absent.items():
        lines += [f"absent from {op}: {name}, {reason}" for name, reason in peers.items()]
    lines += [f"NOTE: {remark}" for remark in suite.remarks]
    lines += [f"rows: {suite.path}"] if suite.rows else []
    for line in lines:
        terminalreporter.write_line(line)


def _rehearsed(row: Row) -> str:
    return f"rehearsed, not measured: {row.op} {row.shape}, {row.direction}"


def _told(row: Row) -> str:
    line = f"{row.op} {row.shape}, {row.dtype}, {row.direction}: {row.median_ms:.4g} ms"
    if row.best_peer:
        line += f", {row.best_peer} takes {row.ratio:.2f}x ({row.ratio_p20:.2f} - {row.ratio_p80:.2f}): {row.verdict}"
    line += f"; {row.roofline_fraction:.0%} of the roofline" if row.roofline_fraction else ""
    return line + (f"; {row.host_share:.0%} of an eager call is the host's" if row.host_share is not None else "")
