"""ops.cross_entropy: parity, shapes, half precision, errors; and what both losses share."""

from __future__ import annotations

import importlib
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt import ops
from fastgpt.ops import reference
from fastgpt.parity import DTYPES, run_parity
from helpers import on_each_backend

REDUCTIONS = ("mean", "sum", "none")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def classes(high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(dtype: torch.dtype) -> None:
    report = run_parity(names=["cross_entropy"], backends=["torch"], dtypes=[dtype])
    assert report.rows and not report.failures and not report.skips, str(report)


OPTIONS = st.fixed_dictionaries(
    {
        "reduction": st.sampled_from(REDUCTIONS),
        "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "ignore_index": st.sampled_from([-100, 0, 2**40]),
    }
)


@settings(max_examples=30, deadline=None)
@given(st.data(), OPTIONS)
def test_any_shape_and_stride(data, options: dict) -> None:
    """Against PyTorch in float64, NaN for the mean of nothing and the zero gradient it then has included."""
    extra = [data.draw(st.integers(0, 3)) for _ in range(data.draw(st.integers(0, 3)))]
    shape = [data.draw(st.integers(0, 4)), data.draw(st.integers(1, 6)), *extra]
    order = data.draw(st.permutations(range(len(shape))))
    stored = normal(*(2 * shape[i] for i in order), dtype=torch.float64)
    logits = stored[tuple(slice(None, None, 2) for _ in shape)].permute([order.index(i) for i in range(len(shape))])
    targets = classes(shape[1], shape[0], *extra, seed=data.draw(st.integers(0, 9)))
    if targets.numel():
        targets.view(-1)[0] = options["ignore_index"]
    weight = normal(shape[1], dtype=torch.float64, seed=1).detach().abs() if data.draw(st.booleans()) else None
    results = []
    for op in (ops.cross_entropy, F.cross_entropy):
        leaf = logits.detach().requires_grad_()
        loss = op(leaf, targets, weight=weight, **options)
        results.append([loss, *torch.autograd.grad(loss.sin().sum(), leaf)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_nothing_counted() -> None:
    """The mean of nothing is NaN and moves no weight; what an ignored row holds does not matter."""
    x, weight, targets = normal(3, 4), normal(5, 4, seed=1), torch.full((3,), -100)
    for loss in (ops.linear_cross_entropy(x, weight, targets), ops.cross_entropy(F.linear(x, weight), targets)):
        assert loss.isnan()
        for grad in torch.autograd.grad(loss, (x, weight)):
            assert torch.equal(grad, torch.zeros_like(grad))
    broken = torch.cat([x.detach(), torch.full((1, 4), math.nan)]).requires_grad_()
    loss = ops.linear_cross_entropy(broken, weight, torch.tensor([0, 1, 2, -100]))
    torch.testing.assert_close(loss, ops.linear_cross_entropy(x, weight, torch.tensor([0, 1, 2])))


def test_infinite_and_huge_logits() -> None:
    inf = math.inf
    logits = torch.tensor([[0.0, -inf, 0.0], [1e30, -1e30, 0.0], [3e38, 3e38, -3e38]])
    loss = ops.cross_entropy(logits, torch.tensor([0, 0, 1]), reduction="none")
    torch.testing.assert_close(loss, torch.tensor([math.log(2), 0.0, math.log(2)]))
    assert ops.cross_entropy(logits[:1], torch.tensor([1])) == inf
    rows = ops.linear_cross_entropy(logits, torch.eye(3)[:, :3], torch.tensor([0, 0, 1]), reduction="none")
    torch.testing.assert_close(rows[1:], loss[1:])
    assert rows[0].isnan()  # 0 * -inf, in the product


def test_a_batch_of_gradients_at_once() -> None:
    """What `jacobian(vectorize=True)` asks for: the incoming gradient is a batch, not a number."""
    logits, x, weight, targets = normal(4, 5), normal(4, 3), normal(5, 3, seed=1), classes(5, 4)
    for op, fused in ((ops.cross_entropy, False), (ops.linear_cross_entropy, True)):

        def twice(leaf: torch.Tensor, op=op, fused=fused) -> torch.Tensor:
            loss = op(leaf, weight, targets) if fused else op(leaf, targets)
            return torch.stack([loss, 2 * loss])

        leaf = (x if fused else logits).detach()
        found = torch.autograd.functional.jacobian(twice, leaf, vectorize=True)
        torch.testing.assert_close(found, torch.autograd.functional.jacobian(twice, leaf))


def test_cross_entropy_has_every_derivative() -> None:
    logits, targets = normal(5, 4, dtype=torch.float64), classes(4, 5)
    results = []
    for op in (ops.cross_entropy, reference.cross_entropy):
        (grad,) = torch.autograd.grad(op(logits, targets, label_smoothing=0.1), logits, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), logits)[0])
    torch.testing.assert_close(*results)
    rows = torch.vmap(lambda x, t: ops.cross_entropy(x, t))(logits, targets)
    torch.testing.assert_close(rows, ops.cross_entropy(logits, targets, reduction="none"))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compile(reduction: str) -> None:
    torch._dynamo.reset()
    x, weight, bias, targets = normal(2, 5, 4), normal(7, 4, seed=1), normal(7, seed=2), classes(7, 2, 5)

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        fused = ops.linear_cross_entropy(x, weight, targets, bias=bias, reduction=reduction)
        logits = F.linear(x, weight, bias).transpose(1, 2)
        return (fused + ops.cross_entropy(logits, targets, reduction=reduction)).sin().sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    runs = [[out := f(x, weight, bias), *torch.autograd.grad(out, (x, weight, bias))] for f in (compiled, call)]
    for ours, eager in zip(*runs, strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    x, weight, bias, targets = normal(5, 4), normal(7, 4, seed=1), normal(7, seed=2), classes(7, 5)
    with torch.autocast("cpu", dtype):
        loss = ops.linear_cross_entropy(x, weight, targets, bias=bias)
        logits = F.linear(x, weight, bias)
        assert loss.dtype == F.cross_entropy(logits, targets).dtype == torch.float32
        assert ops.cross_entropy(logits, targets).dtype == F.cross_entropy(logits, targets).dtype
        assert ops.linear_cross_entropy(x.double(), weight.double(), targets).dtype == torch.float64
        assert ops.linear_cross_entropy(x.to(dtype), weight, targets).dtype == torch.float32  # as a model calls it
    loss.backward()
    assert x.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32
    torch.testing.assert_close(loss, ops.linear_cross_entropy(x, weight, targets, bias=bias), rtol=2e-2, atol=2e-2)


LOGITS, TARGETS, X, W = torch.randn(4, 6), torch.tensor([0, 1, 5, 2]), torch.randn(4, 3), torch.randn(6, 3)
OUT_OF_RANGE = [
    (torch.tensor([0, 1, 6, 2]), r"targets: value 6 at position \(2,\) is outside \[0, 6\)"),
    (torch.tensor([0, -3, 1, 2]), r"targets: value -3 at position \(1,\)"),
    (torch.tensor([0, -100, 1, 2**40]), r"targets: value 1099511627776 at position \(3,\)"),
]


@pytest.mark.parametrize("targets, message", OUT_OF_RANGE)
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"reduction": "none"}, {"reduction": "sum"}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wants_gradient", [False, True], ids=["no gradient", "gradient"])
@on_each_backend
def test_targets_out_of_range(
    backend: str, wants_gradient: bool, dtype: torch.dtype, options: dict, targets: torch.Tensor, message: str
) -> None:
    options = {**options, "backend": backend}
    x, head, logits = (t.to(dtype).requires_grad_(wants_gradient) for t in (X.clone(), W.clone(), LOGITS.clone()))
    with pytest.raises(IndexError, match=f"^{message}"):
        ops.linear_cross_entropy(x, head, targets, **options)
    for weight in (None, torch.ones(6, dtype=dtype)):
        with pytest.raises(IndexError, match=f"^{message}"):
            ops.cross_entropy(logits, targets, weight=weight, **options)


@on_each_backend
def test_targets_out_of_range_in_more_dimensions(backend: str) -> None:
    with pytest.raises(IndexError, match=r"^targets: value 3 at position \(1, 0\)"):
        ops.cross_entropy(torch.randn(2, 3, 2), torch.tensor([[0, 1], [3, 0]]), backend=backend)
    with pytest.raises(IndexError, match=r"^targets: value 9 at position \(0, 1\)"):
        ops.linear_cross_entropy(X.view(2, 2, 3), W, torch.tensor([[0, 9], [1, 2]]), backend=backend)
    with pytest.raises(IndexError, match=r"^targets: value 6 at position \(\) is outside \[0, 6\)"):
        ops.cross_entropy(LOGITS[0], torch.tensor(6), backend=backend)
    assert ops.cross_entropy(LOGITS, torch.tensor([0, 1, 999, 2]), ignore_index=999, backend=backend).isfinite()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"targets": TARGETS.float()}, TypeError, r"targets: expected int64 \(or int32\)"),
        ({"targets": TARGETS.to(torch.uint8)}, TypeError, "targets: expected int64"),
        ({"targets": [0]}, TypeError, "targets: expected a tensor"),
        ({"targets": TARGETS[:3]}, ValueError, r"targets: expected shape \(4,\)"),
        ({"targets": TARGETS.to("meta")}, ValueError, "targets: on meta"),
        ({"reduction": "avg"}, ValueError, "reduction: expected 'mean', 'sum' or 'none', got 'avg'"),
        ({"reduction": None}, ValueError, "reduction: "),
        ({"reduction": np.array(["mean", "sum"])}, ValueError, "reduction: expected 'mean'"),
        ({"targets": TARGETS.to_sparse()}, TypeError, "targets: expected a dense tensor"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing: "),
        ({"label_smoothing": math.nan}, ValueError, "label_smoothing: "),
        ({"label_smoothing": "a"}, TypeError, "label_smoothing: expected a number"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index: expected an int, got float"),
        ({"ignore_index": None}, TypeError, "ignore_index: expected an int"),
        ({"ignore_index": 2**63}, ValueError, "ignore_index: expected a 64-bit integer"),
        ({"backend": "c++"}, ValueError, "backend: unknown backend"),
    ],
)
@on_each_backend
def test_bad_arguments_of_both(backend: str, change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        ops.cross_entropy(**{"logits": LOGITS, "targets": TARGETS, "backend": backend, **change})
    with pytest.raises(error, match=f"^{message}"):
        ops.linear_cross_entropy(**{"x": X, "weight": W, "targets": TARGETS, "backend": backend, **change})


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"logits": LOGITS.long()}, TypeError, "logits: expected float16"),
        ({"logits": torch.tensor(1.0)}, ValueError, "logits: expected"),
        ({"logits": LOGITS.to_sparse()}, TypeError, "logits: expected a dense tensor"),
        ({"logits": LOGITS[:, :0]}, ValueError, "logits: expected at least one class"),
        ({"weight": torch.ones(5)}, ValueError, r"weight: expected shape \(6,\), one factor per class"),
        ({"weight": torch.ones(6).half()}, TypeError, "weight: has dtype torch.float16"),
        ({"weight": torch.ones(6, requires_grad=True)}, ValueError, "weight: class weights get no gradient"),
    ],
)
@on_each_backend
def test_bad_arguments_of_cross_entropy(backend: str, change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        ops.cross_entropy(**{"logits": LOGITS, "targets": TARGETS, "backend": backend, **change})


def test_a_call_that_was_not_checked_again_would_have_passed() -> None:
    module = importlib.import_module("fastgpt.ops.cross_entropy")
    x, t = torch.randn(3, 5), torch.tensor([0, 4, -100])
    plain = (x, t, None, -100, "mean", 0.0, 0.0, None, None, False)
    changes = [
        [x.double(), x.bfloat16(), x.to_sparse(), x.int(), x[0], x[0, 0], x[:, :0], x[:2], x.to("meta"), None, [[1.0]]],
        [t.int(), t.float(), t.to_sparse(), t[:2], t[None], t[0], t.to("meta"), None, [0, 1, 2]],
        [torch.ones(5), torch.ones(4), 1.0],
        [0, -1, True, 1.5, None, 2**63, torch.tensor(-100)],
        ["sum", "none", "max", None, ["mean"], 1],
        [0.1, 1, 1.5, -0.1, math.nan, None, "a", torch.tensor(0.0)],
        [0.1, 1, -0.1, math.inf, math.nan, None, "a"],
        [0.1, 1, 0.0, -1.0, math.inf, math.nan, "a"],
        [torch.ones(3), torch.ones(4), 1.0],
        [True, 1, None],
    ]
    module._signatures_checked.clear()
    assert module._checked(*plain) == module._check(*plain) == plain[2:]
    assert len(module._signatures_checked) == 1
    for position, values in enumerate(changes):
        for value in values:
            call = (*plain[:position], value, *plain[position + 1 :])
            try:
                expected = module._check(*call)
            except (TypeError, ValueError) as error:
                for _ in range(2):
                    with pytest.raises(type(error), match=f"^{re.escape(str(error))}$"):
                        module._checked(*call)
            else:
                assert [module._checked(*call) for _ in range(2)] == [expected, expected]


def test_the_signatures_that_are_kept_are_bounded(monkeypatch) -> None:
    module = importlib.import_module("fastgpt.ops.cross_entropy")
    monkeypatch.setattr(module, "_MOST_SIGNATURES", 3)
    module._signatures_checked.clear()
    for n_rows in range(9):
        ops.cross_entropy(torch.randn(n_rows, 5), torch.zeros(n_rows, dtype=torch.int64), reduction="sum")
        assert len(module._signatures_checked) <= 3


def test_derivatives_in_a_compiled_function() -> None:
    """Traced, an op must not lose what eager calls have or refuse."""
    x, t = torch.randn(6, 10), torch.randint(7, (6,))
    tangent = torch.arange(60.0).view(6, 10).sqrt()
    for transform in (
        torch.func.grad,
        torch.func.jacfwd,
        lambda f: lambda z: torch.func.jvp(f, (z,), (tangent,))[1],
        lambda f: lambda z: torch.func.vmap(f)(z.expand(3, 6, 10)),
    ):
        torch._dynamo.reset()
        ours = torch.compile(transform(lambda z: ops.cross_entropy(z, t)), backend="aot_eager")(x)
        torch.testing.assert_close(ours, transform(lambda z: F.cross_entropy(z, t))(x))

    def jvp(z: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(lambda y: ops.linear_cross_entropy(y, torch.ones(9, 10), t), (z,), (tangent,))[1]

    def dual(z: torch.Tensor) -> torch.Tensor:
        with torch.autograd.forward_ad.dual_level():
            made = torch.autograd.forward_ad.make_dual(z, tangent)
            return torch.autograd.forward_ad.unpack_dual(ops.linear_cross_entropy(made, torch.ones(9, 10), t)).tangent

    for function in (jvp, dual):
        torch._dynamo.reset()
        with pytest.raises(NotImplementedError, match="forward-mode derivatives are not supported"):
            torch.compile(function, backend="aot_eager")(x)


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
@on_each_backend
def test_an_ignore_index_that_is_no_int32(backend: str, op: str) -> None:
    head = torch.randn(10, 4).half()
    gradients = []
    for targets in (torch.tensor([3, 3, 3, 1]), torch.tensor([3, 3, 3, 1], dtype=torch.int32)):
        torch.manual_seed(0)
        h = torch.randn(4, 4).half().requires_grad_()
        if op == "cross_entropy":
            ops.cross_entropy(F.linear(h, head), targets, ignore_index=2**32 + 3, backend=backend).backward()
        else:
            ops.linear_cross_entropy(h, head, targets, ignore_index=2**32 + 3, backend=backend).backward()
        gradients.append(h.grad)
    assert torch.equal(*gradients)
    bad = torch.tensor([1, 12, 2], dtype=torch.int32)
    with pytest.raises(IndexError, match=r"targets: value 12 at position \(1,\)"):
        if op == "cross_entropy":
            ops.cross_entropy(torch.randn(3, 10), bad, ignore_index=2**32 + 12, backend=backend)
        else:
            ops.linear_cross_entropy(
                torch.randn(3, 4), torch.randn(10, 4), bad, ignore_index=2**32 + 12, backend=backend
            )


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_infinite_class_weight_stays_with_its_class(dtype: torch.dtype, reduction: str) -> None:
    weight = torch.tensor([math.inf] + [1.0] * 9, dtype=dtype)
    gradients = []
    for op in (ops.cross_entropy, F.cross_entropy):
        torch.manual_seed(0)
        logits = torch.randn(6, 10, dtype=dtype, requires_grad=True)
        op(logits, torch.arange(1, 7), weight=weight, reduction=reduction).sum().backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients, rtol=0.02, atol=4e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2}, {"reduction": "sum"}, {"reduction": "none"}], ids=str
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_ignored_row_counts_for_nothing(value: float, options: dict, backend: str) -> None:
    """Its loss and gradient are 0 whatever its logits are, where PyTorch's gradient is NaN; the others' stay right."""
    logits, targets = normal(5, 7).detach(), classes(7, 5)
    logits[2], targets[2] = value, -100
    weight = torch.rand(7) + 0.5
    for class_weight in (None, weight):
        leaf = logits.clone().requires_grad_()
        loss = ops.cross_entropy(leaf, targets, weight=class_weight, backend=backend, **options)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        kept = torch.tensor([0, 1, 3, 4])
        clean = logits[kept].requires_grad_()
        expected = F.cross_entropy(clean, targets[kept], weight=class_weight, **options)
        torch.testing.assert_close(loss[kept] if options.get("reduction") == "none" else loss, expected)
        torch.testing.assert_close(gradient[kept], torch.autograd.grad(expected.sum(), clean)[0])
        assert torch.equal(gradient[2], torch.zeros(7))
        exact_weight = None if class_weight is None else weight.double()
        oracle = reference.cross_entropy(logits.double(), targets, weight=exact_weight, **options)
        torch.testing.assert_close(loss, oracle.to(loss.dtype))


@on_each_backend
def test_shapes_as_people_hold_them(backend: str) -> None:
    """The error for logits (B, T, V) with targets (B, T), and for targets of another shape, says what to pass."""
    logits, targets = torch.randn(2, 3, 5), classes(5, 2, 3)
    with pytest.raises(ValueError, match=r"targets: .*pass logits\.flatten\(0, -2\) and targets\.flatten\(\)") as error:
        ops.cross_entropy(logits, targets, backend=backend)
    assert ops.cross_entropy(logits.flatten(0, -2), targets.flatten(), backend=backend).isfinite(), str(error.value)
    with pytest.raises(ValueError, match=r"pass targets\.flatten\(\)"):
        ops.cross_entropy(logits.flatten(0, 1), targets, backend=backend)
    with pytest.raises(ValueError, match=r"pass targets\.flatten\(\)"):
        ops.cross_entropy(logits.flatten(0, 1), targets.view(6, 1), backend=backend)
    x, weight = torch.randn(2, 3, 4), torch.randn(5, 4)
    assert ops.linear_cross_entropy(x, weight, targets, backend=backend).isfinite(), (
        "(B, T, C) with (B, T) is what it takes"
    )
    with pytest.raises(ValueError, match=r"pass targets\.view\(2, 3\)"):
        ops.linear_cross_entropy(x, weight, targets.flatten(), backend=backend)
    with pytest.raises(ValueError, match=r"pass targets\.flatten\(\)"):
        ops.linear_cross_entropy(x.flatten(0, 1), weight, targets, backend=backend)
    with pytest.raises(ValueError, match=r"got \(5,\)$"):
        ops.linear_cross_entropy(x, weight, classes(5, 5), backend=backend)
