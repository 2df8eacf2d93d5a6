"""FastGPT: the GPT you just understood, at the speed of the hardware you have.

Importing this package imports nothing else. A public name is found in its module when it is first asked for (PEP 562),
and PyTorch is imported then: `fastgpt --help` needs no PyTorch, and a script pays for what it uses. Where PyTorch is
there already, the ops are registered with it at once, so that an exported program finds them; else by `fastgpt.ops`.
"""

import sys as _sys
from typing import TYPE_CHECKING

__version__ = "0.1.0"
# `nn` is not among them, because `from fastgpt import *` would put it in the place of torch.nn.
__all__ = ["GPT", "BackendError", "GPTConfig", "explain", "load", "ops", "patch", "unpatch", "use_backend"]

if TYPE_CHECKING:  # type checkers and editors read these lines, and would take any name from a __getattr__
    from . import nn as nn
    from . import ops as ops
    from .config import GPTConfig as GPTConfig
    from .loading import load as load
    from .model import GPT as GPT
    from .ops.backend import BackendError as BackendError
    from .ops.backend import use_backend as use_backend
    from .patching import explain as explain
    from .patching import patch as patch
    from .patching import unpatch as unpatch
else:
    _MODULE_OF = {
        "GPT": "fastgpt.model",
        "GPTConfig": "fastgpt.config",
        "load": "fastgpt.loading",
        "BackendError": "fastgpt.ops.backend",
        "use_backend": "fastgpt.ops.backend",
        "explain": "fastgpt.patching",
        "patch": "fastgpt.patching",
        "unpatch": "fastgpt.patching",
    }

    def __getattr__(name):
        from importlib import import_module

        if name in ("nn", "ops"):
            return import_module(f"fastgpt.{name}")  # which makes it an attribute of this module
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "nn"})


if "torch" in _sys.modules:
    from . import ops as ops
