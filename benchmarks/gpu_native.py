"""embedding, cross_entropy and linear_cross_entropy on a GPU: the CUDA extension against PyTorch and Liger-Kernel.

python benchmarks/gpu_native.py [--quick] [--out FILE]        (bench_embedding.py, bench_cross_entropy.py: on a CPU)
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import check, compare, run

from fastgpt import ops
from fastgpt.ops import reference

BF16 = {"device": "cuda", "dtype": torch.bfloat16}


def _step(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[[], Any]:
    """Forward and backward; gradients of everything that has one."""
    leaves = [x for x in inputs if x.requires_grad]
    return lambda: torch.autograd.grad(function(*inputs).sum(), leaves)


def _liger(module: str, name: str) -> Any:
    try:
        return getattr(__import__(f"liger_kernel.ops.{module}", fromlist=[name]), name)
    except ImportError:
        return None


def cross_entropy(n: int, classes: int) -> dict[str, Any]:
    logits = torch.randn(n, classes, **BF16).requires_grad_()
    targets = torch.randint(classes, (n,), device="cuda")
    few = slice(0, 64)
    exact = reference.cross_entropy(logits[few].double(), targets[few])
    ours = ops.cross_entropy(logits[few], targets[few], backend="native")
    check("cross_entropy", ours, F.cross_entropy(logits[few], targets[few]), exact, 8e-3 * float(exact))
    peers: dict[str, Callable[..., torch.Tensor]] = {
        "fastgpt": lambda x, t: ops.cross_entropy(x, t, backend="native"),
        "torch": F.cross_entropy,
        "torch.compile": torch.compile(F.cross_entropy),
    }
    if liger := _liger("cross_entropy", "LigerCrossEntropyFunction"):
        peers["liger"] = lambda x, t: liger.apply(x, t)[0]
    # Liger writes the gradient over its input, so everyone gets logits of his own.
    calls = {name: _step(f, logits.detach().clone().requires_grad_(), targets) for name, f in peers.items()}
    row = {"op": "cross_entropy", "pass": "forward+backward", "dtype": "bfloat16", "shape": (n, classes)}
    return compare(row, calls, 2 * logits.numel() * 2 / 1e6, "gb_per_s")  # one read, one write


def linear_cross_entropy(n: int, width: int, classes: int) -> dict[str, Any]:
    x = torch.randn(n, width, **BF16).requires_grad_()
    head = (torch.randn(classes, width, **BF16) / width**0.5).requires_grad_()
    targets = torch.randint(classes, (n,), device="cuda")

    def unfused(x, head, targets):
        return F.cross_entropy(F.linear(x, head), targets)

    few = slice(0, 64)
    exact = reference.linear_cross_entropy(x[few].double(), head.double(), targets[few])
    ours = ops.linear_cross_entropy(x[few], head, targets[few], backend="native")
    check("linear_cross_entropy", ours, unfused(x[few], head, targets[few]), exact, 8e-3 * float(exact))
    peers: dict[str, Callable[..., torch.Tensor]] = {
        "fastgpt": lambda x, w, t: ops.linear_cross_entropy(x, w, t, backend="native"),
        "torch": unfused,
        "torch.compile": torch.compile(unfused),
    }
    if liger := _liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"):
        peers["liger"] = lambda x, w, t: liger.apply(x, w, t)[0]
    calls = {name: _step(f, x, head, targets) for name, f in peers.items()}
    row = {"op": "linear_cross_entropy", "pass": "forward+backward", "dtype": "bfloat16", "shape": (n, width, classes)}
    made = compare(row, calls, 6 * n * width * classes / 1e9, "tflop_per_s")
    return made | {"peak_bytes": {name: _peak_bytes(call) for name, call in calls.items()}}


def _peak_bytes(call: Callable[[], Any]) -> int:
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def embedding(n: int, width: int, classes: int) -> dict[str, Any]:
    tokens = torch.randint(classes, (n // 1024, 1024), device="cuda")
    table = torch.randn(classes, width, **BF16).requires_grad_()
    positions = torch.randn(1024, width, **BF16).requires_grad_()
    ids = torch.arange(1024, device="cuda")

    def separate(tokens, table, positions):
        return F.embedding(tokens, table) + F.embedding(ids, positions)

    ours = ops.embedding(tokens, table, positions, backend="native")
    exact = reference.embedding(tokens, table.double(), positions.double())
    check("embedding", ours, separate(tokens, table, positions), exact, 8e-3)
    peers: dict[str, Callable[..., torch.Tensor]] = {
        "fastgpt": lambda *a: ops.embedding(*a, backend="native"),
        "torch": separate,
        "torch.compile": torch.compile(separate),
    }
    calls = {name: _step(f, tokens, table, positions) for name, f in peers.items()}
    row = {"op": "embedding", "pass": "forward+backward", "dtype": "bfloat16", "shape": (n, width, classes)}
    # gather and store forward; read the gradient and write the table's backward
    return compare(row, calls, (3 * n + classes) * width * 2 / 1e6, "gb_per_s")


def measure(quick: bool) -> list[dict[str, Any]]:
    rows = [cross_entropy(8192, 50304), linear_cross_entropy(8192, 768, 50304), embedding(16384, 768, 50304)]
    return rows if quick else [*rows, cross_entropy(8192, 131072), embedding(16384, 384, 65)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="the first shapes only")
    arguments = parser.parse_args()
    run(measure, arguments.out, arguments.quick)
