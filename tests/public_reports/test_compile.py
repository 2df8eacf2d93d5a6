"""What users of neighbouring projects reported about `torch.compile` (see test_citations.py)."""

from __future__ import annotations

import pytest
import torch

from fastgpt import ops
from helpers import NATIVE, close, integers, on_native, outcome, random, tiny


@on_native
def test_compile_the_fused_loss_and_its_gradients(name):
    """pytorch/pytorch#141639, pytorch/pytorch#180642: compiled chunked cross-entropy gave wrong gradients."""
    x, head, targets = random(40, 8), random(30, 8, seed=1), integers(30, 40)
    targets[::7] = -100

    def loss(x, head):
        return 2.0 * ops.linear_cross_entropy(x, head, targets, backend=name)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, gradients = outcome(compiled, (x, head))
    want, expected = outcome(loss, (x, head))
    close(got, want, rtol=1e-6, atol=1e-6)
    for gradient, exact in zip(gradients, expected, strict=True):
        close(gradient, exact, rtol=1e-6, atol=1e-6)


def test_compile_one_graph_for_all_batch_sizes():
    """pytorch/pytorch#172822: layer norm's backward was specialised on the batch, and compiled for each anew."""
    weight, bias, head = (t.requires_grad_() for t in (random(8), random(8, seed=1), random(6, 8, seed=2)))

    def step(x, targets):
        normed, x = ops.add_layer_norm(x, x, weight, bias)
        return ops.linear_cross_entropy(normed + x, head, targets)

    compiled = torch.compile(step, dynamic=True, fullgraph=True, backend="aot_eager")
    compiled(random(3, 8), integers(6, 3)).backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (5, 8, 13):
            compiled(random(rows, 8), integers(6, rows)).backward()


@on_native
def test_compile_keeps_the_check_of_indices(name):
    """pytorch/pytorch#183608: a compiled embedding let negative indices through."""
    table = random(5, 4)
    compiled = torch.compile(lambda tokens: ops.embedding(tokens, table, backend=name), backend="aot_eager")
    assert torch.equal(compiled(torch.tensor([[4, 0]])), table[[4, 0]][None])
    for bad in (-1, 5):
        with pytest.raises((IndexError, RuntimeError), match=r"out of range|outside"):
            compiled(torch.tensor([[0, bad]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compile_inside_autocast(dtype):
    """pytorch/pytorch#124901, pytorch/pytorch#137033: a compiled op had another dtype under autocast than eager."""
    model, idx = tiny(), integers(11, 2, 8)
    compiled = torch.compile(model.loss, backend="aot_eager")
    with torch.autocast("cpu", dtype):
        eager_logits, compiled_loss, eager_loss = model(idx)[0], compiled(idx, idx), model.loss(idx, idx)
    assert eager_logits.dtype == dtype and compiled_loss.dtype == eager_loss.dtype == torch.float32
    close(compiled_loss, eager_loss, rtol=1e-5)


@pytest.mark.parametrize("name", [NATIVE])
def test_compile_strides_of_the_fake_ops(name):
    """pytorch/pytorch#177115, NVIDIA/cuEquivariance#223: the fake op promised other strides than the real one gave."""
    tokens = integers(7, 5, 3).t()
    table = random(4, 7).t().requires_grad_()
    position = random(12, 8)[::2, ::2].requires_grad_()
    torch.library.opcheck(torch.ops.fastgpt.embedding_native, (tokens, table, position, 1))
    logits = random(7, 5).t().requires_grad_()
    for with_grad in (False, True):
        arguments = (logits, integers(7, 5), None, None, -100, 1, 0.0, 0.0, 0.0, with_grad, False)
        torch.library.opcheck(torch.ops.fastgpt.cross_entropy_native, arguments)
