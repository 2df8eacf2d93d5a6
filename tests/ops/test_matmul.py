"""The extension's own matrix product, which linear_cross_entropy takes where it is faster than PyTorch's library."""

import pytest
import torch

from fastgpt import ops
from fastgpt.ops import native
from fastgpt.ops.backend import unavailable

SIZES = [
    (1, 1, 1),
    (3, 5, 7),
    (12, 32, 512),
    (13, 33, 513),
    (300, 40, 9),
    (40, 300, 1100),
    (290, 590, 3),
    (600, 600, 64),
]

REASON = unavailable("native", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, accumulate: bool) -> torch.Tensor:
    torch.ops.fastgpt.matmul_(a, b, out, accumulate)
    return out


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
def test_against_float64(instructions: str, size: tuple[int, int, int], accumulate: bool) -> None:
    """Every layout of both factors; the error is at most twice that of PyTorch's product, plus a unit."""
    M, N, K = size
    generator = torch.Generator().manual_seed(M * N + K)
    a, b, before = (torch.randn(shape, generator=generator) for shape in ((M, K), (K, N), (M, N)))
    exact = a.double() @ b.double() + (before.double() if accumulate else 0.0)
    theirs = float(((a @ b + (before if accumulate else 0.0)).double() - exact).abs().max())
    for left in (a, a.t().contiguous().t(), a.repeat_interleave(2, 1)[:, ::2]):
        for right in (b, b.t().contiguous().t(), b.repeat_interleave(3, 1)[:, ::3]):
            wide = torch.full((M, N + 5), torch.nan)  # there are gaps between the rows
            out = wide[:, 2 : 2 + N]
            out.copy_(before if accumulate else torch.full_like(before, torch.nan))
            _product(left, right, out, accumulate)
            assert float((out.double() - exact).abs().max()) <= 2 * theirs + 1e-6 * K**0.5
            assert wide[:, :2].isnan().all() and wide[:, 2 + N :].isnan().all()


@pytest.mark.parametrize("K", [64, 384, 512, 2048])
def test_rounds_no_worse_than_the_library(instructions: str, K: int) -> None:
    """The root mean square error, which grows with the chain of additions, is at most a quarter above PyTorch's."""
    generator = torch.Generator().manual_seed(K)
    a, b = torch.randn(60, K, generator=generator), torch.randn(K, 96, generator=generator)
    exact = a.double() @ b.double()
    ours, theirs = (
        float((found.double() - exact).square().mean().sqrt())
        for found in (_product(a, b, exact.float(), False), a @ b)
    )
    assert ours <= 1.25 * theirs


@pytest.mark.parametrize("size", [(0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_empty(size: tuple[int, int, int]) -> None:
    M, N, K = size
    before = torch.randn(M, N)
    assert torch.equal(_product(torch.ones(M, K), torch.ones(K, N), before.clone(), False), torch.zeros(M, N))
    assert torch.equal(_product(torch.ones(M, K), torch.ones(K, N), before.clone(), True), before)


def test_not_a_number_stays_in_its_row_and_column() -> None:
    a, b = torch.randn(30, 20), torch.randn(20, 50)
    a[7, 3] = torch.nan
    b[4, 11] = torch.inf
    out = _product(a, b, torch.empty(30, 50), False)
    assert out[7].isnan().all() and not out[:, 11].isfinite().any()
    assert out[torch.arange(30) != 7][:, torch.arange(50) != 11].isfinite().all()


def test_same_bits_for_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        for M, N, K in ((256, 1000, 600), (1000, 256, 600), (600, 32, 3000)):
            a, b, before = torch.randn(M, K), torch.randn(K, N), torch.randn(M, N)
            for accumulate in (False, True):
                results = []
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    results.append(_product(a, b, before.clone(), accumulate))
                assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "a,b,out",
    [
        (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3)),
        (torch.ones(2, 3), torch.ones(3, 2), torch.ones(2, 3)),
        (torch.ones(2, 3).double(), torch.ones(3, 2), torch.ones(2, 2)),
        (torch.ones(2, 3), torch.ones(3, 2), torch.ones(2, 2, 2)[:, :, 0]),
    ],
)
def test_wrong_arguments_are_refused(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="expected"):
        _product(a, b, out, False)


@pytest.mark.parametrize("ours", [False, True])
def test_linear_cross_entropy_with_either_product(monkeypatch: pytest.MonkeyPatch, ours: bool) -> None:
    """With either product, the loss and its gradients are those of the unfused ops, with and without a bias."""
    x, weight = torch.randn(600, 24, requires_grad=True), torch.randn(70, 24, requires_grad=True)
    targets = torch.randint(70, (600,))
    for bias in (None, torch.randn(70, requires_grad=True)):
        leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
        expected = torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, weight, bias), targets)
        gradients = torch.autograd.grad(expected, leaves)
        with monkeypatch.context() as patch:
            patch.setattr(native, "reason_for_library", lambda kernel: None if ours else "a test")
            loss = ops.linear_cross_entropy(x, weight, targets, bias=bias, backend="native")
            found = torch.autograd.grad(loss, leaves)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-6)
