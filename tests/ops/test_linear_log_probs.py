"""ops.linear_log_probs: parity, chunks, gradients, preference optimisation, registration, errors."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.ops import reference
from fastgpt.ops.backend import BackendError
from fastgpt.ops.variants import LinearLogProbs, linear_log_probs_facts
from fastgpt.parity import DTYPES, run_parity
from helpers import on_each_backend

chunked = sys.modules["fastgpt.ops.linear_cross_entropy"]  # the attribute of that name is the op


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def classes(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def by_torch(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.log_softmax(F.linear(x, weight, bias), -1).gather(-1, targets[..., None])[..., 0]


@pytest.mark.parametrize("rows", [None, 3], ids=["one chunk", "chunks of three rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(dtype: torch.dtype, rows: int | None, monkeypatch) -> None:
    if rows is not None:
        monkeypatch.setattr(chunked, "chunk_rows", lambda *sizes: rows)
    report = run_parity(names=["linear_log_probs"], dtypes=[dtype])
    assert report.rows and not report.failures, str(report)


@on_each_backend
def test_shapes_and_layouts(backend: str) -> None:
    for lead in ((), (1,), (5,), (2, 3), (0,), (2, 0, 3)):
        x, weight, bias, targets = normal(*lead, 4), normal(7, 4, seed=1), normal(7, seed=2), classes(7, *lead)
        for given, of_targets in ((x, targets), (x, targets.int()), (x.detach().movedim(0, -1).contiguous(), None)):
            if of_targets is None:
                given, of_targets = given.movedim(-1, 0).requires_grad_(), targets
            ours = ops.linear_log_probs(given, weight, of_targets, bias=bias, backend=backend)
            expected = by_torch(given, weight, targets, bias)
            torch.testing.assert_close(ours, expected)
            upstream = normal(*lead, seed=3).detach()
            for a, b in zip(
                torch.autograd.grad(ours, (given, weight, bias), upstream),
                torch.autograd.grad(expected, (given, weight, bias), upstream),
                strict=True,
            ):
                torch.testing.assert_close(a, b)
            (from_one_number,) = torch.autograd.grad(
                ops.linear_log_probs(given, weight, of_targets, backend=backend).sum(), weight
            )
            torch.testing.assert_close(
                from_one_number, torch.autograd.grad(by_torch(given, weight, targets).sum(), weight)[0]
            )


@on_each_backend
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_direct_preference_optimisation(backend: str, softcap: float | None) -> None:
    """The loss of Rafailov et al. 2023, equation 7, and its gradients, are those of the logits."""
    beta, head, frozen = 0.1, normal(31, 8, seed=9), normal(31, 8, seed=8).detach()
    hidden = {name: normal(3, 6, 8, seed=i) for i, name in enumerate(("chosen", "rejected"))}
    tokens = {name: classes(31, 3, 6, seed=i) for i, name in enumerate(hidden)}
    is_answer = torch.arange(6) >= torch.tensor([[1], [3], [2]])  # the prompts do not count

    def from_logits(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = x @ weight.t()
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]

    def fused(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return ops.linear_log_probs(x, weight, targets, softcap=softcap, backend=backend)

    def loss(log_probs) -> Tensor:
        ratio = {
            name: ((log_probs(x, head, tokens[name]) - log_probs(x.detach(), frozen, tokens[name])) * is_answer).sum(-1)
            for name, x in hidden.items()
        }
        return -F.logsigmoid(beta * (ratio["chosen"] - ratio["rejected"])).mean()

    leaves = [head, *hidden.values()]
    ours, expected = loss(fused), loss(from_logits)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves))


def test_it_is_minus_the_loss() -> None:
    x, weight, targets = normal(9, 4), normal(7, 4, seed=1), classes(7, 9)
    loss = ops.linear_cross_entropy(x, weight, targets, reduction="none", softcap=2.0)
    assert torch.equal(ops.linear_log_probs(x, weight, targets, softcap=2.0), -loss)
    sure = ops.linear_log_probs(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, dtype=torch.int64))
    assert math.copysign(1.0, float(sure)) == 1.0, "the logarithm of 1 is 0, and not -0"


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)], ids=str)
@on_each_backend
def test_frozen_parts(backend: str, wanted: tuple[int, ...]) -> None:
    leaves = [normal(5, 4), normal(7, 4, seed=1), normal(7, seed=2)]
    x, weight, bias = (t if want else t.detach() for t, want in zip(leaves, wanted, strict=True))
    ours = ops.linear_log_probs(x, weight, classes(7, 5), bias=bias, backend=backend)
    assert ours.requires_grad == any(wanted)
    if any(wanted):
        expected = by_torch(x, weight, classes(7, 5), bias)
        asked = [t for t, want in zip(leaves, wanted, strict=True) if want]
        upstream = torch.linspace(-1.0, 2.0, 5)
        for _ in range(2):
            found = torch.autograd.grad(ours, asked, upstream, retain_graph=True)
            torch.testing.assert_close(found, torch.autograd.grad(expected, asked, upstream, retain_graph=True))


def test_gradcheck() -> None:
    inputs = (
        normal(4, 3, dtype=torch.float64),
        normal(5, 3, seed=1, dtype=torch.float64),
        normal(5, seed=2, dtype=torch.float64),
    )
    for op in (ops.linear_log_probs, reference.linear_log_probs):
        for softcap in (None, 2.0):
            assert torch.autograd.gradcheck(
                lambda x, w, b, op=op, softcap=softcap: op(x, w, classes(5, 4), bias=b, softcap=softcap), inputs
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@on_each_backend
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    x, weight, targets = normal(5, 4), normal(7, 4, seed=1), classes(7, 5)
    assert ops.linear_log_probs(x.to(dtype), weight.to(dtype), targets, backend=backend).dtype == dtype
    with torch.autocast("cpu", dtype):
        log_probs = ops.linear_log_probs(x, weight, targets, backend=backend)
    assert log_probs.dtype == torch.float32
    assert [grad.dtype for grad in torch.autograd.grad(log_probs.sum(), (x, weight))] == [torch.float32] * 2
    torch.testing.assert_close(log_probs, by_torch(x, weight, targets), rtol=2e-2, atol=2e-2)
    with torch.autocast("cpu", dtype):
        assert ops.linear_log_probs(x.double(), weight.double(), targets).dtype == torch.float64
    with pytest.raises(BackendError, match="x is float64"):
        ops.linear_log_probs(x.double(), weight.double(), targets, backend="native")


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("bias", [None, 7])
def test_opcheck(backend: str, bias: int | None) -> None:
    x, weight = normal(2, 3, 4), normal(7, 4, seed=1)
    arguments = x, weight, classes(7, 2, 3), None if bias is None else normal(bias, seed=2), 2.0
    torch.library.opcheck(getattr(torch.ops.fastgpt, f"linear_log_probs_{backend}").default, arguments)
    detached = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
    backward = getattr(torch.ops.fastgpt, f"linear_log_probs_{backend}_backward").default
    torch.library.opcheck(backward, (torch.ones(2, 3), *detached, True, False, bias is not None))


def test_compile_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.linear_log_probs, fullgraph=True, backend="aot_eager", dynamic=True)
    weight = normal(7, 4, seed=1)
    for n_rows in (3, 5, 9):
        x, targets = normal(n_rows, 4), classes(7, n_rows)
        runs = [
            torch.autograd.grad(f(x, weight, targets).sin().sum(), (x, weight))
            for f in (compiled, ops.linear_log_probs)
        ]
        torch.testing.assert_close(*runs)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_derivatives_that_are_not_there_raise(backend: str) -> None:
    x, weight, targets = normal(5, 4), normal(7, 4, seed=1), classes(7, 5)

    def total(x: Tensor) -> Tensor:
        return ops.linear_log_probs(x, weight, targets, backend=backend).sum()

    with pytest.raises(NotImplementedError, match="linear_log_probs: forward-mode"):
        torch.func.jvp(total, (x.detach(),), (torch.ones(5, 4),))
    with pytest.raises(NotImplementedError, match=r"linear_log_probs: no derivative inside .*log_softmax"):
        torch.func.grad(total)(x.detach())
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(total)(x.detach()[None].expand(2, 5, 4)), total(x.detach()).expand(2))
    (grad,) = torch.autograd.grad(total(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


X, W, TARGETS = torch.randn(4, 3), torch.randn(6, 3), torch.tensor([0, 1, 5, 2])
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": X.long()}, TypeError, "x: expected float16"),
    ({"x": torch.tensor(1.0)}, ValueError, "x: expected shape"),
    ({"weight": W[:, :2]}, ValueError, r"weight: expected shape \(V, 3\)"),
    ({"weight": W[:0]}, ValueError, "weight: expected at least one class"),
    ({"weight": W.double()}, TypeError, "weight: has dtype torch.float64, but x has torch.float32"),
    ({"bias": torch.ones(5)}, ValueError, r"bias: expected shape \(6,\)"),
    ({"targets": TARGETS.float()}, TypeError, r"targets: expected int64 \(or int32\)"),
    ({"targets": TARGETS[:3]}, ValueError, r"targets: expected shape \(4,\)"),
    ({"softcap": 0.0}, ValueError, "softcap: expected None or a finite number above 0"),
    ({"softcap": math.nan}, ValueError, "softcap: expected None or a finite number above 0"),
    ({"backend": "c++"}, ValueError, "backend: unknown backend"),
    *(
        (
            {"targets": torch.tensor([0, 1, value, 2])},
            IndexError,
            rf"targets: value {value} at position \(2,\) is outside",
        )
        for value in (6, -1, -100, 2**40, -(2**63))
    ),
]


@pytest.mark.parametrize("change, error, message", WRONG)
@on_each_backend
def test_wrong_arguments(backend: str, change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        ops.linear_log_probs(**{"x": X, "weight": W, "targets": TARGETS, "backend": backend, **change})


@pytest.mark.parametrize("option", ["label_smoothing", "z_loss", "token_weight", "ignore_index", "reduction"])
def test_options_of_the_loss_are_none_of_its_own(option: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        ops.linear_log_probs(X, W, TARGETS, **{option: 0.1})


def test_same_bits_and_inputs_left_alone() -> None:
    x, weight, targets = normal(20, 16), normal(33, 16, seed=1), classes(33, 20)
    before = [t.detach().clone() for t in (x, weight, targets)]
    upstream = torch.tensor(0.5).expand(20)
    runs = []
    for _ in range(2):
        log_probs = ops.linear_log_probs(x, weight, targets, softcap=5.0)
        runs.append([log_probs, *torch.autograd.grad(log_probs, (x, weight), upstream)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(t, copy) for t, copy in zip((x, weight, targets), before, strict=True))


def test_variants() -> None:
    device = torch.device("cpu")
    plain, capped, asked = (
        LinearLogProbs(*linear_log_probs_facts(x, W, TARGETS, softcap=cap)).variant(device)
        for x, cap in ((X, None), (X, 2.0), (X.clone().requires_grad_(), None))
    )
    assert len({plain, capped, asked}) == 3 and "softcap" in capped and asked.endswith("gradients of x")
