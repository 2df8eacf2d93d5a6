"""Shared by the ops' Triton implementations: the test that Triton runs here, and the seed as the kernels take it.

Importing this module does not import triton. The first call that may run a Triton kernel does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import register_smoke_test


def _smoke_test(device_type: str) -> None:
    """One launch of the smallest kernel, or an error that says what is missing."""
    try:
        from ..triton_kernels import layer_norm
        from ..triton_kernels.target import INTERPRETING
    except ImportError as error:
        if error.name == "fastgpt.triton_kernels":
            raise RuntimeError("this source tree is not installed; run pip install -e . in it") from error
        raise RuntimeError(f"Triton cannot be imported: {error}; pip install triton") from error
    if device_type == "cpu" and not INTERPRETING:
        raise RuntimeError("Triton's kernels need a CUDA GPU; without one TRITON_INTERPRET=1 interprets them, slowly")
    if device_type not in ("cpu", "cuda"):
        raise RuntimeError(f"the Triton kernels run on CUDA devices, not on {device_type}")
    if device_type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        raise RuntimeError(f"the Triton kernels need compute capability 8.0 or newer; this GPU has {major}.{minor}")
    x = torch.tensor([[-1.0, 1.0]], dtype=torch.float32, device=device_type)
    y = layer_norm.forward(x, None, torch.ones_like(x[0]), None, 1e-5, 0.0, None, torch.float32)[0]
    if not torch.allclose(y, x, atol=1e-4):
        raise RuntimeError("the smallest Triton kernel gave a wrong result; please report it")


def seed_tensor(dropout_p: float, seed: int | Tensor | None, device: torch.device) -> Tensor | None:
    """The Philox key as a 0-dim int64 tensor on `device`, drawn from torch's generator where the caller gave none.

    It is a tensor so that a replayed CUDA graph draws a new key, and a compiled graph does not depend on its value.
    """
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.to(device)
    return torch.full((), seed, dtype=torch.int64, device=device)


register_smoke_test("triton", _smoke_test)
