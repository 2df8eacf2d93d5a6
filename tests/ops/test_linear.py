"""The products that a linear layer takes on a CPU instead of the matrix library's: few rows, and many."""

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
from fastgpt.ops.linear import FEWEST_MULTIPLY_ADDS, MOST_ROWS, linear, linear_choice

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


@pytest.mark.parametrize("kernel", ["linear", "matmul"])
@pytest.mark.parametrize(("maker", "instructions", "mkl", "reason"), MACHINES, ids=lambda value: str(value)[:7])
def test_the_machine_decides_and_both_ways_are_right(
    kernel: str,
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
    takes, why = linear_choice(kernel)
    assert takes == (reason is None) and (reason or "measured to be faster") in why
    rows = 3 if kernel == "linear" else FEWEST_MULTIPLY_ADDS // (40 * 70) + 1
    x, weight, bias = torch.randn(rows, 40), torch.randn(70, 40), torch.randn(70)
    exact = F.linear(x.double(), weight.double(), bias.double())
    with torch.no_grad():
        found = linear(x, weight, bias)
        assert len(calls) == int(takes)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
        with fastgpt.use_backend("torch"):
            assert linear_choice(kernel) == (False, "the torch backend is preferred")
            linear(x, weight, bias)
        assert len(calls) == int(takes)
        with fastgpt.use_backend("native"):
            assert linear_choice(kernel)[0]
            torch.testing.assert_close(linear(x, weight, bias).double(), exact, rtol=1e-5, atol=1e-5)
        assert len(calls) == int(takes) + 1


@pytest.mark.parametrize("kernel", ["linear", "matmul"])
def test_the_choice_of_this_machine_has_a_reason(kernel: str) -> None:
    takes, why = linear_choice(kernel)
    assert isinstance(takes, bool) and why and "\n" not in why


def test_without_the_extension_the_library_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "unavailable", lambda backend, device: "it is not built")
    assert linear_choice("linear") == linear_choice("matmul") == (False, "it is not built")
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


def _large(*leading: int, K: int = 64, N: int = 80, grad: bool = True) -> list[torch.Tensor]:
    """x, weight and bias, with at least as many multiply-adds as the kernel for many rows wants."""
    leading = leading or (FEWEST_MULTIPLY_ADDS // (5 * K * N) * 5 + 5,)
    return [torch.randn(shape, requires_grad=grad) for shape in ((*leading, K), (N, K), (N,))]


def _calls_of(name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    seen = []
    run = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: seen.append(args) or run(*args))
    return seen


def test_which_calls_take_the_kernel_for_many_rows(taken: None, calls: list[tuple[int, ...]]) -> None:
    x, weight, bias = _large()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            linear(x, weight, bias)
            linear(x, weight)
            linear(x.view(5, -1, 64), weight)
            assert len(calls) == 3
            linear(x[: FEWEST_MULTIPLY_ADDS // (64 * 80)], weight)  # too small to pay
            linear(x.double(), weight.double())
            linear(x.bfloat16(), weight.bfloat16())
            with torch.autocast("cpu"):
                assert linear(x, weight).dtype == torch.bfloat16
            with fastgpt.use_backend("torch"):
                linear(x, weight)
            with FlopCounterMode(display=False) as counter:
                linear(x, weight)
            assert counter.get_total_flops() == 2 * x.numel() * 80
            with _Watches() as mode:
                linear(x, weight)
            assert torch._C._nn.linear in mode.seen
            torch.func.jvp(lambda a: linear(a, weight), (x.detach(),), (x.detach(),))
            torch.func.grad(lambda a: linear(a, weight.detach()).sum())(x.detach())
            assert isinstance(linear(x.as_subclass(Other), weight), Other)
        assert len(calls) == 3
        calls.clear()


class _Watches(torch.overrides.TorchFunctionMode):
    """A mode that may give PyTorch's functions another meaning."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(9, 1, 1), (13, 33, 31), (300, 16, 129), (129, 300, 65), (1200, 7, 12)], ids=str)
def test_many_rows_against_float64(instructions: str, shape: tuple[int, int, int]) -> None:
    """Output and gradients; the error is at most twice that of PyTorch's, plus a unit. Strides of every kind."""
    rows, K, N = shape
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(K, rows, generator=generator).t()
    weight = torch.randn(N, K + 3, generator=generator)[:, 1 : K + 1]
    bias = torch.randn(2 * N, generator=generator)[::2]
    for grad in (torch.randn(rows, N, generator=generator), torch.randn(1, 1).expand(rows, N)):
        exact, theirs, ours = [], [], []
        for function, dtype, found in (
            (F.linear, torch.float64, exact),
            (F.linear, torch.float32, theirs),
            (torch.ops.fastgpt.linear_native, torch.float32, ours),
        ):
            leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
            out = function(*leaves)
            found += [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]
        for right, library, own in zip(exact, theirs, ours, strict=True):
            assert own.shape == right.shape and own.dtype == torch.float32 and own.is_contiguous()
            error = float((library.double() - right).abs().max())
            assert float((own.double() - right).abs().max()) <= 2 * error + 1e-6 * max(1.0, float(right.abs().max()))


def test_the_gradient_of_a_bias_rounds_no_worse_than_the_librarys(instructions: str) -> None:
    grad = torch.randn(40000, 9) + 1.0
    exact = grad.double().sum(0)
    found = torch.ops.fastgpt.linear_native_backward(grad, None, None, True)[2]
    assert float((found.double() - exact).abs().max()) <= 2 * float((grad.sum(0).double() - exact).abs().max())


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_the_kernel_makes_only_gradients_that_are_asked_for(
    wanted: tuple[bool, bool, bool], taken: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = _calls_of("_linear_native_backward", monkeypatch)
    leaves = _large(3, 100)
    for leaf, want in zip(leaves, wanted, strict=True):
        leaf.requires_grad_(want)
    linear(*leaves).sum().backward()
    (_, x, weight, with_bias), *others = seen
    assert not others and (weight is not None, x is not None, with_bias) == wanted
    assert [leaf.grad is not None for leaf in leaves] == list(wanted)


def test_a_gradient_becomes_the_parameters_own_without_a_copy(taken: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    run = module._linear_native_backward
    monkeypatch.setattr(
        module, "_linear_native_backward", lambda *args: [made.append(t.data_ptr()) or t for t in run(*args)]
    )
    leaves = _large()
    linear(*leaves).sum().backward()
    assert [leaf.grad.data_ptr() for leaf in leaves] == made
    first = leaves[1].grad.clone()
    linear(*leaves).sum().backward()
    torch.testing.assert_close(leaves[1].grad, 2 * first)


def test_the_registered_gradients_are_right_for_fake_tensors_and_refuse_to_be_differentiated() -> None:
    grad, x, weight = torch.randn(2, 7, 9), torch.randn(2, 7, 20), torch.randn(9, 20)
    op = torch.ops.fastgpt.linear_native_backward.default
    for arguments in ((grad, x, weight, True), (grad, x, None, False), (grad, None, weight, False)):
        torch.library.opcheck(op, arguments)
    with pytest.raises(RuntimeError, match="double backward"):
        op(grad.requires_grad_(), x, weight, True)[0].sum().backward()


def test_a_second_derivative_is_the_librarys(taken: None, calls: list[tuple[int, ...]]) -> None:
    found = []
    torch.manual_seed(0)
    leaves = _large()
    for function in (linear, F.linear):
        first = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().mean() for g in first), leaves))
    assert len(calls) == 1
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-2)


def test_checkpointing_and_hooks_on_saved_tensors(taken: None, calls: list[tuple[int, ...]]) -> None:
    leaves = _large()
    expected = torch.autograd.grad(linear(*leaves).square().sum(), leaves)
    again = torch.utils.checkpoint.checkpoint(linear, *leaves, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), leaves), expected, rtol=0, atol=0)
    with torch.autograd.graph.save_on_cpu():
        out = linear(*leaves)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), leaves), expected, rtol=0, atol=0)
    assert len(calls) == 4


def test_a_weight_that_is_changed_before_its_backward_is_noticed(taken: None) -> None:
    x, weight, bias = _large()
    out = linear(x, weight, bias)
    with torch.no_grad():
        weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gradients_have_the_same_bits_for_any_number_of_threads(instructions: str) -> None:
    threads, results = torch.get_num_threads(), []
    leaves = _large(500, K=200, N=333)
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            out = torch.ops.fastgpt.linear_native(*leaves)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, out.detach())])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.ones(4, 3).double(), None, None, True),
        (torch.ones(()), None, None, True),
        (torch.ones(4, 3), None, torch.ones(4, 3), False),
        (torch.ones(4, 3), torch.ones(5, 2), None, False),
        (torch.ones(4, 3), torch.ones(4, 2).double(), None, False),
        (torch.ones(2, 4, 3), torch.ones(8, 2), None, False),
    ],
)
def test_wrong_gradients_are_refused(arguments: tuple) -> None:
    with pytest.raises(RuntimeError, match="expected"):
        torch.ops.fastgpt.linear_native_backward(*arguments)


def test_a_model_trains_on_it_as_on_the_library(taken: None, calls: list[tuple[int, ...]]) -> None:
    """The gradients of every parameter, with a frozen one, by both entrances and with gradients that are added up."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=40, block_size=64, n_layer=1, n_head=2, n_embd=64, dropout=0.0, bias=True))
    model.blocks[0].mlp.up.weight.requires_grad_(False)
    idx, targets = torch.randint(40, (2, 4, 64))
    found = []
    for backend in ("native", "torch"):
        model.zero_grad()
        with fastgpt.use_backend("auto" if backend == "native" else backend):
            model.loss(idx, targets).backward()
            model(idx, targets)[1].backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(calls) == 2 * 4, "qkv, proj, up, down; the head's product is too small"
    assert found[0].keys() == found[1].keys() and "blocks.0.mlp.up.weight" not in found[0]
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-3, atol=1e-5, msg=name)


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
    sizes = {"vocab_size": 40, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 24}
    model = GPT(GPTConfig(**sizes, norm="post")).eval()  # a pre-norm model has an op for a whole token
    prompt = torch.randint(40, (2, 12))
    ours = model.generate(prompt, 8, temperature=0.0)
    assert set(calls) == {(2, 1, 24), (2, 1, 96), (2, 24)}
    assert MOST_ROWS[torch.float32] >= 2
    with fastgpt.use_backend("torch"):
        assert torch.equal(ours, model.generate(prompt, 8, temperature=0.0))
