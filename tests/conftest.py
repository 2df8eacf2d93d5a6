"""What must be set before torch and triton are imported, here and in the processes that the tests start."""

import os

# Tensors are small, and cores may be shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Where the Triton kernels run: on the GPU if there is one, else on Triton's interpreter, which is chosen when a kernel
# is decorated.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
