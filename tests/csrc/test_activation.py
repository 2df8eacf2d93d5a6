"""The activation in C++: parity with each instruction set, every width, determinism, the registered ops."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastgpt import ops
from fastgpt.config import ACTIVATIONS
from fastgpt.ops import reference
from fastgpt.ops.backend import BackendError, unavailable
from fastgpt.parity import max_error, run_parity

REASON = unavailable("native", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
HALVES_AND_FLOAT = (torch.float32, torch.float16, torch.bfloat16)
OP, BACKWARD = torch.ops.fastgpt.activation_native, torch.ops.fastgpt.activation_native_backward


def test_parity(instructions: str) -> None:
    report = run_parity(names=["activation"], backends=["native"], dtypes=HALVES_AND_FLOAT)
    assert report.rows and not report.failures and not report.skips, str(report)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_a_few_units_in_the_last_place(instructions: str, kind: str) -> None:
    """Function and derivative between -20 and 20, in units of the last place of the larger of 1 and the value."""
    x = torch.linspace(-20.0, 20.0, 400_001, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    results = []
    for y, leaf in (
        (ops.activation(x, kind=kind, backend="native"), x),
        (reference.activation(exact, kind=kind), exact),
    ):
        results.append((y.detach(), torch.autograd.grad(y, leaf, torch.ones_like(y))[0]))
    for ours, theirs in zip(*results, strict=True):
        units = (ours.double() - theirs).abs() / theirs.abs().clamp_min(1.0) / torch.finfo(torch.float32).eps
        assert float(units.max()) < 3.0


def test_gelu_keeps_the_digits_of_small_results(instructions: str) -> None:
    """By 1 + erf(x), as PyTorch computes it, no digit is left below -5.5."""
    x = torch.linspace(-9.0, 0.0, 10_001)
    exact = reference.activation(x.double())
    relative = (ops.activation(x, backend="native").double() - exact).abs() / exact.abs().clamp_min(1e-30)
    assert float(relative.max()) < 1e-5


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)
def test_every_width(instructions: str, dtype: torch.dtype) -> None:
    """Widths about those of one vector (4, 8, 16) and of a piece of 4096 values."""
    for C, with_bias in itertools.product((*range(1, 35), 63, 64, 65, 4095, 4096, 4097), (False, True)):
        generator = torch.Generator().manual_seed(C)
        x, bias, upstream = (torch.randn(*size, generator=generator).to(dtype) for size in ((3, C), (C,), (3, C)))
        leaves = [x.requires_grad_(), bias.requires_grad_()][: 1 + with_bias]
        y = ops.activation(x, bias if with_bias else None, backend="native")
        exact = [t.detach().double().requires_grad_() for t in leaves]
        expected = F.gelu(exact[0] + exact[1] if with_bias else exact[0])
        unit = torch.finfo(dtype).eps
        assert max_error(y, expected.detach()) <= 5 * unit
        found = torch.autograd.grad(y, leaves, upstream)
        for ours, theirs in zip(found, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
            assert max_error(ours, theirs) <= 5 * unit * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("size", [(5, 7), (900, 130)], ids=str)  # below and above what one thread takes
def test_deterministic_for_any_number_of_threads(instructions: str, size: tuple[int, int]) -> None:
    x, bias = torch.randn(size, requires_grad=True), torch.randn(size[1], requires_grad=True)
    upstream = torch.randn(size)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            y = ops.activation(x, bias, backend="native")
            results.append((y, *torch.autograd.grad(y, (x, bias), upstream)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_large_values_sum_up_in_float32() -> None:
    x = torch.full((70_000, 3), 4.0, dtype=torch.bfloat16)
    bias = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    ops.activation(x, bias, kind="relu", backend="native").sum().backward()
    torch.testing.assert_close(bias.grad.double(), torch.full((3,), 70_000.0, dtype=torch.float64), rtol=2**-8, atol=0)


def test_only_what_is_asked_for() -> None:
    x, bias = torch.randn(4, 6), torch.randn(6)
    upstream = torch.ones(4, 6)
    for with_x, with_bias in itertools.product((False, True), repeat=2):
        d_x, d_bias = BACKWARD(upstream, x, bias, 0, with_x, with_bias)
        assert d_x.numel() == (24 if with_x else 0) and d_bias.numel() == (6 if with_bias else 0)
        given = x.clone().requires_grad_(with_x), bias.clone().requires_grad_(with_bias)
        if with_x or with_bias:
            ops.activation(*given, backend="native").sum().backward()
        for leaf, gradient in zip(given, (d_x, d_bias), strict=True):
            assert (leaf.grad is None) == (gradient.numel() == 0)
            assert leaf.grad is None or torch.equal(leaf.grad, gradient)


def test_what_backward_keeps() -> None:
    """x itself and nothing else of its size."""
    saved = []
    x, bias = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.activation(x, bias, backend="native")
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), bias.data_ptr()}


def test_opcheck() -> None:
    x, bias = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    for kind, given_bias in itertools.product(range(len(ACTIVATIONS)), (bias, None)):
        torch.library.opcheck(OP.default, (x, given_bias, kind))
        detached = x.detach(), None if given_bias is None else given_bias.detach()
        for wants in ((True, given_bias is not None), (False, given_bias is not None), (True, False)):
            torch.library.opcheck(BACKWARD.default, (torch.ones(3, 4), *detached, kind, *wants))


def test_what_it_refuses() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(BackendError, match="x is float64"):
        ops.activation(x.double(), backend="native")
    (gradient,) = torch.autograd.grad(ops.activation(x, backend="native").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(gradient.sum(), x)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones(3, 4))
        ops.activation(dual, backend="native")
    with pytest.raises(RuntimeError, match="bias: expected"):
        OP(x.detach(), torch.ones(3), 0)
    with pytest.raises(RuntimeError, match="kind: expected"):
        OP(x.detach(), None, 4)
    with pytest.raises(RuntimeError, match="grad: expected"):
        BACKWARD(torch.ones(3), x.detach(), None, 0, True, False)
