"""How many operations each registered op takes, for `torch.utils.flop_counter.FlopCounterMode`.

As in PyTorch's own formulas, a multiply-add is two operations, only matrix products are counted, and causal attention
counts as if nothing were masked. The counter's module imports triton, which `import fastgpt` must not do. The formulas
are therefore kept here, and registered when the counter's module is imported.
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

_COUNTER = "torch.utils.flop_counter"
_waiting: dict[str, Callable[..., Any]] = {}


def register_flops(op: str, formula: Callable[..., Any]) -> None:
    """Tell the counter of `fastgpt::op`. `formula` takes the op's arguments, a shape in place of each tensor."""
    _waiting[op] = formula
    if (counter := sys.modules.get(_COUNTER)) is not None:
        _register_waiting(counter)


def product_flops(x_shape: Any, weight_shape: Any) -> Any:
    """Operations of x (..., K) times the transpose of weight (N, K)."""
    return 2 * prod(x_shape) * weight_shape[0]


def _register_waiting(counter: ModuleType) -> None:
    while _waiting:
        op, formula = _waiting.popitem()
        counter.register_flop_formula(getattr(torch.ops.fastgpt, op))(formula)


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Finds the counter's module as Python does, and registers the formulas after it has been executed."""

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
