"""The machine: which device a name means here."""

from __future__ import annotations

import torch


class DeviceError(RuntimeError):
    """A device that cannot be used here; the message says why."""


def resolve_device(name: str) -> torch.device:
    """The device called `name`, once it has held a number; "auto" is a CUDA or ROCm GPU, else Apple's, else the CPU."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it knows shapes, and computes nothing")
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        # A name that PyTorch knows, and this build has no code for, ends in an account of its dispatcher.
        unknown = isinstance(error, (NotImplementedError, ImportError)) or "INTERNAL ASSERT" in str(error)
        reason = "this PyTorch was built without it" if unknown else str(error).splitlines()[0]
        raise DeviceError(f"device: {name!r} cannot be used here: {reason}") from None
    return device
