"""Causal attention against PyTorch's kernels by name, FlexAttention and flash-attn; decoding, one query at a time.

PyTorch's attention is called by the name of its kernel, because "SDPA" alone may be any of four.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt.benchmarks.harness.op_work import OpShape, op_benchmark
from fastgpt.benchmarks.harness.peers import Absent, Makers, Peer, gpu_peer, import_peer, only_on_gpus


@dataclass(frozen=True)
class AttentionShape(OpShape):
    """q (B, H, T, D), or (B, H, 1, D) where there is one query; k and v (B, Hkv, T, D)."""

    op = "attention"

    B: int
    H: int
    T: int
    D: int
    Hkv: int = 0  # 0: as many as there are query heads
    dropout: float = 0.0
    one_query: bool = False

    def __str__(self) -> str:
        heads = f"H{self.H}/{self.Hkv}" if self.Hkv else f"H{self.H}"
        dropout = f", dropout {self.dropout}" if self.dropout else ""
        return f"B{self.B} {heads} T{self.T} D{self.D} {'one query' if self.one_query else 'causal'}{dropout}"

    @property
    def options(self) -> dict[str, Any]:
        return {"is_causal": True, "dropout_p": self.dropout}

    @property
    def heads_and_tokens(self) -> dict[str, tuple[int, int]]:
        kv = (self.Hkv or self.H, self.T)
        return {"q": (self.H, 1 if self.one_query else self.T), "k": kv, "v": kv}

    def arguments(self, draw) -> dict[str, Tensor]:
        """As the model has them: the heads side by side in memory, (B, T, H, D)."""
        sizes = self.heads_and_tokens.items()
        return {name: draw.normal(self.B, T, H, self.D).transpose(1, 2) for name, (H, T) in sizes}

    def few(self) -> Self:
        return replace(self, B=1, T=min(self.T, 384))

    def tiny(self) -> Self:
        return replace(self, B=1, H=4, Hkv=2 if self.Hkv else 0, T=min(self.T, 40))

    def elements_moved(self, backward: bool) -> tuple[int, int]:
        q, k, v = (self.B * H * T * self.D for H, T in self.heads_and_tokens.values())
        read, written = q + k + v, q  # written: out
        if backward:
            read, written = read + 3 * q + k + v, written + q + k + v  # q, out, dout, k, v; dq, dk, dv
        return read, written

    def flops(self, backward: bool) -> float:
        pairs = self.B * self.H * (self.T if self.one_query else self.T**2 / 2)
        return 4 * pairs * self.D * (3.5 if backward else 1.0)

    def peers(self, device: torch.device) -> Makers:
        flash_2 = partial(self._heads_last, dropout_p=self.dropout)
        return {
            "sdpa flash": partial(self._sdpa, device, SDPBackend.FLASH_ATTENTION),
            "sdpa cudnn": partial(self._sdpa, device, SDPBackend.CUDNN_ATTENTION),
            "sdpa efficient": partial(self._sdpa, device, SDPBackend.EFFICIENT_ATTENTION),
            "sdpa math": partial(self._sdpa, device, SDPBackend.MATH),
            "flex attention": self._flex,
            **gpu_peer(device, "flash-attn", "flash_attn.flash_attn_func", flash_2),
            **gpu_peer(device, "flash-attn 3", "flash_attn_interface.flash_attn_func", self._flash_attn_3),
        }

    @property
    def peers_are_causal(self) -> bool:
        """One query sees every key, and the peers disagree on what causal means there: they get no mask."""
        return not self.one_query

    def _sdpa(self, device: torch.device, backend: SDPBackend) -> Peer:
        if backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            only_on_gpus(device)
        options = {"is_causal": self.peers_are_causal, "dropout_p": self.dropout, "enable_gqa": bool(self.Hkv)}

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, **options)

        return Peer(call)

    def _flex(self) -> Peer:
        if self.dropout:
            raise Absent("FlexAttention has no dropout")
        module = import_peer("torch.nn.attention.flex_attention", "torch")
        compiled = torch.compile(module.flex_attention, dynamic=False)
        masks: dict[tuple[int, int], Any] = {}

        def call(function: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            size = (q.shape[2], k.shape[2])
            if self.peers_are_causal and size not in masks:
                masks[size] = module.create_block_mask(lambda b, h, i, j: j <= i, None, None, *size, device=q.device)
            return function(q, k, v, block_mask=masks.get(size), enable_gqa=bool(self.Hkv))

        return Peer(partial(call, compiled), uncompiled=partial(call, module.flex_attention))

    def _flash_attn_3(self, function: Callable) -> Callable:
        if self.dropout:
            raise Absent("FlashAttention-3 has no dropout")
        return self._heads_last(function)

    def _heads_last(self, function: Callable, **options: float) -> Callable:
        """For a function of tensors (B, T, H, D)."""

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = function(*(t.transpose(1, 2) for t in (q, k, v)), causal=self.peers_are_causal, **options)
            out = out[0] if isinstance(out, tuple) else out  # some versions return the logsumexp too
            return out.transpose(1, 2)

        return call


bench_attention = op_benchmark(
    cpu=[
        AttentionShape(B=8, H=6, T=256, D=64),
        AttentionShape(B=8, H=6, T=256, D=64, dropout=0.2),
        AttentionShape(B=12, H=4, T=64, D=32),
    ],
    cuda=[
        AttentionShape(B=16, H=12, T=1024, D=64),
        AttentionShape(B=1, H=16, T=8192, D=128),
        AttentionShape(B=64, H=6, T=256, D=64, dropout=0.2),
        AttentionShape(B=4, H=12, T=4096, D=64),
        AttentionShape(B=4, H=16, T=1024, D=128),
        AttentionShape(B=2, H=32, Hkv=8, T=4096, D=128),
        AttentionShape(B=16, H=12, T=1024, D=64, dropout=0.2),
        AttentionShape(B=64, H=4, T=64, D=32),
    ],
)


bench_decoding = op_benchmark(
    cpu=[AttentionShape(B=1, H=12, T=1024, D=64, one_query=True)],
    cuda=[
        AttentionShape(B=1, H=12, T=1024, D=64, one_query=True),
        AttentionShape(B=8, H=32, Hkv=8, T=8192, D=128, one_query=True),
    ],
    directions=["forward"],
)
