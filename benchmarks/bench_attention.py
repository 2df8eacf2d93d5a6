"""Causal attention against PyTorch's kernels by name, FlexAttention and flash-attn; decoding, one query at a time."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from fastgpt.benchmarks.harness import peers
from fastgpt.benchmarks.harness.suite import op_work


class Case(NamedTuple):
    B: int
    H: int
    T: int  # keys
    D: int
    Hkv: int = 0  # 0: as many as there are query heads
    dropout: float = 0.0
    one_query: bool = False

    def __str__(self) -> str:
        heads = f"H{self.H}/{self.Hkv}" if self.Hkv else f"H{self.H}"
        dropout = f", dropout {self.dropout}" if self.dropout else ""
        return f"B{self.B} {heads} T{self.T} D{self.D} {'one query' if self.one_query else 'causal'}{dropout}"


CASES = {
    "cpu": [
        Case(B=8, H=6, T=256, D=64),
        Case(B=8, H=6, T=256, D=64, dropout=0.2),
        Case(B=12, H=4, T=64, D=32),
    ],
    "cuda": [
        Case(B=16, H=12, T=1024, D=64),
        Case(B=1, H=16, T=8192, D=128),
        Case(B=64, H=6, T=256, D=64, dropout=0.2),
        Case(B=4, H=12, T=4096, D=64),
        Case(B=4, H=16, T=1024, D=128),
        Case(B=2, H=32, Hkv=8, T=4096, D=128),
        Case(B=16, H=12, T=1024, D=64, dropout=0.2),
        Case(B=64, H=4, T=64, D=32),
    ],
}
DECODINGS = {
    "cpu": [Case(B=1, H=12, T=1024, D=64, one_query=True)],
    "cuda": [Case(B=1, H=12, T=1024, D=64, one_query=True), Case(B=8, H=32, Hkv=8, T=8192, D=128, one_query=True)],
}


def arguments(case: Case, draw):
    """(B, H, T, D) as the model has it: heads side by side in memory, (B, T, H, D)."""
    queries = 1 if case.one_query else case.T
    shapes = {"q": (queries, case.H), "k": (case.T, case.Hkv or case.H), "v": (case.T, case.Hkv or case.H)}
    return {name: draw.normal(case.B, T, H, case.D).transpose(1, 2) for name, (T, H) in shapes.items()}


def work(setting, case: Case, direction: str):
    queries, kv_heads = 1 if case.one_query else case.T, case.Hkv or case.H
    pairs = case.B * case.H * (case.T if case.one_query else case.T**2 / 2)
    forward = case.B * case.D * (2 * queries * case.H + 2 * case.T * kv_heads)  # q, out; k, v
    backward = case.B * case.D * (4 * queries * case.H + 4 * case.T * kv_heads)  # q, out, dout, dq; k, v, dk, dv
    both = direction != "forward"
    return op_work(
        setting, "attention", str(case), direction, arguments=lambda draw: arguments(case, draw),
        few=lambda draw: arguments(case._replace(B=1, T=min(case.T, 384)), draw),
        peers=peers.attention(setting.device, not case.one_query, case.dropout, bool(case.Hkv)),
        options={"is_causal": True, "dropout_p": case.dropout},
        n_bytes=(forward + (backward if both else 0)) * setting.dtype.itemsize,
        flops=4 * pairs * case.D * (3.5 if both else 1.0),
    )  # fmt: skip


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def bench_attention(bench, setting, case, direction):
    bench(work(setting, case, direction))


def bench_decoding(bench, setting, decoding):
    bench(work(setting, decoding, "forward"))
