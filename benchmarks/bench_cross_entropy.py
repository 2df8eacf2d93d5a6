"""cross_entropy of logits that are there, and linear_cross_entropy, which never has all of them at once."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from fastgpt.benchmarks.harness import peers
from fastgpt.benchmarks.harness.suite import op_work


class Case(NamedTuple):
    rows: int
    V: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.V}"


class Linear(NamedTuple):
    rows: int
    C: int
    V: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.C} V{self.V}"


CASES = {
    "cpu": [Case(1024, 50304), Case(4096, 65)],
    "cuda": [Case(8192, 50304), Case(8192, 131072), Case(16384, 65)],
}
LINEARS = {
    "cpu": [Linear(1024, 512, 50304)],
    "cuda": [Linear(8192, 768, 50304), Linear(4096, 4096, 128256)],
}


def logits_and_targets(case: Case, draw):
    return {"logits": draw.normal(case.rows, case.V), "targets": draw.index(case.V, case.rows)}


def head_and_targets(case: Linear, draw):
    return {
        "x": draw.normal(case.rows, case.C),
        "weight": draw.normal(case.V, case.C) / case.C**0.5,
        "targets": draw.index(case.V, case.rows),
    }


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def bench_cross_entropy(bench, setting, case, direction):
    passes = 1 if direction == "forward" else 2  # the logits once; their gradient once
    work = op_work(
        setting, "cross_entropy", str(case), direction, arguments=lambda draw: logits_and_targets(case, draw),
        few=lambda draw: logits_and_targets(case._replace(rows=64), draw), peers=peers.cross_entropy(setting.device),
        n_bytes=passes * case.rows * case.V * setting.dtype.itemsize,
    )  # fmt: skip
    bench(work)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def bench_linear_cross_entropy(bench, setting, linear, direction):
    passes = 1 if direction == "forward" else 2  # x and the head; their gradients
    work = op_work(
        setting, "linear_cross_entropy", str(linear), direction, arguments=lambda draw: head_and_targets(linear, draw),
        few=lambda draw: head_and_targets(linear._replace(rows=min(linear.rows, 200), C=min(linear.C, 64)), draw),
        peers=peers.linear_cross_entropy(setting.device),
        n_bytes=passes * (linear.rows + linear.V) * linear.C * setting.dtype.itemsize,
        flops=(2 if direction == "forward" else 6) * linear.rows * linear.C * linear.V,
    )  # fmt: skip
    bench(work)
