"""layer_norm, and add_layer_norm: the residual add before it, with its dropout, in one pass over memory."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from fastgpt.benchmarks.harness import peers
from fastgpt.benchmarks.harness.suite import op_work


class Case(NamedTuple):
    rows: int
    width: int
    dropout: float = 0.0

    def __str__(self) -> str:
        return f"{self.rows} x {self.width}" + (f", dropout {self.dropout}" if self.dropout else "")


_GPU_SHAPES = [(32768, 768), (16384, 384), (8192, 1024), (4096, 4096), (4096, 16384)]
CASES = {"cpu": [Case(4096, 768)], "cuda": [Case(*shape) for shape in _GPU_SHAPES]}
ADDS = {
    "cpu": [Case(4096, 768, dropout=0.2), Case(4096, 768)],
    "cuda": [Case(32768, 768, dropout=0.2), Case(32768, 768), Case(4096, 4096, dropout=0.2), Case(4096, 4096)],
}
FEW = 256


def arguments(case: Case, draw, with_residual: bool = False):
    made = {name: draw.normal(case.rows, case.width) for name in ("x", "residual")[: 1 + with_residual]}
    return made | {"weight": draw.normal(case.width), "bias": draw.normal(case.width)}


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def bench_layer_norm(bench, setting, case, direction):
    passes = 2 if direction == "forward" else 5  # x, y; and dy, x, dx
    work = op_work(
        setting, "layer_norm", str(case), direction, arguments=lambda draw: arguments(case, draw),
        few=lambda draw: arguments(case._replace(rows=FEW), draw), peers=peers.layer_norm(setting.device),
        n_bytes=passes * case.rows * case.width * setting.dtype.itemsize,
    )  # fmt: skip
    bench(work)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def bench_add_layer_norm(bench, setting, add, direction):
    passes = 4  # x, residual, y, h
    if direction != "forward":
        passes += 5 if add.dropout else 4  # dy, dh, h; and dx, which is the residual's too unless there is dropout
    work = op_work(
        setting, "add_layer_norm", str(add), direction, arguments=lambda draw: arguments(add, draw, True),
        few=lambda draw: arguments(add._replace(rows=FEW), draw, True),
        peers=peers.add_layer_norm(setting.device, add.dropout), options={"dropout_p": add.dropout},
        n_bytes=passes * add.rows * add.width * setting.dtype.itemsize,
    )  # fmt: skip
    bench(work)
