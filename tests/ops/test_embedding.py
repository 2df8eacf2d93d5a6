"""ops.embedding: parity with the oracle, layouts, deterministic gradients of repeated tokens, errors."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt import ops
from fastgpt.ops import reference
from fastgpt.ops.embedding import CUDA_CHUNK, cuda_chunk, set_cuda_chunks
from fastgpt.parity import DTYPES, run_parity
from helpers import on_each_backend


def table(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(dtype: torch.dtype) -> None:
    report = run_parity(names=["embedding"], backends=["torch"], dtypes=[dtype])
    assert report.rows and not report.failures and not report.skips, str(report)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_shape_and_stride(data) -> None:
    B, T, C, V = (data.draw(st.integers(low, 5)) for low in (0, 0, 0, 1))
    offset, step = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    tokens = torch.randint(V, (step * T, B), generator=generator)[::step].t()
    if data.draw(st.booleans()):
        tokens = tokens.to(torch.int32)
    token_table = table(C, step * V, dtype=torch.float64).t()[::step]
    position_table = table(1, C, dtype=torch.float64, seed=1).expand(offset + T + 1, C)
    results = []
    for op in (ops.embedding, reference.embedding):
        leaves = [t.detach().requires_grad_() for t in (token_table, position_table)]
        out = op(tokens, *leaves, position_offset=offset)
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_output_is_not_a_view_of_the_table() -> None:
    tokens, tokens_table = torch.tensor([[1]]), torch.ones(2, 3)
    ops.embedding(tokens, tokens_table).fill_(5.0)
    assert torch.equal(tokens_table, torch.ones(2, 3))


def test_deterministic_and_leaves_its_inputs_alone() -> None:
    tokens = torch.randint(3, (16, 64), generator=torch.Generator().manual_seed(0))
    tables = table(3, 40), table(64, 40, seed=1)
    copies = [tokens.clone(), *(t.detach().clone() for t in tables)]
    runs = []
    for _ in range(2):
        out = ops.embedding(tokens, *tables)
        runs.append([out, *torch.autograd.grad(out.sin().sum(), tables)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(x, copy) for x, copy in zip((tokens, *tables), copies, strict=True))


def test_gradient_of_one_table_alone() -> None:
    tokens = torch.tensor([[0, 1, 1]])
    for wanted in (0, 1):
        tables = [table(4, 5).detach(), table(3, 5).detach()]
        tables[wanted].requires_grad_()
        ops.embedding(tokens, *tables).sum().backward()
        assert tables[wanted].grad is not None and tables[1 - wanted].grad is None


def test_compile_and_vmap() -> None:
    torch._dynamo.reset()
    tokens, tables = torch.tensor([[0, 2, 2], [1, 0, 3]]), (table(4, 5), table(9, 5, seed=1))
    compiled = torch.compile(lambda *a: ops.embedding(*a, position_offset=4), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tokens, *tables), ops.embedding(tokens, *tables, position_offset=4))
    mapped = torch.vmap(lambda row: ops.embedding(row[None], *tables)[0])(tokens)
    assert torch.equal(mapped, ops.embedding(tokens, *tables))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_dtype(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype):
        assert ops.embedding(torch.tensor([[0]]), table(1, 4), table(1, 4)).dtype == torch.float32


TOKENS, TABLE = torch.tensor([[0, 1], [2, 3]]), torch.randn(4, 6)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"tokens": torch.tensor([[0, 4]])}, IndexError, r"tokens: value 4 at position \(0, 1\) is outside \[0, 4\)"),
        ({"tokens": torch.tensor([[0], [-1]])}, IndexError, r"tokens: value -1 at position \(1, 0\)"),
        ({"tokens": TOKENS.float()}, TypeError, r"tokens: expected int64 \(or int32\) indices, got torch.float32"),
        ({"tokens": TOKENS.bool()}, TypeError, "tokens: expected int64"),
        ({"tokens": TOKENS[0]}, ValueError, "tokens: expected 2 dimensions"),
        ({"tokens": [[0]]}, TypeError, "tokens: expected a tensor, got list"),
        ({"tokens": TOKENS.to("meta")}, ValueError, "tokens: on meta"),
        ({"token_table": TABLE.long()}, TypeError, "token_table: expected float16"),
        ({"token_table": TABLE[None]}, ValueError, "token_table: expected 2 dimensions"),
        ({"token_table": TABLE[:0]}, IndexError, "token_table: has no rows"),
        ({"position_table": TABLE[:, :5]}, ValueError, r"position_table: expected shape \(P, 6\)"),
        ({"position_table": TABLE.half()}, TypeError, "position_table: has dtype torch.float16"),
        (
            {"position_table": TABLE[:1]},
            IndexError,
            r"tokens: positions 0\.\.1 do not fit the 1 rows of position_table",
        ),
        (
            {"position_table": TABLE, "position_offset": 3},
            IndexError,
            r"tokens: positions 3\.\.4 do not fit the 4 rows",
        ),
        ({"position_offset": -1}, ValueError, "position_offset: "),
        ({"position_offset": 2**63}, ValueError, "position_offset: expected a 64-bit integer"),
        ({"token_table": TABLE.to_sparse()}, TypeError, "token_table: expected a dense tensor"),
        ({"position_offset": 1.0}, TypeError, "position_offset: "),
        ({"position_offset": True}, TypeError, "position_offset: "),
    ],
)
@on_each_backend
def test_bad_arguments(backend: str, change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        ops.embedding(**{"tokens": TOKENS, "token_table": TABLE, "backend": backend, **change})


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("value", [4, -1, 2**31 - 1])
def test_tokens_out_of_range(value: int, index: torch.dtype, dtype: torch.dtype, backend: str) -> None:
    """With the gradient that a model asks for, and without; the first of two is named."""
    tokens = torch.tensor([[0, 1, 2], [3, value, -9]], dtype=index)
    for wants_gradient in (False, True):
        tables = [
            t.detach().requires_grad_(wants_gradient) for t in (table(4, 5, dtype=dtype), table(3, 5, dtype=dtype))
        ]
        with pytest.raises(IndexError) as error:
            ops.embedding(tokens, *tables, backend=backend)
        assert str(error.value) == f"tokens: value {value} at position (1, 1) is outside [0, 4)"


@on_each_backend
def test_no_tokens_need_no_rows(backend: str) -> None:
    assert ops.embedding(TOKENS[:, :0], TABLE[:0], backend=backend).shape == (2, 0, 6)
    assert ops.embedding(TOKENS[:0], TABLE, TABLE, backend=backend).shape == (0, 2, 6)


def test_chunks_of_cuda_devices() -> None:
    try:
        set_cuda_chunks("cuda:1", [(2, 1000, 16), (2, 50_000, 64)])
        calls = ((2, 1000), (2, 500), (2, 25_000), (2, 25_001), (2, 50_001), (4, 1000))
        found = [cuda_chunk("cuda:1", size, n) for size, n in calls]
        assert found == [16, CUDA_CHUNK, CUDA_CHUNK, 64, CUDA_CHUNK, CUDA_CHUNK]
        assert cuda_chunk("cuda:0", 2, 1000) == CUDA_CHUNK, "choices are for one device"
        for choice in (
            (2, 10),
            (2, 10, 32, 1),
            (2, "10", 32),
            (2, 10, 32.0),
            (3, 10, 32),
            (2, 0, 32),
            (2, 10, 20),
            (2, 10, 0),
            (2, 10, 256),
        ):
            with pytest.raises(ValueError, match=rf"chunks: {re.escape(str(choice))}: expected"):
                set_cuda_chunks("cuda:1", [(2, 10, 32), choice])
        assert cuda_chunk("cuda:1", 2, 1000) == 16, "one that is refused changes nothing"
    finally:
        set_cuda_chunks("cuda:1", [])
    assert cuda_chunk("cuda:1", 2, 1000) == CUDA_CHUNK
