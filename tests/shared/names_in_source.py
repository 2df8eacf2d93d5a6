"""Which names of other packages a source file uses."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastgpt

ROOT = Path(fastgpt.__file__).resolve().parent.parent
FILES = [
    *(file for folder in ("fastgpt", "benchmarks", "triton_kernels") for file in sorted((ROOT / folder).rglob("*.py"))),
    ROOT / "setup.py",
]
NEEDS_SOURCE = pytest.mark.skipif(not (ROOT / "triton_kernels").is_dir(), reason="the source tree is not here")


def dotted(node: ast.expr) -> str:
    """`torch._C.name` as written; what is no plain name is shown as an ellipsis."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "..."


def names_used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of every attribute and import from elsewhere; of a.b.c only the whole, not a.b too."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            yield node.lineno, dotted(node)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func) in ("getattr", "hasattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant):
                yield node.lineno, f"{dotted(node.args[0])}.{name.value}"


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))
