"""Calls of PyTorch's attention that `ops.attention` takes, and those that it must not take."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgpt import ops
from fastgpt.patched_attention import CallsAttention, calls_attention, scaled_dot_product_attention
from helpers import close, heads, random
from patched_models import OwnAttention, OwnBlock

SQUARE = heads(2, 4, 4, 6, 6, 8)
LONGER = heads(2, 4, 4, 3, 6, 8)  # 3 queries, 6 keys
GROUPED = heads(2, 4, 2, 6, 6, 8)
MASK = random(6, 6) > 0


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """The options of each call of `ops.attention`."""
    called: list[dict] = []
    attention = ops.attention

    def call(*args, **kwargs):
        called.append(kwargs)
        return attention(*args, **kwargs)

    monkeypatch.setattr(ops, "attention", call)
    return called


@pytest.mark.parametrize(
    "qkv, options",
    [
        (SQUARE, {"is_causal": True}),
        (SQUARE, {}),
        (LONGER, {"scale": 0.3}),
        (GROUPED, {"is_causal": True, "enable_gqa": True}),
    ],
)
def test_the_op_computes_what_pytorchs_function_does(calls, qkv, options):
    close(scaled_dot_product_attention(*qkv, **options), F.scaled_dot_product_attention(*qkv, **options))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "qkv, options",
    [
        (LONGER, {"is_causal": True}),  # aligned to the upper left, which the op does not do
        (SQUARE, {"attn_mask": MASK}),
        (tuple(x[0] for x in SQUARE), {"is_causal": True}),  # (H, T, D)
        ((SQUARE[0], SQUARE[1], random(2, 4, 6, 5)), {}),  # values of another width
        ((SQUARE[0], *(x[:1] for x in SQUARE[1:])), {}),  # keys for every sequence
        (heads(1, 1, 1, 4, 4, 300), {}),
        ((SQUARE[0], *(x[:, :, :0] for x in SQUARE[1:])), {}),  # no keys
    ],
)
def test_other_calls_are_pytorchs(calls, qkv, options):
    got, want = scaled_dot_product_attention(*qkv, **options), F.scaled_dot_product_attention(*qkv, **options)
    torch.testing.assert_close(got, want, equal_nan=True, rtol=0, atol=0)
    assert calls == []


def test_wrong_input_raises_what_pytorch_raises():
    q, k, v = GROUPED
    with pytest.raises(RuntimeError):
        scaled_dot_product_attention(q, k, v)  # fewer heads, and enable_gqa is not given
    with pytest.raises(RuntimeError):
        scaled_dot_product_attention(q, q.double(), q)


def test_which_classes_call_it():
    assert calls_attention(OwnAttention)
    assert not calls_attention(OwnBlock), "what it calls does, and is a module of its own"
    assert not calls_attention(nn.MultiheadAttention), "PyTorch's own modules are not looked into"


def test_only_calls_in_the_modules_own_forward_are_taken(calls):
    class Taken(CallsAttention, OwnAttention):
        pass

    module, x = Taken(32, 4, 0.0), random(2, 6, 32)
    got = module(x)
    assert len(calls) == 1
    close(got, OwnAttention.forward(module, x))
    F.scaled_dot_product_attention(*SQUARE)
    assert len(calls) == 1


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def registered():
    """The function that is registered, and that of "sdpa"."""
    pytest.importorskip("transformers", minversion="5")
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from fastgpt import patched_attention

    patched_attention.register()
    return patched_attention.attention_of_transformers, sdpa_attention_forward


class Caller(nn.Module):
    is_causal = True
    num_key_value_groups = 1


@pytest.mark.parametrize(
    "qkv, options, is_taken",
    [
        (SQUARE, {"attention_mask": None}, True),
        (SQUARE, {"attention_mask": None, "is_causal": False, "scaling": 0.2}, True),
        (LONGER, {"attention_mask": None}, True),  # a cache of fixed size, whose last keys are not filled yet
        (tuple(x[:, :, :1] if i == 0 else x for i, x in enumerate(SQUARE)), {"attention_mask": None}, True),
        (SQUARE, {"attention_mask": MASK.expand(2, 1, 6, 6)}, False),
        (SQUARE, {"attention_mask": None, "position_bias": random(1, 4, 6, 6)}, False),
    ],
)
def test_the_registered_function_computes_what_sdpa_does(calls, registered, qkv, options, is_taken):
    got, want = (function(Caller(), *qkv, **options) for function in registered)
    close(got[0], want[0])
    assert got[0].shape == want[0].shape and got[0].is_contiguous() and got[1] is None
    assert len(calls) == is_taken


def test_grouped_heads(calls, registered):
    class Grouped(Caller):
        num_key_value_groups = 2

    got, want = (function(Grouped(), *GROUPED, attention_mask=None) for function in registered)
    close(got[0], want[0])
    assert len(calls) == 1


def test_what_sdpa_refuses_is_refused(registered):
    for function in registered:
        with pytest.raises(ValueError, match="softcap"):
            function(Caller(), *SQUARE, attention_mask=None, softcap=30.0)
