"""A suite with small settings."""

from __future__ import annotations

import pytest
import torch

from fastgpt.benchmarks.harness import ceilings, suite

CPU = torch.device("cpu")
CEILINGS = ceilings.Ceilings("float32", {(way, 2**20): 1e9 for way in ceilings.MIXED}, {(1, 1, 1): 1e12})


@pytest.fixture
def setting() -> suite.Setting:
    return suite.Setting(CPU, seconds=0.0, min_rounds=3, min_time=0.0)


@pytest.fixture
def run(setting, tmp_path, monkeypatch) -> suite.Suite:
    """A suite that writes to tmp_path, with ceilings that are given and nothing compiled."""

    def refuse(*args, **options):
        raise RuntimeError("compiled in the benchmarks, not in their tests")

    monkeypatch.setattr(torch, "compile", lambda *args, **options: refuse)
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda *args: CEILINGS)
    return suite.Suite(setting, tmp_path / "rows.jsonl")
