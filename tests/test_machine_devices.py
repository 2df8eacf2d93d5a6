"""The device that a name stands for: `auto`, devices that are missing, and names that are no device."""

from __future__ import annotations

import pytest
import torch

from fastgpt.machine import DeviceError, resolve_device


@pytest.mark.parametrize(
    ("cuda", "mps", "taken"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu"), (True, False, "cuda")]
)
def test_auto_takes_the_gpu_that_is_there(monkeypatch, cuda, mps, taken):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device("auto").type == taken


@pytest.mark.parametrize("name", ["nonsense", "", "cuda:999", "meta", "hpu", "vulkan", "mkldnn", "privateuseone"])
@pytest.mark.filterwarnings("ignore:'mkldnn'")
def test_a_device_that_is_not_there_is_refused_in_one_line(name):
    with pytest.raises(DeviceError) as error:
        resolve_device(name)
    assert str(error.value).startswith(f"device: {name!r} cannot be used here: ")
    assert "\n" not in str(error.value) and "INTERNAL" not in str(error.value) and len(str(error.value)) < 250


@pytest.mark.parametrize("name", ["cuda", "mps", "xpu"])
def test_a_gpu_that_is_missing_is_refused(name):
    module = torch.get_device_module(name)
    if module.is_available():
        assert resolve_device(name).type == name
        return
    with pytest.raises(DeviceError, match=f"device: '{name}' cannot be used here: "):
        resolve_device(name)
