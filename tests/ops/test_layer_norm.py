"""ops.layer_norm and ops.add_layer_norm: parity with the oracle, exact dropout, layouts, mixed dtypes, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt import ops
from fastgpt.ops import reference
from fastgpt.ops.dropout import philox_keep_mask
from fastgpt.parity import DTYPES, run_parity

DROPOUT = {"dropout_p": 0.3, "seed": 9}
BACKENDS = ("auto", "torch", "native", "triton")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(dtype: torch.dtype) -> None:
    report = run_parity(names=["layer_norm", "add_layer_norm"], backends=["torch"], dtypes=[dtype])
    assert report.rows and not report.failures and not report.skips, str(report)


@st.composite
def calls(draw) -> tuple[list[torch.Tensor | None], dict]:
    """x and residual of any small shape as any view of their storage, with or without bias and dropout."""
    shape = [draw(st.integers(0, 4)) for _ in range(draw(st.integers(0, 3)))] + [draw(st.integers(1, 9))]
    tensors: list[torch.Tensor | None] = []
    for i in range(2):
        order, step = draw(st.permutations(range(len(shape)))), draw(st.integers(1, 2))
        stored = normal(*(step * shape[j] for j in order), dtype=torch.float64, seed=i)
        x = stored[tuple(slice(None, None, step) for _ in shape)].permute([order.index(j) for j in range(len(shape))])
        tensors.append(x[..., :1].expand(shape) if draw(st.booleans()) else x)
    weight = normal(2 * shape[-1], dtype=torch.float64, seed=2)[::2]
    bias = normal(1, dtype=torch.float64, seed=3).expand(shape[-1]) if draw(st.booleans()) else None
    return [*tensors, weight, bias], {"eps": draw(st.sampled_from([1e-5, 0.1]))}


@settings(max_examples=30, deadline=None)
@given(calls(), st.sampled_from([{}, DROPOUT]))
def test_any_shape_and_stride(call, dropout: dict) -> None:
    tensors, options = call
    results = []
    for module in (ops, reference):
        x, residual, weight, bias = (t if t is None else t.detach().requires_grad_() for t in tensors)
        leaves = [t for t in (x, residual, weight, bias) if t is not None]
        normed, h = module.add_layer_norm(x, residual, weight, bias, **options, **dropout)
        alone = module.layer_norm(x, weight, bias, **options)
        grads = torch.autograd.grad(normed.square().sum() + h.sin().sum() + alone.cos().sum(), leaves)
        results.append([normed, h, alone, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)  # eps divides: rows of one value are stiff


def test_dropout_is_the_mask_bit_for_bit() -> None:
    x, residual, weight = torch.ones(3, 5, 7), torch.zeros(3, 5, 7), torch.ones(7)
    _, h = ops.add_layer_norm(x, residual, weight, dropout_p=0.5, seed=2**50 + 3)
    assert torch.equal(h, 2.0 * philox_keep_mask(2**50 + 3, 0.5, 15, 7, x.device).view(3, 5, 7))


def test_seed() -> None:
    x, residual, weight = normal(4, 16), normal(4, 16, seed=1), normal(16, seed=2)
    call = lambda seed: ops.add_layer_norm(x, residual, weight, dropout_p=0.5, seed=seed)[1]  # noqa: E731
    assert torch.equal(call(5), call(torch.tensor(5)))
    assert not torch.equal(call(5), call(6))
    torch.manual_seed(0)
    unseeded = call(None)
    assert not torch.equal(unseeded, call(None))
    torch.manual_seed(0)
    assert torch.equal(unseeded, call(None))


def test_deterministic_and_leaves_its_inputs_alone() -> None:
    leaves = [normal(33, 48), normal(33, 48, seed=1), normal(48, seed=2), normal(48, seed=3)]
    copies = [x.detach().clone() for x in leaves]
    runs = []
    for _ in range(2):
        normed, h = ops.add_layer_norm(*leaves, **DROPOUT)
        runs.append([normed, h, *torch.autograd.grad(normed.square().sum() + h.sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(x, copy) for x, copy in zip(leaves, copies, strict=True))


def test_h_does_not_alias_the_residual() -> None:
    """A caller may write into the result without changing what went in."""
    x, residual, weight = torch.zeros(2, 4), torch.ones(2, 4), torch.ones(4)
    for options in ({}, DROPOUT):
        normed, h = ops.add_layer_norm(x, residual, weight, **options)
        normed.fill_(7.0)
        h.fill_(7.0)
        assert torch.equal(residual, torch.ones(2, 4)) and torch.equal(x, torch.zeros(2, 4))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("options", [{}, DROPOUT, {"dropout_p": 0.3}], ids=str)
def test_no_rows(shape: tuple[int, ...], options: dict) -> None:
    x, weight, bias = normal(*shape), normal(shape[-1]), normal(shape[-1])
    normed, h = ops.add_layer_norm(x, x, weight, bias, **options)
    assert normed.shape == h.shape == ops.layer_norm(x, weight, bias).shape == shape
    (normed.sum() + h.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros(shape[-1])) and x.grad.shape == shape


@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, DROPOUT], ids=str)
def test_residual_of_another_dtype(x_dtype: torch.dtype, residual_dtype: torch.dtype, options: dict) -> None:
    x, residual = normal(3, 8, dtype=x_dtype), normal(3, 8, dtype=residual_dtype, seed=1)
    wide = torch.promote_types(x_dtype, residual_dtype)
    weight = normal(8, dtype=wide, seed=2)
    normed, h = ops.add_layer_norm(x, residual, weight, **options)
    assert normed.dtype == h.dtype == wide
    (normed.sum() + h.sum()).backward()
    assert x.grad.dtype == x_dtype and residual.grad.dtype == residual_dtype
    exact = reference.add_layer_norm(x.double(), residual.double(), weight.double(), **options)[1]
    torch.testing.assert_close(h.double(), exact, rtol=2 * torch.finfo(x_dtype).eps + torch.finfo(wide).eps, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    x, weight, bias = normal(4, 8), normal(8), normal(8)
    with torch.autocast("cpu", dtype):
        for given_x in (x, x.to(dtype)):
            assert ops.layer_norm(given_x, weight, bias).dtype == F.layer_norm(given_x, (8,), weight, bias).dtype
        normed, h = ops.add_layer_norm(x.to(dtype), x, weight, bias)
        assert h.dtype == (x.to(dtype) + x).dtype and normed.dtype == F.layer_norm(h, (8,), weight, bias).dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_takes_weights_in_half_precision_as_fsdp_gathers_them(backend) -> None:
    x, residual, weight, bias = normal(4, 8), normal(4, 8, seed=1), normal(8, seed=2), normal(8, seed=3)
    halves = weight.detach().bfloat16().requires_grad_(), bias.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        for call, inputs in ((ops.layer_norm, (x,)), (ops.add_layer_norm, (x, residual))):
            ours = call(*inputs, *halves, backend=backend)
            wide = call(*inputs, *(t.float() for t in halves), backend="torch")
            torch.testing.assert_close(ours, wide)
    grads = torch.autograd.grad(ours[0].square().sum(), halves)
    expected = torch.autograd.grad(wide[0].square().sum(), halves)
    torch.testing.assert_close(grads, expected)


def test_compile() -> None:
    torch._dynamo.reset()
    leaves = [normal(3, 5, 16), normal(3, 5, 16, seed=1), normal(16, seed=2), normal(16, seed=3)]

    def call(x, residual, weight, bias):
        normed, h = ops.add_layer_norm(x, residual, weight, bias, **DROPOUT)
        return ops.layer_norm(normed + h, weight)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    runs = [[out := f(*leaves), *torch.autograd.grad(out.square().sum(), leaves)] for f in (compiled, call)]
    for ours, eager in zip(*runs, strict=True):
        torch.testing.assert_close(ours, eager)


def test_transforms_and_double_backward() -> None:
    x, weight = normal(3, 6, dtype=torch.float64), normal(6, dtype=torch.float64, seed=1)
    rows = torch.vmap(lambda row: ops.layer_norm(row, weight))(x)
    torch.testing.assert_close(rows, ops.layer_norm(x, weight))
    results = []
    for op in (ops.layer_norm, reference.layer_norm):
        grad = torch.autograd.grad(op(x, weight).sin().sum(), x, create_graph=True)[0]
        results.append(torch.autograd.grad(grad.square().sum(), (x, weight)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


X, W = torch.randn(4, 8), torch.ones(8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": X.long()}, TypeError, "x: expected float16"),
        ({"x": 3}, TypeError, "x: expected a tensor, got int"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape \(..., C\)"),
        ({"x": X[:, :0], "weight": W[:0]}, ValueError, r"x: expected shape \(..., C\) with C at least 1"),
        ({"weight": None}, TypeError, "weight: expected a tensor, got NoneType"),
        ({"weight": W[None]}, ValueError, "weight: expected 1 dimensions"),
        ({"weight": W[:7]}, ValueError, r"weight: expected shape \(8,\)"),
        ({"weight": W.half()}, TypeError, "weight: has dtype torch.float16"),
        ({"weight": W.to("meta")}, ValueError, "weight: on meta"),
        ({"bias": W[:7]}, ValueError, r"bias: expected shape \(8,\)"),
        ({"bias": W.double()}, TypeError, "bias: has dtype torch.float64"),
        ({"eps": -1.0}, ValueError, "eps: "),
        ({"eps": math.nan}, ValueError, "eps: "),
        ({"eps": "small"}, TypeError, "eps: expected a number"),
        ({"backend": "cpu"}, ValueError, "backend: unknown backend 'cpu'"),
    ],
)
def test_bad_arguments(change: dict, error: type[Exception], message: str, backend: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        ops.layer_norm(**{"x": X, "weight": W, "backend": backend, **change})
    residual = change.get("x", X)
    with pytest.raises(error, match=f"^{message}"):
        ops.add_layer_norm(**{"x": X, "residual": residual, "weight": W, "backend": backend, **change})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"residual": X[0]}, ValueError, "residual: expected the shape of x"),
        ({"residual": X.int()}, TypeError, "residual: expected float16"),
        ({"residual": X.to("meta")}, ValueError, "residual: on meta"),
        ({"residual": X.double()}, TypeError, "weight: has dtype torch.float32, but the rows to normalise"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: "),
        ({"dropout_p": None}, TypeError, "dropout_p: "),
        ({"seed": "1"}, TypeError, "seed: "),
    ],
)
def test_bad_arguments_of_add(change: dict, error: type[Exception], message: str, backend: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        ops.add_layer_norm(**{"x": X, "residual": X, "weight": W, "backend": backend, **change})
