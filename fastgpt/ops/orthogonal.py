"""Matrices made orthogonal by Newton-Schulz iterations, which are matrix products alone: what Muon needs.

It is not one of the public ops. With Jordan's coefficients (https://kellerjordan.github.io/posts/muon) five iterations
bring all singular values of a matrix that are not tiny to about 1. On the processors that `native.FASTER_THAN_LIBRARY`
names, the extension computes them (csrc/orthogonal.cpp).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .flops import product_flops
from .library import define_op
from .linear import linear_choice

ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: they grow small singular values fastest
EPSILON = 1e-7  # keeps a matrix of zeros from becoming NaN

_orthogonal_native = define_op(
    "orthogonal_native(Tensor x, float a, float b, float c, int iterations) -> Tensor",
    forward=native.load_at_first_call("orthogonal_native"),
    fake=lambda x, *rest: x.new_empty(x.shape),
    flops=lambda x, a, b, c, iterations, **options: _flops(x, iterations),
)


def _flops(x: list[int], iterations: int) -> int:
    """Of whole products, as PyTorch counts them. The extension computes half of those that are symmetric."""
    count, rows, columns = x
    rectangular, square = product_flops((rows, columns), (rows,)), product_flops((rows, rows), (rows,))
    return count * (2 * rectangular + (4 * iterations - 3) * square)


def orthogonal(matrices: Tensor) -> Tensor:
    """matrices (N, rows, columns) -> about U V^T of the singular value decomposition U S V^T of each."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # the products are cheaper with few rows
    x = x.to(torch.bfloat16 if x.is_cuda else torch.promote_types(x.dtype, torch.float32))
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + EPSILON)  # no singular value is above 1 now
    if x.dtype == torch.bfloat16:
        x = _iterate(x)
    elif x.is_cpu and x.dtype == torch.float32 and linear_choice("orthogonal")[0]:
        x = _orthogonal_native(x, *COEFFICIENTS, ITERATIONS)
    else:
        x = _iterate_gram(x)
    return (x.mT if tall else x).to(matrices.dtype)


def _iterate(x: Tensor) -> Tensor:
    """x <- a x + b (x x^T) x + c (x x^T)^2 x, which maps each singular value s to a s + b s^3 + c s^5."""
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _iterate_gram(x: Tensor) -> Tensor:
    """The same, on the smaller matrix x x^T: an iteration multiplies x by p = a I + b (x x^T) + c (x x^T)^2.

    All products are polynomials in x x^T, so their factors may change places. Rounding errors of x x^T grow faster than
    those of x, so this needs float32.
    """
    gram = x @ x.mT
    product = p = _polynomial(gram)
    for _ in range(ITERATIONS - 1):
        gram = p @ (p @ gram)  # (p x) (p x)^T
        p = _polynomial(gram)
        product = p @ product
    return product @ x


def _polynomial(gram: Tensor) -> Tensor:
    """a I + b gram + c gram^2."""
    a, b, c = COEFFICIENTS
    p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    p.diagonal(dim1=1, dim2=2).add_(a)
    return p
