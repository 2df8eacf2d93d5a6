"""What the launchers ask of the machine, and every undocumented name of Triton that these kernels use."""

import contextlib
from contextlib import AbstractContextManager
from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

# Names below triton and triton.language have moved between releases, so only this file imports them. Each is listed
# with the oldest and the newest release in which it was seen to work. tests/ops/test_library.py checks that the list is
# complete, and says which name is gone.
UNDOCUMENTED_NAMES = {
    "triton.backends.compiler.GPUTarget": ("3.6.0", "3.9.0"),
    "triton.compiler.ASTSource": ("3.6.0", "3.9.0"),
    "triton.knobs.runtime.interpret": ("3.6.0", "3.9.0"),
    "triton.tools.tensor_descriptor.TensorDescriptor": ("3.6.0", "3.9.0"),
}
__all__ = ["ASTSource", "GPUTarget", "TensorDescriptor"]  # for the other files

# Under TRITON_INTERPRET=1, triton.jit returns functions that run on CPU tensors. It reads the variable at decoration.
INTERPRETING = bool(triton.knobs.runtime.interpret)

# Compute a * b + c as one instruction. Every result was tested with this, and Triton's default is about to change.
COMPILE_OPTIONS = {"enable_fp_fusion": True}

# The interpreter counts as two multiprocessors, so few that small test shapes run persistent loops more than once.
_INTERPRETED_MULTIPROCESSORS = 2


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. triton.cdiv takes microseconds on the host, and every launch needs several."""
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
    """The compute capability of the tensor's device: 80, 90, 100, ... The interpreter counts as 90."""
    return 90 if INTERPRETING else _cuda_properties(tensor.device.index)[1]


def device_of(tensor: Tensor) -> AbstractContextManager:
    """A context in which the tensor's device is the current one, because Triton launches kernels on the current one."""
    if INTERPRETING or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def float32_precision() -> str:
    """How float32 tiles are multiplied: in float32 ("ieee"), unless the user has allowed TF32 for matrix products."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
