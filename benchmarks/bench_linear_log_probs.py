"""linear_log_probs: the log-probability of each target from the head's input, without all of the logits at once."""

from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.benchmarks.harness.ceilings import Product, linear_products
from fastgpt.benchmarks.harness.op_work import OpShape, op_benchmark
from fastgpt.benchmarks.harness.peers import Makers, torch_peers


def _log_softmax(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.log_softmax(F.linear(x, weight), -1).gather(-1, targets[:, None])[:, 0]


def _selective(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Without the (rows, V) log-probabilities: the target's logit minus the logsumexp."""
    logits = F.linear(x, weight)
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


@dataclass(frozen=True)
class LinearLogProbsShape(OpShape):
    """x (rows, C), weight (V, C), targets (rows,)."""

    op = "linear_log_probs"

    rows: int
    C: int
    V: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.C} V{self.V}"

    def arguments(self, draw) -> dict[str, Tensor]:
        x, weight = draw.normal(self.rows, self.C), draw.normal(self.V, self.C) / self.C**0.5
        return {"x": x, "weight": weight, "targets": draw.index(self.V, self.rows)}

    def few(self) -> Self:
        return replace(self, rows=min(self.rows, 200), C=min(self.C, 64))

    def tiny(self) -> Self:
        return replace(self, rows=20, C=16, V=self.V % 1000 + 10)

    def elements_moved(self, backward: bool) -> tuple[int, int]:
        x_and_head = (self.rows + self.V) * self.C
        return x_and_head, x_and_head if backward else 0  # written: their gradients

    def flops(self, backward: bool) -> int:
        return (6 if backward else 2) * self.rows * self.C * self.V

    def products(self, backward: bool) -> list[Product]:
        return linear_products(self.rows, self.C, self.V, backward)

    def peers(self, device: torch.device) -> Makers:
        return torch_peers(_log_softmax) | {"torch logsumexp": torch_peers(_selective)["torch"]}


bench_linear_log_probs = op_benchmark(
    cpu=[LinearLogProbsShape(1024, 512, 50304)],
    cuda=[LinearLogProbsShape(8192, 768, 50304)],
)
