"""Rows of a benchmark as they stand in a file, for the tests of what is published."""

from __future__ import annotations

import json
import re
from pathlib import Path

MACHINE = {
    "device": "A CPU",
    "cpu_capability": "AVX2",
    "threads": 2,
    "cuda": None,
    "torch": "2.13.0",
    "triton": "3.9.0",
}


def row(implementation: str = "fastgpt", median_ms: float = 10.0, ratio: float | None = None, **changed) -> dict:
    """A row in which the 20th and 80th percentile are 3 % below and above the median."""
    spread = {"ratio_p20": ratio and ratio * 0.97, "ratio_p80": ratio and ratio * 1.03}
    values = {
        "kind": "row", "op": "embedding", "shape": "B4 T64", "dtype": "float32", "direction": "forward",
        "implementation": implementation, "median_ms": median_ms, "p20_ms": median_ms * 0.97,
        "p80_ms": median_ms * 1.03, "rounds": 20, "ratio": ratio, **spread, **MACHINE,
    }  # fmt: skip
    return values | changed


def run_line(**changed) -> dict:
    ceilings = {"bytes_per_s": 15e9, "flops_per_s": 160e9, "dtype": "float32"}
    absent = {"embedding": {"liger-kernel": "its kernels run on CUDA devices only"}}
    return {"kind": "run", "ops": ["embedding"], "ceilings": ceilings, "absent": absent, **MACHINE} | changed


def cells_of(text: str) -> list[list[str]]:
    """The cells of every line of a table."""
    return [re.split(r" +\| +", line[2:-2].strip()) for line in text.splitlines() if line.startswith("| ")]


def write(path: Path, *lines: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
