"""linear_cross_entropy: the head's product and the loss in one op, which never holds all of the logits at once."""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.benchmarks.bench_cross_entropy import given_options, loss_of_steps, named_options
from fastgpt.benchmarks.harness.ceilings import Product, linear_products
from fastgpt.benchmarks.harness.op_work import OpShape, op_benchmark
from fastgpt.benchmarks.harness.peers import Makers, gpu_peer, torch_peers


@dataclass(frozen=True)
class LinearCrossEntropyShape(OpShape):
    """x (rows, C), weight (V, C), targets (rows,)."""

    op = "linear_cross_entropy"

    rows: int
    C: int
    V: int
    z_loss: float = 0.0
    softcap: float | None = None

    def __str__(self) -> str:
        return f"{self.rows} x {self.C} V{self.V}{named_options(self.z_loss, self.softcap)}"

    @property
    def options(self) -> dict[str, Any]:
        return given_options(self.z_loss, self.softcap)

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
        def torchs(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return loss_of_steps(F.linear(x, weight), targets, **self.options)

        if self.options:
            return torch_peers(torchs)
        liger = "liger_kernel.transformers.functional.liger_fused_linear_cross_entropy"
        quack = "quack.linear_cross_entropy.chunked_linear_cross_entropy"
        return torch_peers(torchs) | gpu_peer(device, "liger-kernel", liger) | gpu_peer(device, "quack-kernels", quack)


bench_linear_cross_entropy = op_benchmark(
    cpu=[
        LinearCrossEntropyShape(1024, 512, 50304),
        LinearCrossEntropyShape(1024, 512, 50304, z_loss=1e-4, softcap=30.0),
    ],
    cuda=[LinearCrossEntropyShape(8192, 768, 50304), LinearCrossEntropyShape(4096, 4096, 128256)],
)
