"""What users of neighbouring projects reported about attention (see test_citations.py)."""

from __future__ import annotations

import math

import pytest
import torch

from fastgpt import ops
from fastgpt.ops import reference
from helpers import agrees, close, heads, integers, on_triton, outcome, random, tiny


@on_triton
@pytest.mark.parametrize("Tq", [1, 3, 7])
def test_attention_fewer_queries_see_the_whole_past(name, Tq):
    """Dao-AILab/flash-attention#282, Dao-AILab/flash-attention#402, NVIDIA/cutlass#2336: aligned to the top left."""
    q, k, v = heads(1, 2, 2, Tq, 9, 4)
    got = agrees(ops.attention, q, k, v, name=name)
    last = torch.softmax(q[0, 0, -1].double() @ k[0, 0].double().t() / 2.0, -1) @ v[0, 0].double()
    close(got[0, 0, -1], last)


@on_triton
def test_attention_queries_without_keys_give_zeros(name):
    """Dao-AILab/flash-attention#1778, pytorch/pytorch#103963, Xilinx/brevitas#1591: NaN forward or backward."""
    q, k, v = heads(2, 2, 1, 7, 3, 8)
    got = agrees(ops.attention, q, k, v, name=name)
    assert (got[:, :, :4] == 0).all() and got[:, :, 4:].abs().min() > 0
    _, gradients = outcome(ops.attention, (q, k, v), backend=name, dropout_p=0.5, seed=3)
    assert all(gradient.isfinite().all() for gradient in gradients) and (gradients[0][:, :, :4] == 0).all()


@on_triton
def test_attention_the_future_has_no_say(name):
    """pytorch/pytorch#101967: a NaN in a masked key reached the rows that do not see it."""
    q, k, v = heads(1, 1, 1, 20, 20, 16)
    before = ops.attention(q, k, v, backend=name)
    k[:, :, 13], v[:, :, 13] = math.nan, 1e30
    after = ops.attention(q, k, v, backend=name)
    assert torch.equal(before[:, :, :13], after[:, :, :13]) and after[:, :, 13:].isnan().all()


@on_triton
@pytest.mark.parametrize("causal", [True, False])
def test_attention_neighbouring_heads_share_keys(name, causal):
    """XunhaoLai/native-sparse-attention-triton#27, onnx/onnx#7274: heads shared in turns, wrong unless square."""
    q, k, v = heads(2, 6, 2, 5, 5, 4)
    got = agrees(ops.attention, q, k, v, name=name, is_causal=causal)
    for head in range(6):
        one = slice(head // 3, head // 3 + 1)
        alone = ops.attention(q[:, head : head + 1], k[:, one], v[:, one], is_causal=causal, backend=name)
        close(got[:, head : head + 1], alone)


def test_attention_heads_that_do_not_divide():
    """Dao-AILab/flash-attention#362: 5 heads of q and 2 of k."""
    with pytest.raises(ValueError, match="k: its 2 heads do not divide the 5 heads of q"):
        ops.attention(*heads(1, 5, 2, 3, 3, 4))


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_attention_scale_that_is_not_positive(scale):
    """NVIDIA/cudnn-frontend#804, pytorch/pytorch#105202: -inf of the mask times 0 is NaN, times -1 is +inf."""
    got = agrees(ops.attention, *heads(1, 2, 2, 6, 6, 4), name="torch", scale=scale)
    if scale == 0.0:
        v = heads(1, 2, 2, 6, 6, 4)[2]
        close(got, v.cumsum(2) / torch.arange(1, 7)[:, None])


@on_triton
def test_attention_scores_far_below_zero(name):
    """flashinfer-ai/flashinfer#4267: every score of a row lay below the finite number that stood for -inf."""
    q, k, v = heads(1, 1, 1, 4, 4, 16)
    k = k.clone()
    q[..., 0], k[..., 0] = -600.0, 1200.0
    got = ops.attention(q, k, v, backend=name)
    close(got, reference.attention(q.double(), k.double(), v.double()), rtol=1e-2, atol=5e-2)
    assert got.abs().max(-1).values.min() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention_of_very_large_numbers(dtype):
    """pytorch/pytorch#121558: NaN where a score of 10^11 met its own maximum."""
    q = torch.full((1, 1, 1, 64), 131072.0, dtype=dtype)
    assert torch.equal(ops.attention(q, q, q), q)


@on_triton
@pytest.mark.parametrize("name_of_op", ["attention", "add_layer_norm"])
def test_attention_dropout_backward_has_the_forwards_mask(name, name_of_op):
    """Dao-AILab/flash-attention#1251, Dao-AILab/flash-attention#180: another mask in the backward pass, or the norm."""
    if name_of_op == "attention":
        agrees(ops.attention, *heads(2, 2, 1, 6, 9, 8), name=name, dropout_p=0.4, seed=1234567)
        return
    x, residual, weight, bias = random(6, 32), random(6, 32, seed=1), random(32, seed=2), random(32, seed=3)
    options = {"dropout_p": 0.4, "seed": 1234567}

    def total(run, **more):
        return lambda *given: sum(part.square().sum() for part in run(*given, **options, **more))

    got, gradients = outcome(total(ops.add_layer_norm, backend=name), (x, residual, weight, bias))
    want, exact = outcome(total(reference.add_layer_norm), (x, residual, weight, bias), dtype=torch.float64)
    close(got, want)
    for gradient, expected in zip(gradients, exact, strict=True):
        close(gradient, expected, atol=1e-3)


@on_triton
def test_attention_dropout_is_not_the_same_every_time(name):
    """Dao-AILab/flash-attention#2088: seed and offset were constants, so each call dropped the same weights."""
    q, k, v = heads(1, 2, 2, 8, 8, 4)
    torch.manual_seed(5)
    first, second = (ops.attention(q, k, v, dropout_p=0.5, backend=name) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, ops.attention(q, k, v, dropout_p=0.5, backend=name))
    assert not torch.equal(first, second)


@on_triton
def test_attention_backward_repeats_to_the_bit(name):
    """Dao-AILab/flash-attention#429: the backward pass gave other gradients each time."""
    q, k, v = heads(2, 2, 1, 20, 20, 16)
    _, first = outcome(ops.attention, (q, k, v), backend=name)
    _, second = outcome(ops.attention, (q, k, v), backend=name)
    assert all(map(torch.equal, first, second))


@on_triton
def test_attention_incoming_gradients_of_any_strides(name):
    """Dao-AILab/flash-attention#355, facebookresearch/xformers#282: .sum() hands back a gradient of strides 0."""
    q, k, v = heads(2, 3, 3, 5, 5, 8)
    agrees(ops.attention, q, k, v, name=name)  # outcome() sums
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    for upstream in (random(8, 5, 3, 2).permute(3, 2, 1, 0), random(2, 3, 1, 8).expand(2, 3, 5, 8)):
        got = torch.autograd.grad(ops.attention(*leaves, backend=name), leaves, upstream)
        want = torch.autograd.grad(reference.attention(*exact), exact, upstream.double())
        for gradient, expected in zip(got, want, strict=True):
            close(gradient, expected)


@on_triton
def test_attention_values_of_another_layout(name):
    """ROCm/pytorch#3230, flagos-ai/FlagGems#5896, Dao-AILab/flash-attention#818: v a transposed view, q and k not."""
    q, k, v = heads(2, 3, 3, 6, 6, 8)
    transposed = v.transpose(1, 2).contiguous().transpose(1, 2)
    close(ops.attention(q, k, transposed, backend=name), reference.attention(q.double(), k.double(), v.double()))
    wide = torch.zeros(2, 3, 6, 16)
    wide[..., ::2] = k
    got = ops.attention(q, wide[..., ::2], v[..., :1].expand_as(v), backend=name)
    close(got, reference.attention(q.double(), k.double(), v[..., :1].expand_as(v).double()))


def test_attention_dropout_ends_with_training():
    """pytorch/pytorch#124464, meta-pytorch/torchtune#1791: attention's dropout stayed on in eval mode."""
    model, idx = tiny(dropout=0.5), integers(11, 2, 8)
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])
    assert torch.equal(model(idx)[0], tiny(dropout=0.0)(idx)[0])
