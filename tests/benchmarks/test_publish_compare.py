"""Two runs compared: a change is real beyond the threshold and both spreads, and a slowdown fails."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmark_rows import cells_of, row, write
from fastgpt import ops
from fastgpt.benchmarks.bench_layer_norm import LayerNormShape
from fastgpt.benchmarks.harness import ceilings, measure, peers
from fastgpt.benchmarks.harness.op_work import op_work
from fastgpt.benchmarks.harness.suite import Setting, Suite
from fastgpt.benchmarks.publish import compare, rows
from fastgpt.benchmarks.publish.rows import Spread

ROOT = Path(__file__).resolve().parents[2]


def comparison(tmp_path: Path, base: list[dict], head: list[dict]) -> compare.RunComparison:
    paths = write(tmp_path / "base.jsonl", *base), write(tmp_path / "head.jsonl", *head)
    return compare.compare_runs(*(rows.read([path]) for path in paths))


def command(*arguments: object) -> int:
    return compare.main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("head", "verdict"),
    [
        (Spread(1.3, 1.2, 1.4), "slower"),
        (Spread(0.7, 0.6, 0.8), "faster"),
        (Spread(1.0, 0.9, 1.1), "same"),
        (Spread(1.08, 1.07, 1.09), "same"),  # beyond both spreads, below the threshold
        (Spread(1.3, 0.95, 1.5), "same"),  # its own rounds reach down to what the other's took
        (Spread(0.8, 0.7, 1.02), "same"),
    ],
)
def test_a_change_must_be_beyond_the_threshold_and_both_spreads(head, verdict):
    assert compare.judge(Spread(1.0, 0.95, 1.05), head, 0.1) == verdict


def test_a_median_within_the_other_runs_spread_is_no_change():
    assert compare.judge(Spread(1.0, 0.9, 1.4), Spread(1.3, 1.28, 1.32), 0.1) == "same"


def test_what_counts_is_the_ratio_to_the_same_peers(tmp_path):
    """A machine that is half as fast today is no slowdown; a call that lost to its peers is one, on any machine."""
    base = [row(), row("torch", 20.0, 2.0), row("torch.compile", 15.0, 1.5)]
    slower_machine = [row(median_ms=20.0), row("torch", 40.0, 2.0), row("torch.compile", 30.0, 1.5)]
    (change,) = comparison(tmp_path, base, slower_machine).changes
    assert change.verdict == "same" and change.factor == pytest.approx(1.0)
    assert change.measured == "against torch, torch.compile"
    slower_call = [row(median_ms=9.0), row("torch", 12.0, 1.333), row("torch.compile", 9.0, 1.0)]
    (change,) = comparison(tmp_path, base, slower_call).changes
    assert change.verdict == "slower" and change.factor == pytest.approx(1.5, rel=1e-3)


def test_more_than_half_of_the_peers_must_agree(tmp_path):
    base = [row(), row("torch", 20.0, 2.0), row("torch.compile", 20.0, 2.0)]
    head = [row(), row("torch", 20.0, 2.0), row("torch.compile", 13.0, 1.3)]  # the peer became faster
    assert comparison(tmp_path, base, head).changes[0].verdict == "same"


def test_without_the_same_peers_it_is_the_time(tmp_path):
    base, head = [row(), row("torch", 20.0, 2.0)], [row(median_ms=20.0), row("liger-kernel", 40.0, 2.0)]
    (change,) = comparison(tmp_path, base, head).changes
    assert (change.verdict, change.measured, change.factor) == ("slower", "by time", 2.0)
    other_torch = [row(torch="2.14.0"), row("torch", 10.0, 1.0, torch="2.14.0")]  # another PyTorch is another peer
    (change,) = comparison(tmp_path, base, other_torch).changes
    assert (change.verdict, change.measured) == ("same", "by time")


def test_one_round_decides_nothing(tmp_path):
    once = {"rounds": 1, "p20_ms": None, "p80_ms": None}
    (change,) = comparison(tmp_path, [row(**once)], [row(median_ms=30.0, **once)]).changes
    assert (change.verdict, change.factor) == ("undecided", 3.0)


def test_missing_and_new_cases_and_other_machines_are_listed(tmp_path):
    base = [row(), row(shape="gone"), row(device="An older CPU"), row("torch", shape="a peer alone")]
    found = comparison(tmp_path, base, [row(), row(op="attention")])
    assert [case[2] for case in found.missing] == ["gone"] and [case[1] for case in found.new] == ["attention"]
    assert found.other_machines == ["An older CPU, AVX2, 2 threads"] and not found.slower
    text = compare.summary(found, 0.1)
    for said in (
        "missing in HEAD:\n- embedding / gone / float32 / forward",
        "not in BASE:\n- attention",
        "An older CPU",
    ):
        assert said in text


def test_exit_codes_and_the_table(tmp_path, capsys):
    base = write(tmp_path / "base" / "cpu.jsonl", row(), row("torch", 20.0, 2.0), row(shape="a|b"))
    slow = write(tmp_path / "slow" / "cpu.jsonl", row(median_ms=15.0), row("torch", 20.0, 1.333), row(shape="a|b"))
    assert command(base, base) == 0
    assert command(base.parent, slow.parent, "--out", tmp_path / "table.md") == 1
    text = capsys.readouterr().out
    assert text.endswith((tmp_path / "table.md").read_text(encoding="utf-8"))
    table = [line for line in text.splitlines() if line.startswith("|")][-4:]
    assert len(set(map(len, table))) == 1, "straight columns"
    work = ["embedding", "B4 T64", "float32", "forward"]
    assert cells_of(table[2]) == [[*work, "10", "15", "+50.0 %", "slower", "against torch"]]
    assert "a\\|b" in table[3] and "1 slower, 1 same (beyond 10 % and both spreads)" in text
    assert command(base, slow, "--threshold", "0.6") == 0


def test_bad_usage_is_2(tmp_path, capsys):
    good = write(tmp_path / "good.jsonl", row())
    gpu = write(tmp_path / "gpu.jsonl", row(device="A GPU", cuda="13.0"))
    other = write(tmp_path / "other.jsonl", row(op="attention"))
    (tmp_path / "bad.jsonl").write_text("not json\n")
    for arguments, message in (
        ((good, tmp_path / "none.jsonl"), "none.jsonl: no such file"),
        ((tmp_path / "bad.jsonl", good), "bad.jsonl, line 1: "),
        ((good, gpu), "nothing to compare: BASE measured A CPU, AVX2, 2 threads, HEAD A GPU"),
        ((good, other), "nothing to compare: the same device but no case in common"),
        ((good, good, "--out", tmp_path), "Is a directory"),
    ):
        assert command(*arguments) == 2
        assert message in capsys.readouterr().err
        assert command(*arguments, "--if-comparable") == (0 if "nothing to compare" in message else 2)
    for arguments in ((good,), (good, good, "--threshold", "nan"), (good, good, "--threshold", "-1")):
        with pytest.raises(SystemExit) as stopped:
            command(*arguments)
        assert stopped.value.code == 2


def test_it_runs_as_a_script_and_as_a_module(tmp_path):
    good = str(write(tmp_path / "good.jsonl", row()))
    for how in ([str(ROOT / "benchmarks" / "publish" / "compare.py")], ["-m", "fastgpt.benchmarks.publish.compare"]):
        done = subprocess.run([sys.executable, *how, good, good], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and "1 same" in done.stdout, done.stderr


class Machine:
    """A clock on which a call takes the seconds given for it; the machine is up to three times slower by turns."""

    def __init__(self, seed: int) -> None:
        self.now, self.slowness, self.draw = 0.0, 1.0, random.Random(seed)

    def taking(self, seconds: float, call: Callable) -> Callable:
        def timed(*tensors, **options):
            self.now += seconds * self.slowness * self.draw.uniform(0.97, 1.03)
            return call(*tensors, **options)

        return timed

    def __call__(self, calls, iterations):
        times, self.slowness = [], self.draw.uniform(1.0, 3.0)
        for call in calls:
            start = self.now
            call()
            times.append(self.now - start)
        return times


def measured(path: Path, monkeypatch, *, seed: int, ours: float) -> Path:
    """Rows of a small comparison by the suite, in which torch takes 2 seconds and our layer norm as many as given."""

    machine = Machine(seed)

    class Shape(LayerNormShape):
        def peers(self, device):
            function = super().peers(device)["torch"]().function
            return {"torch": lambda: peers.Peer(machine.taking(2.0, function))}

    setting = Setting(torch.device("cpu"), seconds=0.0, min_rounds=15, min_time=0.0)
    session = Suite(setting, path)
    with monkeypatch.context() as patch:
        patch.setattr(measure, "clock_of", lambda device: machine)
        patch.setattr(ceilings, "measure_ceilings", lambda *args: ceilings.MADE_UP)
        patch.setattr(ops, "layer_norm", machine.taking(ours, ops.layer_norm))
        session.measure_contenders(op_work(setting, Shape(4, 8), "forward"))
    return path


def test_a_slow_kernel_is_caught_and_two_honest_runs_are_not(tmp_path, monkeypatch, capsys):
    base = measured(tmp_path / "base.jsonl", monkeypatch, seed=0, ours=1.0)
    again = measured(tmp_path / "again.jsonl", monkeypatch, seed=1, ours=1.0)
    slower = measured(tmp_path / "slower.jsonl", monkeypatch, seed=2, ours=1.3)
    assert command(base, again) == 0, capsys.readouterr().out
    assert command(base, slower) == 1
    assert re.search(r"layer_norm .* slower .* against torch ", capsys.readouterr().out)
