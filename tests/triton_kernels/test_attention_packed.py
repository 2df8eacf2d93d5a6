"""Attention whose q, k and v lie side by side: the bits of three separate tensors, and one gradient without a copy."""

import pytest
import torch

from fastgpt import use_backend
from fastgpt.ops.attention import attention, self_attention, split_heads
from triton_checks import DEVICE

pytest.importorskip("fastgpt.triton_kernels.attention")

# name: (B, H, T, D), dtype, causal, dropout
CASES = {
    "one tile": ((2, 3, 20, 16), torch.bfloat16, True, 0.3),
    "tiles": ((1, 2, 70, 24), torch.float16, True, 0.0),
    "descriptors": ((1, 2, 260, 16), torch.bfloat16, False, 0.2),
    "float32": ((2, 1, 18, 8), torch.float32, True, 0.0),
    "no tokens": ((2, 2, 0, 8), torch.float32, True, 0.0),
}


def tensors(B, H, T, D, dtype):
    qkv = torch.randn(B, T, 3 * H * D, dtype=dtype, device=DEVICE).requires_grad_()
    return qkv, torch.randn(B, T, H * D, dtype=dtype, device=DEVICE)


def separately(qkv, n_head, **options):
    return attention(*split_heads(qkv, n_head), **options).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("name", CASES)
def test_the_bits_are_those_of_three_tensors(name):
    (B, H, T, D), dtype, is_causal, dropout_p = CASES[name]
    qkv, grad = tensors(B, H, T, D, dtype)
    results = []
    for run in (self_attention, separately):
        torch.manual_seed(1)  # of the dropout mask
        out = run(qkv, H, is_causal=is_causal, dropout_p=dropout_p, backend="triton")
        results.append((out, *torch.autograd.grad(out, qkv, grad)))
    (out, grad_qkv), expected = results
    assert torch.equal(out, expected[0]) and torch.equal(grad_qkv, expected[1])
    assert out.is_contiguous() and grad_qkv.is_contiguous() and out.grad_fn.name().startswith("attention_packed")


def test_expanded_gradients_and_strided_inputs():
    wide = torch.randn(2, 9, 2 * 48, device=DEVICE)
    qkv = wide[:, :, ::2].requires_grad_()
    (ours,) = torch.autograd.grad(self_attention(qkv, 2, backend="triton").sum(), qkv)
    (torchs,) = torch.autograd.grad(self_attention(qkv, 2, backend="torch").sum(), qkv)
    torch.testing.assert_close(ours, torchs, atol=1e-5, rtol=1e-5)


def test_without_a_gradient_and_on_torch_it_is_plain_attention():
    qkv, grad = tensors(2, 2, 7, 8, torch.float32)
    with torch.no_grad():
        assert torch.equal(self_attention(qkv, 2, backend="triton"), separately(qkv, 2, backend="triton"))
    ours, plain = (run(qkv, 2, backend="torch") for run in (self_attention, separately))
    assert torch.equal(ours, plain)
    assert torch.equal(*(torch.autograd.grad(out, qkv, grad)[0] for out in (ours, plain)))


def test_autocast_and_compile():
    qkv, grad = tensors(1, 2, 9, 8, torch.float32)
    run = lambda x: self_attention(x, 2, backend="triton")  # noqa: E731
    with torch.autocast(DEVICE, torch.bfloat16):
        out = run(qkv)
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out, qkv, grad.bfloat16())[0].dtype == torch.float32
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(run(qkv), qkv, grad)
    torch.testing.assert_close(torch.autograd.grad(compiled(qkv), qkv, grad), expected)


def test_inside_a_transform_it_is_pytorchs():
    qkv, _ = tensors(1, 2, 5, 8, torch.float32)
    loss = lambda x: self_attention(x, 2).square().sum()  # noqa: E731
    with use_backend("torch"):
        expected = torch.autograd.grad(loss(qkv), qkv)[0]
    torch.testing.assert_close(torch.func.grad(loss)(qkv.detach()), expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck(dropout_p):
    qkv, _ = tensors(2, 2, 5, 8, torch.float32)
    seed = torch.tensor(3, device=DEVICE)
    torch.library.opcheck(torch.ops.fastgpt.attention_packed.default, (qkv, 2, seed, True, 0.3, dropout_p, 3))
    qkv = qkv.detach()
    out, lse = torch.ops.fastgpt.attention_packed(qkv, 2, seed, True, 0.3, dropout_p, 3)
    arguments = (torch.randn_like(out), qkv, out, lse, 2, seed, True, 0.3, dropout_p, 3)
    torch.library.opcheck(torch.ops.fastgpt.attention_packed_backward.default, arguments)


def test_double_backward_raises():
    qkv, _ = tensors(1, 1, 4, 8, torch.float32)
    out = self_attention(qkv, 1, backend="triton").square().sum()
    (grad,) = torch.autograd.grad(out, qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()
