"""The activation of a feed-forward layer, with and without the bias that is added before it."""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.benchmarks.harness.op_work import OpShape, op_benchmark
from fastgpt.benchmarks.harness.peers import Makers, torch_peers


@dataclass(frozen=True)
class ActivationShape(OpShape):
    """x (rows, width), and where there is one, bias (width,)."""

    op = "activation"

    rows: int
    width: int
    kind: str = "gelu"
    bias: bool = False

    def __str__(self) -> str:
        return f"{self.kind} {self.rows} x {self.width}{', bias' if self.bias else ''}"

    @property
    def options(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def arguments(self, draw) -> dict[str, Tensor]:
        x = {"x": draw.normal(self.rows, self.width)}
        return x | {"bias": draw.normal(self.width)} if self.bias else x

    def few(self) -> Self:
        return replace(self, rows=256)

    def tiny(self) -> Self:
        return replace(self, rows=8)

    def elements_moved(self, backward: bool) -> tuple[int, int]:
        read, written = (3, 2) if backward else (1, 1)  # x; y; and dy, x; dx
        return read * self.rows * self.width, written * self.rows * self.width

    def peers(self, device: torch.device) -> Makers:
        approximate = "tanh" if self.kind == "gelu_tanh" else "none"

        def torchs(x: Tensor, bias: Tensor | None = None) -> Tensor:
            return F.gelu(x if bias is None else x + bias, approximate=approximate)

        return torch_peers(torchs)


bench_activation = op_benchmark(
    cpu=[
        ActivationShape(768, 512),
        ActivationShape(1024, 1536),
        ActivationShape(1024, 1536, bias=True),
        ActivationShape(1024, 3072, kind="gelu_tanh"),
    ],
    cuda=[ActivationShape(8192, 3072), ActivationShape(8192, 3072, kind="gelu_tanh", bias=True)],
)
