"""What the tests of the Triton kernels share: an op and its gradients against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.ops import reference
from fastgpt.parity import ATOL

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def outputs_and_gradients(
    function: Callable, inputs: Sequence[Tensor | None], grads: Sequence[Tensor], **options
) -> list[Tensor]:
    """The outputs of function(*inputs, **options), then the gradient of each input that is not None."""
    inputs = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs, **options)
    out = out if isinstance(out, tuple) else (out,)
    leaves = [x for x in inputs if x is not None]
    grads = [grad.to(y.dtype) for grad, y in zip(grads, out, strict=True)]
    return [*(y.detach() for y in out), *torch.autograd.grad(out, leaves, grads)]


def check_against_oracle(
    op: str,
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    dtype: torch.dtype,
    atol: float | None = None,
    **options,
) -> None:
    """An error may be twice that of PyTorch's op in the same dtype, plus `atol`, parity's ATOL unless given.

    This is stricter than parity, whose tolerance grows with the largest value.
    """
    ours = outputs_and_gradients(getattr(ops, op), inputs, grads, backend="triton", **options)
    peer = partial(getattr(ops, op), backend="torch")
    if op == "attention" and options.get("dropout_p", 0.0) > 0.0 and dtype != torch.float32:
        peer = reference.attention  # with dropout, the torch backend computes half precision in float32
    torchs = outputs_and_gradients(peer, inputs, grads, **options)
    exact = [None if x is None else x.double() for x in inputs]
    oracle = outputs_and_gradients(getattr(reference, op), exact, [grad.double() for grad in grads], **options)
    atol = ATOL[dtype] if atol is None else atol
    for i, (our, pytorchs, expected) in enumerate(zip(ours, torchs, oracle, strict=True)):
        assert our.shape == expected.shape and our.dtype == dtype, f"result {i}: {our.shape}, {our.dtype}"
        error, torch_error = (float((x - expected).abs().max()) for x in (our, pytorchs))
        assert error <= 2 * torch_error + atol, f"result {i}: error {error:.2e}, PyTorch's {torch_error:.2e}"
