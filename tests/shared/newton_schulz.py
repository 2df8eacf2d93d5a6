"""What Newton-Schulz iterations make of a matrix, computed from its singular values."""

from __future__ import annotations

import torch

from fastgpt.ops.orthogonal import COEFFICIENTS, ITERATIONS


def by_singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """The Newton-Schulz iterations in float64, each applied to the singular values alone."""
    a, b, c = COEFFICIENTS
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / matrix.double().norm()
    for _ in range(ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    return u * s @ v
