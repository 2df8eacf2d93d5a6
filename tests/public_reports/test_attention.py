"""What users of neighbouring projects reported, tried here: each test names its report and asserts the right value.

The reports are public: issues and pull requests on GitHub, cited as owner/repository#number. What went wrong there is
said in one line; the inputs are our own. Numbers are compared with the formulas of `fastgpt.ops.reference` in float64.
The tests stand by kind, which is the second word of their names: numerics, attention, autograd, compile, data,
checkpoint, configuration, sampling, installation.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgpt import GPT, GPTConfig, ops
from fastgpt.baselines import Bigram, build_model
from fastgpt.checkpoint import Checkpoint, CheckpointError
from fastgpt.cli import main
from fastgpt.config import ConfigError, TrainConfig
from fastgpt.data.corpus import Corpus
from fastgpt.data.layouts import Blocks
from fastgpt.data.prefetch import Prefetcher
from fastgpt.data.sources import DataError, load_text
from fastgpt.files import atomic_path
from fastgpt.generate import stream
from fastgpt.ops import backend, reference
from fastgpt.tokenizer import BPETokenizer, CharTokenizer, StreamDecoder
from fastgpt.training.loop import Trainer
from fastgpt.training.run_folder import RunFolder, read_metrics
from fastgpt.training.step import learning_rate, make_optimizer

NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(backend.unavailable("native", "cpu") is not None, reason="no compiled extension")
)
TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
        reason="the interpreter, which takes CPU tensors, is chosen where there is triton and no GPU",
    ),
)
on_native = pytest.mark.parametrize("name", ["torch", NATIVE])
on_triton = pytest.mark.parametrize("name", ["torch", TRITON])
TINY = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.0)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def integers(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def tiny(seed: int = 0, **changes) -> GPT:
    return build_model(dataclasses.replace(TINY, **changes), seed)


def close(got: Tensor, want: Tensor, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=atol, equal_nan=True)


def outcome(run, inputs, upstream: Tensor | None = None, dtype: torch.dtype | None = None, **options):
    """The result of run(*inputs, **options), and the gradients of its floating point inputs."""

    def cast(value):
        return value.to(dtype) if dtype and isinstance(value, Tensor) and value.is_floating_point() else value

    given = [cast(t).detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    result = run(*given, **{name: cast(value) for name, value in options.items()})
    (result if upstream is None else result * cast(upstream)).sum().backward()
    return result.detach(), [t.grad for t in given if t.is_floating_point()]


def agrees(op, *inputs: Tensor, name: str, upstream: Tensor | None = None, rtol=1e-4, atol=1e-5, **options) -> Tensor:
    """Check an op on one backend, forward and backward, against its formula in float64; return the result."""
    formula = getattr(reference, op.__name__)
    got, gradients = outcome(op, inputs, upstream, backend=name, **options)
    want, exact = outcome(formula, inputs, upstream, torch.float64, **options)
    close(got, want, rtol, atol)
    for gradient, expected in zip(gradients, exact, strict=True):
        close(gradient, expected, rtol, atol)
    return got


def run_python(code: str, *flags: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- numerics: the losses ---------------------------------------------------------------------------------------------


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


# --- numerics: norms and embeddings -----------------------------------------------------------------------------------


@on_triton
@pytest.mark.parametrize("mean", [0.0, 100.0, 2000.0, 40_000.0])
def test_numerics_layer_norm_far_from_zero(name, mean):
    """pytorch/pytorch#51102, tracel-ai/burn#5607, microsoft/onnxruntime#28463: E[x^2] - E[x]^2 cancels."""
    x = mean + random(5, 48)
    atol = 1e-5 + 4 * mean * torch.finfo(torch.float32).eps  # numbers as large as these are known no better
    out = ops.layer_norm(x, torch.ones(48), torch.zeros(48), backend=name)
    close(out, reference.layer_norm(x.double(), torch.ones(48).double()), atol=atol)


@on_triton
def test_numerics_layer_norm_of_one_number(name):
    """pytorch/pytorch#98075, pytorch/pytorch#108956: a row of one number is its own mean, so the bias comes out."""
    x, weight, bias = 3.3 * random(6, 1), torch.tensor([1e10]), torch.tensor([-1.0])
    out, (dx, dweight, dbias) = outcome(ops.layer_norm, (x, weight, bias), backend=name, eps=0.1)
    assert (out == -1.0).all() and (dx == 0).all() and abs(dweight) < 1e-5 and dbias == 6


@on_triton
def test_numerics_layer_norm_of_strided_input(name):
    """microsoft/DirectML#588, NVIDIA/TransformerEngine#1017: input that is not contiguous was read as if it were."""
    base, weight, bias = random(6, 7, 8), random(7, seed=1), random(7, seed=2)
    for view in (base.transpose(1, 2), base.transpose(1, 2)[::2], base[..., :1].expand(6, 7, 8).transpose(1, 2)):
        x = view.detach().requires_grad_()
        out = ops.layer_norm(x, weight, bias, backend=name)
        close(out, reference.layer_norm(view.double(), weight.double(), bias.double()))
        upstream = random(*out.shape[::-1], seed=3).permute(2, 1, 0)
        (gradient,) = torch.autograd.grad(out, x, upstream)
        exact = view.double().requires_grad_()
        formula = reference.layer_norm(exact, weight.double(), bias.double())
        close(gradient, torch.autograd.grad(formula, exact, upstream.double())[0])


@on_triton
def test_numerics_layer_norm_of_no_rows(name):
    """pytorch/pytorch#28614, pytorch/pytorch#12013: a batch of zero rows failed."""
    out, (dx, dweight, dbias) = outcome(ops.layer_norm, (random(0, 3, 8), random(8), random(8)), backend=name)
    assert out.shape == dx.shape == (0, 3, 8) and (dweight == 0).all() and (dbias == 0).all()
    normed, stream_ = ops.add_layer_norm(random(0, 8), random(0, 8), random(8), random(8), backend=name)
    assert normed.shape == stream_.shape == (0, 8)


@pytest.mark.parametrize("name", [NATIVE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_numerics_a_frequent_tokens_gradient(name, dtype):
    """tenstorrent/tt-metal#53386: a sum kept in bfloat16 stops at 256, and frequent tokens lost their gradient."""
    table = torch.zeros(3, 4, dtype=dtype)
    _, (gradient,) = outcome(ops.embedding, (torch.ones(40, 50, dtype=torch.int64), table), backend=name)
    assert gradient[1].tolist() == [2000.0] * 4 and (gradient[[0, 2]] == 0).all()


@on_native
@pytest.mark.parametrize("token", [-1, -7, 6, 2**35])
def test_numerics_a_token_outside_is_an_error(name, token):
    """mindspore-ai/mindspore#270, tensorflow/tensorflow#5847: a wrong index gave another row, or zeros."""
    tokens = torch.tensor([[0, 5], [token, 1]])
    with pytest.raises(IndexError, match=re.escape(f"tokens: value {token} at position (1, 0)")):
        ops.embedding(tokens, random(6, 3), backend=name)


# --- attention --------------------------------------------------------------------------------------------------------


def heads(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of shape (B, H, Hkv, Tq, Tk, D)."""
    B, H, Hkv, Tq, Tk, D = shape
    return tuple(random(B, h, t, D, seed=i, dtype=dtype) for i, (h, t) in enumerate(((H, Tq), (Hkv, Tk), (Hkv, Tk))))


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


# --- autograd ---------------------------------------------------------------------------------------------------------


@on_native
def test_autograd_losses_weighted_one_by_one(name):
    """linkedin/Liger-Kernel#968, linkedin/Liger-Kernel#1298: every row got the first row's weight in dW."""
    x, head, bias = random(7, 4), random(6, 4, seed=1), random(6, seed=2)
    targets = torch.tensor([0, 5, -100, 2, 3, -100, 1])
    weights = torch.tensor([0.0, 2.0, 5.0, -1.0, 0.5, 1.0, 3.0])
    for smoothing in (0.0, 0.2):
        options = {"reduction": "none", "label_smoothing": smoothing}

        def ours(x, head, bias, options=options):
            return ops.linear_cross_entropy(x, head, targets, bias=bias, backend=name, **options)

        def formula(x, head, bias, options=options):
            return reference.linear_cross_entropy(x, head, targets, bias=bias, **options)

        got, gradients = outcome(ours, (x, head, bias), weights)
        want, exact = outcome(formula, (x, head, bias), weights, torch.float64)
        close(got, want)
        for gradient, expected in zip(gradients, exact, strict=True):
            close(gradient, expected)


@on_native
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_autograd_a_loss_nobody_derives(name, context):
    """linkedin/Liger-Kernel#507: without a gradient to compute, the loss was 0."""
    x, head, targets = random(5, 3), random(4, 3, seed=1), integers(4, 5)
    with context():
        loss = ops.cross_entropy(x, targets.clamp(max=2), backend=name)
        fused = ops.linear_cross_entropy(x, head, targets, backend=name)
    close(loss, reference.cross_entropy(x.double(), targets.clamp(max=2)))
    close(fused, reference.linear_cross_entropy(x.double(), head.double(), targets))


@on_native
def test_autograd_logits_are_left_alone(name):
    """linkedin/Liger-Kernel#272, unslothai/unsloth#5002: gradients overwrote the logits, and exp's saved output."""
    leaf, targets = random(6, 5).requires_grad_(), integers(5, 6)
    logits = leaf.exp()  # whose derivative is its output
    before = logits.detach().clone()
    loss = ops.cross_entropy(logits, targets, backend=name) + logits.square().mean()
    loss.backward()
    assert torch.equal(logits.detach(), before)
    exact = leaf.detach().double().requires_grad_()
    (reference.cross_entropy(exact.exp(), targets) + exact.exp().square().mean()).backward()
    close(leaf.grad, exact.grad)


@on_native
def test_autograd_backward_twice(name):
    """axolotl-ai-cloud/axolotl#3892: a second pass through a kept graph gave numbers scaled or spoiled by the first."""
    x, head = (t.requires_grad_() for t in (random(5, 4), random(6, 4, seed=1)))
    loss = ops.linear_cross_entropy(x, head, integers(6, 5), backend=name)
    first = [g.clone() for g in torch.autograd.grad(2.0 * loss, (x, head), retain_graph=True)]
    second = torch.autograd.grad(loss, (x, head), retain_graph=True)
    third = torch.autograd.grad(-3.0 * loss, (x, head))
    for a, b, c in zip(first, second, third, strict=True):
        close(a, 2.0 * b)
        close(c, -3.0 * b)


@on_native
@pytest.mark.parametrize("factor", [1.0, 0.25, -2.0, 0.0])
def test_autograd_a_gradient_passed_to_backward(name, factor):
    """linkedin/Liger-Kernel#435: output.backward(gradient=...) of a loss that is not the last step."""
    logits, targets = random(4, 5).requires_grad_(), integers(5, 4)
    loss = ops.cross_entropy(logits, targets, reduction="sum", backend=name)
    loss.backward(gradient=torch.tensor(factor))
    want = torch.softmax(logits.detach().double(), -1) - F.one_hot(targets, 5)
    close(logits.grad, factor * want)


@on_native
def test_autograd_classes_in_the_second_dimension(name):
    """pytorch/pytorch#175084: the gradient of transposed (N, C, d1, d2) logits could not be made."""
    leaf, targets = random(2, 3, 4, 5).requires_grad_(), integers(5, 2, 3, 4)
    loss = ops.cross_entropy(leaf.movedim(-1, 1), targets, backend=name)
    loss.backward()
    exact = leaf.detach().double().requires_grad_()
    want = reference.cross_entropy(exact.movedim(-1, 1), targets)
    want.backward()
    close(loss.detach(), want.detach())
    close(leaf.grad, exact.grad)


@on_native
def test_autograd_second_derivatives(name):
    """pytorch/pytorch#76185, pytorch/pytorch#58509: what forward saved counted as a constant, silently."""
    logits, targets = random(3, 4, dtype=torch.float32).requires_grad_(), integers(4, 3)
    (gradient,) = torch.autograd.grad(ops.cross_entropy(logits, targets, backend=name), logits, create_graph=True)
    if name == "native":
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            gradient.square().sum().backward()
        return
    gradient.square().sum().backward()
    exact = logits.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(reference.cross_entropy(exact, targets), exact, create_graph=True)
    wanted.square().sum().backward()
    close(logits.grad, exact.grad)


@on_native
def test_autograd_logits_changed_in_place_after_the_loss(name):
    """linkedin/Liger-Kernel#273: autograd did not notice; the gradient must be the old logits', or an error."""
    leaf, targets = random(4, 5).requires_grad_(), integers(5, 4)
    logits = leaf * 1.0
    want = torch.softmax(leaf.detach().double(), -1) - F.one_hot(targets, 5)
    loss = ops.cross_entropy(logits, targets, reduction="sum", backend=name)
    with torch.no_grad():
        logits.add_(random(4, 5, seed=1))
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        close(leaf.grad, want)


def test_autograd_under_deterministic_algorithms():
    """MooreThreads/torch_musa#152, pytorch/pytorch#195404: embedding's backward was not, though it was asked to be."""
    idx = integers(3, 4, 8)

    def gradients():
        torch.manual_seed(1)
        model = tiny(dropout=0.2)
        model.loss(idx, idx).backward()
        return [p.grad for p in model.parameters()]

    torch.use_deterministic_algorithms(True)
    try:
        assert all(map(torch.equal, gradients(), gradients()))
        tiny().generate(idx[:, :2], 12, top_k=5, top_p=0.9)
    finally:
        torch.use_deterministic_algorithms(False)


def test_autograd_parameters_given_from_outside():
    """pytorch/pytorch#92295: a functional call has to use the parameters it is given, in the fused loss as well."""
    model, idx = tiny(tie_weights=False), integers(11, 2, 8)
    given = {name: (2.0 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
    loss = torch.func.functional_call(model, given, (idx, idx))[1]
    other = copy.deepcopy(model)
    other.load_state_dict(given)
    close(loss.detach(), other.loss(idx, idx).detach())
    gradients = torch.autograd.grad(loss, list(given.values()))
    expected = torch.autograd.grad(other.loss(idx, idx), list(other.parameters()))
    for gradient, exact in zip(gradients, expected, strict=True):
        close(gradient, exact)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy", "embedding", "layer_norm", "attention"])
def test_autograd_gradients_per_sample(op):
    """pytorch/pytorch#102720: vmap over a kernel with its own backward lost the gradient without a word."""
    targets = integers(5, 3, 4)
    if op == "embedding":
        given, run, formula = random(6, 2), ops.embedding, reference.embedding
        each = [integers(6, 1, 4, seed=i) for i in range(3)]

        def loss(table, tokens, run=run):
            return run(tokens, table).square().sum()
    elif op == "attention":
        given, run, formula = random(1, 2, 4, 8), ops.attention, reference.attention
        each = [random(1, 2, 4, 8, seed=i + 1) for i in range(3)]

        def loss(q, k, run=run):
            return run(q, k, k).square().sum()
    elif op == "layer_norm":
        given, run, formula = random(8), ops.layer_norm, reference.layer_norm
        each = [random(4, 8, seed=i + 1) for i in range(3)]

        def loss(weight, x, run=run):
            return run(x, weight).pow(3).sum()
    elif op == "cross_entropy":
        given, run, formula = random(4, 5), ops.cross_entropy, reference.cross_entropy
        each = list(targets)

        def loss(logits, targets, run=run):
            return run(logits, targets)
    else:
        given, run, formula = random(4, 3), ops.linear_cross_entropy, reference.linear_cross_entropy
        each, head = list(targets), random(5, 3, seed=9)

        def loss(x, targets, run=run):
            return run(x, head.to(x.dtype), targets)

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    if op == "linear_cross_entropy":  # it makes its gradient by hand on every backend, and says what to take instead
        with pytest.raises(NotImplementedError, match="take cross_entropy"):
            per_sample(given, torch.stack(each))
        return
    got = per_sample(given, torch.stack(each))
    for gradient, other in zip(got, each, strict=True):
        exact = given.double().requires_grad_()
        other = other.double() if other.is_floating_point() else other
        close(gradient, torch.autograd.grad(loss(exact, other, run=formula), exact)[0])


def test_autograd_training_after_inference_mode():
    """unslothai/unsloth#2434, snowflakedb/ArcticTraining#265: what inference mode made was saved for backward later."""
    model, idx = tiny(), integers(11, 2, 8)
    fresh = tiny()
    with torch.inference_mode():
        model.generate(idx[:, :3], max_new_tokens=9)
        model.loss(idx, idx)
    model.loss(idx, idx).backward()
    fresh.loss(idx, idx).backward()
    for parameter, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_autograd_activation_checkpointing_keeps_the_dropout(reentrant):
    """allenai/OLMo-core#828, pytorch/pytorch#14253: recomputed activations were dropped with another mask."""
    q, k, v = heads(1, 2, 2, 6, 6, 8)
    weight = random(8, seed=5)

    def branch(q, k, v, weight):
        y = ops.attention(q, k, v, dropout_p=0.5)
        return ops.add_layer_norm(y, q, weight, dropout_p=0.5)[0]

    torch.manual_seed(3)
    _, plain = outcome(branch, (q, k, v, weight))
    torch.manual_seed(3)
    _, again = outcome(lambda *given: checkpoint(branch, *given, use_reentrant=reentrant), (q, k, v, weight))
    assert all(map(torch.equal, plain, again))


@on_native
def test_autograd_an_overflow_that_the_gradient_scaler_sees(name):
    """pytorch/pytorch#26512, pytorch/pytorch#152279: the step is skipped where a scaled gradient is not finite."""
    logits = torch.nn.Parameter(10 * random(4, 5, dtype=torch.float32))
    before = logits.detach().clone()
    optimizer = torch.optim.SGD([logits], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    loss = ops.cross_entropy(logits, torch.tensor([0, 1, -100, 3]), reduction="sum", backend=name)
    scaler.scale(8.0 * loss).backward()
    assert (logits.grad[2] == 0).all(), "an ignored row has no gradient, whatever the scale"
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(logits.detach(), before) and scaler.get_scale() == pytest.approx(1.5e38)


# --- compile ----------------------------------------------------------------------------------------------------------


@on_native
def test_compile_the_fused_loss_and_its_gradients(name):
    """pytorch/pytorch#141639, pytorch/pytorch#180642: compiled chunked cross-entropy gave wrong gradients."""
    x, head, targets = random(40, 8), random(30, 8, seed=1), integers(30, 40)
    targets[::7] = -100

    def loss(x, head):
        return 2.0 * ops.linear_cross_entropy(x, head, targets, backend=name)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, gradients = outcome(compiled, (x, head))
    want, expected = outcome(loss, (x, head))
    close(got, want, rtol=1e-6, atol=1e-6)
    for gradient, exact in zip(gradients, expected, strict=True):
        close(gradient, exact, rtol=1e-6, atol=1e-6)


def test_compile_one_graph_for_all_batch_sizes():
    """pytorch/pytorch#172822: layer norm's backward was specialised on the batch, and compiled for each anew."""
    weight, bias, head = (t.requires_grad_() for t in (random(8), random(8, seed=1), random(6, 8, seed=2)))

    def step(x, targets):
        normed, x = ops.add_layer_norm(x, x, weight, bias)
        return ops.linear_cross_entropy(normed + x, head, targets)

    compiled = torch.compile(step, dynamic=True, fullgraph=True, backend="aot_eager")
    compiled(random(3, 8), integers(6, 3)).backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (5, 8, 13):
            compiled(random(rows, 8), integers(6, rows)).backward()


@on_native
def test_compile_keeps_the_check_of_indices(name):
    """pytorch/pytorch#183608: a compiled embedding let negative indices through."""
    table = random(5, 4)
    compiled = torch.compile(lambda tokens: ops.embedding(tokens, table, backend=name), backend="aot_eager")
    assert torch.equal(compiled(torch.tensor([[4, 0]])), table[[4, 0]][None])
    for bad in (-1, 5):
        with pytest.raises((IndexError, RuntimeError), match=r"out of range|outside"):
            compiled(torch.tensor([[0, bad]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compile_inside_autocast(dtype):
    """pytorch/pytorch#124901, pytorch/pytorch#137033: a compiled op had another dtype under autocast than eager."""
    model, idx = tiny(), integers(11, 2, 8)
    compiled = torch.compile(model.loss, backend="aot_eager")
    with torch.autocast("cpu", dtype):
        eager_logits, compiled_loss, eager_loss = model(idx)[0], compiled(idx, idx), model.loss(idx, idx)
    assert eager_logits.dtype == dtype and compiled_loss.dtype == eager_loss.dtype == torch.float32
    close(compiled_loss, eager_loss, rtol=1e-5)


@pytest.mark.parametrize("name", [NATIVE])
def test_compile_strides_of_the_fake_ops(name):
    """pytorch/pytorch#177115, NVIDIA/cuEquivariance#223: the fake op promised other strides than the real one gave."""
    tokens = integers(7, 5, 3).t()
    table = random(4, 7).t().requires_grad_()
    position = random(12, 8)[::2, ::2].requires_grad_()
    torch.library.opcheck(torch.ops.fastgpt.embedding_native, (tokens, table, position, 1))
    logits = random(7, 5).t().requires_grad_()
    for with_grad in (False, True):
        arguments = (logits, integers(7, 5), None, -100, 1, 0.0, with_grad)
        torch.library.opcheck(torch.ops.fastgpt.cross_entropy_native, arguments)


# --- data -------------------------------------------------------------------------------------------------------------


LINE_ENDS = ("\n", "\r\n", "\r")


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_data_a_split_shorter_than_a_block(tmp_path):
    """karpathy/nanoGPT#292: randint failed on the validation split, hundreds of steps into a run."""
    file = write(tmp_path / "short.txt", "abcdefghij" * 10)
    with pytest.raises(DataError, match=r"the val split of .*short.txt' has 10 tokens, and a block of 16 needs 17"):
        Corpus.load(file, block_size=16)
    assert len(Corpus.load(file, block_size=9).examples("val", 9)) == 1


def test_data_the_last_place_is_a_place():
    """AOSSIE-Org/OpenVerifiableLLM#92: a text of one block was refused, and the last start was never drawn."""
    tokens = np.arange(6, dtype=np.uint16)
    x, y = Blocks(tokens, 5).batch(1, seed=1, step=0)
    assert x.tolist() == [[0, 1, 2, 3, 4]] and y.tolist() == [[1, 2, 3, 4, 5]]
    starts = {int(s) for step in range(60) for s in Blocks(tokens, 3).batch(4, seed=2, step=step)[0][:, 0]}
    assert starts == {0, 1, 2}


def test_data_evaluation_reaches_the_end():
    """karpathy/build-nanogpt#109, karpathy/build-nanogpt#41: tokens at the end were skipped, or made a short batch."""
    tokens = np.arange(101, dtype=np.uint16)
    for n in (1, 2, 7):
        x, y = Blocks(tokens, 8).evenly_spaced(n)
        assert x.shape == y.shape == (n, 8) and torch.equal(x[:, 1:], y[:, :-1])
    assert x[0, 0] == 0 and y[-1, -1] == 100


@pytest.mark.parametrize("size", [2**16, 2**16 + 1])
def test_data_more_tokens_than_16_bits_hold(size, tmp_path, monkeypatch):
    """huggingface/transformers#2825, alasdairforsythe/tokenmonster#23: ids of 65536 and more wrapped around."""
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
    text = "".join(chr(c) for c in range(0x10000, 0x10000 + size))
    file = write(tmp_path / "many.txt", text)
    for corpus in (Corpus.load(file), Corpus.load(file)):  # made, then from the cache
        assert corpus.tokenizer.vocab_size == size
        ids = np.concatenate([corpus.train, corpus.val]).astype(np.int64)
        assert (ids == np.arange(size)).all()
        assert corpus.tokenizer.decode(corpus.val[-3:]) == text[-3:]


def test_data_batches_own_their_memory(tmp_path, monkeypatch):
    """karpathy/nanoGPT#287: the text is mapped, not read, and what a batch keeps is the batch alone."""
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
    corpus = Corpus.load(write(tmp_path / "text.txt", "to be or not to be\n" * 40))
    owner = corpus.train
    while getattr(owner, "base", None) is not None and not isinstance(owner, np.memmap):
        owner = owner.base
    assert isinstance(owner, np.memmap)
    x, y = corpus.examples("train", 4).batch(2, seed=0, step=0)
    before = corpus.train[:].copy()
    x.fill_(0), y.fill_(0)
    assert (corpus.train == before).all() and x.untyped_storage().nbytes() == 2 * 4 * 8


def test_data_a_resumed_run_draws_what_comes_next():
    """karpathy/nanoGPT#467: after each restart the seed gave the first batches again."""
    examples = Blocks(np.arange(500, dtype=np.uint16), 4)
    with Prefetcher(examples, 3, seed=9) as batches:
        whole = [next(batches)[0] for _ in range(6)]
    with Prefetcher(examples, 3, seed=9, start_step=4) as batches:
        rest = [next(batches)[0] for _ in range(2)]
    assert all(map(torch.equal, rest, whole[4:])) and not torch.equal(rest[0], whole[0])


def test_data_batches_do_not_end():
    """karpathy/nanochat#360: the loader hung when it had given every example once."""
    with Prefetcher(Blocks(np.arange(4, dtype=np.uint16), 2), 2, seed=0) as batches:
        assert sum(next(batches)[0].shape[0] for _ in range(50)) == 100


def test_data_files_are_utf8_whatever_the_locale(tmp_path):
    """karpathy/nanoGPT#711, Lightning-AI/litgpt#162: open() without an encoding takes the locale's, cp1252 say."""
    file = write(tmp_path / "text.txt", "naïve café — “quotes”, 日本語 🙂\n" * 30)
    code = f"""
import dataclasses, warnings
from pathlib import Path
from fastgpt import GPTConfig
from fastgpt.config import TrainConfig
from fastgpt.data.corpus import Corpus
from fastgpt.baselines import build_model
from fastgpt.training.loop import Trainer
from fastgpt.training.run_folder import RunFolder, read_metrics
warnings.filterwarnings("error", category=EncodingWarning, module="fastgpt")
corpus = Corpus.load({str(file)!r}, block_size=4)
cfg = TrainConfig(max_steps=1, batch_size=2, eval_batches=1, warmup_steps=0, device="cpu")
folder = RunFolder(Path({str(tmp_path / "run")!r}))
folder.create(dataclasses.asdict(cfg))
model = GPTConfig(vocab_size=corpus.tokenizer.vocab_size, block_size=4, n_layer=1, n_head=1, n_embd=4)
Trainer(build_model(model, 1), corpus, cfg, folder).run()
assert read_metrics(folder.metrics_path)
print(ascii(corpus.tokenizer.decode(corpus.train[-31:])))
"""
    out = run_python(code, "-X", "warn_default_encoding", FASTGPT_CACHE=str(tmp_path / "cache"))
    assert "\\u65e5\\u672c\\u8a9e \\U0001f642" in out


def test_data_lines_of_every_system(tmp_path):
    """betalgo/openai#145: a text with \\r\\n had other tokens than the same text with \\n."""
    texts = [load_text(write(tmp_path / f"{i}.txt", f"to be{end}or not{end}{end}")) for i, end in enumerate(LINE_ENDS)]
    assert texts == ["to be\nor not\n\n"] * 3


def test_data_a_character_the_model_never_saw():
    """karpathy/nanoGPT#434, sherjilozair/char-rnn-tensorflow#97: KeyError for a character of the prompt."""
    tokenizer = CharTokenizer.train("hello world")
    with pytest.raises(ValueError, match=r"character 'é' at position 1 is not among the tokenizer's 8 characters"):
        tokenizer.encode("hé")


def test_data_an_id_the_vocabulary_lacks():
    """karpathy/nanoGPT#169: KeyError 271, where the model had another vocabulary than the tokenizer."""
    with pytest.raises(ValueError, match="token id 271 at position 1 is outside the vocabulary of 8"):
        CharTokenizer.train("hello world").decode([0, 271])


def test_data_emoji_come_whole_from_a_stream():
    """huggingface/text-generation-inference#131, latitudegames/GPT-3-Encoder#1: half an emoji was printed as U+FFFD."""
    text = "🤗 안녕 👩‍👩‍👧 naïve\u0301 \U0001f1e9\U0001f1ea"
    tokenizer = BPETokenizer.train("plain text, nothing else " * 20, 300)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) > len(text)
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(i) for i in ids]
    assert "".join(parts) + decoder.flush() == text and "\ufffd" not in "".join(parts)


def test_data_text_cut_inside_a_character():
    """guillaume-be/rust-bert#27, timtoole02/Camelid#288: an incomplete character at the end was an error."""
    tokenizer = BPETokenizer.train("plain text " * 20, 260)
    ids = tokenizer.encode("ok 🙂")[:-1]
    assert tokenizer.decode(ids) == "ok \ufffd"
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.push(i) for i in ids) == "ok " and decoder.flush() == "\ufffd"


def test_data_text_that_spells_a_special_token(tmp_path):
    """karpathy/minGPT#140: text is text; the id of <|endoftext|> is not what its spelling encodes to."""
    trained = BPETokenizer.train("some text to learn from, some more text " * 9, 270)
    tokenizer = BPETokenizer([*trained.vocab, "<|endoftext|>"], trained.merges, {"<|endoftext|>": len(trained.vocab)})
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.special_tokens["<|endoftext|>"] not in ids and tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode([tokenizer.special_tokens["<|endoftext|>"]]) == "<|endoftext|>"


# --- checkpoint -------------------------------------------------------------------------------------------------------

QUICK = TrainConfig(
    batch_size=4, max_steps=6, eval_interval=3, eval_batches=1, log_interval=1, warmup_steps=0, device="cpu"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    file = write(tmp_path_factory.mktemp("data") / "text.txt", "the quick brown fox jumps over the lazy dog\n" * 30)
    return Corpus.load(file, block_size=8)


def trainer(corpus: Corpus, path: Path, cfg: TrainConfig = QUICK, new: bool = True, **changes) -> Trainer:
    folder = RunFolder(path)
    if new:
        folder.create(dataclasses.asdict(cfg))
    config = dataclasses.replace(TINY, vocab_size=corpus.tokenizer.vocab_size, **changes)
    return Trainer(build_model(config, cfg.seed), corpus, cfg, folder)


def test_checkpoint_of_a_compiled_run_has_plain_names(corpus, tmp_path):
    """karpathy/nanoGPT#325, rasbt/LLMs-from-scratch#580: "_orig_mod." before every name; resuming failed."""
    saved = trainer(corpus, tmp_path / "run", dataclasses.replace(QUICK, compile=True)).checkpoint()
    plain = trainer(corpus, tmp_path / "other").checkpoint()
    assert saved.tensors.keys() == plain.tensors.keys()
    model = tiny()
    torch.compile(model, backend="eager").save_pretrained(tmp_path / "compiled")
    again = GPT.from_pretrained(tmp_path / "compiled")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("format", ["fastgpt", "huggingface"])
def test_checkpoint_writes_shared_weights_once(format, tmp_path):
    """safetensors/safetensors#98, unslothai/unsloth#1105: tied weights could not be saved, or were saved twice."""
    from safetensors import safe_open

    model = tiny()
    model.save_pretrained(tmp_path, format=format)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
    assert len([n for n in names if "lm_head" in n or "wte" in n or "token_embedding" in n]) == 1
    again = GPT.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.token_embedding.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_checkpoint_with_the_tied_head_written_out(tmp_path):
    """vllm-project/vllm#6758: KeyError 'lm_head.weight', a copy of the embedding that fine-tuning had written."""
    from safetensors.torch import load_file, save_file

    model = tiny()
    model.save_pretrained(tmp_path, format="huggingface")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    idx = integers(11, 1, 8)
    assert torch.equal(GPT.from_pretrained(tmp_path)(idx)[0], model(idx)[0])


def test_checkpoint_keeps_a_head_of_its_own(tmp_path):
    """NVIDIA-NeMo/Automodel#2942, sgl-project/sglang#15398: a trained head was replaced by the embedding."""
    model, idx = tiny(tie_weights=False), integers(11, 1, 8)
    for format in ("fastgpt", "huggingface"):
        model.save_pretrained(tmp_path / format, format=format)
        again = GPT.from_pretrained(tmp_path / format)
        assert again.lm_head.weight is not again.token_embedding.weight
        assert torch.equal(again(idx)[0], model(idx)[0])


def test_checkpoint_copies_of_a_model_stay_tied():
    """BlackSamorez/tensor_parallel#73, huggingface/accelerate#1204: the copy's head was a tensor of its own."""
    model, idx = tiny(), integers(11, 2, 8)
    loaded = tiny(seed=1)
    loaded.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), loaded):
        assert other.lm_head.weight is other.token_embedding.weight
        other.loss(idx, idx).backward()
        assert other.num_parameters() == model.num_parameters()
        assert torch.equal(other(idx)[0], model(idx)[0])


@pytest.mark.parametrize("way", ["assign", "meta"])
def test_checkpoint_loaded_by_assignment_stays_tied(way):
    """pytorch/pytorch#188346, Modalities/modalities#357: assign=True, or a model made on "meta", untied the head."""
    saved = tiny().state_dict()
    if way == "meta":
        with torch.device("meta"):
            model = GPT(TINY)
        model.to_empty(device="cpu").load_state_dict(saved)
    else:
        model = tiny(seed=1)
        model.load_state_dict(saved, assign=True)
    assert model.lm_head.weight is model.token_embedding.weight
    assert model.num_parameters() == tiny().num_parameters()


def test_checkpoint_in_half_precision(tmp_path):
    """huggingface/transformers#12062, huggingface/peft#2421: which dtype a loaded model has is one, and documented."""
    model = tiny().bfloat16()
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    for parameter, other in zip(model.parameters(), again.parameters(), strict=True):
        assert other.dtype == torch.float32 and torch.equal(parameter.float(), other)


def test_checkpoint_best_and_latest_are_two(corpus, tmp_path):
    """karpathy/nanoGPT#180, PolymathicAI/the_well#60: the latest weights overwrote the best."""
    cfg = dataclasses.replace(QUICK, lr=30.0, min_lr=30.0, max_steps=4, eval_interval=1, grad_clip=0.0)
    trainer(corpus, tmp_path, cfg).run()
    val = [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl") if row["split"] == "val"]
    best, latest = (Checkpoint.load(tmp_path / "checkpoint" / f"{n}.safetensors") for n in ("best", "latest"))
    assert val.index(min(val)) == best.state["step"] < latest.state["step"] == 4
    taken = GPT.from_pretrained(tmp_path)
    assert torch.equal(taken.token_embedding.weight, best.part("model")["token_embedding.weight"])


def test_checkpoint_of_the_last_step(corpus, tmp_path):
    """intelligent-machine-learning/dlrover#894: the run ended between two intervals, and its end was not saved."""
    trainer(corpus, tmp_path, dataclasses.replace(QUICK, max_steps=5, eval_interval=3)).run()
    assert Checkpoint.load(tmp_path / "checkpoint" / "latest.safetensors").state["step"] == 5


def test_checkpoint_survives_an_interrupted_write(tmp_path):
    """Lightning-AI/pytorch-lightning#688, howervoo/speechturn#15: half a file stood where the good one had been."""
    path = tmp_path / "latest.safetensors"
    path.write_bytes(b"good")
    for error in (OSError("disk full"), KeyboardInterrupt(), SystemExit(1)):
        with pytest.raises((CheckpointError, KeyboardInterrupt, SystemExit)), atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            raise error
        assert path.read_bytes() == b"good" and list(tmp_path.iterdir()) == [path]


def test_checkpoint_resumes_to_the_same_bits(corpus, tmp_path):
    """NVIDIA-NeMo/Megatron-Bridge#5257, facebookresearch/neural-rewriter#6: random state or learning rate drifted."""
    whole = trainer(corpus, tmp_path / "whole", dropout=0.2)
    whole.run()
    first = trainer(corpus, tmp_path / "parts", dataclasses.replace(QUICK, max_steps=6), dropout=0.2)
    stop_after = 3
    evaluate = first._evaluate_and_save

    def evaluate_and_stop():
        evaluate()
        return first.state["step"] == stop_after

    first._evaluate_and_save = evaluate_and_stop
    first.run()
    torch.manual_seed(99)
    second = trainer(corpus, tmp_path / "parts", new=False, dropout=0.2)
    second.restore(Checkpoint.load(tmp_path / "parts" / "checkpoint" / "latest.safetensors"))
    second.run()
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    rates = [row["lr"] for row in read_metrics(tmp_path / "parts" / "metrics.jsonl") if row["split"] == "train"]
    assert rates == [learning_rate(step, QUICK) for step in range(6)]


def test_checkpoint_without_moments_cannot_be_resumed(corpus, tmp_path):
    """karpathy/llama2.c#148: KeyError 'optimizer', for a file that holds weights only."""
    run = trainer(corpus, tmp_path)
    saved = run.checkpoint()
    weights = {name: t for name, t in saved.tensors.items() if name.startswith(("model.", "rng."))}
    file = dataclasses.replace(saved, tensors=weights, path=tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: tensor exp_avg\.\S+ is missing"):
        run.restore(file)


def test_checkpoint_of_a_partly_frozen_model(corpus, tmp_path):
    """NVIDIA/Megatron-LM#345, kohjingyu/fromage#18: frozen weights failed in the optimizer, or were trained."""
    run = trainer(corpus, tmp_path)
    run.model.blocks[0].requires_grad_(False)
    before = [p.clone() for p in run.model.parameters()]
    run.run()
    again = trainer(corpus, tmp_path, dataclasses.replace(QUICK, max_steps=8), new=False)
    again.model.blocks[0].requires_grad_(False)
    again.restore(Checkpoint.load(tmp_path / "checkpoint" / "latest.safetensors"))
    again.run()
    for old, (name, new) in zip(before, again.model.named_parameters(), strict=True):
        assert torch.equal(old, new) == name.startswith("blocks.0."), name


def test_checkpoint_square_weights_are_transposed_too(tmp_path):
    """karpathy/nanoGPT#190: GPT-2's linears are (in, out), which shapes show only where they are not square."""
    from safetensors.torch import load_file

    model, idx = tiny(), integers(11, 2, 8)
    model.save_pretrained(tmp_path, format="huggingface")
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["transformer.h.0.attn.c_attn.weight"].shape == (16, 48)
    assert torch.equal(tensors["transformer.h.1.attn.c_proj.weight"], model.blocks[1].attn.proj.weight.t())
    assert torch.equal(GPT.from_pretrained(tmp_path)(idx)[0], model(idx)[0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale_attn_by_inverse_layer_idx", True),
        ("scale_attn_weights", False),
        ("layer_norm_epsilon", 1e-6),
        ("n_inner", 24),
        ("activation_function", "silu"),
    ],
)
def test_checkpoint_settings_that_would_be_ignored(field, value, tmp_path):
    """huggingface/transformers#44380, mlc-ai/mlc-llm#1389: settings of GPT-2 were ignored, and outputs were wrong."""
    tiny().save_pretrained(tmp_path, format="huggingface")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(CheckpointError, match=f"field '{field}' is {value!r}"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(("theirs", "approximate"), [("gelu_new", "tanh"), ("gelu", "none")])
def test_checkpoint_gelu_is_the_one_it_was_trained_with(theirs, approximate, tmp_path):
    """karpathy/nanoGPT#2, nntile/nntile#370: GPT-2 was trained with the tanh form."""
    tiny().save_pretrained(tmp_path, format="huggingface")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "activation_function": theirs}))
    mlp, x = GPT.from_pretrained(tmp_path).blocks[0].mlp, 3 * random(2, 16)
    close(mlp(x), mlp.down(F.gelu(mlp.up(x), approximate=approximate)), rtol=1e-6, atol=1e-7)


def test_checkpoint_block_size_is_the_models(tmp_path):
    """huggingface/transformers#10732: "index out of range in self" for too long a block."""
    model = tiny()
    with pytest.raises(ValueError, match="idx: 9 tokens do not fit block_size=8"):
        model(integers(11, 1, 9))
    model.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"position_embedding.weight has shape \(8, 16\), the model has \(4, 16\)"
    ):
        GPT.from_pretrained(tmp_path, block_size=4)


# --- configuration ----------------------------------------------------------------------------------------------------


def test_configuration_width_and_heads():
    """rasbt/LLMs-from-scratch#444, facebookresearch/detr#499: an assertion that names neither number."""
    with pytest.raises(ConfigError, match="n_embd: expected a multiple of n_head=48, got 1600"):
        GPTConfig(n_embd=1600, n_head=48)
    assert GPTConfig.preset("gpt2-xl").n_head == 25


@pytest.mark.parametrize(("warmup", "steps"), [(10, 10), (20, 10), (0, 0), (0, 10), (10, 11)])
def test_configuration_schedules_without_a_decay(warmup, steps):
    """karpathy/nanoGPT#691, deepspeedai/DeepSpeed#8142, pytorch/torchtitan#1010: division by zero."""
    cfg = TrainConfig(lr=1.0, min_lr=0.1, warmup_steps=warmup, max_steps=steps)
    rates = [learning_rate(step, cfg) for step in range(30)]
    assert all(0.0 < rate <= 1.0 for rate in rates) and rates[29] == 0.1
    assert rates[:warmup] == sorted(rates[:warmup])


def test_configuration_the_first_step_learns():
    """karpathy/nanoGPT#578, PaddlePaddle/PaddleDetection#4611: the rate began at 0, or jumped where warm-up ends."""
    cfg = TrainConfig(lr=1.0, min_lr=0.1, warmup_steps=4, max_steps=44)
    rates = [learning_rate(step, cfg) for step in range(46)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and rates[44] == rates[45] == 0.1
    assert rates[24] == pytest.approx(0.55) and rates[4:45] == sorted(rates[4:45], reverse=True)


@pytest.mark.parametrize("tied", [True, False])
def test_configuration_weight_decay(tied):
    """Lightning-AI/lit-llama#254, oumi-ai/oumi#341, karpathy/nanoGPT#21: biases and norms decayed too."""
    model = tiny(tie_weights=tied)
    decayed, rest = make_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3 and rest["weight_decay"] == 0.0
    every = [id(p) for group in (decayed, rest) for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in model.parameters()), "each once, the shared one too"
    undecayed = {id(p) for p in rest["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in undecayed) == (name.endswith("bias") or "ln_" in name)


def test_configuration_false_means_false(tmp_path, capsys):
    """NVIDIA/OpenSeq2Seq#130, bw2/ConfigArgParse#87, axolotl-ai-cloud/axolotl#3765: "False" counted as true."""
    import tomllib

    text = write(tmp_path / "text.txt", "abcdefgh" * 40)
    small = "max_steps = 0\nblock_size = 4\nn_layer = 1\nn_head = 1\nn_embd = 4\neval_batches = 1\nbatch_size = 1\n"
    for number, (line, option, want) in enumerate(
        [
            ("bias = false", [], False),
            ("bias = true", ["--no-bias"], False),
            ("bias = false", ["--bias"], True),
            ("bias = true", ["--bias", "False"], False),
        ]
    ):
        config = write(tmp_path / f"{number}.toml", f"{small}device = 'cpu'\n{line}\n")
        out = tmp_path / f"run{number}"
        code = main(["train", "--config", str(config), "--data", str(text), "--out", str(out), *option])
        if option == ["--bias", "False"]:  # refused or understood, never taken for true
            assert code == 2 or tomllib.loads((out / "config.toml").read_text())["bias"] is False
        else:
            assert code == 0 and tomllib.loads((out / "config.toml").read_text())["bias"] is want
    capsys.readouterr()


# --- sampling ---------------------------------------------------------------------------------------------------------


def draws(probabilities: list[float], n: int = 4000, **options) -> list[int]:
    """How often each token follows token 0, for a model that gives it these probabilities."""
    V = len(probabilities)
    model = Bigram(dataclasses.replace(TINY, vocab_size=V))
    with torch.no_grad():
        model.table.weight.copy_(torch.tensor(probabilities).log().expand(V, V))
    options.setdefault("generator", torch.Generator().manual_seed(1))
    out = model.generate(torch.zeros(n, 1, dtype=torch.int64), max_new_tokens=1, **options)
    return torch.bincount(out[:, 1], minlength=V).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_k", [0, -1])
def test_sampling_top_k_of_nothing(top_k, temperature):
    """Lightning-AI/litgpt#2309: top_k=0 masked every logit, and greedy decoding gave token 0."""
    with pytest.raises(ValueError, match=f"top_k: expected an integer of at least 1, got {top_k}"):
        draws([0.2, 0.8], top_k=top_k, temperature=temperature)


@pytest.mark.parametrize("top_k", [4, 5, 10_000])
def test_sampling_top_k_of_more_than_there_are(top_k):
    """TransformerLensOrg/TransformerLens#1347, OpenNMT/CTranslate2#586, ml-explore/mlx-lm#1377: crash, or refusal."""
    assert draws([0.1, 0.2, 0.3, 0.4], top_k=top_k) == draws([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("top_k", [1.2, 2.0, "3"])
def test_sampling_top_k_of_a_fraction(top_k):
    """vllm-project/vllm#7227, devforth/gpt-j-6b-gpu-docker#1: a TypeError from inside the sampler."""
    with pytest.raises(ValueError, match="top_k: expected an integer of at least 1, got "):
        draws([0.2, 0.3, 0.5], n=10, top_k=top_k)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-9, [0]), (0.49, [0]), (0.6, [0, 1]), (0.81, [0, 1, 2]), (0.97, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])],
)
def test_sampling_top_p_keeps_the_token_that_crosses(top_p, kept):
    """thu-nics/C2C#21, Biohub/esm#360, fishaudio/fish-speech#1171: the crossing token was left out."""
    counts = draws([0.5, 0.3, 0.15, 0.05], top_p=top_p)
    assert [token for token, count in enumerate(counts) if count] == kept
    share = sum([0.5, 0.3, 0.15, 0.05][: len(kept)])
    assert counts[0] / 4000 == pytest.approx(0.5 / share, abs=0.04)


def test_sampling_never_takes_what_is_impossible():
    """pytorch/pytorch#48841, huggingface/transformers#23088: tokens of probability 0 were drawn."""
    counts = draws([0.0, 0.7, 0.0, 0.3, 0.0], n=100_000)
    assert [counts[i] for i in (0, 2, 4)] == [0, 0, 0] and sum(counts) == 100_000


def test_sampling_repeats_with_its_generator():
    """karpathy/nanoGPT#426, openai/gpt-2#65, minimaxir/gpt-2-simple#121: the same seed gave other text."""
    model, idx = tiny(), integers(11, 2, 3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = model.generate(idx, 12, generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    torch.manual_seed(2)
    assert torch.equal(first, model.generate(idx, 12, generator=torch.Generator().manual_seed(7)))
    assert not torch.equal(first, model.generate(idx, 12, generator=torch.Generator().manual_seed(8)))


def test_sampling_restores_the_mode():
    """pytorch/examples#114, shubhamagarwal92/mmd#14: dropout on while sampling, or off for the rest of training."""
    model, idx = tiny(dropout=0.6), integers(11, 1, 3)
    first, second = (model.generate(idx, 12, temperature=0.0) for _ in range(2))
    assert torch.equal(first, second) and model.training
    tokens = stream(model, idx, 12, temperature=0.0)
    next(tokens)
    assert model.training, "between two tokens the caller may train"
    tokens.close()
    model.eval()
    assert torch.equal(first, model.generate(idx, 12, temperature=0.0)) and not model.training


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("prompt", [1, 5, 8, 11])
def test_sampling_with_and_without_a_cache(batch, prompt):
    """lucidrains/x-transformers#219, rasbt/LLMs-from-scratch#1048: the cache changed what was said."""
    model, idx = tiny(seed=3), integers(11, batch, prompt)
    with_cache, without = (
        torch.cat(list(stream(model, idx, 10, temperature=0.0, use_cache=use)), 1) for use in (True, False)
    )
    assert torch.equal(with_cache, without)
    text = idx
    for token in with_cache.split(1, 1):
        logits = model(text[:, -8:])[0][:, -1]
        assert torch.equal(logits.argmax(-1, keepdim=True), token)
        text = torch.cat([text, token], 1)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_sampling_the_caches_dtype_is_attentions(dtype, autocast):
    """Lightning-AI/litgpt#57, TransformerLensOrg/TransformerLens#1260: keys of one dtype met queries of another."""
    model, idx = tiny(seed=3).to(dtype), integers(11, 2, 3)
    half = torch.float16 if dtype == torch.float16 else torch.bfloat16
    with torch.autocast("cpu", half, enabled=autocast):
        assert model.generate(idx, 9, temperature=0.0).shape == (2, 12)


def test_sampling_past_the_context():
    """huggingface/transformers#530, huggingface/transformers#11033, Lightning-AI/litgpt#45: an error at token 1025."""
    model, idx = tiny(), integers(11, 2, 20)
    out = model.generate(idx, 30)
    assert out.shape == (2, 50) and torch.equal(out[:, :20], idx) and int(out.max()) < 11


def test_sampling_rows_of_a_batch_do_not_meet():
    """rasbt/reasoning-from-scratch#33: a row said something else beside other rows than alone."""
    model, idx = tiny(seed=4), integers(11, 4, 3)
    together = model.generate(idx, 10, temperature=0.0)
    for row, alone in zip(together, idx, strict=True):
        assert torch.equal(row, model.generate(alone[None], 10, temperature=0.0)[0])


# --- installation -----------------------------------------------------------------------------------------------------


def test_installation_without_gpu_and_compiler():
    """flagos-ai/FlagGems#5812, deepseek-ai/DeepSeek-R1#493, apple/ml-cross-entropy#5: no driver, or no C compiler."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no triton")
    code = """
import torch, fastgpt
import fastgpt.triton_kernels.attention, fastgpt.triton_kernels.layer_norm
from fastgpt import ops
q = torch.randn(1, 1, 3, 4)
assert ops.attention(q, q, q).shape == q.shape
assert ops.explain("attention", q, q, q).backend == "torch"
try:
    ops.attention(q, q, q, backend="triton")
except fastgpt.BackendError as error:
    print(error)
"""
    out = run_python(code, CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0", CC="", PATH="")
    assert out.startswith("backend='triton' was asked for, but cannot run attention here: ") and "\n" not in out


def test_installation_with_another_torch(monkeypatch):
    """Dao-AILab/flash-attention#950, Dao-AILab/flash-attention#723: undefined symbol, and nothing ran any more."""

    def fails(device_type: str) -> None:
        raise ImportError("_C.abi3.so: undefined symbol: _ZN3c104cuda9SetDeviceEi")

    monkeypatch.setattr(backend, "_availability", {})
    monkeypatch.setattr(backend, "_warned", set())
    monkeypatch.setitem(backend._smoke_tests, "native", fails)
    logits, targets = random(3, 4), integers(4, 3)
    with pytest.warns(UserWarning, match="undefined symbol"):
        loss = ops.cross_entropy(logits, targets)
    close(loss, reference.cross_entropy(logits.double(), targets))
    assert "undefined symbol" in str(ops.explain("cross_entropy", logits, targets))


def test_every_test_names_its_report():
    """A test here without a report, or a report without a number, is a slip."""
    for name, test in list(globals().items()):
        if name.startswith("test_") and name != "test_every_test_names_its_report":
            assert re.match(r"[\w.-]+/[\w.-]+#\d+(, [\w.-]+/[\w.-]+#\d+)*: ", test.__doc__ or ""), name
