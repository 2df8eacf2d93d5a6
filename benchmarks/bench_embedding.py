"""Token and position embedding: the gather and its gradient, with tokens as frequent as words are (Zipf), or evenly."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from fastgpt.benchmarks.harness import peers
from fastgpt.benchmarks.harness.suite import op_work


class Case(NamedTuple):
    B: int
    T: int
    V: int
    C: int
    zipf: bool = False

    def __str__(self) -> str:
        return f"B{self.B} T{self.T} V{self.V} C{self.C}{' Zipf' if self.zipf else ''}"


CASES = {
    "cpu": [
        Case(B=4, T=1024, V=50304, C=768, zipf=True),
        Case(B=4, T=1024, V=50304, C=768),
        Case(B=64, T=256, V=65, C=384, zipf=True),
    ],
    "cuda": [
        Case(B=16, T=1024, V=50304, C=768, zipf=True),
        Case(B=16, T=1024, V=50304, C=768),
        Case(B=64, T=256, V=65, C=384, zipf=True),
    ],
}


def arguments(case: Case, draw):
    tokens = draw.index(case.V, case.B, case.T)
    if case.zipf:  # rank r with probability ~ 1 / r, by its inverse: r = V ** u
        u = torch.rand(case.B, case.T, generator=draw.generator, device=draw.generator.device)
        tokens = (case.V**u).long().clamp_max(case.V).sub(1).to(tokens.device)
    return {
        "tokens": tokens,
        "token_table": draw.normal(case.V, case.C),
        "position_table": draw.normal(case.T, case.C),
    }


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def bench_embedding(bench, setting, case, direction):
    tokens, size = case.B * case.T, setting.dtype.itemsize
    moved = 2 * tokens * case.C  # a row is read, a row is written
    if direction != "forward":
        moved += (tokens + case.V) * case.C  # the upstream gradient is read, the table's is written
    work = op_work(
        setting, "embedding", str(case), direction, arguments=lambda draw: arguments(case, draw),
        few=lambda draw: arguments(case._replace(B=2, T=min(case.T, 256), V=min(case.V, 5003)), draw),
        peers=peers.embedding(setting.device), n_bytes=moved * size,
    )  # fmt: skip
    bench(work)
