"""FastGPT: the GPT you just understood, at the speed of the hardware you have."""

from pathlib import Path as _Path

# In a source tree that is not installed, triton_kernels/ lies beside this package instead of inside it.
_here = _Path(__file__).resolve().parent
if not (_here / "triton_kernels").is_dir() and (_here.parent / "triton_kernels" / "__init__.py").is_file():
    __path__.append(str(_here.parent))

from . import ops  # noqa: E402
from .config import GPTConfig  # noqa: E402
from .model import GPT  # noqa: E402
from .ops.backend import BackendError, use_backend  # noqa: E402

__version__ = "0.1.0"
__all__ = ["GPT", "BackendError", "GPTConfig", "ops", "use_backend"]
