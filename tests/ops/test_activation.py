"""ops.activation: parity with the oracle, layouts, the ends of the number line, autocast, errors on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt import ops
from fastgpt.config import ACTIVATIONS
from fastgpt.ops import reference
from fastgpt.ops.backend import implements, unavailable
from fastgpt.parity import DTYPES, run_parity

BACKENDS = [name for name in ("auto", "torch", "native", "triton") if name == "auto" or implements(name, "activation")]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(dtype: torch.dtype) -> None:
    report = run_parity(names=["activation"], backends=["torch"], dtypes=[dtype])
    assert report.rows and not report.failures and not report.skips, str(report)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_shape_and_stride(data) -> None:
    shape = [data.draw(st.integers(0, 4)) for _ in range(data.draw(st.integers(0, 3)))] + [data.draw(st.integers(1, 9))]
    order, step = data.draw(st.permutations(range(len(shape)))), data.draw(st.integers(1, 2))
    kind = data.draw(st.sampled_from(ACTIVATIONS))
    stored = normal(*(step * shape[i] for i in order), dtype=torch.float64)
    x = stored[tuple(slice(None, None, step) for _ in shape)].permute([order.index(i) for i in range(len(shape))])
    bias = normal(1, dtype=torch.float64, seed=1).expand(shape[-1]) if data.draw(st.booleans()) else None
    for dtype, backend in ((torch.float64, "torch"), (torch.float32, "auto")):
        results = []
        for function in (
            lambda *a, backend=backend, **o: ops.activation(*a, **o, backend=backend),
            reference.activation,
        ):
            leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, bias)]
            out = function(*leaves, kind=kind)
            results.append([out, *torch.autograd.grad(out.sin().sum(), [t for t in leaves if t is not None])])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_from_subnormal_to_huge_values(kind: str, backend: str) -> None:
    x = torch.tensor([0.0, *(sign * v for sign in (1, -1) for v in (1e-40, 1e-20, 5.0, 13.0, 40.0, 1e12))])
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    results = []
    for y, leaf in (
        (ops.activation(x, kind=kind, backend=backend), x),
        (reference.activation(exact, kind=kind), exact),
    ):
        results.append((y.float(), torch.autograd.grad(y.sum(), leaf)[0].float()))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    nothing = torch.full((40,), float("nan"), requires_grad=True)
    assert ops.activation(nothing, kind=kind, backend=backend).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic_and_leaves_its_inputs_alone(backend: str) -> None:
    leaves = [normal(33, 48), normal(48, seed=1)]
    copies = [t.detach().clone() for t in leaves]
    runs = []
    for _ in range(2):
        y = ops.activation(*leaves, backend=backend)
        runs.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(t, copy) for t, copy in zip(leaves, copies, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (0,), (5, 0), (2, 0, 0)], ids=str)
def test_no_values(shape: tuple[int, ...], backend: str) -> None:
    x, bias = normal(*shape), normal(shape[-1])
    y = ops.activation(x, bias, backend=backend)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape and torch.equal(bias.grad, torch.zeros(shape[-1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scalar_has_no_bias(backend: str) -> None:
    x = normal()
    y = ops.activation(x, backend=backend)
    torch.testing.assert_close([y, *torch.autograd.grad(y, x)], [F.gelu(x), *torch.autograd.grad(F.gelu(x), x)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, backend: str) -> None:
    x, bias = normal(4, 8), normal(8)
    with torch.autocast("cpu", dtype):
        for given_x in (x, x.to(dtype)):
            y = ops.activation(given_x, bias, backend=backend)
            assert y.dtype == F.gelu(given_x).dtype
            exact = F.gelu(given_x.float() + bias.to(given_x.dtype).float())
            torch.testing.assert_close(y.float(), exact, rtol=2e-2, atol=2e-2)
    y.sum().backward()
    assert bias.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend: str) -> None:
    torch._dynamo.reset()
    leaves = [normal(3, 5, 16), normal(16, seed=1)]

    def call(x, bias):
        return ops.activation(ops.activation(x, bias, backend=backend), kind="relu2", backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    runs = [[out := f(*leaves), *torch.autograd.grad(out.square().sum(), leaves)] for f in (compiled, call)]
    for ours, eager in zip(*runs, strict=True):
        torch.testing.assert_close(ours, eager)


def test_transforms() -> None:
    x = normal(3, 6)
    torch.testing.assert_close(torch.vmap(lambda row: ops.activation(row))(x), F.gelu(x))
    of_sum = torch.func.grad(lambda x: ops.activation(x).sum())
    torch.testing.assert_close(of_sum(x.detach()), torch.autograd.grad(F.gelu(x).sum(), x)[0])


def test_the_choice() -> None:
    x = torch.zeros(2, 3)
    expected = "torch" if unavailable("native", "cpu") else "native"
    assert ops.explain("activation", x).backend == expected
    assert ops.explain("activation", x.double()).backend == "torch"


X, B = torch.randn(4, 8), torch.ones(8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": X.long()}, TypeError, "x: expected float16"),
        ({"x": 3}, TypeError, "x: expected a tensor, got int"),
        ({"x": X.to_sparse()}, TypeError, "x: expected a dense tensor"),
        ({"kind": "swish"}, ValueError, "kind: expected one of gelu, gelu_tanh, relu, relu2, got 'swish'"),
        ({"kind": None}, ValueError, "kind: expected one of gelu"),
        ({"kind": ["gelu"]}, ValueError, "kind: expected one of gelu"),
        ({"bias": 1.0}, TypeError, "bias: expected a tensor, got float"),
        ({"bias": B[None]}, ValueError, "bias: expected 1 dimensions"),
        ({"bias": B[:7]}, ValueError, r"bias: expected shape \(C,\) to fit x \(..., C\) \(4, 8\), got \(7,\)"),
        ({"x": torch.tensor(1.0)}, ValueError, r"bias: expected shape \(C,\)"),
        ({"bias": B.half()}, TypeError, "bias: has dtype torch.float16, but x has torch.float32"),
        ({"bias": B.to("meta")}, ValueError, "bias: on meta"),
    ],
)
def test_bad_arguments(change: dict, error: type[Exception], message: str, backend: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        ops.activation(**{"x": X, "kind": "gelu", "bias": B, "backend": backend, **change})


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"^backend: unknown backend 'cpu'"):
        ops.activation(X, backend="cpu")
