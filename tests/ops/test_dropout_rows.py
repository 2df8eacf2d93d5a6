"""`rows_from`: parts of a batch drop what the whole batch drops, on every backend, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastgpt import ops, use_backend
from fastgpt.ops.attention import self_attention
from fastgpt.ops.dropout import dropout, philox_keep_mask, rows_from, within_rows
from fastgpt.ops.self_test import without_modes
from helpers import NATIVE, TRITON, random, tiny

B = 4
CPU = torch.device("cpu")
on_each = pytest.mark.parametrize("name", ["torch", NATIVE, TRITON])
Op = Callable[..., "Tensor | tuple[Tensor, ...]"]
# Each op with tensors of B sequences. Triton takes other kernels for short sequences of 16 bits, and for wide rows.
CASES: dict[str, tuple[Op, list[Tensor]]] = {
    "attention": (
        lambda q, k, v: ops.attention(q, k, v, dropout_p=0.4),
        [random(B, 2, 3, 8), random(B, 1, 5, 8, seed=1), random(B, 1, 5, 8, seed=2)],
    ),
    "blind queries": (lambda q, k: ops.attention(q, k, k, dropout_p=0.4), [random(B, 1, 6, 8), random(B, 1, 4, 8)]),
    "half": (lambda q: ops.attention(q, q, q, dropout_p=0.4), [random(B, 2, 5, 8, dtype=torch.bfloat16)]),
    "self_attention": (lambda qkv: self_attention(qkv, 2, dropout_p=0.4), [random(B, 5, 24)]),
    "add_layer_norm": (
        lambda x, residual: ops.add_layer_norm(x, residual, random(12, seed=3), dropout_p=0.4),
        [random(B, 5, 12), random(B, 5, 12, seed=1)],
    ),
    "wide rows": (
        lambda x, residual: ops.add_layer_norm(x, residual, random(4100, seed=3), dropout_p=0.4),
        [random(B, 1, 4100), random(B, 1, 4100, seed=1)],
    ),
    "dropout": (lambda x: dropout(x, 0.4), [random(B, 3, 5)]),
}


def results(op: Op, tensors: list[Tensor], rows: tuple[int, int] | None) -> tuple[list[Tensor], Tensor]:
    """Outputs and gradients of op(*tensors) as a part of a batch, or alone, and the state of torch's generator."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    torch.manual_seed(0)
    if rows is None:
        out = op(*leaves)
    else:
        with rows_from(*rows):
            out = op(*leaves)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    gradients = torch.autograd.grad([x.square().sum() for x in outputs], leaves)  # not inside of rows_from
    return [*(x.detach() for x in outputs), *gradients], torch.get_rng_state()


@on_each
@pytest.mark.parametrize("case", CASES)
def test_parts_of_a_batch_are_dropped_as_the_whole_is(case: str, name: str) -> None:
    op, tensors = CASES[case]
    with use_backend(name):
        whole, state = results(op, tensors, None)
        for part in (1, 2, 4):
            firsts = range(0, B, part) if name != "triton" else [B - part]  # the interpreter takes its time
            for first in firsts:
                ours, our_state = results(op, [x[first : first + part] for x in tensors], (first, B))
                assert torch.equal(our_state, state)
                for x, expected in zip(ours, whole, strict=True):
                    if name == "torch":  # whose products of matrices may depend on their number
                        torch.testing.assert_close(x, expected[first : first + part])
                    else:
                        assert torch.equal(x, expected[first : first + part])


@on_each
def test_rows_past_32_bits(name: str) -> None:
    """Both words of a row's number count. All keys have one weight here, and all values are 1 or of a norm."""
    first, H, T = 2**31 + 1, 3, 4
    with use_backend(name), rows_from(first, first + 2):
        q, v = torch.zeros(2, H, T, T), torch.eye(T).expand(2, H, T, T)
        weights = ops.attention(q, q, v, is_causal=False, dropout_p=0.5, seed=5)
        h = ops.add_layer_norm(torch.ones(2, 3, 16), torch.zeros(2, 3, 16), torch.ones(16), dropout_p=0.5, seed=5)[1]
    keep = philox_keep_mask(5, 0.5, 2 * H * T, T, CPU, first * H * T)
    assert torch.equal(weights != 0, keep.view(weights.shape))
    assert torch.equal(h != 0, philox_keep_mask(5, 0.5, 6, 16, CPU, first * 3).view(h.shape))


@pytest.mark.parametrize("name", [NATIVE])  # Triton's op takes the same number, and the formula takes long to compile
def test_compiled(name: str) -> None:
    """The number of the first sequence is a constant of a compiled function, and the length stays open."""
    torch._dynamo.reset()

    def block(x: Tensor) -> Tensor:
        y = ops.attention(x, x, x, dropout_p=0.4)
        return ops.add_layer_norm(y, x, torch.ones(8), dropout_p=0.4)[0]

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    with use_backend(name):
        for first, lengths in ((0, (5, 6)), (1, (6, 7))):
            for T, stance in zip(lengths, ("default", "fail_on_recompile"), strict=True):
                with torch.compiler.set_stance(stance):
                    ours, state = results(compiled, [random(2, 2, T, 8)], (first, B))
                expected, expected_state = results(block, [random(2, 2, T, 8)], (first, B))
                torch.testing.assert_close(ours, expected)
                assert torch.equal(state, expected_state)


@on_each
def test_gradients_of_the_parts_of_a_gpt_add_up(name: str) -> None:
    model, idx = tiny(n_layer=1, n_head=1, dropout=0.3).train(), torch.arange(B * 6).view(B, 6) % 7
    parameters = list(model.parameters())

    def loss_and_gradients(first: int, end: int) -> list[Tensor]:
        torch.manual_seed(1)
        with rows_from(first, B):
            loss = model.loss(idx[first:end], idx[first:end]) * ((end - first) / B)
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    with use_backend(name):
        torch.manual_seed(1)
        loss = model.loss(idx, idx)
        whole = [loss.detach(), *torch.autograd.grad(loss, parameters)]
        for ends in ((0, 1, 4),) if name == "triton" else ((0, 1, 4), (0, 2, 4), (0, 1, 2, 3, 4)):
            parts = [loss_and_gradients(*part) for part in pairwise(ends)]
            torch.testing.assert_close([sum(x) for x in zip(*parts, strict=True)], whole, atol=1e-6, rtol=1e-5)


def test_it_ends_and_nests() -> None:
    x = torch.ones(1, 64)
    draw = lambda: dropout(x, 0.5, torch.Generator().manual_seed(3))  # noqa: E731
    alone = draw()
    with rows_from(1, 2):
        second = draw()
        with rows_from(0, 2):
            assert torch.equal(draw(), alone)
        assert torch.equal(draw(), second) and not torch.equal(second, alone)
        assert not without_modes(CPU, within_rows)  # a self-test has a batch of its own
    assert torch.equal(draw(), alone)
    with pytest.raises(RuntimeError, match="stop"), rows_from(1, 2):
        raise RuntimeError("stop")
    assert torch.equal(draw(), alone)


@pytest.mark.parametrize("first, n", [(-1, 2), (2, 2), (0, 0)])
def test_bad_rows(first: int, n: int) -> None:
    with pytest.raises(ValueError, match=r"^first_sequence: expected"), rows_from(first, n):
        pass


def test_a_call_that_does_not_fit_is_refused() -> None:
    x, row = torch.ones(3, 2, 8), torch.ones(8)
    with rows_from(2, 4):
        for call in (
            lambda: dropout(x, 0.5),
            lambda: dropout(row, 0.5),
            lambda: ops.attention(x[:, None], x[:, None], x[:, None], dropout_p=0.5),
            lambda: ops.add_layer_norm(x, x, row, dropout_p=0.5),
        ):
            with pytest.raises(ValueError, match=r"^x: dropout inside rows_from"):
                call()
        assert ops.add_layer_norm(x, x, row)[0].shape == x.shape  # nothing is dropped
