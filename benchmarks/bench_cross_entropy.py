"""cross_entropy of logits that are in memory already; bench_linear_cross_entropy.py has the op that computes them."""

from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.benchmarks.harness.op_work import OpShape, op_benchmark
from fastgpt.benchmarks.harness.peers import Makers, gpu_peer, torch_peers


@dataclass(frozen=True)
class CrossEntropyShape(OpShape):
    """logits (rows, V), targets (rows,)."""

    op = "cross_entropy"

    rows: int
    V: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.V}"

    def arguments(self, draw) -> dict[str, Tensor]:
        return {"logits": draw.normal(self.rows, self.V), "targets": draw.index(self.V, self.rows)}

    def few(self) -> Self:
        return replace(self, rows=64)

    def tiny(self) -> Self:
        return replace(self, rows=4)

    def elements_moved(self, backward: bool) -> tuple[int, int]:
        logits = self.rows * self.V
        return logits, logits if backward else 0  # written: their gradient

    def peers(self, device: torch.device) -> Makers:
        path = "liger_kernel.transformers.functional.liger_cross_entropy"
        liger = gpu_peer(device, "liger-kernel", path, overwrites=True)
        return (
            torch_peers(F.cross_entropy)
            | liger
            | gpu_peer(device, "quack-kernels", "quack.cross_entropy.cross_entropy")
        )


bench_cross_entropy = op_benchmark(
    cpu=[CrossEntropyShape(1024, 50304), CrossEntropyShape(4096, 65)],
    cuda=[CrossEntropyShape(8192, 50304), CrossEntropyShape(8192, 131072), CrossEntropyShape(16384, 65)],
)
