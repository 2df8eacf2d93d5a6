"""cross_entropy of logits that are in memory already; bench_linear_cross_entropy.py has the op that computes them."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.benchmarks.harness.op_work import OpShape, op_benchmark
from fastgpt.benchmarks.harness.peers import Makers, gpu_peer, torch_peers


def named_options(z_loss: float, softcap: float | None) -> str:
    return (f", z-loss {z_loss:g}" if z_loss else "") + (f", softcap {softcap:g}" if softcap else "")


def given_options(z_loss: float, softcap: float | None) -> dict[str, Any]:
    return ({"z_loss": z_loss} if z_loss else {}) | ({"softcap": softcap} if softcap else {})


def loss_of_steps(logits: Tensor, targets: Tensor, z_loss: float = 0.0, softcap: float | None = None) -> Tensor:
    """The steps that models take where PyTorch's loss does not have an option."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, targets)
    return loss + z_loss * logits.logsumexp(-1).square().mean() if z_loss else loss


@dataclass(frozen=True)
class CrossEntropyShape(OpShape):
    """logits (rows, V), targets (rows,); with the z-loss of PaLM and the soft cap of Gemma 2, or without."""

    op = "cross_entropy"

    rows: int
    V: int
    z_loss: float = 0.0
    softcap: float | None = None

    def __str__(self) -> str:
        return f"{self.rows} x {self.V}{named_options(self.z_loss, self.softcap)}"

    @property
    def options(self) -> dict[str, Any]:
        return given_options(self.z_loss, self.softcap)

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
        if self.options:
            return torch_peers(partial(loss_of_steps, **self.options))
        path = "liger_kernel.transformers.functional.liger_cross_entropy"
        liger = gpu_peer(device, "liger-kernel", path, overwrites=True)
        return (
            torch_peers(F.cross_entropy)
            | liger
            | gpu_peer(device, "quack-kernels", "quack.cross_entropy.cross_entropy")
        )


bench_cross_entropy = op_benchmark(
    cpu=[
        CrossEntropyShape(1024, 50304),
        CrossEntropyShape(4096, 65),
        CrossEntropyShape(1024, 50304, z_loss=1e-4),
        CrossEntropyShape(1024, 50304, softcap=30.0),
    ],
    cuda=[
        CrossEntropyShape(8192, 50304),
        CrossEntropyShape(8192, 131072),
        CrossEntropyShape(16384, 65),
        CrossEntropyShape(8192, 50304, z_loss=1e-4, softcap=30.0),
    ],
)
