"""Attention against PyTorch's three SDPA backends by name, FlexAttention, and itself with dropout; and decoding.

python benchmarks/bench_attention.py [--quick] [--out FILE]
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import check, compare, run
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt import ops
from fastgpt.ops import reference

SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
# (B, H, Hkv, T, D): GPT-2's shape first, then longer, then heads of 128, then the character models
SHAPES = [
    (16, 12, 12, 1024, 64),
    (4, 12, 12, 4096, 64),
    (4, 16, 16, 1024, 128),
    (1, 16, 16, 8192, 128),
    (2, 32, 8, 4096, 128),
    (64, 6, 6, 256, 64),
    (64, 4, 4, 64, 32),
]


def _parity(shape: tuple[int, ...], dropout_p: float) -> None:
    _, H, Hkv, T, D = shape
    T = min(T, 512)
    q, k, v = (torch.randn(1, h, T, D, device="cuda", dtype=torch.bfloat16) for h in (H, Hkv, Hkv))
    options = {"dropout_p": dropout_p, "seed": 7}
    ours = ops.attention(q, k, v, backend="triton", **options)
    # With dropout the torch backend computes in float32: then the peer is the formula in bfloat16.
    peer = reference.attention(q, k, v, **options) if dropout_p else ops.attention(q, k, v, backend="torch")
    check("attention", ours, peer, reference.attention(q.double(), k.double(), v.double(), **options), 8e-3)


def _calls(backward: bool, function: Callable[..., Any], q, k, v) -> Callable[[], Any]:
    if not backward:
        with torch.no_grad():
            function(q, k, v)
        return torch.no_grad()(lambda: function(q, k, v))
    out = function(q, k, v)
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(function(q, k, v), (q, k, v), grad)


def _peers(gqa: bool, dropout_p: float) -> dict[str, Callable[..., Any]]:
    def sdpa(backend):
        def call(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p, enable_gqa=gqa)

        return call

    peers = {"fastgpt": lambda q, k, v: ops.attention(q, k, v, dropout_p=dropout_p, backend="triton")}
    return peers | {name: sdpa(backend) for name, backend in SDPA.items()}


def _flex(T: int, gqa: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, T, T, device="cuda")
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=gqa)


def measure(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for shape in SHAPES[:1] + SHAPES[3:4] + SHAPES[5:6] if quick else SHAPES:
        B, H, Hkv, T, D = shape
        inputs = [
            torch.randn(B, T, h, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
            for h in (H, Hkv, Hkv)
        ]
        for dropout_p in (0.0, 0.2) if T <= 1024 else (0.0,):
            _parity(shape, dropout_p)
            for backward in (False, True):
                peers = _peers(Hkv != H, dropout_p)
                if T * T * B * H > 2**31:  # the math backend would write the scores: tens of gigabytes
                    del peers["sdpa math"]
                if not dropout_p and not backward:
                    peers["flex attention"] = _flex(T, Hkv != H)
                calls = {}
                for name, function in peers.items():
                    try:
                        calls[name] = _calls(backward, function, *inputs)
                    except Exception as error:
                        print(f"{name} skipped: {str(error).splitlines()[0][:120]}")
                flops = 4 * B * H * T * T * D / 2 * (3.5 if backward else 1.0)
                row = {"op": "attention", "pass": "forward+backward" if backward else "forward", "dtype": "bfloat16"}
                row |= {"B,H,Hkv,T,D": shape, "causal": True, "dropout_p": dropout_p}
                rows.append(compare(row, calls, flops / 1e9, "tflop_per_s"))
    return rows + _decoding()


@torch.no_grad()
def _decoding() -> list[dict[str, Any]]:
    rows = []
    for B, H, Hkv, T, D in ((1, 12, 12, 1024, 64), (8, 32, 8, 8192, 128)):
        q = torch.randn(B, H, 1, D, device="cuda", dtype=torch.bfloat16)
        k, v = torch.randn(2, B, Hkv, T, D, device="cuda", dtype=torch.bfloat16)
        exact = reference.attention(q.double(), k.double(), v.double())
        check(
            "decoding", ops.attention(q, k, v, backend="triton"), ops.attention(q, k, v, backend="torch"), exact, 8e-3
        )
        peers = {
            "fastgpt": lambda q=q, k=k, v=v: ops.attention(q, k, v, backend="triton"),
            "sdpa default": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        }
        row = {"op": "attention", "pass": "decode", "dtype": "bfloat16", "B,H,Hkv,T,D": (B, H, Hkv, T, D)}
        rows.append(compare(row, peers, 2 * k.numel() * 2 / 1e6, "gb_per_s"))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="three shapes instead of all")
    arguments = parser.parse_args()
    run(measure, arguments.out, arguments.quick)
