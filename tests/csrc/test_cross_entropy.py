"""cross_entropy in C++: parity with each instruction set, determinism, registered ops; and what both losses share."""

from __future__ import annotations

import itertools
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastgpt import ops
from fastgpt.ops import native, reference
from fastgpt.ops.backend import BackendError, unavailable
from fastgpt.ops.cross_entropy import cuda_plan, set_cuda_plans
from fastgpt.parity import max_error, run_parity

REASON = unavailable("native", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
HALVES_AND_FLOAT = (torch.float32, torch.float16, torch.bfloat16)


def rows(n: int, classes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator).mul_(3).to(dtype).requires_grad_()
    return logits, torch.randint(classes, (n,), generator=generator)


def loss_and_gradient(logits: torch.Tensor, targets: torch.Tensor, **options):
    loss = ops.cross_entropy(logits, targets, backend="native", **options)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return loss, torch.autograd.grad(loss, logits, upstream)[0]


def test_parity(instructions: str) -> None:
    report = run_parity(names=["cross_entropy"], backends=["native"], dtypes=HALVES_AND_FLOAT)
    assert report.rows and not report.failures and not report.skips, str(report)


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)
def test_every_length(instructions: str, dtype: torch.dtype) -> None:
    """Lengths about those of one vector (4, 8, 16), two vectors and a block of 2048, so that every tail is computed."""
    for classes in (*range(1, 40), 63, 64, 65, 127, 2047, 2048, 2049, 2064, 4099, 50257):
        logits, targets = rows(3, classes, dtype, seed=classes)
        exact = logits.detach().double().requires_grad_()
        for options in ({}, {"label_smoothing": 0.1}, {"reduction": "none"}):
            loss, gradient = loss_and_gradient(logits, targets, **options)
            expected = F.cross_entropy(exact, targets, **options)
            upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).view(loss.shape)
            (expected_gradient,) = torch.autograd.grad(expected, exact, upstream)
            unit = torch.finfo(dtype).eps
            assert max_error(loss, expected.detach()) <= 4 * max(unit, 1e-6) * max(1.0, float(expected.detach().max()))
            assert max_error(gradient, expected_gradient) <= 2 * unit * float(expected_gradient.abs().max()) + 2e-7


def test_groups_of_short_rows(instructions: str) -> None:
    """Float32 rows are computed in groups: groups that are full and not, ignored rows, every tail, in place and not."""
    for classes in (*range(1, 36), 65):
        for n in (1, 15, 16, 17, 37):
            logits, targets = rows(n, classes, seed=classes)
            targets[::3] = -100
            loss, gradient = loss_and_gradient(logits, targets, reduction="sum")
            exact = logits.detach().double().requires_grad_()
            expected = F.cross_entropy(exact, targets, reduction="sum")
            (expected_gradient,) = torch.autograd.grad(expected, exact, torch.tensor(0.5, dtype=torch.float64))
            assert max_error(loss, expected.detach()) <= 4e-6 * max(1.0, float(expected.detach()))
            assert max_error(gradient, expected_gradient) <= 2e-7
            chunk, ones = logits.detach().clone(), torch.ones(n)
            torch.ops.fastgpt.cross_entropy_chunk_(chunk, targets, ones, -100, 0.0, 0.0, 0.0, True, False)
            assert max_error(chunk * 0.5, expected_gradient) <= 2e-7


def test_sixteen_bits_are_read_and_rounded_as_pytorch_does(instructions: str) -> None:
    """Every 16-bit pattern, read and written by an op that only adds: an embedding with constant position rows."""
    for dtype in (torch.float16, torch.bfloat16):
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
        tokens = torch.arange(256)[None]
        for position in (0.0, 1.0, 3e-5):
            table = torch.full((256, 256), position, dtype=dtype)
            out = ops.embedding(tokens, patterns, table, backend="native")[0]
            torch.testing.assert_close(out, patterns + table, rtol=0, atol=0, equal_nan=True)


def test_streamed_rows() -> None:
    """A gradient above the threshold is written past the caches. Rows of 50,257 values start at every alignment."""
    n = native.load("cpu").stream_threshold() // (4 * 50257) + 3
    logits, targets = rows(n, 50257)
    _, gradient = loss_and_gradient(logits, targets)
    expected = torch.softmax(logits.detach(), 1)
    expected[torch.arange(n), targets] -= 1
    torch.testing.assert_close(gradient, expected * 0.5 / n, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("classes", [65, 5000])
def test_deterministic_for_any_number_of_threads(classes: int) -> None:
    logits, targets = rows(1000, classes)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(loss_and_gradient(logits, targets))
    finally:
        torch.set_num_threads(threads)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


def test_strange_logits() -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[0.0, -inf, 1.0], [-inf, -inf, -inf], [inf, 0.0, 0.0], [nan, 0.0, 0.0], [1e30, -1e30, 0.0]])
    targets = torch.tensor([0, 1, 0, 1, 0])
    for smoothing in (0.0, 0.1):
        ours = loss_and_gradient(logits.requires_grad_(), targets, reduction="none", label_smoothing=smoothing)[0]
        theirs = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert loss_and_gradient(logits[:1].detach().requires_grad_(), targets[:1])[1][0, 1] == 0.0


def test_large_common_offset() -> None:
    logits, targets = rows(8, 100)
    shifted = (logits.detach() + 4096).requires_grad_()
    exact = F.cross_entropy(shifted.double(), targets)
    assert abs(float(loss_and_gradient(shifted, targets)[0]) - float(exact)) < 1e-6


def test_user_tensors_are_not_changed() -> None:
    logits, targets = rows(64, 300)
    before = logits.detach().clone(), targets.clone()
    loss = ops.cross_entropy(logits, targets, backend="native")
    (first,) = torch.autograd.grad(loss * 2, logits, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss * 3, logits)
    assert torch.equal(first, kept)  # the second gradient has a buffer of its own
    torch.testing.assert_close(second, first * 1.5)
    assert torch.equal(logits.detach(), before[0]) and torch.equal(targets, before[1])


def test_gradients_accumulate() -> None:
    logits, targets = rows(16, 50)
    for _ in range(3):
        ops.cross_entropy(logits, targets, backend="native").backward()
    (once,) = torch.autograd.grad(F.cross_entropy(logits, targets), logits)
    torch.testing.assert_close(logits.grad, 3 * once)


def test_a_scaled_loss_in_float16_keeps_small_gradients() -> None:
    torch.manual_seed(0)
    logits, targets = rows(512, 1000, torch.float16)
    (ours,) = torch.autograd.grad(ops.cross_entropy(logits, targets, backend="native") * 32768.0, logits)
    (theirs,) = torch.autograd.grad(F.cross_entropy(logits, targets) * 32768.0, logits)
    assert (ours != 0).sum() >= (theirs != 0).sum() * 0.999
    x = torch.randn(512, 32).half().requires_grad_()
    head = torch.randn(1000, 32).half().requires_grad_()
    ours = torch.autograd.grad(ops.linear_cross_entropy(x, head, targets, backend="native") * 32768.0, (x, head))
    theirs = torch.autograd.grad(F.cross_entropy(x.float() @ head.float().t(), targets) * 32768.0, (x, head))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=float(b.abs().max()) * 2e-3)


def test_ignored_rows_under_an_infinite_gradient() -> None:
    logits, targets = rows(4, 9)
    targets[1] = -100
    loss = ops.cross_entropy(logits, targets, backend="native")
    (gradient,) = torch.autograd.grad(loss, logits, torch.tensor(float("inf")))
    assert (gradient[1] == 0).all() and not gradient[0].isfinite().all()


def test_bad_targets() -> None:
    logits, targets = rows(6, 10)
    for value in (10, -1, 2**40, -(2**63)):
        bad = targets.clone()
        bad[4] = value
        with pytest.raises(IndexError, match=rf"targets: value {value} at position \(4,\) is outside \[0, 10\)"):
            ops.cross_entropy(logits, bad, backend="native")
        with pytest.raises(IndexError, match="flat position 4"):
            torch.ops.fastgpt.cross_entropy_native(logits, bad, None, None, -100, 1, 0.0, 0.0, 0.0, False, False)
        with pytest.raises(IndexError, match=r"position \(4,\)"):
            ops.linear_cross_entropy(torch.randn(6, 3), torch.randn(10, 3), bad, backend="native")
        assert torch.isfinite(ops.cross_entropy(logits, bad, ignore_index=value, backend="native"))


def test_float64_is_refused_by_name_and_served_by_auto() -> None:
    logits, targets = rows(3, 5, torch.float64)
    with pytest.raises(BackendError, match="logits is float64"):
        ops.cross_entropy(logits, targets, backend="native")
    assert ops.explain("cross_entropy", logits, targets).backend == "torch"
    assert ops.explain("cross_entropy", logits.float(), targets).backend == "native"


def test_autocast() -> None:
    logits, targets = rows(5, 7, torch.bfloat16)
    x, head = torch.randn(5, 8), torch.randn(7, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.cross_entropy(logits, targets, backend="native").dtype == F.cross_entropy(logits, targets).dtype
        assert ops.linear_cross_entropy(x, head, targets, backend="native").dtype == torch.float32


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)
@pytest.mark.parametrize("classes", [1, 3, 16, 64, 65, 70, 4099])
def test_long_double_works_after_it(instructions: str, classes: int, dtype: torch.dtype) -> None:
    """Had a kernel used an MMX register, long double arithmetic would give NaN afterwards."""
    logits, targets = rows(37, classes, dtype)
    targets[5] = -100
    for options in ({}, {"label_smoothing": 0.1}, {"weight": torch.rand(classes).to(dtype)}, {"reduction": "none"}):
        loss_and_gradient(logits, targets, **options)
        assert np.longdouble(1.5) + 1 == 2.5, options


@pytest.mark.parametrize("upstream", [torch.nan, torch.inf, -torch.inf, 0.0])
def test_upstream_gradients_that_are_not_finite(upstream: float) -> None:
    """A counted row whose gradient is 0 becomes NaN when multiplied by inf, an ignored row stays 0: in both passes."""
    logits = torch.tensor([[200.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    targets = torch.tensor([0, -100])
    expected = torch.autograd.grad(F.cross_entropy(logits, targets), logits, torch.tensor(upstream))[0]
    loss = ops.cross_entropy(logits, targets, backend="native")
    for _ in range(2):
        found = torch.autograd.grad(loss, logits, torch.tensor(upstream), retain_graph=True)[0]
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_mean_over_weights_of_zero() -> None:
    logits, targets = rows(5, 4)
    weight = torch.zeros(4)
    for smoothing in (0.0, 0.1):
        assert F.cross_entropy(logits, targets, weight, label_smoothing=smoothing).isnan()
        assert ops.cross_entropy(logits, targets, weight=weight, label_smoothing=smoothing).isnan()
        assert reference.cross_entropy(logits, targets, weight=weight, label_smoothing=smoothing).isnan()


def test_the_registered_op_names_what_is_wrong() -> None:
    op, (logits, targets) = torch.ops.fastgpt.cross_entropy_native, rows(6, 6)
    for arguments, message in (
        (
            (None, None, -100, 0, 0.0, 0.0, 0.0, True, False),
            "with_grad: a gradient for each loss comes from backward alone",
        ),
        ((None, None, -100, 7, 0.0, 0.0, 0.0, False, False), "reduction: expected 0, 1 or 2"),
        ((torch.ones(6, 1), None, -100, 1, 0.0, 0.0, 0.0, False, False), r"^weight: expected float32 \(C,\)"),
        ((None, torch.ones(5), -100, 1, 0.0, 0.0, 0.0, False, False), "^token_weight: expected float32, one value"),
    ):
        with pytest.raises(RuntimeError, match=message) as caught:
            op(logits, targets, *arguments)
        assert sys.prefix not in str(caught.value) and " /" not in str(caught.value), "where it was built"
    with pytest.raises(RuntimeError, match="a result of more bytes than an int64 counts"):
        torch.ops.fastgpt.large_buffer(logits, 2**60, 16)
    with pytest.raises(TypeError, match="logits: expected a dense tensor, got a nested tensor"):
        ops.cross_entropy(torch.nested.nested_tensor([logits[:2], logits[2:]]), targets)


@pytest.mark.parametrize("classes,reduction", list(itertools.product([7, 65], [0, 1])))
def test_opcheck(classes: int, reduction: int) -> None:
    logits, targets = rows(4, classes)
    weight = torch.rand(classes)
    for with_grad, w in ((False, None), (reduction != 0, weight)):
        arguments = (logits, targets, w, None, -100, reduction, 0.1, 0.0, 0.0, with_grad, False)
        torch.library.opcheck(torch.ops.fastgpt.cross_entropy_native.default, arguments)
    loss, statistics, _ = torch.ops.fastgpt.cross_entropy_native(
        logits.detach(), targets, None, None, -100, reduction, 0.0, 0.0, 0.0, False, False
    )
    for known in (statistics, None):
        backward = (torch.ones_like(loss), logits.detach(), targets, None, None, known, -100, reduction, 0.0, 0.0, 0.0)
        torch.library.opcheck(torch.ops.fastgpt.cross_entropy_native_backward.default, backward)
    scale = torch.ones(4)
    chunk = (logits.detach().clone(), targets, scale, -100, 0.0, 0.0, 0.0, True, False)
    torch.library.opcheck(torch.ops.fastgpt.cross_entropy_chunk_.default, chunk)


def test_double_backward_raises() -> None:
    logits, targets = rows(4, 6)
    x, head = torch.randn(4, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    losses = (
        (ops.cross_entropy(logits, targets, backend="native"), logits),
        (ops.linear_cross_entropy(x, head, targets, backend="native"), x),
    )
    for loss, leaf in losses:
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(gradient.sum(), leaf)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(reduction: str) -> None:
    torch._dynamo.reset()
    logits, targets = rows(4, 6)
    square, own = torch.randn(6, 6), torch.arange(4)

    def step(logits):  # in the last loss, logits is both x and head
        loss = ops.cross_entropy(logits * 2, targets, reduction=reduction, backend="native").sum() * 3
        loss = loss + ops.linear_cross_entropy(logits, square, targets, reduction=reduction, backend="native").sum()
        return loss + ops.linear_cross_entropy(logits, logits, own, reduction=reduction, backend="native").sum()

    def by_torch(logits):
        loss = F.cross_entropy(logits * 2, targets, reduction=reduction).sum() * 3
        loss = loss + F.cross_entropy(logits @ square.t(), targets, reduction=reduction).sum()
        return loss + F.cross_entropy(logits @ logits.t(), own, reduction=reduction).sum()

    loss, expected = torch.compile(step, fullgraph=True)(logits), by_torch(logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))


def test_plans_are_for_cuda_devices() -> None:
    with pytest.raises(NotImplementedError, match="cross_entropy_set_plans has no kernel for these tensors on cpu"):
        set_cuda_plans("cpu", [])
    with pytest.raises(NotImplementedError, match="cross_entropy_plan has no kernel for these tensors on cpu"):
        cuda_plan(torch.zeros(2, 3))
    for plan in ((2, 2, 300, 128), (2, 2, 300, 128, 1, 1), (2, 2, 300, 128, 1.0)):
        with pytest.raises(ValueError, match=rf"^plans: {re.escape(str(plan))}: expected"):
            set_cuda_plans("cpu", [(2, 1, 300, 128, 0), plan])
