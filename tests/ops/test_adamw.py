"""The extension's step of AdamW and its norm of many tensors, against PyTorch's and against float64."""

from __future__ import annotations

import pytest
import torch

import fastgpt
from fastgpt.ops import adamw as module
from fastgpt.ops.adamw import adamw_, is_plain, one_pass_choice, total_norm
from fastgpt.ops.backend import unavailable

REASON = unavailable("native", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SHAPES = [(1,), (7,), (16, 1), (33, 65), (0, 4), (200, 200), ()]
SETTINGS = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}


def drawn(dtype: torch.dtype = torch.float32) -> list[list[torch.Tensor]]:
    """Weights, gradients, both moments and the counts of steps."""
    torch.manual_seed(0)
    weights, grads, exp_avgs = ([torch.randn(shape) for shape in SHAPES] for _ in range(3))
    squares = [torch.rand(shape) for shape in SHAPES]
    steps = [torch.tensor(float(i)) for i in range(len(SHAPES))]
    return [[t.to(dtype) for t in part] for part in (weights, grads, exp_avgs, squares, steps)]


def by_pytorch(dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """The same step by torch.optim.AdamW, of gradients halved before."""
    parts = drawn(dtype)
    weights, grads, exp_avgs, squares, steps = parts
    parameters = [torch.nn.Parameter(w) for w in weights]
    optimizer = torch.optim.AdamW(parameters, **SETTINGS, fused=True)
    for p, grad, m, v, step in zip(parameters, grads, exp_avgs, squares, steps, strict=True):
        p.grad = grad * 0.5
        optimizer.state[p] = {"step": step.float(), "exp_avg": m, "exp_avg_sq": v}
    optimizer.step()
    return [[p.detach() for p in parameters], exp_avgs, squares]


def test_against_float64(instructions):
    """The error is at most twice that of PyTorch's fused step, plus a unit; gradients stay as they are."""
    weights, grads, exp_avgs, squares, steps = drawn()
    before = [grad.clone() for grad in grads]
    adamw_(weights, grads, exp_avgs, squares, steps, **SETTINGS, grad_scale=0.5)
    assert all(torch.equal(grad, old) for grad, old in zip(grads, before, strict=True))
    assert [float(step) for step in steps] == [i + 1.0 for i in range(len(SHAPES))]
    results = zip([weights, exp_avgs, squares], by_pytorch(torch.float32), by_pytorch(torch.float64), strict=True)
    for ours, theirs, exact in results:
        for found, other, right in zip(ours, theirs, exact, strict=True):
            allowed = 2 * (other - right).abs().max() + 1e-6 if right.numel() else 0.0
            assert found.shape == right.shape and ((found - right).abs() <= allowed).all()


def test_the_norm_is_that_of_pytorch(instructions):
    _, tensors, *_ = drawn()
    exact = torch.nn.utils.get_total_norm([t.double() for t in tensors])
    assert float(total_norm(tensors)) == pytest.approx(float(exact), rel=1e-6)
    tensors[3][1, 1] = torch.nan
    assert total_norm(tensors).isnan()


def test_same_bits_for_any_number_of_threads():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            parts = drawn()
            adamw_(*parts, **SETTINGS)
            results.append([total_norm(parts[1]), *parts[0], *parts[2], *parts[3]])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_does_not_fit_is_refused():
    for part, replacement in (
        (1, torch.ones(2)),
        (2, torch.ones(7).double()),
        (3, torch.ones(14)[::2]),
        (4, torch.ones(2)),
    ):
        parts = drawn()
        parts[part][1] = replacement
        with pytest.raises(RuntimeError, match="expected"):
            adamw_(*parts, **SETTINGS)
        assert not all(is_plain(t) and t.shape == (7,) for t in parts[part][1:2])
    parts = drawn()
    with pytest.raises(RuntimeError, match="expected as many"):
        adamw_(parts[0], parts[1][1:], *parts[2:], **SETTINGS)


def test_a_graph_that_needs_the_old_weights_notices():
    weight = torch.nn.Parameter(torch.ones(4))
    loss = (weight * weight).sum()
    with torch.no_grad():
        adamw_([weight], [torch.ones(4)], [torch.zeros(4)], [torch.zeros(4)], [torch.zeros(())], **SETTINGS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_opcheck():
    torch.library.opcheck(torch.ops.fastgpt.total_norm.default, ([torch.ones(3), torch.ones(2, 2)],))


def test_the_choice(monkeypatch):
    assert one_pass_choice()[0] == (module.native.load("cpu").instruction_set() != "generic")
    with fastgpt.use_backend("torch"):
        assert one_pass_choice() == (False, "the torch backend is preferred")
    with fastgpt.use_backend("native"):
        assert one_pass_choice()[0]
    monkeypatch.setattr(module, "unavailable", lambda *args: "a test")
    assert one_pass_choice() == (False, "a test")
