"""What the launchers ask of the machine they run on, and every undocumented name of Triton that the package uses."""

import contextlib
from contextlib import AbstractContextManager
from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

# What lies below triton and triton.language has moved between releases. It is imported here alone, and each name is
# listed with the oldest and the newest triton in which it was seen to do what is needed here: tests/ops/test_library.py
# holds the list complete and says which one is gone.
UNDOCUMENTED_NAMES = {
    "triton.backends.compiler.GPUTarget": ("3.6.0", "3.9.0"),
    "triton.compiler.ASTSource": ("3.6.0", "3.9.0"),
    "triton.knobs.runtime.interpret": ("3.6.0", "3.9.0"),
    "triton.tools.tensor_descriptor.TensorDescriptor": ("3.6.0", "3.9.0"),
}
__all__ = ["ASTSource", "GPUTarget", "TensorDescriptor"]  # for the other files

# Under TRITON_INTERPRET=1 triton.jit gives functions that run on CPU tensors; it is read when they are decorated.
INTERPRETING = bool(triton.knobs.runtime.interpret)

# Contracting a * b + c is what every result here was tested with; Triton's own default is about to change.
COMPILE_OPTIONS = {"enable_fp_fusion": True}

# A CPU has no multiprocessors. Two make every persistent loop and every split of small test shapes run more than once.
_INTERPRETED_MULTIPROCESSORS = 2


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own costs microseconds on the host, and every launch needs a few."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@lru_cache
def _cuda_properties(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.major * 10 + properties.minor


def multiprocessors(tensor: Tensor) -> int:
    return _INTERPRETED_MULTIPROCESSORS if INTERPRETING else _cuda_properties(tensor.device.index)[0]


def architecture(tensor: Tensor) -> int:
    """80, 90, 100, ...: the compute capability of the tensor's device. The interpreter takes the newest code path."""
    return 90 if INTERPRETING else _cuda_properties(tensor.device.index)[1]


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    if INTERPRETING or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def float32_precision() -> str:
    """How a dot of float32 runs: as float32, unless the user allowed TF32 for matrix products."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
