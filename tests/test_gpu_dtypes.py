"""Tensors of different dtypes in one call, and autocast: as a model in training calls the Triton kernels.

At a model's sizes on a GPU; on Triton's interpreter with few rows.
"""

from __future__ import annotations

import pytest
import torch

from fastgpt import ops
from fastgpt.ops import reference
from triton_checks import DEVICE, outputs_and_gradients

pytest.importorskip("triton")

ON_GPU = DEVICE == "cuda"
ROWS = 4096 if ON_GPU else 6
WIDTHS = [384, 768, 4096] if ON_GPU else [48]
BF16, F32 = torch.bfloat16, torch.float32
EPS = {BF16: 2**-8, F32: 2**-23}  # of one rounding, relative


def normal(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, device=DEVICE)


def assert_as_exact_as_its_dtype(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """The error is at most a few roundings of the largest value, in the dtype that the result has."""
    error, largest = float((found - expected).abs().max()), float(expected.abs().max())
    assert error <= 4 * max(EPS[found.dtype], 2**-20) * largest, f"{what}: {error:.2e} of {largest:.2e}"


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtypes", [(BF16, F32), (F32, BF16)], ids=str)
def test_add_layer_norm_of_a_branch_and_a_stream(dtypes, width, dropout_p):
    """The first is what training under autocast has: a bfloat16 branch joins a float32 stream."""
    torch.manual_seed(width)
    x, residual = (normal(ROWS, width, dtype=dtype) for dtype in dtypes)
    inputs = [x, residual, normal(width), normal(width)]
    grads = [normal(ROWS, width), normal(ROWS, width)]
    options = {"dropout_p": dropout_p, "seed": 7}
    ours = outputs_and_gradients(ops.add_layer_norm, inputs, grads, backend="triton", **options)
    torchs = outputs_and_gradients(ops.add_layer_norm, inputs, grads, backend="torch", **options)
    # The oracle starts from the gradients as the outputs' dtypes round them.
    rounded = [grad.to(y.dtype).double() for grad, y in zip(grads, ours[:2], strict=True)]
    exact = outputs_and_gradients(reference.add_layer_norm, [t.double() for t in inputs], rounded, **options)
    names = ("y", "h", "dx", "dresidual", "dweight", "dbias")
    for what, our, pytorchs, expected in zip(names, ours, torchs, exact, strict=True):
        assert our.dtype == pytorchs.dtype, what
        torch_error = float((pytorchs - expected).abs().max())
        if float((our - expected).abs().max()) > 2 * torch_error:
            assert_as_exact_as_its_dtype(our, expected, what)


T, D = (512, 64) if ON_GPU else (20, 16)
HALF = {"dtype": BF16}
AUTOCAST = {
    "attention": (ops.attention, lambda: [normal(2, 3, T, D) for _ in "qkv"]),
    "attention of two dtypes": (
        ops.attention,
        lambda: [normal(2, 3, T, D, **HALF), normal(2, 3, T, D), normal(2, 3, T, D, **HALF)],
    ),
    "layer_norm": (ops.layer_norm, lambda: [normal(ROWS, 48), normal(48), normal(48)]),
    "layer_norm of bfloat16": (ops.layer_norm, lambda: [normal(ROWS, 48, **HALF), normal(48), normal(48)]),
    "add_layer_norm": (
        ops.add_layer_norm,
        lambda: [normal(ROWS, 48, **HALF), normal(ROWS, 48), normal(48), normal(48)],
    ),
}


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_gives_the_torch_ops_dtypes_and_gradients(name):
    torch.manual_seed(0)
    op, make = AUTOCAST[name]
    inputs = make()
    results = []
    for backend in ("triton", "torch"):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        with torch.autocast(DEVICE, BF16):
            out = op(*leaves, backend=backend)
        out = out if isinstance(out, tuple) else (out,)
        grads = torch.autograd.grad(out, leaves, [torch.ones_like(y) for y in out])
        results.append([*(y.detach() for y in out), *grads])
    for ours, torchs in zip(*results, strict=True):
        assert ours.dtype == torchs.dtype
        scale = float(torchs.float().abs().max())
        torch.testing.assert_close(ours, torchs, rtol=2e-2, atol=2e-2 * max(1.0, scale))
