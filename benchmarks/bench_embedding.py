"""Token and position embedding: the gather and its gradient, with tokens as frequent as words are (Zipf), or evenly."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.benchmarks.harness.op_work import OpShape, op_benchmark
from fastgpt.benchmarks.harness.peers import Makers, gpu_peer, torch_peers


@dataclass(frozen=True)
class EmbeddingShape(OpShape):
    """tokens (B, T), token table (V, C), position table (T, C)."""

    op = "embedding"

    B: int
    T: int
    V: int
    C: int
    zipf: bool = False

    def __str__(self) -> str:
        return f"B{self.B} T{self.T} V{self.V} C{self.C}{' Zipf' if self.zipf else ''}"

    def arguments(self, draw) -> dict[str, Tensor]:
        tokens = draw.index(self.V, self.B, self.T)
        if self.zipf:  # rank r with probability ~ 1 / r, by its inverse: r = V ** u
            u = torch.rand(self.B, self.T, generator=draw.generator, device=draw.generator.device)
            tokens = (self.V**u).long().clamp_max(self.V).sub(1).to(tokens.device)
        tables = {"token_table": draw.normal(self.V, self.C), "position_table": draw.normal(self.T, self.C)}
        return {"tokens": tokens, **tables}

    def few(self) -> Self:
        return replace(self, B=2, T=min(self.T, 256), V=min(self.V, 5003))

    def tiny(self) -> Self:
        return replace(self, B=1, T=16, V=503)

    @property
    def different_tokens(self) -> float:
        """How many rows of the table are read, as expected of random tokens."""
        if not self.zipf:
            return self.V * (1 - (1 - 1 / self.V) ** (self.B * self.T))
        shares = (math.log1p(1 / rank) / math.log(self.V) for rank in range(1, self.V))
        return sum(1 - (1 - share) ** (self.B * self.T) for share in shares)

    def elements_moved(self, backward: bool) -> tuple[float, float]:
        tokens = self.B * self.T
        read, written = self.different_tokens + self.T, tokens  # rows of the tables; of the output
        if backward:
            read, written = read + tokens, written + self.V + self.T  # the upstream gradient; those of the tables
        return read * self.C, written * self.C

    def peers(self, device: torch.device) -> Makers:
        def torchs(tokens: Tensor, table: Tensor, positions: Tensor) -> Tensor:
            return F.embedding(tokens, table) + positions

        def liger(function: Any) -> Callable:
            return lambda tokens, table, positions: function.apply(table, tokens) + positions

        path = "liger_kernel.ops.experimental.embedding.LigerEmbeddingFunction"
        return torch_peers(torchs) | gpu_peer(device, "liger-kernel", path, liger)


def _shapes(B: int) -> list[EmbeddingShape]:
    """GPT-2's tables with B sequences, then the character model's."""
    gpt2 = EmbeddingShape(B=B, T=1024, V=50304, C=768)
    return [replace(gpt2, zipf=True), gpt2, EmbeddingShape(B=64, T=256, V=65, C=384, zipf=True)]


bench_embedding = op_benchmark(cpu=_shapes(B=4), cuda=_shapes(B=16))
