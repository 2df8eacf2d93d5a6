"""`make gpu-check`: which benchmarks it runs, and in which order."""

from __future__ import annotations

from fastgpt.benchmarks import command, gpu_check


def test_the_gpu_check_runs_every_benchmark_and_the_ops_first():
    order = gpu_check.benchmarks_in_order()
    assert sorted(order) == command.benchmark_names()
    assert order.index("linear_cross_entropy") < order.index("train_step")
