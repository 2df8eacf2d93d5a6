"""Every entry of the committed tables compiles for its architecture without a GPU, fits it and spills nothing."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from fastgpt.triton_kernels import tuned

gpu_tune = pytest.importorskip("fastgpt.benchmarks.gpu_tune")
pytest.importorskip("fastgpt.triton_kernels.offline")

from fastgpt.benchmarks.gpu_tune_subjects import subject_of  # noqa: E402

COMMITTED = [e for e in tuned.read(*tuned.named_files()).entries.values() if not tuned.KERNELS[e.kernel].of_csrc]


def why_refused(entries: list[tuned.Entry]) -> list[str | None]:
    """For each entry, all of one architecture, what the compiler says against it. In a process that compiles."""
    [arch] = {entry.arch for entry in entries}
    spawn = multiprocessing.get_context("spawn")
    found = []
    with ProcessPoolExecutor(1, spawn, gpu_tune.begin_compiling, (arch, 132)) as pool:
        for entry in entries:
            subject = subject_of(entry.kernel, **entry.call)
            code = pool.submit(gpu_tune.compile_candidate, subject, arch, entry.choices).result()
            found.append(gpu_tune.why_dropped(subject, arch, entry.choices, code))
    return found


@pytest.mark.parametrize("arch", sorted({entry.arch for entry in COMMITTED}))
def test_every_entry_of_the_committed_table_compiles_and_spills_nothing(arch):
    entries = [entry for entry in COMMITTED if entry.arch == arch]
    refused = {entry.key: why for entry, why in zip(entries, why_refused(entries), strict=True) if why}
    assert refused == {}


def test_an_entry_that_spills_is_found():
    norm = subject_of("layer_norm.forward", width=512)  # of 16 rows in one warp, a lane has 256 elements
    valid, spilling = (norm.entry(90, {"ROWS": rows, "num_warps": warps}) for rows, warps in ((1, 4), (16, 1)))
    fits, why = why_refused([valid, spilling])
    assert fits is None and why.startswith("spills ")
