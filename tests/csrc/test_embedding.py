"""embedding in C++: parity with each instruction set, determinism, the registered ops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastgpt import ops
from fastgpt.ops.backend import unavailable
from fastgpt.parity import run_parity

REASON = unavailable("native", "cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def tables(V: int, P: int, C: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(V * C)
    make = [torch.randn(n, C, generator=generator).to(dtype).requires_grad_() for n in (V, P)]
    return make[0], make[1]


def test_parity(instructions: str) -> None:
    report = run_parity(names=["embedding"], backends=["native"], dtypes=[torch.float32, torch.float16, torch.bfloat16])
    assert report.rows and not report.failures and not report.skips, str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_width(instructions: str, dtype: torch.dtype) -> None:
    """Widths about those of a vector and of a strip of 128 columns."""
    tokens = torch.tensor([[0, 3, 3], [4, 3, 0]])
    for C in (0, 1, 3, 4, 5, 8, 15, 16, 17, 33, 127, 128, 129, 300):
        token_table, position_table = tables(5, 4, C, dtype)
        out = ops.embedding(tokens, token_table, position_table, position_offset=1, backend="native")
        assert torch.equal(out, F.embedding(tokens, token_table) + position_table[1:])
        upstream = torch.randn(out.shape).to(dtype)
        d_tokens, d_positions = torch.autograd.grad(out, (token_table, position_table), upstream)
        exact = torch.zeros(5, C, dtype=torch.float64).index_add_(0, tokens.flatten(), upstream.double().flatten(0, 1))
        torch.testing.assert_close(d_tokens.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert (d_positions[0] == 0).all()
        exact = upstream.double().sum(0)
        torch.testing.assert_close(d_positions[1:].double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("kind", ["uniform", "one token", "zipf"])
def test_duplicates_are_summed_in_float32(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    if kind == "one token":
        tokens, V = torch.full((16, 256), 7), 65
    elif kind == "uniform":
        tokens, V = torch.randint(65, (16, 256), generator=generator), 65
    else:
        odds = 1.0 / torch.arange(1, 50305, dtype=torch.float64)
        tokens, V = torch.multinomial(odds, 4096, replacement=True, generator=generator).view(16, 256), 50304
    token_table = torch.zeros(V, 32, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(16, 256, 32, generator=generator).bfloat16()
    out = ops.embedding(tokens, token_table, backend="native")
    (gradient,) = torch.autograd.grad(out, token_table, upstream)
    exact = torch.zeros(V, 32, dtype=torch.float64).index_add_(0, tokens.flatten(), upstream.double().flatten(0, 1))
    torch.testing.assert_close(gradient.double(), exact, rtol=2**-8, atol=1e-3)


def test_large_buffers() -> None:
    """A result above 8 MB is in a block of memory that is used again. What the block held before must never appear."""
    token_table, _ = tables(50304, 1, 64)
    tokens = torch.randint(50304, (64, 1024))
    for seed in range(3):
        upstream = torch.full((64, 1024, 64), float(seed + 1))
        out = ops.embedding(tokens, token_table, backend="native")
        assert torch.equal(out, F.embedding(tokens, token_table))
        (gradient,) = torch.autograd.grad(out, token_table, upstream)
        counts = torch.bincount(tokens.flatten(), minlength=50304)
        assert torch.equal(gradient, (counts * (seed + 1.0))[:, None].expand(-1, 64))
        gradient.fill_(float("nan"))


def test_deterministic_for_any_number_of_threads() -> None:
    token_table, position_table = tables(65, 256, 384)
    tokens = torch.randint(65, (16, 256))
    tokens[:, :100] = 1
    upstream = torch.randn(16, 256, 384)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            out = ops.embedding(tokens, token_table, position_table, backend="native")
            results.append((out, *torch.autograd.grad(out, (token_table, position_table), upstream)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_strides() -> None:
    wide, _ = tables(10, 1, 40)
    tokens = torch.randint(10, (6, 4), dtype=torch.int32).t()
    for table in (wide[:, :20], wide[:, ::2], wide[::2, :20].expand(5, 20), wide.t()[:10, :10]):
        index = tokens % table.shape[0]
        out = ops.embedding(index, table, table[:1].expand(9, -1), backend="native")
        assert torch.equal(out, F.embedding(index, table) + table[:1])
        (ours,) = torch.autograd.grad(out.sum(), wide)  # a stride-0 gradient
        (theirs,) = torch.autograd.grad((F.embedding(index, table) + table[:1]).sum(), wide)
        torch.testing.assert_close(ours, theirs)


def test_bad_tokens() -> None:
    token_table, _ = tables(10, 1, 4)
    for value in (10, -1, 2**40):
        tokens = torch.zeros(2, 3, dtype=torch.int64)
        tokens[1, 2] = value
        with pytest.raises(IndexError, match=rf"tokens: value {value} at position \(1, 2\) is outside \[0, 10\)"):
            ops.embedding(tokens, token_table, backend="native")
        with pytest.raises(IndexError, match="flat position 5"):
            torch.ops.fastgpt.embedding_native(tokens, token_table, None, 0)
        with pytest.raises(IndexError, match="flat position 5"):
            torch.ops.fastgpt.embedding_native_backward(torch.ones(2, 3, 4), tokens, 10, 0, 0, True, False)


def test_empty() -> None:
    token_table, position_table = tables(10, 3, 4)
    for shape in ((0, 3), (3, 0), (0, 0)):
        tokens = torch.zeros(shape, dtype=torch.int64)
        out = ops.embedding(tokens, token_table, position_table, backend="native")
        assert out.shape == (*shape, 4)
        for gradient in torch.autograd.grad(out.sum(), (token_table, position_table)):
            assert (gradient == 0).all()


def test_opcheck() -> None:
    token_table, position_table = tables(10, 5, 4)
    tokens = torch.randint(10, (2, 3))
    op, backward = torch.ops.fastgpt.embedding_native, torch.ops.fastgpt.embedding_native_backward
    torch.library.opcheck(op.default, (tokens, token_table, position_table, 2))
    torch.library.opcheck(op.default, (tokens, token_table.detach(), None, 0))
    for wants in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(backward.default, (torch.randn(2, 3, 4), tokens, 10, 5, 1, *wants))


def test_double_backward_raises() -> None:
    token_table, _ = tables(10, 1, 4)
    out = ops.embedding(torch.randint(10, (2, 3)), token_table, backend="native")
    (gradient,) = torch.autograd.grad((out**2).sum(), token_table, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(gradient.sum(), token_table)


def test_compile_with_one_table_twice() -> None:
    torch._dynamo.reset()
    table, _ = tables(8, 1, 4)
    tokens = torch.randint(8, (2, 5))

    def loss(table, position_offset):
        x = ops.embedding(tokens, table, table, position_offset=position_offset, backend="native")
        return (x**2).sum()

    compiled = torch.compile(loss, fullgraph=True)
    for position_offset in (0, 1, 3):
        (ours,) = torch.autograd.grad(compiled(table, position_offset), table)
        (theirs,) = torch.autograd.grad(loss(table, position_offset), table)
        torch.testing.assert_close(ours, theirs)
