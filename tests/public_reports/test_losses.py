"""What users of neighbouring projects reported about cross-entropy and linear cross-entropy (see test_citations.py)."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F

from fastgpt import ops
from fastgpt.ops import reference
from helpers import agrees, close, heads, integers, on_native, outcome, random, tiny


@on_native
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_numerics_smoothing_leaves_ignored_rows_out(name, reduction):
    """pytorch/pytorch#73205: label smoothing counted the uniform part of ignored rows."""
    logits, targets = random(7, 5), torch.tensor([0, -100, 4, 2, -100, 1, 3])
    got = agrees(ops.cross_entropy, logits, targets, name=name, reduction=reduction, label_smoothing=0.3)
    kept = targets != -100
    alone = ops.cross_entropy(logits[kept], targets[kept], reduction=reduction, label_smoothing=0.3, backend=name)
    close(got[kept] if reduction == "none" else got, alone)


@on_native
def test_numerics_smoothing_of_the_fused_head(name):
    """linkedin/Liger-Kernel#243: the fused linear cross-entropy dropped its label_smoothing."""
    x, head, targets = random(6, 4), random(9, 4, seed=1), integers(9, 6)
    smooth = agrees(ops.linear_cross_entropy, x, head, targets, name=name, label_smoothing=0.25)
    assert abs(smooth - ops.linear_cross_entropy(x, head, targets, backend=name)) > 1e-2


@on_native
def test_numerics_smoothing_shares_out_eps_over_all_classes(name):
    """paiml/aprender#2199, pytorch/pytorch#148884: a class off the target got another share than eps / C."""
    p = torch.tensor([0.5, 0.25, 0.25])
    q = torch.tensor([0.8 + 0.2 / 3, 0.2 / 3, 0.2 / 3])
    got = ops.cross_entropy(p.log()[None], torch.tensor([0]), label_smoothing=0.2, backend=name)
    close(got, -(q * p.log()).sum())


@on_native
@pytest.mark.parametrize("smoothing", [0.0, 0.4])
def test_numerics_class_weights_divide_the_mean(name, smoothing):
    """linkedin/Liger-Kernel#420, pytorch/pytorch#104776: class weights, smoothing and "mean" together."""
    logits, targets = random(8, 4), torch.tensor([3, 0, -100, 2, 2, 1, 0, 3])
    weight = torch.tensor([0.1, 3.0, 0.0, 1.5])
    agrees(ops.cross_entropy, logits, targets, name=name, weight=weight, label_smoothing=smoothing)
    halves = {"weight": weight.half(), "label_smoothing": smoothing, "rtol": 4e-3, "atol": 1e-3}
    agrees(ops.cross_entropy, logits.half(), targets, name=name, **halves)
    if smoothing == 0.0:
        each = -torch.log_softmax(logits.double(), -1)
        kept = targets[targets != -100]
        want = sum(weight[t].item() * each[i, t] for i, t in enumerate(targets.tolist()) if t >= 0) / weight[kept].sum()
        close(ops.cross_entropy(logits, targets, weight=weight, backend=name), want)


@on_native
def test_numerics_nothing_to_count(name):
    """pytorch/pytorch#116349, pytorch/pytorch#70348: every target is ignored."""
    x, head, targets = random(5, 4), random(6, 4, seed=1), torch.full((5,), -100)
    for reduction, want in (("mean", torch.tensor(math.nan)), ("sum", torch.tensor(0.0)), ("none", torch.zeros(5))):
        loss, gradients = outcome(ops.linear_cross_entropy, (x, head, targets), backend=name, reduction=reduction)
        close(loss, want)
        assert all((gradient == 0).all() for gradient in gradients), "an update by it changes nothing"
        loss, (gradient,) = outcome(ops.cross_entropy, (x, targets), backend=name, reduction=reduction)
        close(loss, want)
        assert (gradient == 0).all()


@on_native
@pytest.mark.parametrize("bad", [-4, -1, 5, 2**40])
def test_numerics_a_target_outside_is_an_error(name, bad):
    """pytorch/pytorch#12670: any negative target counted as ignored, whatever ignore_index was."""
    targets = torch.tensor([1, -2, bad, 0])
    with pytest.raises(IndexError, match=re.escape(f"targets: value {bad} at position (2,)")):
        ops.cross_entropy(random(4, 5), targets, ignore_index=-2, reduction="none", backend=name)
    with pytest.raises(IndexError, match=re.escape(f"targets: value {bad} at position (2,)")):
        ops.linear_cross_entropy(random(4, 3), random(5, 3), targets, ignore_index=-2, backend=name)


@on_native
def test_numerics_an_ignored_class_stays_a_class(name):
    """pytorch/pytorch#63004: with ignore_index a valid class, its rows are left out and its logit is not."""
    logits, targets = random(6, 3), torch.tensor([0, 1, 2, 0, 2, 1])
    got = agrees(ops.cross_entropy, logits, targets, name=name, ignore_index=0)
    close(got, -torch.log_softmax(logits, -1)[[1, 2, 4, 5], [1, 2, 2, 1]].mean())
    _, (gradient,) = outcome(ops.cross_entropy, (logits, targets), backend=name, ignore_index=0)
    assert (gradient[[0, 3]] == 0).all() and (gradient[[1, 2, 4, 5], 0] > 0).all()


@on_native
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_numerics_ignore_index_beyond_the_classes(name, reduction):
    """pytorch/pytorch#15508: ignore_index=255 with three classes failed for reduction="none"."""
    targets = torch.tensor([0, 255, 2, 255])
    agrees(ops.cross_entropy, random(4, 3), targets, name=name, ignore_index=255, reduction=reduction)


@on_native
@pytest.mark.parametrize("place", [0, 31, 2047, 2048, 4999])
def test_numerics_all_logits_but_one_are_masked(name, place):
    """Dao-AILab/flash-attention#1930: with -inf everywhere but in one place the loss was NaN, for some places."""
    logits = torch.full((2, 5000), -math.inf)
    logits[:, place] = 7.0
    loss, (gradient,) = outcome(ops.cross_entropy, (logits, torch.tensor([place, place])), backend=name)
    assert loss == 0.0 and (gradient == 0.0).all()


@on_native
def test_numerics_a_masked_logit_beside_the_target(name):
    """google-deepmind/optax#896: 0 * -inf made the loss NaN where a class off the target was masked."""
    logits, targets = random(4, 6), torch.tensor([1, 5, 3, 0])
    logits[:, [2, 4]] = -math.inf
    loss, (gradient,) = outcome(ops.cross_entropy, (logits, targets), backend=name)
    close(loss, F.cross_entropy(logits[:, [0, 1, 3, 5]].double(), torch.tensor([1, 3, 2, 0])))
    assert gradient.isfinite().all() and (gradient[:, [2, 4]] == 0).all()


@on_native
@pytest.mark.parametrize("offset", [-1e5, 1e5, 3e38])
def test_numerics_logits_far_from_zero(name, offset):
    """flashinfer-ai/flashinfer#4267: a finite number stood for minus infinity, and rows below it came out as zeros."""
    logits = torch.full((3, 40), offset)
    loss, (gradient,) = outcome(ops.cross_entropy, (logits, torch.tensor([0, 17, 39])), backend=name, reduction="sum")
    close(loss, torch.tensor(3 * math.log(40)))
    close(gradient.sum(-1), torch.zeros(3))
    close(gradient[:, 20], torch.full((3,), 1 / 40))


@on_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_numerics_a_mean_whose_sum_overflows(name, dtype):
    """pytorch/pytorch#85791: the losses were summed in float16, where 65504 is the largest number."""
    logits = torch.zeros(30_000, 16, dtype=dtype)
    logits[:, 0] = 4.0
    loss, (gradient,) = outcome(ops.cross_entropy, (logits, torch.ones(30_000, dtype=torch.int64)), backend=name)
    close(loss, torch.tensor(math.log(math.exp(4.0) + 15.0)), rtol=torch.finfo(dtype).eps)
    assert gradient.isfinite().all() and (gradient[:, 0] > 0).all()


@on_native
def test_numerics_the_loss_under_autocast_is_float32(name):
    """Modalities/modalities#464: a bfloat16 loss of 36 lies on a grid of 0.25."""
    x, head, targets = 40 * random(32, 8), random(50, 8, seed=1), integers(50, 32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_cross_entropy(x, head, targets, backend=name)
    exact = reference.linear_cross_entropy(x.bfloat16().double(), head.bfloat16().double(), targets)
    assert loss.dtype == torch.float32 and exact > 36
    close(loss, exact, rtol=2e-3)


@on_native
def test_numerics_the_heads_gradient_is_not_rounded_per_chunk(name):
    """linkedin/Liger-Kernel#830, linkedin/Liger-Kernel#512: dW was accumulated in bfloat16, chunk by chunk."""
    x, head, targets = random(6000, 16), 0.1 * random(512, 16, seed=1), integers(512, 6000)
    x, head = x.bfloat16(), head.bfloat16()
    _, (_, exact) = outcome(reference.linear_cross_entropy, (x, head, targets), dtype=torch.float64, reduction="sum")
    _, (_, fused) = outcome(ops.linear_cross_entropy, (x, head, targets), backend=name, reduction="sum")

    def unfused(x, head):
        return F.cross_entropy((x @ head.t()).float(), targets, reduction="sum")

    _, (_, plain) = outcome(unfused, (x, head))
    assert (fused - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-3 * exact.abs().max()


@on_native
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_numerics_rows_beyond_two_to_the_31(name, dtype):
    """pytorch/pytorch#111484, pytorch/pytorch#85786: offsets of 32 bits read elsewhere past 2^31 elements."""
    try:
        storage = torch.empty(2**31 + 200, dtype=dtype)  # pages that are not touched take no memory
    except RuntimeError:
        pytest.skip("no address space for 2^31 elements")
    logits = storage.as_strided((2, 100), (2**31 + 100, 1))
    logits.copy_(random(2, 100))
    small = logits.clone()
    targets = torch.tensor([99, 3])
    got = ops.cross_entropy(logits, targets, reduction="none", backend=name)
    assert torch.equal(got, ops.cross_entropy(small, targets, reduction="none", backend=name))
    tokens = torch.tensor([[1, 0]])
    assert torch.equal(ops.embedding(tokens, logits, backend=name), small[tokens])


@on_native
def test_numerics_the_default_dtype_is_the_callers(name):
    """pytorch/ao#2286, meta-pytorch/torchtune#398: tables and caches took the default dtype, not the tensors'."""
    x, head, targets = random(20, 4), random(7, 4, seed=1), integers(7, 20)
    torch.set_default_dtype(torch.bfloat16)
    try:
        agrees(ops.linear_cross_entropy, x, head, targets, name=name, label_smoothing=0.1)
        q, k, v = heads(1, 2, 1, 3, 5, 4)
        agrees(ops.attention, q, k, v, name="torch", dropout_p=0.4, seed=2)
        assert torch.equal(ops.embedding(targets[None], head, backend=name), head[targets][None])
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("op", ["attention", "add_layer_norm", "cross_entropy", "model"])
def test_numerics_the_default_device_is_the_callers(op):
    """meta-pytorch/torchrec#2484: random numbers were drawn on the default device, and met tensors of another."""
    model, idx, x = tiny(dropout=0.5), integers(11, 2, 8), random(1, 2, 4, 8)
    targets, head = integers(8, 2, 8), random(8, 2)
    torch.set_default_device("meta")  # a device whose tensors no other tensor can be combined with
    try:
        if op == "attention":
            assert ops.attention(x, x, x, dropout_p=0.5).is_cpu and ops.attention(x, x, x, dropout_p=0.5, seed=1).is_cpu
        elif op == "add_layer_norm":
            assert all(y.is_cpu for y in ops.add_layer_norm(x, x, x[0, 0, 0], dropout_p=0.5))
        elif op == "cross_entropy":
            assert ops.cross_entropy(head.t(), targets[0, :2], label_smoothing=0.1).isfinite()
        else:
            model.loss(idx, idx).backward()
            assert model.generate(idx[:, :2], 9, top_k=3, top_p=0.9).is_cpu
    finally:
        torch.set_default_device(None)
