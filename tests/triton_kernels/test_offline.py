"""Every kernel configuration compiles for sm_80, sm_90 and sm_100 without a GPU, within tests/kernel_budgets.toml.

The compilations run in two processes of their own: this one may have Triton's interpreter switched on.
"""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

offline = pytest.importorskip("fastgpt.triton_kernels.offline")

BUDGETS = tomllib.loads((Path(__file__).parents[1] / "kernel_budgets.toml").read_text(encoding="utf-8"))
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}  # bytes a program may have, of each chip
SMALL_SHARED_LIMIT = 101376  # of the consumer chips (sm_86, sm_89, sm_120), which have the matrix instructions of sm_80
CASES = [(arch, case.name) for arch in offline.ARCHITECTURES for case in offline.cases(arch)]


@pytest.fixture(scope="session")
def measured() -> dict[tuple[int, str], dict]:
    return rows_of("-m", "fastgpt.triton_kernels.offline", "--json", "--part")


@pytest.fixture(scope="session")
def trained() -> dict[tuple[int, str], dict]:
    """What a model launches, see shared/trained_launches.py."""
    return rows_of(str(Path(__file__).parents[1] / "shared" / "trained_launches.py"))


def rows_of(*command: str) -> dict[tuple[int, str], dict]:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([sys.executable, *command, f"{i}/2"], env=environment, **pipes) for i in range(2)]
    rows = {}
    for worker in workers:
        out, errors = worker.communicate(timeout=900)
        assert worker.returncode == 0, errors[-3000:]
        rows |= {(row["arch"], row["name"]): row for row in map(json.loads, out.splitlines())}
    return rows


@pytest.mark.parametrize(("arch", "name"), CASES, ids=lambda value: str(value))
def test_budget(measured, arch, name):
    row, budget = measured[arch, name], BUDGETS[f"sm_{arch}"][name]
    assert not row["faults"]
    assert row["spilled_bytes"] <= budget.get("spilled_bytes", 0)
    assert row["registers"] <= budget["registers"]
    assert row["shared_bytes"] <= min(budget["shared_bytes"], SHARED_LIMIT[arch])
    assert row["hgmma"] >= budget.get("hgmma", 0)
    assert row["tma_loads"] >= budget.get("tma_loads", 0)
    if arch != 90:
        assert row["shared_bytes"] <= SMALL_SHARED_LIMIT


def test_budget_file_has_no_stale_rows():
    listed = {(arch, name) for arch in offline.ARCHITECTURES for name in BUDGETS[f"sm_{arch}"]}
    assert listed == set(CASES)


def test_long_attention_uses_the_tensor_memory_accelerator_and_warpgroup_products(measured):
    for (arch, name), row in measured.items():
        if arch == 90 and ".long." in name:
            assert row["tma_loads"] > 0 and row["hgmma"] > 0


def test_what_a_model_launches(trained):
    """Compiled as for a GPU. A multiprocessor must hold as many programs of each as the budget file says."""
    budget = {(int(arch), name): n for arch, rows in BUDGETS["trained"].items() for name, n in rows.items()}
    assert trained.keys() == budget.keys()
    for (arch, name), row in trained.items():
        assert not row["faults"] and row["spilled_bytes"] == 0, (arch, name)
        assert row["programs"] >= budget[arch, name] and row["shared_bytes"] <= SHARED_LIMIT[arch], (arch, name)
        if arch == 90 and ".attention_" in name:  # decoding has too few rows for the instruction
            assert (row["hgmma"] > 0) == ("attention_decode" not in name), name


def test_matrix_instructions_of_long_attention_do_not_wait_for_each_other(measured):
    """Where the assembler cannot prove that their sums are left alone, it waits for each before it issues the next."""
    for (arch, name), row in measured.items():
        if arch == 90 and name.startswith(("attention.forward", "attention.grad")):
            assert row["hgmma_waits"] < max(1, row["hgmma"]), name
