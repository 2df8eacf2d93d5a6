"""layer_norm, and add_layer_norm: the residual add before it, with its dropout, in one pass over memory."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.benchmarks.harness.op_work import OpShape, op_benchmark
from fastgpt.benchmarks.harness.peers import Makers, gpu_peer, torch_peers


@dataclass(frozen=True)
class LayerNormShape(OpShape):
    """x (rows, width), weight (width,), bias (width,)."""

    op = "layer_norm"
    inputs = ("x",)

    rows: int
    width: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.width}"

    def arguments(self, draw) -> dict[str, Tensor]:
        x = {name: draw.normal(self.rows, self.width) for name in self.inputs}
        return x | {name: draw.normal(self.width) for name in ("weight", "bias")}

    def few(self) -> Self:
        return replace(self, rows=256)

    def tiny(self) -> Self:
        return replace(self, rows=8)

    def elements_moved(self, backward: bool) -> tuple[int, int]:
        read, written = (3, 2) if backward else (1, 1)  # x; y; and dy, x; dx
        return read * self.rows * self.width, written * self.rows * self.width

    def peers(self, device: torch.device) -> Makers:
        def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.layer_norm(x, weight.shape, weight, bias)

        def liger(function: Any) -> Callable:
            return lambda x, weight, bias: function.apply(x, weight, bias, 1e-5)

        def quack(function: Callable) -> Callable:
            """Forward alone: QuACK has no autograd function for LayerNorm. Its weights are float32."""
            wide = functools.cache(Tensor.float)  # once for each tensor, because the kernel does not convert them
            return lambda x, weight, bias: function(x, wide(weight), wide(bias), eps=1e-5)

        path = "liger_kernel.ops.layer_norm.LigerLayerNormFunction"
        on_gpus = gpu_peer(device, "liger-kernel", path, liger)
        on_gpus |= gpu_peer(device, "quack-kernels", "quack.rmsnorm.layernorm_fwd", quack)
        return torch_peers(torchs) | on_gpus


@dataclass(frozen=True)
class AddLayerNormShape(LayerNormShape):
    """The same with a residual (rows, width) after x."""

    op = "add_layer_norm"
    inputs = ("x", "residual")

    dropout: float = 0.0

    def __str__(self) -> str:
        return super().__str__() + (f", dropout {self.dropout}" if self.dropout else "")

    @property
    def options(self) -> dict[str, Any]:
        return {"dropout_p": self.dropout}

    def elements_moved(self, backward: bool) -> tuple[int, int]:
        read, written = 2, 2  # x, residual; y, h
        if backward:
            read += 3  # dy, dh, h
            written += 2 if self.dropout else 1  # dx; with dropout the residual's gradient is not dx
        return read * self.rows * self.width, written * self.rows * self.width

    def peers(self, device: torch.device) -> Makers:
        def torchs(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            h = residual + F.dropout(x, self.dropout)
            return F.layer_norm(h, weight.shape, weight, bias), h

        return torch_peers(torchs)


bench_layer_norm = op_benchmark(
    cpu=[LayerNormShape(4096, 768)],
    cuda=[
        LayerNormShape(rows, width)
        for rows, width in [(32768, 768), (16384, 384), (8192, 1024), (4096, 4096), (4096, 16384)]
    ],
)


bench_add_layer_norm = op_benchmark(
    cpu=[AddLayerNormShape(4096, 768, dropout=0.2), AddLayerNormShape(4096, 768)],
    cuda=[AddLayerNormShape(*size, dropout) for size in [(32768, 768), (4096, 4096)] for dropout in (0.2, 0.0)],
)
