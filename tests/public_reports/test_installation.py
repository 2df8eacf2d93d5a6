"""What users of neighbouring projects reported about machines that lack something (see test_citations.py)."""

from __future__ import annotations

import importlib.util

import pytest

from fastgpt import ops
from fastgpt.ops import backend, reference
from helpers import close, integers, random, run_python


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
