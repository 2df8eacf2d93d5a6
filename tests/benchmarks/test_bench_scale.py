"""One and two processes that train: what they hold, compute and exchange is what the plan says."""

from __future__ import annotations

import pytest
import torch

from fastgpt.benchmarks import bench_scale
from fastgpt.benchmarks.bench_scale import ScaleShape, scale_work
from fastgpt.benchmarks.harness.processes import together
from fastgpt.benchmarks.harness.suite import Setting
from fastgpt.plan import FLOAT32

SMALL = {"B": 4, "T": 8, "L": 3, "H": 2, "C": 16, "V": 33}


def test_what_two_sharded_processes_hold_and_exchange_is_what_was_planned():
    shape = ScaleShape(**SMALL, processes=2, parallel="fsdp")
    first, second = together(2, bench_scale.counts, shape)
    assert first == bench_scale.planned_counts(shape.plan)
    assert first.keys() > {"all_gather_forward", "all_gather_backward", "reduce_scatter"}
    odd = 4 * shape.C  # the vocabulary's 33 rows are shared out as 17 and 16
    assert second["weights"] == first["weights"] - odd and second["moments"] == first["moments"] - 2 * odd


def test_in_half_precision_blocks_are_gathered_in_it():
    shape = ScaleShape(**SMALL, processes=2, parallel="fsdp", dtype="bfloat16")
    counted, planned = together(2, bench_scale.counts, shape)[0], bench_scale.planned_counts(shape.plan)
    counted["activations"] -= FLOAT32 * shape.C  # on a CPU the first norm copies its gathered weight to float32
    assert counted == planned


def test_the_benchmark_writes_a_row(run):
    shape = ScaleShape(**SMALL, processes=2, parallel="ddp")
    run.measure_contenders(scale_work(Setting(torch.device("cpu"), seconds=0.0, min_rounds=1, min_time=0.0), shape))
    (row,) = run.rows
    assert row.shape == "2 processes, ddp, B4 T8 L3 H2 C16 V33"
    assert row.extra["counted"] == row.extra["planned"] and "all_reduce" in row.extra["counted"]
    times = row.extra["planned_ms"]
    assert 0 < times["compute"] <= times["overlapped"] <= times["not_overlapped"]


def fail_in_one() -> None:
    if torch.distributed.get_rank() == 1:
        raise ValueError("this one fails")
    torch.distributed.barrier()


def test_an_error_in_one_process_ends_all():
    with pytest.raises(RuntimeError, match=r"(?s)process [01]: .*(this one fails|gloo|closed)"):
        together(2, fail_in_one)
