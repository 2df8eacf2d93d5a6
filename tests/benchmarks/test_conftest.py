"""The suite as pytest starts it: its rows, --quick, --benchmark-disable, and a kernel whose result is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt.benchmarks.harness import measure
from fastgpt.benchmarks.publish import rows

CPU = torch.device("cpu")
SMALL = """
import dataclasses
from fastgpt.benchmarks.harness import op_work, peers
@dataclasses.dataclass(frozen=True)
class SmallShape(op_work.OpShape):
    op = "embedding"
    B: int
    def __str__(self):
        return f"B{self.B}"
    def arguments(self, draw):
        return {"tokens": draw.index(11, self.B, 8), "token_table": draw.normal(11, 16)}
    def few(self):
        return self
    def peers(self, device):
        return {"torch": lambda: peers.Peer(lambda tokens, table: table[tokens])}
    def elements_moved(self, backward):
        return 1, 1
bench_small = op_work.op_benchmark(cpu=[SmallShape(4), SmallShape(5)], cuda=[], directions=["forward"])
"""
GIVEN_CEILINGS = """
from fastgpt.benchmarks.harness import ceilings
ceilings.measure_ceilings = lambda *args: ceilings.MADE_UP
"""
WRONG = """
from fastgpt.ops import backend, embedding
def wrong(tokens, token_table, position_table=None, *, position_offset=0):
    return token_table[tokens] * 1.001
for name in ("torch", "native"):
    backend.register("embedding", name, wrong)
"""


def start(folder: Path, *options: str, setup: str = "") -> subprocess.CompletedProcess[str]:
    settings = Path(measure.__file__).parent.parent / "pytest.ini"
    (folder / "conftest.py").write_text(GIVEN_CEILINGS + setup + "\nfrom fastgpt.benchmarks.conftest import *\n")
    (folder / "bench_small.py").write_text(SMALL)
    command = [sys.executable, "-m", "pytest", "-c", str(settings), "--rootdir", str(folder), "--device", "cpu"]
    command += ["--rows", str(folder / "rows.jsonl"), "--benchmark-max-time", "0.01", *options]
    # Seen from the worker of pytest-xdist that runs this test, pytest-benchmark would measure nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command.append(str(folder / "bench_small.py"))
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def test_a_session_writes_rows_and_hands_its_times_to_pytest_benchmark(tmp_path):
    done = start(tmp_path, "--benchmark-json", str(tmp_path / "raw.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows.read([tmp_path / "rows.jsonl"])
    written, (run,) = found.rows, found.runs
    assert [(r.shape, r.implementation) for r in written] == [
        ("B4", "fastgpt"), ("B4", "torch"), ("B5", "fastgpt"), ("B5", "torch"),
    ]  # fmt: skip
    raw = json.loads((tmp_path / "raw.json").read_text(encoding="utf-8"))["benchmarks"]
    assert [b["name"] for b in raw] == ["fastgpt", "torch"] * 2 and len({b["fullname"] for b in raw}) == 4
    for row, entry in zip(written, raw, strict=True):
        assert len(entry["stats"]["data"]) == row.rounds
        assert entry["stats"]["median"] * 1e3 == pytest.approx(row.median_ms, rel=1e-3)
    assert run.ops == ["embedding"] and "torch takes" in done.stdout


def test_quick_takes_the_first_case(tmp_path):
    assert start(tmp_path, "--quick").returncode == 0
    assert {row.shape for row in rows.read([tmp_path / "rows.jsonl"]).rows} == {"B4"}


def test_disabled_it_checks_and_times_nothing(tmp_path):
    done = start(tmp_path, "--benchmark-disable")
    assert done.returncode == 0 and "2 passed" in done.stdout and not (tmp_path / "rows.jsonl").exists()


def test_a_wrong_kernel_fails_the_session_and_leaves_no_row(tmp_path):
    done = start(tmp_path, setup=WRONG)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "ParityError" in done.stdout and "no time is kept" in done.stdout and "2 failed" in done.stdout
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_device_that_is_not_there_is_a_usage_error(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = start(tmp_path, "--device", "cuda")
    assert done.returncode == 4 and "finds no CUDA device" in done.stderr


def test_rows_are_kept_apart_from_the_committed_ones_unless_they_are_to_be_published():
    from fastgpt.benchmarks.conftest import default_rows

    usual, published = (default_rows(CPU, publish) for publish in (False, True))
    assert usual.name == published.name and usual.suffix == ".jsonl"
    assert usual.parent.parts[-2:] == ("runs", "bench") and published.parent.parts[-2:] == ("benchmarks", "results")
