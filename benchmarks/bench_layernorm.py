"""layer_norm and add_layer_norm against PyTorch's kernels, torch.compile, and Liger-Kernel where it is installed.

python benchmarks/bench_layernorm.py [--quick] [--out FILE]
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from harness import check, compare, run

from fastgpt import ops
from fastgpt.ops import reference

SHAPES = [(32768, 768), (16384, 384), (8192, 1024), (4096, 4096), (4096, 16384)]  # (rows, width)


def _separate(x, residual, weight, bias, dropout_p=0.0):
    h = residual + F.dropout(x, dropout_p)
    return F.layer_norm(h, weight.shape, weight, bias), h


def _layer_norm(x, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias)


def _peers() -> dict[str, Callable[..., Any]]:
    peers = {
        "fastgpt": lambda x, w, b: ops.layer_norm(x, w, b, backend="triton"),
        "torch": _layer_norm,
        "torch.compile": torch.compile(_layer_norm),
    }
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    except ImportError:
        return peers
    return peers | {"liger": lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, 1e-5)}


def _calls(peers: dict[str, Callable[..., Any]], inputs: list[torch.Tensor], backward: bool) -> dict[str, Any]:
    """Forward alone, or backward alone through a graph that is kept."""
    if not backward:
        return {name: torch.no_grad()(lambda f=f: f(*inputs)) for name, f in peers.items()}
    calls = {}
    for name, function in peers.items():
        out = function(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        grads = [torch.randn_like(y) for y in out]
        calls[name] = lambda out=out, grads=grads: torch.autograd.grad(out, inputs, grads, retain_graph=True)
    return calls


def measure(quick: bool) -> list[dict[str, Any]]:
    torch._functorch.config.donated_buffer = False  # the graphs are kept, to time backward alone
    rows = []
    for shape in SHAPES[:1] if quick else SHAPES:
        n_rows, width = shape
        x, residual = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
        weight, bias = (torch.randn(width, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
        few = slice(0, 256)
        ours, torchs = (ops.layer_norm(x[few], weight, bias, backend=name) for name in ("triton", "torch"))
        exact = reference.layer_norm(x[few].double(), weight.double(), bias.double())
        check("layer_norm", ours, torchs, exact, 8e-3)
        base = {"dtype": "bfloat16", "rows,width": shape}
        size = n_rows * width * 2
        for backward in (False, True):
            row = {"op": "layer_norm", "pass": "backward" if backward else "forward", **base}
            calls = _calls(_peers(), [x, weight, bias], backward)
            rows.append(compare(row, calls, (3 if backward else 2) * size / 1e6, "gb_per_s"))
        for dropout_p in (0.0, 0.2):
            peers = {
                "fastgpt": lambda x, r, w, b, p=dropout_p: ops.add_layer_norm(
                    x, r, w, b, dropout_p=p, backend="triton"
                ),
                "torch, separate ops": partial(_separate, dropout_p=dropout_p),
                "torch.compile": torch.compile(partial(_separate, dropout_p=dropout_p)),
            }
            for backward in (False, True):
                row = {"op": "add_layer_norm", "pass": "backward" if backward else "forward", **base}
                calls = _calls(peers, [x, residual, weight, bias], backward)
                moved = (4 if not backward else 5 if dropout_p else 4) * size
                rows.append(compare(row | {"dropout_p": dropout_p}, calls, moved / 1e6, "gb_per_s"))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="one shape instead of all")
    arguments = parser.parse_args()
    run(measure, arguments.out, arguments.quick)
