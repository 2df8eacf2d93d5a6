"""The seed of a Triton kernel's dropout, and why Triton cannot run on a device."""

import pytest
import torch

from fastgpt.ops import triton_backend

CPU = torch.device("cpu")


def test_the_seed_is_a_tensor_and_is_drawn_only_where_it_is_needed():
    state = torch.get_rng_state()
    assert triton_backend.seed_tensor(0.0, None, CPU) is None
    for given in (7, torch.tensor(7)):
        seed = triton_backend.seed_tensor(0.5, given, CPU)
        assert seed.dtype == torch.int64 and seed.shape == () and seed == 7
    assert torch.equal(torch.get_rng_state(), state), "nothing was drawn"
    torch.manual_seed(1)
    first, second = (triton_backend.seed_tensor(0.5, None, CPU) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, triton_backend.seed_tensor(0.5, None, CPU)) and not torch.equal(first, second)


def test_a_device_without_triton_is_named(monkeypatch):
    target = pytest.importorskip("fastgpt.triton_kernels.target")
    with pytest.raises(RuntimeError, match="run on CUDA devices, not on mps"):
        triton_backend._smoke_test("mps")
    monkeypatch.setattr(target, "INTERPRETING", False)
    with pytest.raises(RuntimeError, match="need a CUDA GPU; without one TRITON_INTERPRET=1"):
        triton_backend._smoke_test("cpu")
