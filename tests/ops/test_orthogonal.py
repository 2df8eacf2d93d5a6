"""Newton-Schulz iterations, by the extension and by PyTorch, against the same iterations of the singular values."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastgpt
from fastgpt.ops import native
from fastgpt.ops import orthogonal as module
from fastgpt.ops.backend import unavailable
from fastgpt.ops.orthogonal import COEFFICIENTS, ITERATIONS, orthogonal
from newton_schulz import by_singular_values

REASON = unavailable("native", "cpu")
needs_extension = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(params=["torch", pytest.param("native", marks=needs_extension)], autouse=True)
def backend(request):
    with fastgpt.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (64, 16), (1, 7), (7, 1), (1, 1), (33, 20)], ids=str)
def test_orthogonal_is_newton_schulz_on_the_singular_values(shape):
    torch.manual_seed(sum(shape))
    matrices = torch.randn(3, *shape) * torch.logspace(2, -2, 3)[:, None, None]
    result = orthogonal(matrices)
    for matrix, found in zip(matrices, result, strict=True):
        torch.testing.assert_close(found.double(), by_singular_values(matrix), atol=1e-3, rtol=0)
    values = torch.linalg.svdvals(orthogonal(torch.eye(shape[0], shape[1])[None])[0])
    assert values.min() > 0.6 and values.max() < 1.25


def test_orthogonal_of_other_dtypes_zeros_and_nothing():
    matrix = torch.randn(1, 8, 24, dtype=torch.float64)
    torch.testing.assert_close(orthogonal(matrix)[0], by_singular_values(matrix[0]), atol=1e-6, rtol=0)
    half = orthogonal(matrix.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half[0].double(), by_singular_values(matrix[0]), atol=0.02, rtol=0)
    assert torch.equal(orthogonal(torch.zeros(2, 4, 4)), torch.zeros(2, 4, 4))
    assert orthogonal(torch.zeros(0, 4, 8)).shape == (0, 4, 8)


def test_a_large_matrix_of_low_rank_stays_near_the_singular_values():
    """Rounding must not grow in the directions that the matrix does not have."""
    torch.manual_seed(1)
    matrix = torch.randn(128, 4) @ torch.randn(4, 128)
    torch.testing.assert_close(orthogonal(matrix[None])[0].double(), by_singular_values(matrix), atol=2e-3, rtol=0)


@needs_extension
@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 13, 13), (5, 40, 70), (1, 130, 130), (2, 300, 310)], ids=str)
def test_the_kernel_is_as_exact_as_pytorch(instructions, shape):
    """The error is at most twice PyTorch's, plus a unit, in every layout; the largest shape has several blocks."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    exact = module._iterate(x.double())
    theirs = (module._iterate_gram(x) - exact).abs().max()
    for layout in (
        x,
        x.mT.contiguous().mT,
        x.repeat_interleave(2, 2)[:, :, ::2],
        x.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        found = module._orthogonal_native(layout, *COEFFICIENTS, ITERATIONS)
        assert found.is_contiguous() and float((found - exact).abs().max()) <= 2 * theirs + 1e-5


@needs_extension
@pytest.mark.parametrize("shape", [(1, 200, 200), (3, 70, 100), (8, 33, 50)], ids=str)
def test_same_bits_for_any_number_of_threads(shape):
    """With more matrices than threads and with fewer."""
    x, before, results = torch.randn(shape) / 1000.0, torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(module._orthogonal_native(x, *COEFFICIENTS, ITERATIONS))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@needs_extension
def test_opcheck_flops_and_wrong_arguments():
    op, x = torch.ops.fastgpt.orthogonal_native.default, torch.randn(2, 5, 9) / 100
    torch.library.opcheck(op, (x, *COEFFICIENTS, ITERATIONS))
    counted = []
    for function in (module._iterate_gram, lambda x: op(x, *COEFFICIENTS, ITERATIONS)):
        with FlopCounterMode(display=False) as counter:
            function(x)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0
    for wrong in (x[0], x.double()):
        with pytest.raises(RuntimeError, match="x: expected"):
            op(wrong, *COEFFICIENTS, ITERATIONS)


@needs_extension
@pytest.mark.parametrize("ours", [False, True])
def test_the_table_of_makers_chooses(monkeypatch, ours):
    called = []
    run = module._orthogonal_native
    monkeypatch.setattr(module, "_orthogonal_native", lambda *args: called.append(1) or run(*args))
    monkeypatch.setattr(native, "reason_for_library", lambda kernel: None if ours else "a test")
    with fastgpt.use_backend("auto"):
        orthogonal(torch.randn(1, 4, 4))
    assert bool(called) == ours
