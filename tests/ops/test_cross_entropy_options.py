"""The options of both losses that PyTorch's do not have: z_loss, softcap, token_weight, return_accuracy."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.ops import reference
from fastgpt.ops.variants import CrossEntropy, LinearCrossEntropy, cross_entropy_facts, linear_cross_entropy_facts
from helpers import on_each_backend

VALUES: dict[str, tuple] = {
    "reduction": ("mean", "sum", "none"),
    "label_smoothing": (0.0, 0.1),
    "z_loss": (0.0, 0.02),
    "softcap": (None, 4.0),
    "weight": (False, True),
    "token_weight": (False, True),
    "return_accuracy": (False, True),
    "ignored": (False, True),
}


def pairwise() -> list[dict[str, Any]]:
    """Few calls in which every two values of two options meet."""
    names = list(VALUES)
    pairs = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(VALUES[a]))
        for j in range(len(VALUES[b]))
    }
    calls = []

    def new(call: tuple[int, ...]) -> set:
        of = dict(zip(names, call, strict=True))
        return {pair for pair in pairs if of[pair[0]] == pair[1] and of[pair[2]] == pair[3]}

    while pairs:
        best = max(itertools.product(*(range(len(VALUES[name])) for name in names)), key=lambda call: len(new(call)))
        pairs.difference_update(new(best))
        calls.append({name: VALUES[name][i] for name, i in zip(names, best, strict=True)})
    return calls


CALLS = pairwise()


def name_of(call: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in call.items() if value)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def classes(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def options_of(call: dict[str, Any], targets: Tensor, C: int, dtype: torch.dtype) -> dict[str, Any]:
    options = {name: call[name] for name in ("reduction", "label_smoothing", "z_loss", "softcap", "return_accuracy")}
    if call["weight"]:
        options["weight"] = torch.linspace(0.5, 2.0, C).to(dtype)
    if call["token_weight"]:
        options["token_weight"] = torch.linspace(-0.5, 2.0, targets.numel()).to(dtype).view(targets.shape)
    if call["ignored"]:
        targets.view(-1)[::3] = -100
    return options


def results(function, leaves: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """The loss, the accuracy where there is one, and the gradients."""
    result = function(*leaves, **options)
    loss, *more = result if isinstance(result, tuple) else (result,)
    assert all(not t.requires_grad and t.dtype == torch.float32 for t in more)
    return [loss.detach(), *more, *torch.autograd.grad(loss.sin().sum(), leaves)]


def agree(function, formula, leaves: list[Tensor], options: dict[str, Any], rtol: float = 1e-5) -> None:
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}
    for ours, expected in zip(results(function, leaves, options), results(formula, exact, wide), strict=True):
        assert ours.shape == expected.shape
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(ours.double(), expected.double(), rtol=rtol, atol=rtol * scale / 4)


@pytest.mark.parametrize("call", CALLS, ids=name_of)
@on_each_backend
def test_every_pair_of_options(backend: str, call: dict[str, Any]) -> None:
    for shape in ((17, 5), (3, 7, 4), (2, 33)):
        logits = (normal(*shape).detach() * 3).requires_grad_()
        targets = classes(shape[1], shape[0], *shape[2:])
        options = options_of(call, targets, shape[1], torch.float32)
        agree(
            lambda z, targets=targets, **o: ops.cross_entropy(z, targets, backend=backend, **o),
            lambda z, targets=targets, **o: reference.cross_entropy(z, targets, **o),
            [logits],
            options,
        )
    x, head, bias, targets = normal(2, 9, 6), normal(21, 6, seed=1), normal(21, seed=2), classes(21, 2, 9)
    options = options_of(call | {"weight": False}, targets, 21, torch.float32)
    agree(
        lambda x, head, bias, **o: ops.linear_cross_entropy(x, head, targets, bias=bias, backend=backend, **o),
        lambda x, head, bias, **o: reference.linear_cross_entropy(x, head, targets, bias=bias, **o),
        [x, head, bias],
        options,
    )


@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_gradcheck(call: dict[str, Any]) -> None:
    """The formulas, and the backend that takes float64, against differences of their own values."""
    logits, targets = normal(3, 4, 2, dtype=torch.float64), classes(4, 3, 2)
    options = options_of(call | {"return_accuracy": False}, targets, 4, torch.float64)
    for op in (reference.cross_entropy, ops.cross_entropy):
        assert torch.autograd.gradcheck(lambda z, op=op: op(z, targets, **options), (logits,))
    x, head, targets = normal(4, 3, dtype=torch.float64), normal(5, 3, seed=1, dtype=torch.float64), classes(5, 4)
    options = options_of(call | {"return_accuracy": False, "weight": False}, targets, 5, torch.float64)
    for op in (reference.linear_cross_entropy, ops.linear_cross_entropy):
        assert torch.autograd.gradcheck(lambda x, h, op=op: op(x, h, targets, **options), (x, head))


@on_each_backend
def test_the_formulas_of_palm_and_gemma(backend: str) -> None:
    """PaLM adds 1e-4 log(Z)^2 to the mean loss; Gemma 2 divides by 30, takes tanh and multiplies by 30."""
    logits, targets = (normal(12, 50).detach() * 20).requires_grad_(), classes(50, 12)
    z_loss = F.cross_entropy(logits, targets) + 1e-4 * torch.logsumexp(logits, -1).pow(2).mean()
    gemma = F.cross_entropy(torch.tanh(logits / 30.0) * 30.0, targets)
    for expected, options in ((z_loss, {"z_loss": 1e-4}), (gemma, {"softcap": 30.0})):
        loss = ops.cross_entropy(logits, targets, backend=backend, **options)
        torch.testing.assert_close(loss, expected)
        found, wanted = (torch.autograd.grad(value, logits)[0] for value in (loss, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


@on_each_backend
def test_weights_of_targets(backend: str) -> None:
    """A weight of 0 is as good as an ignored target, one of 2 as the same target twice, and -1 turns the sign."""
    logits, targets = normal(4, 6), torch.tensor([1, 5, 0, 3])

    def loss(z: Tensor, t: Tensor, weights: list[float] | None = None, **options: Any) -> Tensor:
        token_weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)  # of any dtype
        return ops.cross_entropy(z, t, token_weight=token_weight, z_loss=0.1, backend=backend, **options)

    ignored = torch.tensor([1, -100, 0, 3])
    torch.testing.assert_close(loss(logits, targets, [1.0, 0.0, 1.0, 1.0]), loss(logits, ignored))
    twice = loss(torch.cat([logits, logits[2:3]]), torch.tensor([1, 5, 0, 3, 0]))
    torch.testing.assert_close(loss(logits, targets, [1.0, 1.0, 2.0, 1.0]), twice)
    each = loss(logits, targets, reduction="none")
    signs = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    torch.testing.assert_close(loss(logits, targets, signs.tolist(), reduction="none"), each * signs)
    torch.testing.assert_close(loss(logits, targets, signs.tolist(), reduction="sum"), (each * signs).sum())
    assert loss(logits, targets, signs.tolist()).isnan(), "the mean over weights whose sum is 0"
    x, head = normal(4, 3), normal(6, 3, seed=1)
    assert ops.linear_cross_entropy(x, head, targets, token_weight=signs, backend=backend).isnan()
    assert loss(logits, ignored, [1.0, math.nan, 1.0, 1.0]).isfinite(), "the weight of an ignored target does not count"


@on_each_backend
def test_the_accuracy(backend: str) -> None:
    """Of equal logits the first counts; a row with NaN is wrong; a cap, which makes logits equal, changes nothing."""
    inf, nan = math.inf, math.nan
    logits = torch.tensor(
        [
            *([1.0, 3.0, 2.0], [3.0, 3.0, 1.0], [3.0, 3.0, 1.0], [nan, 2.0, 1.0], [1.0, nan, 0.0], [-inf, -inf, -inf]),
            *([500.0, 600.0, 1.0], [inf, 1.0, 2.0], [9.0, 1.0, 1.0]),
        ]
    )
    targets = torch.tensor([1, 0, 1, 1, 1, 0, 1, 0, -100])
    expected = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    eye = torch.eye(3)
    for softcap, wide in itertools.product((None, 2.0), (False, True)):
        z = F.pad(logits, (0, 3000), value=-inf) if wide else logits
        _, each = ops.cross_entropy(
            z, targets, reduction="none", softcap=softcap, return_accuracy=True, backend=backend
        )
        assert torch.equal(each, expected)
        for reduction in ("mean", "sum"):
            options: dict[str, Any] = {"reduction": reduction, "softcap": softcap, "backend": backend}
            _, share = ops.cross_entropy(z, targets, return_accuracy=True, **options)
            torch.testing.assert_close(share, torch.tensor(5 / 8))
    finite = torch.tensor([0, 1, 2, 6])
    _, each = ops.linear_cross_entropy(
        logits[finite], eye, targets[finite], reduction="none", return_accuracy=True, backend=backend
    )
    assert torch.equal(each, expected[finite])
    _, share = ops.cross_entropy(logits, torch.full((9,), -100), return_accuracy=True, backend=backend)
    assert share.isnan(), "the share of nothing"


@on_each_backend
def test_logits_at_the_cap_and_beyond(backend: str) -> None:
    """Infinite and huge logits are the cap itself, and have no gradient; NaN stays NaN, and stays in its row."""
    logits = torch.tensor([[math.inf, 1.0, -math.inf], [1e30, -3e38, 0.0], [math.nan, 0.0, 0.0]], requires_grad=True)
    targets = torch.tensor([0, 2, 1])
    loss = ops.cross_entropy(logits, targets, softcap=5.0, reduction="none", backend=backend)
    capped = torch.tensor([[5.0, 5 * math.tanh(0.2), -5.0], [5.0, -5.0, 0.0]])
    torch.testing.assert_close(loss[:2], F.cross_entropy(capped, targets[:2], reduction="none"))
    (gradient,) = torch.autograd.grad(loss[:2].sum(), logits)
    assert torch.equal(gradient[:2] != 0, torch.tensor([[False, True, False], [False, False, True]]))
    assert loss[2].isnan()


@on_each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_counted_and_no_rows(backend: str, reduction: str) -> None:
    options: dict[str, Any] = {"z_loss": 0.1, "softcap": 3.0, "return_accuracy": True, "reduction": reduction}
    for n in (0, 3):
        logits, x, head = normal(n, 4), normal(n, 2), normal(4, 2, seed=1)
        targets, weights = torch.full((n,), -100), torch.ones(n)
        for loss, accuracy in (
            ops.cross_entropy(logits, targets, token_weight=weights, backend=backend, **options),
            ops.linear_cross_entropy(x, head, targets, token_weight=weights, backend=backend, **options),
        ):
            assert loss.isnan() if reduction == "mean" else torch.equal(loss, torch.zeros_like(loss))
            assert accuracy.isnan() if reduction != "none" else torch.equal(accuracy, torch.zeros(n))
            for gradient in torch.autograd.grad(loss.sum(), (logits, x, head), allow_unused=True):
                assert gradient is None or torch.equal(gradient, torch.zeros_like(gradient))


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_and_autocast(backend: str, dtype: torch.dtype) -> None:
    """Losses are computed in float32, so that the squares of the z-loss do not overflow; results have x's dtype."""
    x, head, targets = normal(300, 16, dtype=dtype), normal(40, 16, seed=1, dtype=dtype), classes(40, 300)
    options: dict[str, Any] = {"z_loss": 1e-3, "softcap": 20.0, "token_weight": torch.full((300,), 250.0)}
    wide = [t.detach().float().requires_grad_() for t in (x, head)]
    expected = ops.linear_cross_entropy(*wide, targets, **options, backend="torch")
    wanted = torch.autograd.grad(expected, wide)
    for loss in (
        ops.linear_cross_entropy(x, head, targets, **options, backend=backend),
        ops.cross_entropy(x @ head.t(), targets, **options, backend=backend),
    ):
        assert loss.dtype == dtype
        torch.testing.assert_close(loss.float(), expected, rtol=2e-2, atol=2e-2)
        for found, of_float in zip(torch.autograd.grad(loss, (x, head)), wanted, strict=True):
            torch.testing.assert_close(found.float(), of_float, rtol=5e-2, atol=0.02 * float(of_float.abs().max()))
    with torch.autocast("cpu", dtype):
        loss = ops.linear_cross_entropy(*wide, targets, **options, backend=backend)
        plain = ops.cross_entropy(wide[0] @ wide[1].t(), targets, **options, backend=backend)
    assert loss.dtype == plain.dtype == torch.float32
    assert [gradient.dtype for gradient in torch.autograd.grad(loss + plain, wide)] == [torch.float32] * 2
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)


@on_each_backend
def test_any_layout_same_bits_and_inputs_left_alone(backend: str) -> None:
    options: dict[str, Any] = {"z_loss": 1e-2, "softcap": 3.0, "return_accuracy": True, "backend": backend}
    every_second = normal(9, 40).detach()[:, ::2].requires_grad_()
    expanded, transposed = normal(1, 20).expand(9, 20), normal(20, 9).t()
    targets, weights = classes(20, 9), torch.tensor(0.5).expand(9)
    head = normal(30, 20, seed=1)
    before = [t.detach().clone() for t in (every_second, expanded, transposed, targets, weights, head)]
    for given in (every_second, expanded, transposed):
        leaf = given.detach().contiguous().requires_grad_()
        for op, more in ((ops.cross_entropy, ()), (ops.linear_cross_entropy, (head,))):
            runs = []
            for source in (given, given, leaf):
                loss, accuracy = op(source, *more, targets, token_weight=weights, **options)
                runs.append([loss, accuracy, *torch.autograd.grad(loss, (source, *more))])
            assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
            for ours, expected in zip(runs[0], runs[2], strict=True):
                torch.testing.assert_close(ours, expected)
    after = every_second, expanded, transposed, targets, weights, head
    assert all(torch.equal(t, copy) for t, copy in zip(after, before, strict=True))


@on_each_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(backend: str, reduction: str) -> None:
    torch._dynamo.reset()
    x, head, targets, weights = normal(2, 5, 4), normal(7, 4, seed=1), classes(7, 2, 5), torch.rand(2, 5) + 0.5
    options: dict[str, Any] = {"z_loss": 1e-2, "softcap": 3.0, "token_weight": weights, "return_accuracy": True}

    def call(x: Tensor, head: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fused = ops.linear_cross_entropy(x, head, targets, reduction=reduction, backend=backend, **options)
        logits = F.linear(x, head).transpose(1, 2)
        loss, accuracy = ops.cross_entropy(logits, targets, reduction=reduction, backend=backend, **options)
        log_probs = ops.linear_log_probs(x, head, targets, softcap=3.0, backend=backend)
        return (fused[0] + loss).sin().sum() + log_probs.cos().sum(), fused[1], accuracy

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    runs = [[*(out := f(x, head)), *torch.autograd.grad(out[0], (x, head))] for f in (compiled, call)]
    for ours, eager in zip(*runs, strict=True):
        torch.testing.assert_close(ours, eager)


def test_derivatives_of_other_kinds() -> None:
    """cross_entropy has every derivative; linear_cross_entropy refuses those it lacks, as without the options."""
    logits, targets = normal(5, 4, dtype=torch.float64), classes(4, 5)
    options: dict[str, Any] = {"z_loss": 0.1, "softcap": 2.0, "token_weight": torch.linspace(0.5, 1.0, 5).double()}
    second = []
    for op in (ops.cross_entropy, reference.cross_entropy):
        (grad,) = torch.autograd.grad(op(logits, targets, **options), logits, create_graph=True)
        second.append(torch.autograd.grad(grad.square().sum(), logits)[0])
    torch.testing.assert_close(*second)
    rows = torch.vmap(lambda z, t, u: ops.cross_entropy(z, t, token_weight=u, reduction="none", softcap=2.0))
    expected = ops.cross_entropy(logits, targets, token_weight=options["token_weight"], reduction="none", softcap=2.0)
    torch.testing.assert_close(rows(logits, targets, options["token_weight"]), expected)
    tangent = torch.func.jvp(lambda z: ops.cross_entropy(z, targets, **options), (logits,), (torch.ones_like(logits),))
    torch.testing.assert_close(
        tangent[1], torch.autograd.grad(ops.cross_entropy(logits, targets, **options), logits)[0].sum()
    )
    x, head = normal(5, 3), normal(4, 3, seed=1)
    with pytest.raises(NotImplementedError, match="linear_cross_entropy: no derivative inside"):
        torch.func.grad(lambda x: ops.linear_cross_entropy(x, head, targets, softcap=2.0))(x)


@on_each_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_and_a_second_pass(backend: str, reduction: str) -> None:
    x, head, targets = normal(5, 4), normal(7, 4, seed=1), classes(7, 5)
    options: dict[str, Any] = {"z_loss": 0.1, "softcap": 2.0, "token_weight": torch.linspace(0.5, 1.0, 5)}
    loss, accuracy = ops.linear_cross_entropy(
        x, head, targets, reduction=reduction, return_accuracy=True, backend=backend, **options
    )
    assert not accuracy.requires_grad
    first = torch.autograd.grad(loss.sum(), (x, head), retain_graph=True)
    again = torch.autograd.grad(2 * loss.sum(), (x, head), retain_graph=True)
    torch.testing.assert_close([2 * t for t in first], list(again))
    (grad,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


LOGITS, TARGETS, X, W = torch.randn(4, 6), torch.tensor([0, 1, 5, 2]), torch.randn(4, 3), torch.randn(6, 3)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"z_loss": -1e-4}, ValueError, "z_loss: expected a finite number of at least 0, got -0.0001"),
    ({"z_loss": math.inf}, ValueError, "z_loss: expected a finite number"),
    ({"z_loss": math.nan}, ValueError, "z_loss: expected a finite number"),
    ({"z_loss": None}, TypeError, "z_loss: expected a number, got NoneType"),
    ({"softcap": 0.0}, ValueError, "softcap: expected None or a finite number above 0"),
    ({"softcap": -30.0}, ValueError, "softcap: expected None or a finite number above 0"),
    ({"softcap": math.inf}, ValueError, "softcap: expected None or a finite number above 0"),
    ({"softcap": math.nan}, ValueError, "softcap: expected None or a finite number above 0"),
    ({"softcap": 1e-40}, ValueError, "softcap: expected None or a finite number above 0, from 1e-30 to 1e30"),
    ({"softcap": "30"}, TypeError, "softcap: expected a number, got str"),
    ({"token_weight": torch.ones(3)}, ValueError, r"token_weight: expected the shape of targets, \(4,\), got \(3,\)"),
    ({"token_weight": torch.ones(4, 1)}, ValueError, "token_weight: expected the shape of targets"),
    ({"token_weight": torch.ones(())}, ValueError, "token_weight: expected the shape of targets"),
    ({"token_weight": torch.ones(4).long()}, TypeError, "token_weight: expected float16, bfloat16, float32 or float64"),
    ({"token_weight": [1.0] * 4}, TypeError, "token_weight: expected a tensor, got list"),
    ({"token_weight": 1.0}, TypeError, "token_weight: expected a tensor, got float"),
    ({"token_weight": torch.ones(4, device="meta")}, ValueError, "token_weight: on meta, but targets is on cpu"),
    ({"token_weight": torch.ones(4, requires_grad=True)}, ValueError, "token_weight: .* get no gradient"),
    ({"return_accuracy": 1}, TypeError, "return_accuracy: expected True or False, got 1"),
    ({"return_accuracy": None}, TypeError, "return_accuracy: expected True or False, got None"),
]


@pytest.mark.parametrize("change, error, message", WRONG)
@on_each_backend
def test_wrong_options(backend: str, change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        ops.cross_entropy(LOGITS, TARGETS, backend=backend, **change)
    with pytest.raises(error, match=f"^{message}"):
        ops.linear_cross_entropy(X, W, TARGETS, backend=backend, **change)


@on_each_backend
def test_targets_out_of_range(backend: str) -> None:
    bad, options = torch.tensor([0, 6, 1, -100]), {"z_loss": 0.1, "softcap": 2.0, "return_accuracy": True}
    for call in (
        lambda: ops.cross_entropy(LOGITS, bad, token_weight=torch.ones(4), backend=backend, **options),
        lambda: ops.linear_cross_entropy(X, W, bad, token_weight=torch.ones(4), backend=backend, **options),
    ):
        with pytest.raises(IndexError, match=r"^targets: value 6 at position \(1,\) is outside \[0, 6\)"):
            call()


def test_no_gradient_without_gradients() -> None:
    weights = torch.ones(4, requires_grad=True)
    with torch.no_grad():  # as class weights do, they may have a gradient where none is computed
        loss, _ = ops.cross_entropy(LOGITS, TARGETS, token_weight=weights, return_accuracy=True)
    assert not loss.requires_grad


def test_the_options_are_a_variant_of_their_own() -> None:
    """A GPU takes a kernel only after a self-test of the same variant; calls without options keep their variants."""
    weights, device = torch.ones(4), torch.device("cpu")
    for facts_of, kind, args in (
        (cross_entropy_facts, CrossEntropy, (LOGITS, TARGETS)),
        (linear_cross_entropy_facts, LinearCrossEntropy, (X, W, TARGETS)),
    ):
        plain = kind(*facts_of(*args))
        assert "z-loss" not in plain.variant(device) and plain.options == (False,) * 4
        variants = {plain.variant(device)}
        for options in ({"z_loss": 0.1}, {"softcap": 30.0}, {"token_weight": weights}, {"return_accuracy": True}):
            variants.add(kind(*facts_of(*args, **options)).variant(device))
        assert len(variants) == 5
