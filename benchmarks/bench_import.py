"""Seconds that an import takes beyond `import torch`, which every contender needs. Each runs in a new process."""

import subprocess
import sys
from importlib.util import find_spec

from fastgpt.benchmarks.harness.suite import OURS, Work

# What a user writes to import the model or the kernels.
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


def bench_import(run_work):
    extra: dict[str, dict] = {name: {} for name in STATEMENTS}
    contenders, absent = {}, {}
    for name, statement in STATEMENTS.items():
        package = statement.split()[1].split(".")[0]
        if find_spec(package) is None:
            absent[name] = f"{name} is not installed"
        elif import_seconds(statement, extra[name]) is None:
            absent[name] = f"`{statement}` fails here"
        else:
            contenders[name] = lambda statement=statement, extra=extra[name]: import_seconds(statement, extra)
    work = Work(
        op="import", shape="over import torch", direction="import", dtype="none", contenders=contenders, absent=absent,
        error_ratio=lambda name: None, extra=extra, reports_seconds=True,
    )  # fmt: skip
    run_work(work)


def import_seconds(statement: str, extra: dict) -> float | None:
    """Seconds of the import, None where it fails; the seconds of `import torch` go to `extra`."""
    command = [sys.executable, "-c", PROGRAM.format(statement=statement)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode != 0:
        return None
    of_torch, seconds = (float(number) for number in done.stdout.split()[-2:])
    extra["import_torch_ms"] = round(of_torch * 1e3, 1)
    return seconds
