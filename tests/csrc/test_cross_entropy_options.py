"""The kernels of cross-entropy for CPUs with a z-loss, a soft cap, weights of targets and what is correct."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.ops import native, reference
from fastgpt.ops.backend import unavailable
from fastgpt.parity import run_parity

REASON = unavailable("native", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
HALVES_AND_FLOAT = (torch.float32, torch.float16, torch.bfloat16)


def test_parity_of_log_probabilities(instructions: str) -> None:
    """That of the losses is in the files of each of them."""
    report = run_parity(names=["linear_log_probs"], backends=["native"], dtypes=HALVES_AND_FLOAT)
    assert report.rows and not report.failures and not report.skips, str(report)


def rows(n: int, classes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, classes, generator=generator) * 3).to(dtype)
    return logits.requires_grad_(), torch.randint(classes, (n,), generator=generator)


def results(function: Any, logits: Tensor, targets: Tensor, **options: Any) -> list[Tensor]:
    loss, accuracy = function(logits, targets, return_accuracy=True, **options)
    return [loss.detach(), accuracy, torch.autograd.grad(loss.sum(), logits)[0]]


def check(logits: Tensor, targets: Tensor, unit: float = 1e-6, **options: Any) -> None:
    found = results(ops.cross_entropy, logits, targets, backend="native", **options)
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}
    exact = logits.detach().double().requires_grad_()
    for ours, expected in zip(found, results(reference.cross_entropy, exact, targets, **wide), strict=True):
        scale = max(1.0, float(expected.abs().nan_to_num().max()))
        torch.testing.assert_close(ours.double(), expected.double(), rtol=0.0, atol=4 * unit * scale, equal_nan=True)


def test_groups_of_short_rows(instructions: str) -> None:
    """Float32 rows are computed in groups: groups that are full and not, ignored rows, every tail, in place and not."""
    for classes in (*range(1, 36), 65):
        for n in (1, 16, 17):
            logits, targets = rows(n, classes, seed=classes)
            targets[n // 2] = -100
            weights = torch.linspace(-1.0, 2.0, n)
            for options in ({"z_loss": 0.1}, {"softcap": 2.0}, {"z_loss": 0.1, "softcap": 2.0}):
                check(logits, targets, reduction="sum", token_weight=weights, **options)
                z_loss, cap = options.get("z_loss", 0.0), options.get("softcap", 0.0)
                chunk = logits.detach().clone()
                losses, correct = torch.ops.fastgpt.cross_entropy_chunk_(
                    chunk, targets, weights, -100, 0.0, z_loss, cap, True, True
                )
                each, expected_correct, gradient = results(
                    ops.cross_entropy, logits, targets, reduction="sum", token_weight=weights, **options
                )
                torch.testing.assert_close((losses * weights).sum(), each)
                torch.testing.assert_close(chunk, gradient)
                torch.testing.assert_close(correct.sum() / (targets != -100).sum(), expected_correct, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT, ids=str)
def test_long_rows(instructions: str, dtype: torch.dtype) -> None:
    """Several blocks of a row, with every reduction, smoothing and class weights, from known statistics and not."""
    unit = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for classes in (2048, 2049, 4100):
        logits, targets = rows(5, classes, dtype)
        targets[1] = -100
        weights = torch.tensor([1.0, 5.0, -0.5, 2.0, 0.25])
        for reduction in ("mean", "sum", "none"):
            check(logits, targets, unit, reduction=reduction, softcap=6.0, z_loss=1e-2, token_weight=weights)
        smooth: dict[str, Any] = {"weight": torch.linspace(0.5, 1.5, classes).to(dtype), "label_smoothing": 0.1}
        check(logits, targets, unit, softcap=6.0, z_loss=1e-2, **smooth)


def test_gradients_past_the_caches(instructions: str) -> None:
    extension = native.load("cpu")
    threshold = extension.stream_threshold()
    logits, targets = rows(7, 3001)
    plain = results(ops.cross_entropy, logits, targets, softcap=3.0, z_loss=0.1, backend="native")
    try:
        extension.set_stream_threshold(0)
        streamed = results(ops.cross_entropy, logits, targets, softcap=3.0, z_loss=0.1, backend="native")
    finally:
        extension.set_stream_threshold(threshold)
    assert all(torch.equal(a, b) for a, b in zip(plain, streamed, strict=True))


def test_the_hyperbolic_tangent(instructions: str) -> None:
    """Of numbers of every size: losses of two classes, of which one is far below, show the capped value itself."""
    sizes = torch.logspace(-6, 3, 4001, dtype=torch.float64).float()
    values = torch.cat([sizes, -sizes])
    capped = torch.tanh(values.double())
    # log(1 + exp(capped - 0)) of the pair (0, x); its derivative is a probability times the slope of tanh.
    pairs = torch.stack([torch.zeros_like(values), values], 1).requires_grad_()
    loss = ops.cross_entropy(
        pairs, torch.zeros(len(pairs), dtype=torch.int64), softcap=1.0, reduction="none", backend="native"
    )
    assert float((loss.detach().double() - torch.nn.functional.softplus(capped)).abs().max()) < 5e-7
    (gradient,) = torch.autograd.grad(loss.sum(), pairs)
    assert float((gradient[:, 1].double() - torch.sigmoid(capped) * (1.0 - capped.square())).abs().max()) < 5e-7
    assert bool((gradient[:, 1] >= 0.0).all()), "rounding does not turn the sign of a slope"


@pytest.mark.parametrize("classes", [65, 5000])
def test_deterministic_for_any_number_of_threads(classes: int) -> None:
    logits, targets = rows(1000, classes)
    weights, threads, found = torch.linspace(-1.0, 2.0, 1000), torch.get_num_threads(), []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            found.append(results(ops.cross_entropy, logits, targets, softcap=9.0, z_loss=0.1, token_weight=weights))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("classes", [7, 2500])
def test_opcheck(classes: int, reduction: int) -> None:
    logits, targets = rows(4, classes)
    options = -100, reduction, 0.1, 0.01, 3.0
    weights = torch.rand(classes), torch.rand(4)
    arguments = (logits, targets, *weights, *options, reduction != 0, True)
    torch.library.opcheck(torch.ops.fastgpt.cross_entropy_native.default, arguments)
    loss, statistics, _ = torch.ops.fastgpt.cross_entropy_native(
        logits.detach(), targets, *weights, *options, False, True
    )
    for known in (statistics, None):
        backward = (torch.ones_like(loss), logits.detach(), targets, *weights, known, *options)
        torch.library.opcheck(torch.ops.fastgpt.cross_entropy_native_backward.default, backward)
    chunk = (logits.detach().clone(), targets, torch.ones(4), -100, 0.1, 0.01, 3.0, True, True)
    torch.library.opcheck(torch.ops.fastgpt.cross_entropy_chunk_.default, chunk)
    wanted = [reduction != 0] * 3
    x, head, name = (
        torch.randn(4, 3, requires_grad=True),
        torch.randn(9, 3, requires_grad=True),
        ("none", "mean")[reduction],
    )
    linear = (x, head, targets % 9, torch.randn(9, requires_grad=True), torch.rand(4), -100, name, 0.1, 0.01, 3.0)
    for backend in ("native", "torch"):
        op = getattr(torch.ops.fastgpt, f"linear_cross_entropy_{backend}").default
        torch.library.opcheck(op, (*linear, *wanted, True))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_chunks_give_the_unchunked_result(backend: str, monkeypatch) -> None:
    module = sys.modules["fastgpt.ops.linear_cross_entropy"]
    torch.manual_seed(0)
    x, head, targets = (
        torch.randn(50, 8, requires_grad=True),
        torch.randn(33, 8, requires_grad=True),
        torch.randint(33, (50,)),
    )
    targets[7] = -100
    options: dict[str, Any] = {"z_loss": 0.1, "softcap": 4.0, "token_weight": torch.linspace(-0.5, 2.0, 50)}
    for reduction in ("mean", "none"):
        runs = []
        for chunk in (50, 7, 1):
            monkeypatch.setattr(module, "chunk_rows", lambda *sizes, chunk=chunk: chunk)
            loss, accuracy = ops.linear_cross_entropy(
                x, head, targets, reduction=reduction, return_accuracy=True, backend=backend, **options
            )
            runs.append([loss, accuracy, *torch.autograd.grad(loss.sin().sum(), (x, head))])
        for other in runs[1:]:
            torch.testing.assert_close(other, runs[0])
