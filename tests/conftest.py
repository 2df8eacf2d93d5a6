"""One thread for PyTorch, here and in the processes the tests start: tensors are small, and cores may be shared."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
