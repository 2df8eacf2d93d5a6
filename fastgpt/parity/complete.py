"""What an op needs, and which of these parts one that is being added does not have yet.

An op without all of its parts is half-added. It runs as soon as it has a function and a torch backend, and
`fastgpt doctor` and `fastgpt parity` say which parts are missing, each with the file in which it belongs.
"""

from __future__ import annotations

import inspect

from .. import ops
from ..ops import reference
from ..ops.backend import OPS, PREFERENCE, implements
from ..ops.yardsticks import YARDSTICKS
from .cases import parity_cases


def public_ops() -> tuple[str, ...]:
    """The ops that the table of preferences names, and the functions that fastgpt.ops exports."""
    exported = [name for name, value in vars(ops).items() if inspect.isfunction(value) and name != "explain"]
    return tuple(dict.fromkeys((*OPS, *exported)))


def missing_parts(op: str) -> list[str]:
    """The parts that the public op `op` lacks, each with its file; none where it is complete."""
    parts = (
        (f"its function (fastgpt/ops/{op}.py, exported by fastgpt/ops/__init__.py)", _is_exported(op)),
        (f"its torch backend (register in fastgpt/ops/{op}.py)", implements("torch", op)),
        ("its formula (fastgpt/ops/reference.py)", callable(getattr(reference, op, None))),
        ("its cases (fastgpt/parity/cases.py)", bool(parity_cases(op))),
        ("its yardstick (fastgpt/ops/yardsticks.py)", op in YARDSTICKS),
        ("its line in PREFERENCE (fastgpt/ops/backend.py)", bool(PREFERENCE.get(op))),
    )
    return [part for part, is_there in parts if not is_there]


def can_be_measured(op: str) -> bool:
    """Whether the public op `op` has what `fastgpt parity` needs. Without a yardstick, the formula serves as one."""
    return _is_exported(op) and implements("torch", op) and hasattr(reference, op) and bool(parity_cases(op))


def _is_exported(op: str) -> bool:
    return inspect.isfunction(getattr(ops, op, None))


def half_added() -> dict[str, str]:
    """The public ops that are not complete, and in words what each one lacks."""
    missing = {op: missing_parts(op) for op in public_ops()}
    return {op: f"half-added, it lacks {', '.join(parts)}" for op, parts in missing.items() if parts}
