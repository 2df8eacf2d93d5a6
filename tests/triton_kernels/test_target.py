"""The undocumented names of Triton: in one file, listed there, and still in the installed Triton."""

from __future__ import annotations

import operator
from importlib import import_module

import pytest

from names_in_source import FILES, NEEDS_SOURCE, names_used, parse


@NEEDS_SOURCE
def test_undocumented_names_of_triton_stand_in_one_file() -> None:
    target = pytest.importorskip("fastgpt.triton_kernels.target")
    used: dict[str, set[str]] = {}
    for file in FILES:
        for _, name in names_used(parse(file)):
            if name.startswith("triton.") and name.count(".") > 1 and not name.startswith("triton.language"):
                used.setdefault(file.name, set()).add(name)
    assert used == {"target.py": set(target.UNDOCUMENTED_NAMES)}


def test_triton_has() -> None:
    target = pytest.importorskip("fastgpt.triton_kernels.target")
    for name, (oldest, newest) in target.UNDOCUMENTED_NAMES.items():
        module = "triton.knobs" if name.startswith("triton.knobs") else name.rpartition(".")[0]
        try:
            operator.attrgetter(name.removeprefix(f"{module}."))(import_module(module))
        except (ImportError, AttributeError):
            pytest.fail(f"triton {import_module('triton').__version__} has no {name}; {oldest} to {newest} had it")
