"""What the launchers ask of the machine, and every undocumented name of Triton that these kernels use."""

import contextlib
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

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
    "triton.knobs.runtime.jit_cache_hook": ("3.6.0", "3.9.0"),
    "triton.runtime.driver.set_active": ("3.6.0", "3.9.0"),
    "triton.tools.tensor_descriptor.TensorDescriptor": ("3.6.0", "3.9.0"),
}
__all__ = ["ASTSource", "GPUTarget", "TensorDescriptor"]  # for the other files

# Under TRITON_INTERPRET=1, triton.jit returns functions that run on CPU tensors. It reads the variable at decoration.
INTERPRETING = bool(triton.knobs.runtime.interpret)

# Compute a * b + c as one instruction: stated, because Triton's default is about to change. layer_norm.py does not.
COMPILE_OPTIONS = {"enable_fp_fusion": True}

# The interpreter counts as two multiprocessors, so few that small test shapes run persistent loops more than once.
_INTERPRETED_MULTIPROCESSORS = 2


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. triton.cdiv takes microseconds on the host, and every launch needs several."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


_without_gpu: tuple[int, int] | None = (_INTERPRETED_MULTIPROCESSORS, 90) if INTERPRETING else None


@lru_cache
def _cuda_properties(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.major * 10 + properties.minor


def multiprocessors(tensor: Tensor) -> int:
    return (_without_gpu or _cuda_properties(tensor.device.index))[0]


def architecture(tensor: Tensor) -> int:
    """The compute capability of the tensor's device: 80, 90, 100, ... The interpreter counts as 90."""
    return (_without_gpu or _cuda_properties(tensor.device.index))[1]


def device_of(tensor: Tensor) -> AbstractContextManager:
    """A context in which the tensor's device is the current one, because Triton launches kernels on the current one."""
    if _without_gpu or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def float32_precision() -> str:
    """How float32 tiles are multiplied: in float32 ("ieee"), unless the user has allowed TF32 for matrix products."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


class _CompileOnlyDriver:
    """What a launch asks of Triton's driver before it compiles. No real device has the number -1."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def compile_launches(arch: int, n_multiprocessors: int) -> list[tuple[str, Any]]:
    """From now on a launch in this process compiles the kernel for sm_`arch`, and runs nothing. No GPU is needed.

    The launchers may then be called with tensors on the CPU, of any size: what they would run on a GPU with
    `n_multiprocessors` is compiled, in the variant that Triton makes for just these arguments, and is in Triton's cache
    when a GPU asks for it. The list that is returned gets the name and the compiled kernel of every later launch.
    """
    global _without_gpu
    if INTERPRETING:
        raise RuntimeError("TRITON_INTERPRET=1 is set, and what it interprets cannot be compiled; unset it")
    _without_gpu = n_multiprocessors, arch
    compiled: list[tuple[str, Any]] = []
    driver = _CompileOnlyDriver(arch)

    def compile_instead(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = {key: compile[key] for key in ("num_warps", "num_stages", "enable_fp_fusion")}
        source = ASTSource(fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0])
        compiled.append((fn.name, triton.compile(source, target=driver.target, options=options)))
        return True  # Triton then goes on without the kernel

    triton.runtime.driver.set_active(driver)
    triton.knobs.runtime.jit_cache_hook = compile_instead
    return compiled
