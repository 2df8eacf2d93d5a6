"""The self-test of attention compares a few heads, piece by piece: the values of the whole call, in bounded memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt.ops import compared_heads, reference, self_test
from fastgpt.ops.accuracy import exact, max_error, outputs_and_gradients
from fastgpt.ops.attention import attention_on_torch
from fastgpt.ops.compared_heads import MOST_SCORES, chosen, heads_of, pieces, results_of_heads, separate
from fastgpt.ops.variants import Attention, Draw

pytest.importorskip("triton")

CPU = torch.device("cpu")
ALL = (True, True, True)


def call_of(B, H, Hkv, Tq, Tk, D=8, *, is_causal=True, dropout=False, asked=ALL, route="attention") -> Attention:
    return Attention(torch.float32, B, H, Hkv, Tq, Tk, D, is_causal, dropout, None, asked, route)


CALLS = {
    "all heads": call_of(1, 2, 2, 9, 9),
    "some heads": call_of(3, 4, 4, 9, 9),
    "groups": call_of(2, 6, 3, 7, 11),
    "dropout": call_of(3, 4, 2, 9, 9, dropout=True),
    "more queries than keys": call_of(2, 4, 2, 30, 5, dropout=True),
    "every key is seen": call_of(2, 3, 3, 10, 12, is_causal=False, dropout=True),
    "forward alone": call_of(2, 3, 3, 1, 40, asked=()),
    "the gradient of k": call_of(2, 3, 3, 8, 8, asked=(False, True, False)),
    "side by side": call_of(2, 4, 4, 13, 13, dropout=True, route="self_attention"),
    "a cache": call_of(2, 4, 2, 3, 40, asked=(), route="attention_cached"),
    "a small cache": call_of(2, 2, 2, 4, 5, asked=(), route="attention_cached"),
}


@pytest.mark.parametrize("most_scores", [MOST_SCORES, 30])
@pytest.mark.parametrize("name", CALLS)
def test_they_have_the_values_of_the_whole_call(name, most_scores, monkeypatch) -> None:
    monkeypatch.setattr(compared_heads, "MOST_SCORES", most_scores)
    call = CALLS[name]
    tensors, options = call.inputs(Draw(CPU))
    upstream = Draw(CPU).normal(*call.output_shape, dtype=call.dtype)
    found = results_of_heads(reference.attention, call, tensors, options, upstream, exact)

    separated = separate(call, tensors | {"out": upstream})
    grad = exact(separated.pop("out"))
    doubled = {which: exact(tensor) for which, tensor in separated.items()}
    options.pop("n_head", None)
    asked = [which for which, is_asked in zip("qkv", call.asked or (False,) * 3, strict=True) if is_asked]
    whole = outputs_and_gradients(reference.attention, doubled, options, asked, lambda out: grad)
    expected = heads_of(call._replace(route="attention"), whole)
    assert found.keys() == expected.keys() == {"out", *(f"d {which}" for which in asked)}
    for which, value in expected.items():
        assert found[which].shape == value.shape and max_error(found[which], value) < 1e-13
    if most_scores == 30 and 1 < call.Tq <= call.Tk:
        n_pieces = len(list(pieces(call._replace(Tk=doubled["k"].shape[2]))))
        assert n_pieces > len(chosen(call)) * call.H // call.Hkv


def test_which_heads() -> None:
    assert chosen(call_of(1, 1, 1, 5, 5)) == [(0, 0)]
    assert chosen(call_of(1, 8, 2, 5, 5)) == [(0, 0), (0, 1)]
    assert chosen(call_of(16, 12, 12, 5, 5)) == [(0, 0), (8, 0), (15, 11)]


def in_float32(q, k, v, *, n_head=None, **options) -> torch.Tensor:
    options.pop("seed", None)
    return attention_on_torch(q, k, v, seed=7, **options)


class WideTensors(TorchDispatchMode):
    """The number of elements of the largest tensor of 8 bytes an element that an operation gives."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, torch.Tensor) and result.element_size() == 8:
                self.largest = max(self.largest, result.numel())
        return results


@pytest.mark.parametrize("dropout", [False, True])
def test_the_memory_of_the_formula_is_bounded(dropout) -> None:
    """One head of this call has more scores, and all heads have 70 times as many."""
    call = call_of(8, 8, 8, 1100, 1100, dropout=dropout)
    assert call.Tq * call.Tk > MOST_SCORES
    with WideTensors() as made:
        tensors, options = call.inputs(Draw(CPU))
        upstream = torch.zeros(call.output_shape)
        results_of_heads(reference.attention, call, tensors, options, upstream, exact)
    assert MOST_SCORES // 2 < made.largest <= 1.01 * MOST_SCORES
    assert call.B * call.H * call.Tq * call.Tk > 70 * made.largest


def test_no_part_of_a_self_test_makes_a_larger_tensor(monkeypatch) -> None:
    monkeypatch.setattr(compared_heads, "MOST_SCORES", 2**12)
    call = call_of(8, 8, 8, 100, 100, asked=())
    with WideTensors() as made:
        outcome = self_test.measure("attention", "triton", in_float32, CPU, call)
    assert outcome.passed, outcome.figures
    assert made.largest <= 2**13 < call.B * call.H * call.Tq * call.D


# (batch, head) -> what the self-test says; heads (0, 0), (1, 0) and (1, 2) are compared
FAULTS = {
    "wrong, compared": ((1, 2), lambda out, turn: out * 1.1, "out: error"),
    "wrong, in the middle": ((1, 0), lambda out, turn: out * 1.1, "out: error"),
    "not finite elsewhere": ((0, 1), lambda out, turn: out * torch.nan, "out: not finite in a head that is not among"),
    "other bits elsewhere": ((0, 2), lambda out, turn: out + turn % 2, "out: two runs on the same inputs gave differ"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(fault) -> None:
    (batch, head), spoil, says = FAULTS[fault]
    turns = itertools.count()

    def wrong(*args, **options):
        out = in_float32(*args, **options).clone()
        out[batch, head] = spoil(out[batch, head], next(turns))
        return out

    call = call_of(2, 3, 3, 20, 20, asked=())
    assert self_test.measure("attention", "triton", in_float32, CPU, call).passed
    outcome = self_test.measure("attention", "triton", wrong, CPU, call)
    assert not outcome.passed and outcome.is_kept and outcome.figures.startswith(says)


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_a_fault_in_the_gradient_of_one_head(which) -> None:
    def wrong(q, k, v, **options):
        heads = {"q": q, "k": k, "v": v}
        x = heads[which]
        heads[which] = torch.cat([x[:, :-1], x[:, -1:] + 0.1 * (x[:, -1:] - x[:, -1:].detach())], dim=1)
        return in_float32(**heads, **options)

    outcome = self_test.measure("attention", "triton", wrong, CPU, call_of(2, 4, 2, 20, 20))
    assert not outcome.passed and outcome.figures.startswith(f"d {which}: error")
