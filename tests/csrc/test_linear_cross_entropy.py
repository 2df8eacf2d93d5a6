"""linear_cross_entropy on the native backend: parity, the registered ops, checkpoints, chunks."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F

from fastgpt import ops
from fastgpt.ops.backend import unavailable
from fastgpt.parity import run_parity

REASON = unavailable("native", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
HALVES_AND_FLOAT = (torch.float32, torch.float16, torch.bfloat16)
module = sys.modules["fastgpt.ops.linear_cross_entropy"]


def test_parity(instructions: str) -> None:
    report = run_parity(names=["linear_cross_entropy"], backends=["native"], dtypes=HALVES_AND_FLOAT)
    assert report.rows and not report.failures and not report.skips, str(report)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_checkpointing(reduction: str, backend: str) -> None:
    torch.manual_seed(0)
    x, head, targets = torch.randn(7, 5, requires_grad=True), torch.randn(9, 5), torch.randint(9, (7,))

    def loss(x: torch.Tensor) -> torch.Tensor:
        return ops.linear_cross_entropy(x, head, targets, reduction=reduction, backend=backend).sum()

    expected = torch.autograd.grad(loss(x), x)[0]
    checkpointed = torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=False)
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(checkpointed, x, retain_graph=True)[0], expected)


@pytest.mark.parametrize("classes,reduction", list(itertools.product([7, 65], [0, 1])))
def test_opcheck(classes: int, reduction: int) -> None:
    targets = torch.randint(classes, (4,))
    loss = torch.zeros(()) if reduction else torch.zeros(4)
    x = torch.randn(4, 3, requires_grad=True)
    head = torch.randn(classes, 3, requires_grad=True)
    name = "mean" if reduction else "none"
    for with_dx, with_dw in itertools.product([False, reduction != 0], repeat=2):
        arguments = (x, head, targets, None, None, -100, name, 0.0, 0.0, 0.0, with_dx, with_dw, False)
        torch.library.opcheck(torch.ops.fastgpt.linear_cross_entropy_native.default, (*arguments, False))
        backward = (torch.ones_like(loss), *(t.detach() for t in (x, head)), *arguments[2:])
        torch.library.opcheck(torch.ops.fastgpt.linear_cross_entropy_native_backward.default, backward)


def test_chunks_give_the_unchunked_result(monkeypatch) -> None:
    x = torch.randn(50, 8, requires_grad=True)
    head = torch.randn(33, 8, requires_grad=True)
    bias = torch.randn(33, requires_grad=True)
    targets = torch.randint(33, (50,))
    targets[7] = -100
    expected = F.cross_entropy(F.linear(x, head, bias), targets)
    for chunk in (1, 7, 50):
        monkeypatch.setattr(module, "chunk_rows", lambda *sizes, chunk=chunk: chunk)
        loss = ops.linear_cross_entropy(x, head, targets, bias=bias, backend="native")
        torch.testing.assert_close(loss, expected)
        ours = torch.autograd.grad(loss * 2, (x, head, bias), retain_graph=True)
        again = torch.autograd.grad(loss * 2, (x, head, bias))
        theirs = torch.autograd.grad(expected * 2, (x, head, bias), retain_graph=True)
        for a, b, c in zip(ours, again, theirs, strict=True):
            torch.testing.assert_close(a, c)
            torch.testing.assert_close(b, c)
