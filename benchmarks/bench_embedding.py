"""Token and position embedding, forward and backward in float32 on the CPU: native against PyTorch.

python benchmarks/bench_embedding.py [seconds per row]
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from interleaved import agree, interleaved, machine, show

from fastgpt import ops


def two_embeddings(tokens, token_table, position_table):
    return F.embedding(tokens, token_table) + position_table


def embedding(batch: int, length: int, classes: int, width: int, zipf: bool, seconds: float) -> None:
    odds = 1.0 / torch.arange(1, classes + 1, dtype=torch.float64) if zipf else torch.ones(classes)
    tokens = torch.multinomial(odds, batch * length, replacement=True).view(batch, length)
    tables = [torch.randn(n, width, requires_grad=True) for n in (classes, length)]
    upstream = torch.randn(batch, length, width)

    def fused(*arguments):
        return ops.embedding(*arguments, backend="native")

    def step(run):
        for table in tables:
            table.grad = None
        run(tokens, *tables).backward(upstream)

    gradients = [torch.autograd.grad(run(tokens, *tables), tables, upstream) for run in (fused, two_embeddings)]
    if not torch.equal(fused(tokens, *tables), two_embeddings(tokens, *tables)):
        sys.exit("forward: parity failed; no timing is reported")
    wide = upstream.double()
    exact = torch.zeros(classes, width, dtype=torch.float64).index_add_(0, tokens.flatten(), wide.flatten(0, 1))
    agree("token gradient", gradients[0][0], gradients[1][0], exact)
    agree("position gradient", gradients[0][1], gradients[1][1], wide.sum(0))
    del gradients, exact, wide

    title = f"embedding V={classes} N={batch * length} C={width}{' Zipf' if zipf else ''}"
    show(title, interleaved({"torch": lambda: step(two_embeddings), "native": lambda: step(fused)}, seconds))


if __name__ == "__main__":
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    torch.manual_seed(0)
    print(machine())
    embedding(64, 256, 65, 384, False, seconds)
    embedding(64, 256, 65, 384, True, seconds)
    embedding(4, 1024, 50304, 768, False, seconds)
    embedding(4, 1024, 50304, 768, True, seconds)
