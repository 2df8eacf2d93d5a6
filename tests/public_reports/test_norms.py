"""What users of neighbouring projects reported about layer norm and embedding (see test_citations.py)."""

from __future__ import annotations

import re

import pytest
import torch

from fastgpt import ops
from fastgpt.ops import reference
from helpers import NATIVE, close, on_native, on_triton, outcome, random


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
