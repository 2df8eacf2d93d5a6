"""What the CPU kernels choose by the machine, set to every value: each choice is right on any machine that takes it.

The kernels choose by instruction set, by the processor's maker, by the number of threads, and by the size above which a
result is written past the caches. Nothing here depends on the machine that runs the tests, except that it must have the
instructions.
"""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

from fastgpt import ops
from fastgpt.ops import native
from fastgpt.parity import run_parity

OPS = ("activation", "add_layer_norm", "attention", "embedding", "layer_norm", "cross_entropy", "linear_cross_entropy")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=[1, 2, 3, 8], ids=lambda count: f"{count} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def set_machine(monkeypatch):
    """set_machine(maker, stream_threshold): the maker, and the bytes above which results are stored past the caches."""
    extension = native.load("cpu")
    before = extension.stream_threshold()

    def choose(maker: str, stream_threshold: int) -> None:
        monkeypatch.setattr(native, "cpu_maker", lambda: maker)
        extension.set_stream_threshold(stream_threshold)

    yield choose
    extension.set_stream_threshold(before)


@pytest.mark.usefixtures("instructions", "threads")
def test_parity_of_every_choice(set_machine) -> None:
    """Thresholds of 0, of a few kilobytes and of more than any result has, each with another maker's choices."""
    for maker, stream_threshold in (("amd", 0), ("intel", 2**40), ("other", 4096)):
        set_machine(maker, stream_threshold)
        report = run_parity(backends=["native"], names=OPS, dtypes=DTYPES)
        assert report.rows and not report.failures and not report.skips, str(report)


@pytest.mark.parametrize("size", [(3, 5, 7), (40, 130, 33)], ids=str)  # below and above the size of one thread's task
@pytest.mark.usefixtures("instructions")
def test_the_same_bits_whatever_the_threads_and_the_cache(size, set_machine, monkeypatch) -> None:
    """The threads and the threshold only decide which thread computes a value and how it is stored: no bit changes."""
    # PyTorch's own product may divide a sum among threads.
    monkeypatch.setattr(native, "reason_for_library", lambda kernel: None)
    B, T, C = size
    torch.manual_seed(0)
    tokens, targets = torch.randint(50, (2, B, T))
    tables = [torch.randn(n, C, requires_grad=True) for n in (50, T, 50)]
    count = torch.get_num_threads()

    def step() -> list[torch.Tensor]:
        x = ops.embedding(tokens, tables[0], tables[1], backend="native")
        heads = x.view(B, T, 1, C).transpose(1, 2)
        y = ops.attention(heads, heads, heads, dropout_p=0.2, seed=1, backend="native")
        x = x + y.transpose(1, 2).flatten(2)
        fused = ops.linear_cross_entropy(x, tables[2], targets, backend="native")
        loss = fused + ops.cross_entropy(x.flatten(0, 1), targets.flatten() % C, label_smoothing=0.1, backend="native")
        return [loss.detach(), *torch.autograd.grad(loss, tables)]

    results = []
    try:
        for n_threads, threshold in itertools.product([1, 2, 3, 8], [0, 2**40]):
            torch.set_num_threads(n_threads)
            set_machine("amd", threshold)
            results.append(step())
    finally:
        torch.set_num_threads(count)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("maker", ["amd", "intel", "other"])
def test_a_product_is_left_to_the_library_where_ours_was_not_measured(maker: str, set_machine) -> None:
    set_machine(maker, 0)
    for kernel in native.FASTER_THAN_LIBRARY:
        for instructions in ("avx512", "avx2", "generic"):
            reason = native._reason_for_library(kernel, maker, instructions, True)
            assert (reason is None) == (maker == "amd" and instructions != "generic")
        assert "another matrix library" in native._reason_for_library(kernel, "amd", "avx512", False)
    if maker != "amd":
        assert maker in native.reason_for_library("matmul")


def test_no_file_of_the_system_is_read(monkeypatch) -> None:
    """The loss chooses its chunks without asking the system for the size of its caches or memory."""
    import builtins
    import os

    def refuse(*args, **kwargs):
        raise AssertionError(f"asked the system: {args}")

    x, weight = torch.randn(300, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    ops.linear_cross_entropy(x, weight, torch.randint(50, (300,)))  # loads the modules that it needs
    for module, name in ((builtins, "open"), (os, "sysconf"), (os, "cpu_count")):
        monkeypatch.setattr(module, name, refuse)
    ops.linear_cross_entropy(x, weight, torch.randint(50, (300,))).backward()


def test_nobody_is_warned_that_another_backend_is_faster(monkeypatch) -> None:
    q, weight = torch.randn(1, 2, 1, 8), torch.ones(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.attention(q, q, q)
        assert "PyTorch's kernel is faster" in ops.explain("attention", q, q, q).reasons["native"]
        x = torch.zeros(2**11, 2**10)
        with torch.no_grad():
            ops.add_layer_norm(x, x, x[0])
            assert "large tensors" in ops.explain("add_layer_norm", x, x, x[0]).reasons["native"]
            assert "PyTorch's gelu" in ops.explain("activation", x).reasons["native"]
            assert (
                ops.explain("activation", x, x[0]).backend
                == ops.explain("activation", x, kind="relu2").backend
                == "native"
            )
        assert ops.explain("add_layer_norm", x, x, x[0]).backend == "native"
        monkeypatch.setattr(native, "instruction_set", lambda: "generic")
        for op, *arguments in (("activation", q), ("add_layer_norm", q, q, weight), ("attention", *[q[:, 0:1].mT] * 3)):
            getattr(ops, op)(*arguments)
            assert "AVX2" in ops.explain(op, *arguments).reasons["native"]
