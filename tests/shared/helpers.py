"""What several test files need: small tensors, a small model, comparisons with the formulas, a fresh interpreter."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgpt import GPT, GPTConfig
from fastgpt.baselines import build_model
from fastgpt.ops import backend, reference

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
on_each_backend = pytest.mark.parametrize("backend", ["auto", "torch", NATIVE])
on_triton = pytest.mark.parametrize("name", ["torch", TRITON])
PANGRAM = "the quick brown fox jumps over the lazy dog\n" * 50
TINY = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.0)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def integers(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def heads(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of shape (B, H, Hkv, Tq, Tk, D)."""
    B, H, Hkv, Tq, Tk, D = shape
    return tuple(random(B, h, t, D, seed=i, dtype=dtype) for i, (h, t) in enumerate(((H, Tq), (Hkv, Tk), (Hkv, Tk))))


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


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def run_command(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed; its last output is shown where it does not."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done
