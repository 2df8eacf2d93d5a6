"""What must be set before torch and triton are imported, here and in the processes that the tests start; fixtures."""

import os

# Tensors are small, and cores may be shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

# Where the Triton kernels run: on the GPU if there is one, else on Triton's interpreter, which is chosen when a kernel
# is decorated.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")


@pytest.fixture(autouse=True)
def floating_point_state():
    """Compiled code leaves the processor as it found it: x86 computes long double in registers that MMX shares."""
    yield
    assert np.longdouble(1.5) + 1 == 2.5, "compiled code has left the x87 registers in use"


@pytest.fixture(params=["avx512", "avx2", "generic"])
def instructions(request):
    """Each set of the extension's CPU kernels that runs on this processor."""
    from fastgpt.ops import native

    extension = native.load("cpu")
    widest = extension.instruction_set()
    if not extension.use_instruction_set(request.param):
        pytest.skip(f"no {request.param} here")
    yield request.param
    extension.use_instruction_set(widest)
