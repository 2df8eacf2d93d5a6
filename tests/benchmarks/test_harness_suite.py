"""The suite: its rows, who is left out and why, and that a wrong result is never timed."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from fastgpt import machine, parity
from fastgpt.benchmarks.bench_attention import AttentionShape
from fastgpt.benchmarks.bench_cross_entropy import CrossEntropyShape
from fastgpt.benchmarks.bench_layer_norm import LayerNormShape
from fastgpt.benchmarks.harness import accuracy, ceilings, measure, models, peers, suite
from fastgpt.benchmarks.publish import rows

CPU = torch.device("cpu")
GIGABYTE = ceilings.Demand(ceilings.Traffic(read=1e9, written=0, footprint=1e9))


def given(bytes_per_s: float) -> ceilings.Ceilings:
    return ceilings.Ceilings("float32", {(way, 2**20): bytes_per_s for way in ceilings.MIXED}, {(1, 1, 1): 1e12})


CEILINGS = given(1e9)


def work(**changes) -> suite.Work:
    calls = {"fastgpt": lambda: None, "torch": lambda: None}
    given = {"op": "thing", "shape": "1", "direction": "forward", "dtype": "float32", "contenders": calls}
    return suite.Work(**{**given, "error_ratio": lambda name: 1.0, **changes})


def test_the_best_ceilings_of_a_run_count_for_all_its_rows(run, monkeypatch):
    found = iter([given(1e9), given(4e9)])
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda *args: next(found))
    monkeypatch.setattr(measure, "interleave", lambda contenders, clock, **options: {"fastgpt": [1.0]})
    for shape in "12":
        run.measure_contenders(work(shape=shape, demand=GIGABYTE, contenders={"fastgpt": lambda: None}))
    assert [row.roofline_fraction for row in rows.read([run.path]).rows] == [0.25, 0.25]
    assert run.ceilings.bandwidth(2**20) == 4e9
    assert {row.ceiling for row in run.rows} == {"reading 1e+03 MB at 4 GB/s"} and not run.remarks


def test_a_row_that_is_faster_than_its_ceiling_has_it_measured_again_or_is_told(run, monkeypatch):
    asked = []
    found = iter([given(1e9), given(4e9), given(1e9), given(4e9)])
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda *args: asked.append(args[2]) or next(found))
    monkeypatch.setattr(measure, "interleave", lambda contenders, clock, **options: {"fastgpt": [0.5]})
    alone = {"fastgpt": lambda: None}
    run.measure_contenders(work(demand=GIGABYTE, contenders=alone))
    assert asked == [None, None] and not run.remarks
    assert [row.roofline_fraction for row in run.rows] == [0.5]
    twice = dataclasses.replace(GIGABYTE, traffic=ceilings.Traffic(3e9, 0, 1e9))
    run.measure_contenders(work(shape="2", demand=twice, contenders=alone))
    (told,) = run.remarks
    assert told.startswith("thing 2, forward: fastgpt is faster than its ceiling (reading 1e+03 MB at 4 GB/s)")
    assert [row.roofline_fraction for row in rows.read([run.path]).rows] == [0.5, 1.5]


def test_rows_say_who_is_faster(run):
    times = {"fastgpt": [1.0, 2.0, 1.0], "A": [2.0, 4.0, 2.0], "B": [0.5, 4.0, 0.5]}
    done = work(demand=dataclasses.replace(GIGABYTE, flops=1e9), tokens=10, backend="native")
    run.ceilings = CEILINGS
    ours, a, b = run.make_rows(done, times, {"fastgpt": 0.5}, {"A": 7}, {})
    assert (ours.implementation, ours.backend, ours.best_peer) == ("fastgpt", "native", "B")
    assert (ours.ratio, ours.verdict) == (0.5, "noise")
    assert (a.ratio, a.ratio_p20, a.verdict, a.best_peer, a.backend) == (2.0, 2.0, "faster", None, None)
    assert (b.ratio, b.ratio_p80) == (0.5, 1.4)
    assert (ours.median_ms, ours.rounds, ours.bytes, ours.flops) == (1000.0, 3, 1e9, 1e9)
    assert ours.extra == {"gb_per_s": 1.0, "tflop_per_s": 0.001, "tokens_per_s": 10.0}
    assert (ours.parity_error_ratio, a.parity_error_ratio, a.peak_bytes) == (0.5, None, 7)


def test_without_peers_there_is_no_ratio(run):
    run.measure_contenders(work(contenders={"fastgpt": lambda: None}))
    (row,) = run.rows
    assert (row.ratio, row.best_peer, row.verdict) == (None, None, None)


def test_every_line_has_every_key_the_facts_of_the_machine_last(run):
    facts, run.ceilings = machine.facts(CPU), CEILINGS
    (row,) = run.make_rows(work(), {"fastgpt": [1.0]}, {}, {}, {})
    assert list(json.loads(row.to_json()))[-len(facts) :] == list(facts)
    keys = {field.name for field in dataclasses.fields(rows.Row)} - {"other_keys", "eager_ms", "graph_ms", "ceiling"}
    assert set(json.loads(row.to_json())) == keys | {"kind"}
    assert list(json.loads(rows.Run(**facts).to_json())) == ["kind", "ops", "ceilings", "absent", *facts]


def test_a_peer_that_fails_or_computes_something_else_is_left_out(run):
    def fails():
        raise RuntimeError("no kernel for this\nand more")

    ratios = {"fastgpt": 1.0, "wrong": 21.0, "rough": 19.0, "unknown": None, "fails": 1.0}
    calls = {name: fails if name == "fails" else lambda: None for name in ratios}
    run.measure_contenders(work(contenders=calls, error_ratio=ratios.get, absent={"elsewhere": "not installed"}))
    assert [row.implementation for row in run.rows] == ["fastgpt", "rough", "unknown"]
    absent = run.absent["thing"]
    assert absent["elsewhere"] == "not installed" and absent["fails, 1, forward"] == "no kernel for this"
    assert "21 times" in absent["wrong, 1, forward"]
    (written,) = rows.read([run.path]).runs
    assert written.absent == run.absent and written.ceilings["bytes_per_s"] == 1e9 and written.ops == ["thing"]


@pytest.mark.parametrize("ratio", [2.01, float("inf"), float("nan")])
def test_a_wrong_result_is_not_timed(run, ratio):
    ran = []
    with pytest.raises(suite.ParityError, match="no time is kept"):
        run.measure_contenders(work(contenders={"fastgpt": lambda: ran.append(1)}, error_ratio=lambda name: ratio))
    assert not ran and not run.rows and not run.path.exists()


def test_peers_that_are_not_here_say_why(tmp_path):
    shape = models.ModelShape(B=1, T=8, L=1, H=1, C=8, V=11)
    _, absent = models.make_models(shape, suite.Setting(CPU, lecture=str(tmp_path / "nothing.py")))
    assert absent["nanoGPT"] == "give a checkout: --nanogpt DIR" and "is not a file" in absent["lecture"]
    for shape, peer in ((CrossEntropyShape(8, 33), "liger-kernel"), (AttentionShape(1, 2, 16, 8), "sdpa cudnn")):
        with pytest.raises(peers.Absent, match="CUDA devices only"):
            shape.peers(CPU)[peer]()
    with pytest.raises(peers.Absent, match="flash-attn is not installed"):
        peers.import_peer("package_that_is_nowhere", "flash-attn")


def test_a_compiled_peer_is_checked_without_compiling():
    def refuse(*tensors):
        raise RuntimeError("compiled for a shape that is not timed")

    setting = suite.Setting(CPU)
    case = parity.ParityCase("layer_norm", "", LayerNormShape(4, 8).arguments, {})
    peer = peers.Peer(refuse, uncompiled=lambda x, weight, bias: torch.layer_norm(x, weight.shape, weight, bias))
    assert accuracy.PeerCheck(case, setting).error_ratio(peer, "forward+backward") <= 1.0
    wrong = peers.Peer(refuse, uncompiled=lambda x, weight, bias: x * weight + bias)
    assert accuracy.PeerCheck(case, setting).error_ratio(wrong, "forward") > suite.MAX_PEER_ERROR_RATIO


def test_whatever_a_peer_raises_it_is_absent(tmp_path, monkeypatch):
    """A package that ends the process, and one of which only an empty folder is left."""
    (tmp_path / "ends.py").write_text("raise SystemExit('no licence')")
    (tmp_path / "flash_attention").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    gpu = torch.device("cuda")
    makers = peers.gpu_peer(gpu, "ends", "ends.function")
    makers |= peers.gpu_peer(gpu, "flash-attn", "flash_attention.flash_attn_func")
    makers["breaks"] = lambda: [][0]
    present, absent = peers.make_present(makers)
    assert not present and absent == {
        "ends": "ends does not load: no licence",
        "flash-attn": "flash-attn has no flash_attn_func in flash_attention",
        "breaks": "cannot be made: list index out of range",
    }
    with pytest.raises(IndexError):
        peers.make_present({"fastgpt": lambda: [][0]})


def test_a_rehearsal_runs_everything_and_its_rows_name_no_device(tmp_path):
    ran = []
    calls = {name: lambda name=name: ran.append(name) for name in ("fastgpt", "torch")}
    setting = suite.Setting(CPU, seconds=0.0, min_rounds=1, rehearsal=True)
    session = suite.Suite(setting, tmp_path / "rows.jsonl")
    session.measure_contenders(work(contenders=calls, one_call=True, demand=GIGABYTE))
    found = rows.read([tmp_path / "rows.jsonl"])
    assert found.machines() == ["rehearsal, not a measurement"] and set(ran) == {"fastgpt", "torch"}
    assert [(row.median_ms, row.eager_ms, row.graph_ms) for row in found.rows] == [(1.0, 1.0, 0.33333)] * 2


def test_on_a_cpu_no_row_has_a_graph(run):
    run.measure_contenders(work(one_call=True))
    assert all("graph_ms" not in json.loads(row.to_json()) for row in run.rows)
