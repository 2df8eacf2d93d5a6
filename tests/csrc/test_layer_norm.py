"""layer_norm and add_layer_norm in C++: parity with each instruction set, masks, widths, threads, registered ops."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastgpt import ops
from fastgpt.ops import reference
from fastgpt.ops.backend import BackendError, unavailable
from fastgpt.ops.dropout import philox_keep_mask
from fastgpt.parity import max_error, run_parity

REASON = unavailable("native", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
HALVES_AND_FLOAT = (torch.float32, torch.float16, torch.bfloat16)
OP, BACKWARD = torch.ops.fastgpt.layer_norm_native, torch.ops.fastgpt.layer_norm_native_backward


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def test_parity(instructions: str) -> None:
    names = ["layer_norm", "add_layer_norm"]
    report = run_parity(names=names, backends=["native"], dtypes=HALVES_AND_FLOAT)
    assert report.rows and not report.failures and not report.skips, str(report)


def test_every_width(instructions: str) -> None:
    """Widths about those of a vector (4, 8, 16), of the four sums of a row, and of one draw of a mask."""
    for C in (*range(1, 36), 63, 64, 65, 127, 128, 129, 300):
        x, residual, weight, bias = normal(3, C), normal(3, C, seed=1), normal(C, seed=2), normal(C, seed=3)
        upstream = torch.linspace(-1.0, 1.0, 3 * C).view(3, C)
        results = []
        for module, dtype, options in ((ops, torch.float32, {"backend": "native"}), (reference, torch.float64, {})):
            leaves = [t.detach().to(dtype).requires_grad_() for t in (x, residual, weight, bias)]
            normed, h = module.add_layer_norm(*leaves, eps=0.1, dropout_p=0.4, seed=2**40 + C, **options)
            gradients = torch.autograd.grad((normed, h), leaves, (upstream.to(dtype), upstream.to(dtype)))
            results.append((normed.detach(), h.detach(), *gradients))
        for ours, exact in zip(*results, strict=True):
            assert max_error(ours, exact) <= 4e-6 * max(1.0, float(exact.abs().max())), C


def test_the_mask_is_drawn_bit_for_bit(instructions: str) -> None:
    """Forward and backward, for rows past the first task and keys past 32 bits."""
    for rows, C, seed in ((5, 7, 3), (600, 130, -(2**62) + 11)):
        x, residual = torch.ones(rows, C, requires_grad=True), torch.zeros(rows, C)
        _, h = ops.add_layer_norm(x, residual, torch.ones(C), dropout_p=0.5, seed=seed, backend="native")
        kept = 2.0 * philox_keep_mask(seed, 0.5, rows, C, x.device)
        assert torch.equal(h, kept)
        assert torch.equal(torch.autograd.grad(h, x, torch.ones_like(h))[0], kept)


@pytest.mark.parametrize("types", itertools.product(HALVES_AND_FLOAT, repeat=3), ids=str)
def test_mixed_dtypes(types: tuple[torch.dtype, ...]) -> None:
    """x, residual and the result may each have a dtype of its own, as under autocast."""
    x_dtype, residual_dtype, out_dtype = types
    x, residual, weight = normal(4, 33, dtype=x_dtype), normal(4, 33, dtype=residual_dtype, seed=1), normal(33, seed=2)
    y, h, _ = OP(x, residual, weight, None, 1e-5, 0.0, None, 0, out_dtype)
    exact = reference.add_layer_norm(x.detach().double(), residual.detach().double(), weight.detach().double())
    assert y.dtype == out_dtype and h.dtype == torch.promote_types(x_dtype, residual_dtype)
    for ours, theirs in zip((y, h), exact, strict=True):
        unit = torch.finfo(ours.dtype).eps + torch.finfo(h.dtype).eps
        assert max_error(ours, theirs) <= 2 * unit * max(1.0, float(theirs.abs().max())) + 1e-6
    d_x, d_residual, d_weight = torch.autograd.grad((y.sum() + h.square().sum()).float(), (x, residual, weight))
    assert (d_x.dtype, d_residual.dtype, d_weight.dtype) == (x_dtype, residual_dtype, torch.float32)
    torch.testing.assert_close(d_x.float(), d_residual.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("size", [(5, 7), (900, 130)], ids=str)  # below and above what one thread takes
def test_deterministic_for_any_number_of_threads(instructions: str, size: tuple[int, int]) -> None:
    leaves = [normal(*size), normal(*size, seed=1), normal(size[1], seed=2), normal(size[1], seed=3)]
    upstream = normal(*size, seed=4).detach()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            normed, h = ops.add_layer_norm(*leaves, dropout_p=0.2, seed=9, backend="native")
            results.append((normed, h, *torch.autograd.grad((normed, h), leaves, (upstream, upstream))))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_only_what_is_asked_for() -> None:
    x, weight = torch.randn(4, 6), torch.randn(6)
    stats = OP(x, None, weight, None, 1e-5, 0.0, None, 0, torch.float32)[2]
    for mask in itertools.product((False, True), repeat=4):
        for dropout_p, seed in ((0.0, None), (0.5, torch.tensor(1))):
            options = (dropout_p, seed, 3, torch.float32, torch.float32, mask)
            d_residual, d_x, affine = BACKWARD(torch.ones(4, 6), None, x, weight, stats, *options)
            shared = dropout_p == 0.0
            assert d_residual.numel() == (24 if mask[1] or (shared and mask[0]) else 0)
            assert d_x.numel() == (24 if mask[0] and not shared else 0)
            assert affine.shape == (mask[2] + mask[3], 6)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck(dropout_p: float) -> None:
    x, residual, weight, bias = normal(3, 4), normal(3, 4, seed=1), normal(4, seed=2), normal(4, seed=3)
    seed = torch.tensor(5) if dropout_p else None
    for given in ((x, residual, weight, bias), (x, None, weight, None)):
        torch.library.opcheck(OP.default, (*given, 1e-5, dropout_p, seed, 3, torch.float32))
    stats = OP(x, None, weight, None, 1e-5, 0.0, None, 0, torch.float32)[2]
    options = (dropout_p, seed, 3, torch.float32, torch.float32, [True] * 4)
    torch.library.opcheck(BACKWARD.default, (torch.ones(3, 4), None, x.detach(), weight.detach(), stats, *options))


def test_what_it_refuses() -> None:
    x, weight = normal(3, 4), normal(4, seed=1)
    with pytest.raises(BackendError, match="x is float64"):
        ops.layer_norm(x.double(), weight.double(), backend="native")
    with pytest.raises(BackendError, match="residual is float64"):
        ops.add_layer_norm(x, x.double(), weight.double(), backend="native")
    (gradient,) = torch.autograd.grad(ops.layer_norm(x, weight, backend="native").sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(gradient.sum(), x)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones(3, 4))
        ops.layer_norm(dual, weight, backend="native")
    plain, options = x.detach(), (1e-5, 0.5, None, 0, torch.float32)
    for call, message in (
        (lambda: OP(plain, None, torch.ones(3), None, *options), "weight: expected"),
        (lambda: OP(plain, None, torch.ones(4), torch.ones(3), *options), "bias: expected"),
        (lambda: OP(plain, torch.ones(3), torch.ones(4), None, *options), "residual: expected"),
        (lambda: OP(plain, plain, torch.ones(4), None, *options), "seed: expected"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
