"""The product of a few rows, which generation takes on a CPU instead of the matrix library's."""

import pytest
import torch
import torch.nn.functional as F

import fastgpt
from fastgpt import GPT, GPTConfig
from fastgpt.ops import linear as module
from fastgpt.ops import native
from fastgpt.ops.backend import unavailable
from fastgpt.ops.linear import MOST_ROWS, linear

REASON = unavailable("native", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

UNIT = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of x that reach the kernel."""
    seen = []
    run = module._run
    monkeypatch.setattr(module, "_run", lambda x, *rest: seen.append(tuple(x.shape)) or run(x, *rest))
    return seen


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("K", [1, 3, 16, 65, 384, 1000])
@pytest.mark.parametrize("rows", range(1, 10))
def test_against_float64(instructions: str, rows: int, K: int, dtype: torch.dtype) -> None:
    """The error is at most twice that of PyTorch's product, plus a unit; weights with wide rows, x transposed."""
    generator = torch.Generator().manual_seed(rows * K)
    for N in (1, 17, 130):
        x = torch.randn(K, rows, generator=generator).to(dtype).t()
        weight = torch.randn(N, K + 3, generator=generator).to(dtype)[:, 1 : K + 1]
        bias = torch.randn(N, generator=generator).to(dtype)
        for b in (None, bias):
            exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
            theirs = float((F.linear(x, weight, b).double() - exact).abs().max())
            found = torch.ops.fastgpt.linear_native(x, weight, b)
            assert found.shape == (rows, N) and found.dtype == dtype
            unit = UNIT[dtype] * max(1.0, float(exact.abs().max()))
            assert float((found.double() - exact).abs().max()) <= 2 * theirs + unit


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((2, 3, 20), (9, 20), (9,)))
    for b in (None, bias):
        torch.library.opcheck(torch.ops.fastgpt.linear_native.default, (x, weight, b))


@pytest.mark.parametrize("leading", [(), (4,), (2, 3)], ids=str)
def test_gradients_are_those_of_the_library(leading: tuple[int, ...]) -> None:
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((*leading, 20), (9, 20), (9,))]
    ours = torch.autograd.grad(torch.ops.fastgpt.linear_native(*leaves).square().sum(), leaves)
    theirs = torch.autograd.grad(F.linear(*leaves).square().sum(), leaves)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_same_bits_for_any_number_of_threads() -> None:
    x, weight, results = torch.randn(5, 768), torch.randn(1001, 768), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.ops.fastgpt.linear_native(x, weight, None))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_what_is_not_finite_stays_in_its_place() -> None:
    x, weight = torch.randn(3, 20), torch.randn(40, 20)
    x[1, 18] = torch.inf
    weight[7, 2] = torch.nan
    found = torch.ops.fastgpt.linear_native(x, weight, None)
    assert found[:, 7].isnan().all() and found[1, torch.arange(40) != 7].isinf().all()
    assert found[[0, 2]][:, torch.arange(40) != 7].isfinite().all()


@pytest.fixture
def vectors() -> None:
    if native.load("cpu").instruction_set() == "generic":
        pytest.skip("the kernel is taken with AVX2 or AVX-512")


def test_processors_without_avx2_keep_the_library(calls: list[tuple[int, ...]]) -> None:
    extension = native.load("cpu")
    before = extension.instruction_set()
    extension.use_instruction_set("generic")
    try:
        with torch.no_grad():
            linear(torch.randn(1, 12), torch.randn(5, 12))
    finally:
        extension.use_instruction_set(before)
    assert calls == []


class Other(torch.Tensor):
    """Somebody's tensor, with products of its own perhaps."""


def test_which_calls_take_the_kernel(vectors: None, calls: list[tuple[int, ...]]) -> None:
    x, weight, bias = torch.randn(8, 12), torch.randn(5, 12), torch.randn(5)
    with torch.no_grad():
        linear(x, weight, bias)
        assert calls == [(8, 12)]
        linear(torch.randn(9, 12), weight, bias)
        linear(x[:0], weight)
        linear(x, weight.t().contiguous().t())
        for other in (torch.randn(1), torch.randn(()), torch.randn(1, 5), torch.randn(8, 5)):
            assert torch.equal(linear(x, weight, other), F.linear(x, weight, other))
        with pytest.raises(RuntimeError, match="at least 1D"):
            linear(torch.tensor(2.0), weight)
        linear(x.double(), weight.double())
        linear(torch.randn(3, 12).bfloat16(), weight.bfloat16())
        linear(x, weight.to_sparse_csr())
        assert isinstance(linear(x.as_subclass(Other), weight), Other)
        torch.vmap(lambda row: linear(row[None], weight))(x)
        torch.func.jvp(lambda a: linear(a, weight), (x,), (x,))
        with fastgpt.use_backend("torch"):
            linear(x, weight)
        with torch.autocast("cpu"):
            assert linear(x, weight).dtype == torch.bfloat16
    linear(x, weight)  # gradients may be wanted
    assert calls == [(8, 12)]


@torch.no_grad()
def test_wrong_arguments_raise_as_pytorchs() -> None:
    x, weight = torch.randn(2, 12), torch.randn(5, 12)
    with pytest.raises(RuntimeError):
        linear(x, torch.randn(5, 11))
    with pytest.raises(RuntimeError):
        linear(x, weight, torch.randn(4))
    with pytest.raises(RuntimeError):
        linear(x, weight.double())


def test_generation_takes_it_and_writes_the_same_text(vectors: None, calls: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=40, block_size=32, n_layer=2, n_head=2, n_embd=24, dropout=0.0)).eval()
    prompt = torch.randint(40, (2, 12))
    ours = model.generate(prompt, 8, temperature=0.0)
    assert set(calls) == {(2, 1, 24), (2, 1, 96), (2, 24)}
    assert MOST_ROWS[torch.float32] >= 2
    with fastgpt.use_backend("torch"):
        assert torch.equal(ours, model.generate(prompt, 8, temperature=0.0))
