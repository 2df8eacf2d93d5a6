"""What the registered ops cost, for `torch.utils.flop_counter.FlopCounterMode`: a multiply-add is two operations.

As in PyTorch's own formulas, matrix products alone are counted, and causal attention as if nothing were masked. The
counter imports triton, which `import fastgpt` must not: formulas wait here until somebody imports the counter.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from math import prod
from types import ModuleType
from typing import Any

import torch

from .library import library

_COUNTER = "torch.utils.flop_counter"
_waiting: dict[str, Callable[..., Any]] = {}


def register_flops(op: str, formula: Callable[..., Any]) -> None:
    """Let the counter know `fastgpt::op`. `formula` takes the op's arguments, a shape in place of each tensor."""
    _waiting[op] = formula
    if (counter := sys.modules.get(_COUNTER)) is not None:
        _register_waiting(counter)


def product_flops(x_shape: Any, weight_shape: Any) -> Any:
    """x (..., K) times the transpose of weight (N, K)."""
    return 2 * prod(x_shape) * weight_shape[0]


def _register_waiting(counter: ModuleType) -> None:
    while _waiting:
        op, formula = _waiting.popitem()
        counter.register_flop_formula(getattr(torch.ops.fastgpt, op))(formula)


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Finds the counter as Python would have, and registers the formulas once its module has been executed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register_waiting(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _RegisterAfterImport())

# An op that makes the products of its gradient in the forward pass, where they are cheapest, calls this one in backward
# under a mode that watches, so that they are counted where they belong. It does nothing.
library.define("products_made_before(Tensor like, SymInt flops) -> ()")
library.impl("products_made_before", lambda like, flops: None, "CompositeExplicitAutograd")
torch.library.register_fake("fastgpt::products_made_before", lambda like, flops: None, lib=library)
register_flops("products_made_before", lambda like, flops, **options: flops)
