"""ops.linear_cross_entropy: parity, chunks, memory, registration, and which gradients are made."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt import ops
from fastgpt.ops import reference
from fastgpt.ops.backend import unavailable
from fastgpt.parity import DTYPES, run_parity
from helpers import on_each_backend

module = sys.modules["fastgpt.ops.linear_cross_entropy"]  # the attribute of that name is the op
REDUCTIONS = ("mean", "sum", "none")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def classes(high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    """Three rows a chunk, so that a small test has several, and a last one that is not full."""
    monkeypatch.setattr(module, "chunk_rows", lambda *sizes: 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(dtype: torch.dtype) -> None:
    report = run_parity(names=["linear_cross_entropy"], backends=["torch"], dtypes=[dtype])
    assert report.rows and not report.failures and not report.skips, str(report)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity_in_chunks(dtype: torch.dtype) -> None:
    report = run_parity(names=["linear_cross_entropy"], backends=["torch"], dtypes=[dtype])
    assert report.rows and not report.failures, str(report)


OPTIONS = st.fixed_dictionaries(
    {
        "reduction": st.sampled_from(REDUCTIONS),
        "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "ignore_index": st.sampled_from([-100, 0, 2**40]),
    }
)


@settings(max_examples=30, deadline=None)
@given(st.data(), OPTIONS)
def test_any_shape_and_stride_of_linear(data, options: dict) -> None:
    lead = [data.draw(st.integers(0, 4)) for _ in range(data.draw(st.integers(0, 3)))]
    C, V, step = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 6)), data.draw(st.integers(1, 2))
    order = data.draw(st.permutations(range(len(lead) + 1)))
    stored = normal(*(step * [*lead, C][i] for i in order), dtype=torch.float64)
    x = stored[tuple(slice(None, None, step) for _ in order)].permute([order.index(i) for i in range(len(order))])
    weight = normal(C, step * V, dtype=torch.float64, seed=1).t()[::step]
    bias = normal(1, dtype=torch.float64, seed=2).expand(V) if data.draw(st.booleans()) else None
    targets = classes(V, *lead, seed=data.draw(st.integers(0, 9)))
    if targets.numel():
        targets.view(-1)[0] = options["ignore_index"]

    def by_torch(x, weight, targets, *, bias, **options):
        logits = F.linear(x, weight, bias).reshape(targets.numel(), V)
        loss = F.cross_entropy(logits, targets.reshape(-1), **options)
        return loss.view(targets.shape) if options["reduction"] == "none" else loss

    results = []
    for op in (ops.linear_cross_entropy, by_torch):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
        loss = op(*leaves[:2], targets, bias=leaves[2] if bias is not None else None, **options)
        results.append([loss, *torch.autograd.grad(loss.sin().sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)], ids=str)
def test_gradients_of_some_inputs_alone(wanted: tuple[int, ...], reduction: str) -> None:
    targets = classes(7, 5)
    results = []
    for op in (ops.linear_cross_entropy, reference.linear_cross_entropy):
        inputs = [normal(5, 4), normal(7, 4, seed=1), normal(7, seed=2)]
        leaves = [t.detach().requires_grad_(bool(w)) for t, w in zip(inputs, wanted, strict=True)]
        loss = op(leaves[0], leaves[1], targets, bias=leaves[2], reduction=reduction)
        loss.sum().backward()
        results.append([t.grad for t in leaves])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_without_gradient() -> None:
    x, weight, targets = normal(5, 4), normal(7, 4, seed=1), classes(7, 5)
    with torch.no_grad():
        quiet = ops.linear_cross_entropy(x, weight, targets)
    assert not quiet.requires_grad and torch.equal(quiet, ops.linear_cross_entropy(x, weight, targets))
    assert not ops.linear_cross_entropy(x.detach(), weight.detach(), targets).requires_grad


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_deterministic_and_leaves_its_inputs_alone(reduction: str) -> None:
    inputs = [normal(20, 16), normal(33, 16, seed=1), normal(33, seed=2)]
    targets = classes(33, 20)
    logits = normal(20, 33, seed=3)
    copies = [t.detach().clone() for t in (*inputs, targets, logits)]
    runs = []
    for _ in range(2):
        x, weight, bias = inputs
        fused = ops.linear_cross_entropy(x, weight, targets, bias=bias, reduction=reduction, label_smoothing=0.1)
        plain = ops.cross_entropy(logits, targets, reduction=reduction, label_smoothing=0.1)
        runs.append([fused, plain, *torch.autograd.grad((fused + plain).sin().sum(), (*inputs, logits))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(t, copy) for t, copy in zip((*inputs, targets, logits), copies, strict=True))


def test_backward_twice_gives_the_same() -> None:
    x, weight = normal(5, 4), normal(7, 4, seed=1)
    loss = ops.linear_cross_entropy(x, weight, classes(7, 5))
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (x, weight))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)


@on_each_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_raises(reduction: str, backend: str) -> None:
    x, weight, targets = normal(5, 4), normal(7, 4, seed=1), classes(7, 5)
    loss = ops.linear_cross_entropy(x, weight, targets, reduction=reduction, backend=backend).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["auto", "torch"])  # native that was asked for is refused inside a transform
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_derivatives_that_are_not_there_raise(reduction: str, backend: str) -> None:
    x, weight, targets = normal(5, 4), normal(7, 4, seed=1), classes(7, 5)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return ops.linear_cross_entropy(x, weight, targets, reduction=reduction, backend=backend).sum()

    with pytest.raises(NotImplementedError, match="linear_cross_entropy: forward-mode"):
        torch.func.jvp(loss, (x.detach(),), (torch.ones(5, 4),))
    with pytest.raises(NotImplementedError, match="linear_cross_entropy: no derivative inside"):
        torch.func.grad(loss)(x.detach())
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(loss)(x.detach()[None].expand(2, 5, 4)), loss(x.detach()).expand(2))


def layouts() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {
        "contiguous": (normal(4, 6), normal(7, 6)),
        "transposed": (normal(6, 4).t(), normal(6, 7).t()),
        "expanded": (normal(1, 6).expand(4, 6), normal(7, 1).expand(7, 6)),
        "permuted": (normal(3, 2, 6).transpose(0, 1), normal(7, 6)),
        "no rows": (normal(0, 6), normal(7, 6)),
    }


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_opcheck(reduction: str, layout: str) -> None:
    x, weight = (t.detach().requires_grad_() for t in layouts()[layout])
    bias = None if layout == "permuted" else normal(7)
    scalar = reduction != "none"
    wanted = (scalar, scalar, scalar and bias is not None)
    if layout == "no rows" and reduction == "mean":
        reduction = "sum"  # opcheck compares outputs, and NaN is never equal
    arguments = (x, weight, classes(7, *x.shape[:-1]), bias, None, -100, reduction, 0.1, 0.0, 0.0, *wanted, False)
    torch.library.opcheck(torch.ops.fastgpt.linear_cross_entropy_torch.default, arguments)


def test_compile_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    weight = normal(7, 4, seed=1)
    for n_rows in (3, 5, 9):
        x, targets = normal(n_rows, 4), classes(7, n_rows)
        runs = [torch.autograd.grad(f(x, weight, targets), (x, weight)) for f in (compiled, ops.linear_cross_entropy)]
        for ours, eager in zip(*runs, strict=True):
            torch.testing.assert_close(ours, eager)


def test_a_loss_scale_saves_float16_gradients() -> None:
    """A probability over N rows is 0 in float16; what a scaler multiplies the loss by must reach it before that."""
    x, weight, targets = normal(4096, 16), normal(500, 16, seed=1) * 0.1, classes(500, 4096)
    errors = []
    for op in (ops.linear_cross_entropy, lambda x, w, t: F.cross_entropy(F.linear(x, w).float(), t)):
        low = [t.detach().half().requires_grad_() for t in (x, weight)]
        exact = [t.detach().double().requires_grad_() for t in low]
        grads = torch.autograd.grad(1024 * op(*low, targets).float(), low)
        expected = torch.autograd.grad(1024 * reference.linear_cross_entropy(*exact, targets), exact)
        errors.append([float((g - e).abs().max()) for g, e in zip(grads, expected, strict=True)])
    for ours, theirs in zip(*errors, strict=True):
        assert ours <= 2 * theirs


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_gradients_that_are_asked_for(wanted: tuple[bool, bool, bool]) -> None:
    """One product makes the logits, and one each of dx and dW; what is not asked for stays empty."""
    x, weight, bias, targets = torch.randn(5, 3), torch.randn(4, 3), torch.randn(4), classes(4, 5)
    made = []

    def product_(a, b, out, accumulate=False) -> None:
        made.append(tuple(out.shape))
        module.matmul_on_torch_(a, b, out, accumulate)

    kernels = dataclasses.replace(module.ON_TORCH, product_=product_)
    head = module.ChunkedHead(kernels, x, weight, targets, bias, -100, wanted)
    for rows, logits in head.chunks():
        head.add_gradient(rows, logits)
    assert made == [(5, 4)] + [shape for shape, want in zip([(5, 3), (4, 3)], wanted, strict=False) if want]
    for gradient, size, want in zip(head.gradients(), (15, 12, 4), wanted, strict=True):
        assert gradient.numel() == (size if want else 0)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_frozen_parts(wanted: tuple[bool, bool, bool], reduction: str, backend: str) -> None:
    """Any of x, weight and bias may be frozen: the others' gradients are the same, at a second pass too."""
    leaves = [normal(6, 3), normal(5, 3, seed=1), normal(5, seed=2)]
    targets = classes(5, 6)

    def loss(op, **options):
        x, weight, bias = (t if want else t.detach() for t, want in zip(leaves, wanted, strict=True))
        return op(x, weight, targets, bias=bias, reduction=reduction, **options).sin().sum()

    asked = [t for t, want in zip(leaves, wanted, strict=True) if want]
    ours = loss(ops.linear_cross_entropy, backend=backend)
    assert ours.requires_grad == any(wanted)
    if asked:
        expected = torch.autograd.grad(loss(reference.linear_cross_entropy), asked)
        for _ in range(2):
            torch.testing.assert_close(torch.autograd.grad(ours, asked, retain_graph=True), expected)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_gradient_that_the_forward_op_was_not_told_of(backend: str) -> None:
    """Whoever calls the registered op without its flags gets all gradients all the same: backward makes them."""
    x, weight, bias, targets = normal(6, 3), normal(5, 3, seed=1), normal(5, seed=2), classes(5, 6)
    op = getattr(torch.ops.fastgpt, f"linear_cross_entropy_{backend}")
    for flags in itertools.product([False, True], repeat=3):
        loss, *_ = op(x, weight, targets, bias, None, -100, "mean", 0.0, 0.0, 0.0, *flags, False)
        expected = reference.linear_cross_entropy(x, weight, targets, bias=bias)
        found, wanted = (torch.autograd.grad(value, (x, weight, bias)) for value in (loss, expected))
        torch.testing.assert_close(found, wanted)


PEAK = """
import torch
from fastgpt import ops
from fastgpt.ops import native

N, V, C, backend = {n_rows}, {vocab_size}, 128, "{backend}"
if "{product}" == "library":
    native.reason_for_library = lambda kernel: "a test"

def peak() -> int:
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])

x, weight = torch.randn(N, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
targets = torch.randint(V, (N,))
ops.linear_cross_entropy(x[:300], weight, targets[:300], backend=backend).backward()  # threads, buffers, code
x.grad = weight.grad = None
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak is now what is in use
before = peak()
ops.linear_cross_entropy(x, weight, targets, backend=backend).backward()
print(peak() - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak that can be set back here")
@pytest.mark.parametrize("backend, product", [("native", "own"), ("native", "library"), ("torch", "library")])
def test_memory(backend: str, product: str) -> None:
    """The loss and its gradients together take less than 1/8 of the logits beyond the gradients themselves."""
    if backend == "native" and (reason := unavailable("native", "cpu")):
        pytest.skip(reason)
    n_rows, vocab_size = 6144, 8192
    code = PEAK.format(n_rows=n_rows, vocab_size=vocab_size, backend=backend, product=product)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    gradients = (n_rows + vocab_size) * 128 * 4
    assert int(done.stdout) - gradients < n_rows * vocab_size * 4 / 8


LOGITS, TARGETS, X, W = torch.randn(4, 6), torch.tensor([0, 1, 5, 2]), torch.randn(4, 3), torch.randn(6, 3)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": X.int()}, TypeError, "x: expected float16"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape \(..., C\)"),
        ({"weight": W[0]}, ValueError, "weight: expected 2 dimensions"),
        ({"weight": W.to_sparse()}, TypeError, "weight: expected a dense tensor"),
        ({"weight": W[:, :2]}, ValueError, r"weight: expected shape \(V, 3\)"),
        ({"weight": W[:0]}, ValueError, "weight: expected at least one class"),
        ({"weight": W.double()}, TypeError, "weight: has dtype torch.float64"),
        ({"bias": torch.ones(5)}, ValueError, r"bias: expected shape \(6,\)"),
        ({"bias": torch.ones(6).half()}, TypeError, "bias: has dtype torch.float16"),
        ({"bias": torch.ones(6, 1)}, ValueError, "bias: expected 1 dimensions"),
    ],
)
@on_each_backend
def test_bad_arguments_of_linear_cross_entropy(
    backend: str, change: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        ops.linear_cross_entropy(**{"x": X, "weight": W, "targets": TARGETS, "backend": backend, **change})
