"""The CUDA kernels without a GPU: compiled for the CPU by tests/cuda_emulator/, and compared with the oracle there.

docs/kernels-native.md says what this shows and what it cannot. `make sanitize` runs the same under ThreadSanitizer.
"""

from __future__ import annotations

import os

import pytest

import emulate
from emulate import MUTATIONS, Library

PLAIN, ADDRESS = Library("plain"), Library("address")
ORDERS = [0, 1, 2]  # ascending, descending, and at random
FEWEST_CASES = {"small device": 270, "H100": 12, "H100 without clusters": 2, "H100 with plans": 80}
MISUSES = {
    "two barriers": "the barrier is met here, and by other threads in line",
    "shuffle without a lane": "deadlock: 31 threads wait at an operation of a warp",
    "wait without arriving": "a thread waits at the cluster's barrier without having arrived",
    "remote write before all have begun": "the shared memory of a block that has not begun",
    "write past the end": "a thread has written past the end of a shared variable",
    "too many variables": "the variables do not fit the shared memory of a block",
    "copy without wait": "a thread ends before its asynchronous copies",
    "misaligned copy": "an asynchronous copy is not aligned",
    "too many threads": "CUDA would refuse the launch: a block has 1 to 1024 threads",
    "no blocks": "CUDA would refuse the launch: a grid has at least one block",
    "shared memory not asked for": "CUDA would refuse the launch: the kernel has not asked for so much shared memory",
    "part of a cluster": "CUDA would refuse the launch: the grid is not made of such clusters",
    "reads too early": "nan nan 1 nan 5",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What checks.py found: by library, and by what was checked."""
    if reason := emulate.reason_to_skip():
        (pytest.fail if os.environ.get("EXTENSION_REQUIRED") else pytest.skip)(reason)
    mutants = [Library(mutation.kind, mutation) for mutation in MUTATIONS]
    paths = emulate.build(tmp_path_factory.mktemp("emulated"), [PLAIN, ADDRESS, *mutants])
    jobs = [(PLAIN, device, ORDERS) for device in FEWEST_CASES]
    jobs += [(ADDRESS, device, [1]) for device in FEWEST_CASES]
    jobs += [(mutant, "few cases", [1]) for mutant in mutants]
    jobs.append((PLAIN, "misuse", list(MISUSES)))
    results = {}
    for kind in ("plain", "address"):
        of_kind = [job for job in jobs if job[0].kind == kind]
        answers = emulate.run(kind, [(paths[library], *rest) for library, *rest in of_kind])
        results |= {(library, what): answer for (library, what, _), answer in zip(of_kind, answers, strict=True)}
    return results


@pytest.mark.parametrize("device", FEWEST_CASES)
@pytest.mark.parametrize("library", [PLAIN, ADDRESS], ids=["plain", "address and undefined behaviour sanitizer"])
def test_the_kernels_agree_with_the_oracle_in_every_order(found, library: Library, device: str) -> None:
    result = found[library, device]
    assert not result["failures"]
    assert result["cases"] >= FEWEST_CASES[device]
    print(f"{result['cases']} cases")


@pytest.mark.parametrize("library", [PLAIN, ADDRESS], ids=["plain", "address"])
def test_every_kernel_was_launched(found, library: Library) -> None:
    results = [found[library, device] for device in FEWEST_CASES]
    launched = {name.partition(" in clusters")[0] for result in results for name in result["launched"]}
    assert len(results[0]["kernels"]) > 40
    assert sorted(launched) == results[0]["kernels"]


def test_clusters_are_launched_where_there_are_any(found) -> None:
    def sizes(device: str) -> set[str]:
        return {name.split()[-1] for name in found[PLAIN, device]["launched"] if "in clusters of" in name}

    assert sizes("small device") >= {"2", "4", "8"} and sizes("H100")
    assert not sizes("H100 without clusters")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_fault_in_the_kernels_is_seen(found, mutation) -> None:
    assert found[Library(mutation.kind, mutation), "few cases"]["failures"]


def test_a_mutation_that_changes_nothing_says_so() -> None:
    with pytest.raises(ValueError, match=r"which csrc/cross_entropy\.cu has 0 times: let it replace"):
        MUTATIONS[0].apply("text of a kernel that was written anew")


@pytest.mark.parametrize("misuse", MISUSES)
def test_what_cuda_forbids_is_seen(found, misuse: str) -> None:
    assert MISUSES[misuse] in found[PLAIN, "misuse"][misuse]
