"""The undocumented names of Triton: in one file, listed there, and still in the installed Triton."""

from __future__ import annotations

import operator
import os
import subprocess
import sys
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
        objects = ("triton.knobs", "triton.runtime")  # what follows in the name are attributes, not modules
        module = next((module for module in objects if name.startswith(module)), name.rpartition(".")[0])
        try:
            operator.attrgetter(name.removeprefix(f"{module}."))(import_module(module))
        except (ImportError, AttributeError):
            pytest.fail(f"triton {import_module('triton').__version__} has no {name}; {oldest} to {newest} had it")


COMPILED_AHEAD = """
import torch, triton
from fastgpt.triton_kernels import layer_norm, target

compiled = target.compile_launches(90, 132)
x, weight = torch.empty(300, 768, dtype=torch.bfloat16), torch.empty(768)
call = lambda: layer_norm.forward(x, x, weight, weight, 1e-5, 0.1, torch.zeros((), dtype=torch.int64), x.dtype)
call()
[(name, ahead)] = compiled
# What Triton itself would compile for this launch, short of running it: the same entry of its cache.
triton.knobs.runtime.jit_cache_hook = None
kernel, own = layer_norm.forward_kernel, []
run = kernel.run
kernel.run = lambda *args, **options: own.append(run(*args, **options | {"warmup": True}))
call()
assert name.endswith("forward_kernel") and ahead.hash == own[0].hash
assert target.architecture(x) == 90 and target.multiprocessors(x) == 132
"""


def test_launches_are_compiled_without_a_gpu_and_as_a_gpu_would_ask_for_them() -> None:
    pytest.importorskip("fastgpt.triton_kernels.target")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILED_AHEAD], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
