"""linear, an internal op: x W^T + b of a model's linear layers, by the extension's product or by the matrix library."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.benchmarks.harness.ceilings import Product, linear_products
from fastgpt.benchmarks.harness.op_work import OpShape, op_benchmark
from fastgpt.benchmarks.harness.peers import Makers, torch_peers
from fastgpt.ops.backend import Explanation
from fastgpt.ops.linear import linear, linear_choice


@dataclass(frozen=True)
class LinearShape(OpShape):
    """x (rows, K), weight (N, K), and where there is one, bias (N,)."""

    op = "linear"

    rows: int
    K: int
    N: int
    bias: bool = False

    def __str__(self) -> str:
        return f"{self.rows} x {self.K} x {self.N}{', bias' if self.bias else ''}"

    @property
    def function(self) -> Callable[..., Any]:
        return linear

    def explain(self, *arguments: Tensor) -> Explanation:
        is_ours, reason = linear_choice("matmul")
        return Explanation(self.op, "native", {}) if is_ours else Explanation(self.op, "torch", {"native": reason})

    def arguments(self, draw) -> dict[str, Tensor]:
        made = {"x": draw.normal(self.rows, self.K), "weight": draw.normal(self.N, self.K) / self.K**0.5}
        return made | {"bias": draw.normal(self.N)} if self.bias else made

    def few(self) -> Self:
        return replace(self, rows=min(self.rows, 256))

    def tiny(self) -> Self:
        return replace(self, rows=20, K=self.K % 100 + 16, N=self.N % 100 + 10)

    def elements_moved(self, backward: bool) -> tuple[int, int]:
        x, weight, y = self.rows * self.K, self.N * self.K, self.rows * self.N
        return (
            (2 * (x + weight) + y, y + x + weight) if backward else (x + weight, y)
        )  # and y's gradient; those of both

    def flops(self, backward: bool) -> int:
        return (6 if backward else 2) * self.rows * self.K * self.N

    def products(self, backward: bool) -> list[Product]:
        return linear_products(self.rows, self.K, self.N, backward)

    def peers(self, device: torch.device) -> Makers:
        def torchs(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return F.linear(x, weight, bias)

        return torch_peers(torchs)


bench_linear = op_benchmark(
    cpu=[
        LinearShape(768, 128, 512),
        LinearShape(1024, 384, 1536),
        LinearShape(1024, 384, 1536, bias=True),
        LinearShape(512, 512, 2048),
    ],
    cuda=[],  # `linear` is PyTorch's there
)
