"""The product of a few rows, which generation takes on a CPU instead of the matrix library's."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastgpt
from fastgpt import GPT, GPTConfig
from fastgpt.ops import linear as module
from fastgpt.ops import native
from fastgpt.ops.backend import unavailable
from fastgpt.ops.linear import MOST_ROWS, linear, linear_choice

REASON = unavailable("native", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

UNIT = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of x that reach the kernel."""
    seen = []
    run = module._linear_native
    monkeypatch.setattr(module, "_linear_native", lambda x, *rest: seen.append(tuple(x.shape)) or run(x, *rest))
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


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_only_gradients_that_are_asked_for_are_computed(wanted: tuple[bool, bool, bool]) -> None:
    leaves = [torch.randn(s, requires_grad=w) for s, w in zip(((2, 3, 20), (9, 20), (9,)), wanted, strict=True)]
    out = torch.ops.fastgpt.linear_native(*leaves)
    kept = [tensor is not None for tensor in out.grad_fn.saved_tensors]
    assert kept == [wanted[1], wanted[0]], "x is kept for the weight's gradient, and the weight for that of x"
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == (wanted[0] + wanted[1]) * 2 * (2 * 3) * 9 * 20
    assert [leaf.grad is not None for leaf in leaves] == list(wanted)


def test_one_graph_for_any_number_of_rows(taken: None, calls: list[tuple[int, ...]]) -> None:
    """torch.compile takes the library's product, which it knows how to fuse, and does not ask for the rows' number."""
    torch._dynamo.reset()
    weight, graphs = torch.randn(5, 12), []
    compiled = torch.compile(
        linear, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph
    )
    with torch.no_grad():
        for rows in (2, 3, 8, 9, 100):
            x = torch.randn(rows, 12)
            torch.testing.assert_close(compiled(x, weight), F.linear(x, weight))
        rows = torch.export.Dim("rows", min=1)
        program = torch.export.export(_Linear(), (torch.randn(4, 12), weight), dynamic_shapes=({0: rows}, None))
        assert program.module()(torch.randn(50, 12), weight).shape == (50, 5)
    assert len(graphs) == 1 and calls == []


class _Linear(torch.nn.Module):
    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear(x, weight)


def test_the_registered_op_compiles_for_any_number_of_rows() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(torch.ops.fastgpt.linear_native, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 3, 7):
        leaves = [torch.randn(s, requires_grad=True) for s in ((rows, 12), (5, 12), (5,))]
        ours = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
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
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor on which the kernel was measured to be the faster one."""
    monkeypatch.setattr(native, "reason_for_library", lambda kernel: None)


MACHINES = [
    ("amd", "avx512", True, None),
    ("amd", "avx2", True, None),
    ("amd", "generic", True, "this processor has neither"),
    ("amd", "avx2", False, "this PyTorch has another matrix library"),
    ("intel", "avx512", True, "this one's maker: intel"),
    ("other", "generic", False, "this one's maker: other"),
]


@pytest.mark.parametrize(("maker", "instructions", "mkl", "reason"), MACHINES, ids=lambda value: str(value)[:7])
def test_the_machine_decides_and_both_ways_are_right(
    maker: str,
    instructions: str,
    mkl: bool,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
    calls: list[tuple[int, ...]],
) -> None:
    """What was measured on one maker is taken there; what the machine says of itself is all that decides."""
    extension = native.load("cpu")
    monkeypatch.setattr(native, "cpu_maker", lambda: maker)
    monkeypatch.setattr(extension, "instruction_set", lambda: instructions)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    takes, why = linear_choice()
    assert takes == (reason is None) and (reason or "measured to be faster") in why
    x, weight, bias = torch.randn(3, 40), torch.randn(70, 40), torch.randn(70)
    exact = F.linear(x.double(), weight.double(), bias.double())
    with torch.no_grad():
        found = linear(x, weight, bias)
        assert len(calls) == int(takes)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
        with fastgpt.use_backend("torch"):
            assert linear_choice() == (False, "the torch backend was asked for")
            linear(x, weight, bias)
        assert len(calls) == int(takes)
        with fastgpt.use_backend("native"):
            assert linear_choice()[0]
            torch.testing.assert_close(linear(x, weight, bias).double(), exact, rtol=1e-5, atol=1e-5)
        assert len(calls) == int(takes) + 1


def test_the_choice_of_this_machine_has_a_reason() -> None:
    takes, why = linear_choice()
    assert isinstance(takes, bool) and why and "\n" not in why


def test_without_the_extension_the_library_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "unavailable", lambda backend, device: "it is not built")
    assert linear_choice() == (False, "it is not built")
    with torch.no_grad():
        assert linear(torch.ones(1, 3), torch.ones(2, 3)).tolist() == [[3.0, 3.0]]


class Other(torch.Tensor):
    """Somebody's tensor, with products of its own perhaps."""


def test_which_calls_take_the_kernel(taken: None, calls: list[tuple[int, ...]]) -> None:
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


def test_generation_takes_it_and_writes_the_same_text(taken: None, calls: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=40, block_size=32, n_layer=2, n_head=2, n_embd=24, dropout=0.0)).eval()
    prompt = torch.randint(40, (2, 12))
    ours = model.generate(prompt, 8, temperature=0.0)
    assert set(calls) == {(2, 1, 24), (2, 1, 96), (2, 24)}
    assert MOST_ROWS[torch.float32] >= 2
    with fastgpt.use_backend("torch"):
        assert torch.equal(ours, model.generate(prompt, 8, temperature=0.0))
