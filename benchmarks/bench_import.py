"""What an import costs over `import torch`, which is there anyway: each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

from fastgpt.benchmarks.harness.measure import ReportedClock
from fastgpt.benchmarks.harness.suite import OURS, Work

# What a user writes to get at the model, or at the kernels.
STATEMENTS = {
    OURS: "from fastgpt import GPT, ops",
    "transformers": "from transformers import GPT2LMHeadModel",
    "liger-kernel": "from liger_kernel.transformers import LigerLayerNorm",
    "flash-attn": "from flash_attn import flash_attn_func",
    "quack-kernels": "from quack import cross_entropy",
}
PROGRAM = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
{statement}
print(middle - start, time.perf_counter() - middle)
"""


def bench_import(bench):
    extra: dict[str, dict] = {name: {} for name in STATEMENTS}
    contenders, absent = {}, {}
    for name, statement in STATEMENTS.items():
        package = statement.split()[1].split(".")[0]
        if find_spec(package) is None:
            absent[name] = f"{name} is not installed"
        elif run(statement, extra[name]) is None:
            absent[name] = f"`{statement}` fails here"
        else:
            contenders[name] = lambda statement=statement, extra=extra[name]: run(statement, extra)
    work = Work(
        op="import", shape="over import torch", direction="import", dtype="none", contenders=contenders, absent=absent,
        error_ratio=lambda name: None, extra=extra, clock=ReportedClock(), warmups=0, seconds=0.0, measure_memory=False,
    )  # fmt: skip
    bench(work)


def run(statement: str, extra: dict) -> float | None:
    """Seconds of the import; how long that of torch took goes to `extra`."""
    command = [sys.executable, "-c", PROGRAM.format(statement=statement)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode != 0:
        return None
    of_torch, seconds = (float(number) for number in done.stdout.split()[-2:])
    extra["import_torch_ms"] = round(of_torch * 1e3, 1)
    return seconds
