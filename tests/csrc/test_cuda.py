"""The CUDA kernels as nvcc compiles them: registers and spills within their budgets, and the clusters in use."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import sysconfig
import tomllib
from pathlib import Path

import pytest
import torch

from helpers import run_command

ROOT = Path(__file__).resolve().parents[2]
in_source_tree = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the source tree")
CUDA_PATH = os.pathsep.join(["/usr/local/cuda/bin", os.environ.get("PATH", "")])
NVCC = shutil.which("nvcc", path=CUDA_PATH)
TRITON = importlib.util.find_spec("triton")  # its wheel carries a disassembler
TRITON_BIN = Path(TRITON.origin).parent / "backends" / "nvidia" / "bin" if TRITON else Path()
CUOBJDUMP = shutil.which("cuobjdump", path=os.pathsep.join([CUDA_PATH, str(TRITON_BIN)]))


DTYPES = {"f": torch.float32, "13__nv_bfloat16": torch.bfloat16, "6__half": torch.float16}  # as symbols have them
PLACES = ("registers", "shared memory", "cluster", "nowhere")  # Held
VECTOR = r"\.128\b"


def read_budgets() -> dict:
    return tomllib.loads((ROOT / "tests" / "kernel_budgets_cuda.toml").read_text(encoding="utf-8"))


def cross_entropy_kernels(object_file: Path, architecture: str) -> dict[tuple[torch.dtype, int, str], str]:
    """The machine code of cross_entropy_kernel by dtype, threads and where it keeps a row."""
    command = [CUOBJDUMP, "-sass", "-arch", architecture, str(object_file)]
    code = run_command(*command, cwd=object_file.parent).stdout
    kernels = {}
    for function in code.split("Function : ")[1:]:
        if match := re.match(r"\w+cross_entropy_kernelI(\w+?)Li(\d+)ELNS0_4HeldE(\d)", function):
            dtype, threads, held = match.groups()
            kernels[DTYPES[dtype], int(threads), PLACES[int(held)]] = function
    return kernels


def innermost_loops(function: str) -> list[list[str]]:
    """The instructions of each loop that has no loop inside: from a branch's target back to the branch."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", function)]
    jumps = [(int(to[1], 16), at) for at, text in code if (to := re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text))]
    loops = [(to, at) for to, at in jumps if to < at]
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [[text for at, text in code if begin <= at <= end] for begin, end in inner]


def count(pattern: str, instructions: list[str]) -> int:
    return sum(re.search(pattern, text) is not None for text in instructions)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """compiled(name): what the assembler said of csrc/NAME.cu for A100, H100 and B200, and the object. Not run."""

    @functools.cache
    def compile_once(name: str) -> tuple[str, Path]:
        folder = tmp_path_factory.mktemp(name)
        include = [f"-I{Path(torch.__file__).parent / 'include'}", f"-I{sysconfig.get_paths()['include']}"]
        targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90, 100)]
        flags = ["-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Xcompiler=-fPIC"]
        source_file, out = str(ROOT / "csrc" / f"{name}.cu"), folder / f"{name}.o"
        command = [str(NVCC), "-c", source_file, "-o", str(out), *include, *targets, *flags, "--threads=2"]
        return run_command(*command, "-Xptxas=-v", cwd=folder).stderr, out

    return compile_once


@in_source_tree
@pytest.mark.skipif(NVCC is None, reason="no nvcc here")
@pytest.mark.parametrize("name", ["cross_entropy", "embedding"])
def test_cuda_kernels_compile_within_their_budgets(name: str, compiled) -> None:
    log, _ = compiled(name)
    budgets = read_budgets()[name]

    seen = set()
    for entry in re.split(r"Compiling entry function ", log)[1:]:
        symbol, architecture = re.match(r"'(\w+)' for '(\w+)'", entry).groups()
        kernel = next(known for known in budgets if known in symbol)
        registers = int(re.search(r"Used (\d+) registers", entry).group(1))
        spills = sum(int(size) for size in re.findall(r"(\d+) bytes spill", entry))
        assert registers <= budgets[kernel]["registers"], (symbol, architecture, registers)
        assert spills <= budgets[kernel]["spills"], (symbol, architecture, spills)
        seen.add((kernel, architecture))
    assert seen == {(kernel, sm) for kernel in budgets for sm in ("sm_80", "sm_90", "sm_100")}


@in_source_tree
@pytest.mark.skipif(NVCC is None, reason="no nvcc here")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_long_rows_are_held_by_clusters(architecture: str, compiled) -> None:
    """In the machine code: the cluster's barrier, stores to other blocks' shared memory, copies past the registers."""
    if CUOBJDUMP is None:
        pytest.skip("no cuobjdump here")
    log, out = compiled("cross_entropy")
    assert max(int(size) for size in re.findall(r"(\d+) bytes smem", log)) <= 1024  # STATIC_BYTES there
    kernels = cross_entropy_kernels(out, architecture)
    assert len(kernels) == 3 * (1 + 3 + 2 + 3)  # dtypes; threads by place
    for (_, _, held), code in kernels.items():
        arrivals, waits = code.count("UCGABAR_ARV"), code.count("UCGABAR_WAIT")
        remote_stores = len(re.findall(r"\bST\.E\b", code))  # by generic address: neither STG nor STS
        copies = len(re.findall(r"\bLDGSTS\.E\S*\.128\b", code))
        if held == "cluster" and architecture == "sm_80":  # has no clusters: the kernel is there, and is never launched
            assert "BPT.TRAP" in code and not arrivals and not copies
        elif held == "cluster":  # all have begun; the statistics are exchanged; the smoothing term is
            assert arrivals == waits >= 3 and remote_stores >= 2 and copies
        else:
            assert not arrivals and not waits and not remote_stores
            assert bool(copies) == (held == "shared memory")


@in_source_tree
@pytest.mark.skipif(NVCC is None, reason="no nvcc here")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_instructions_for_each_value_are_within_their_budgets(dtype: torch.dtype, compiled) -> None:
    """The loops over a row take most of the time that is not spent on waiting for memory."""
    if CUOBJDUMP is None:
        pytest.skip("no cuobjdump here")
    _, out = compiled("cross_entropy")
    budget = read_budgets()["instructions_for_each_value"][str(dtype).removeprefix("torch.")]
    values_of_a_vector = 16 // dtype.itemsize

    for (kernel_dtype, threads, held), code in cross_entropy_kernels(out, "sm_90").items():
        if kernel_dtype != dtype or held == "registers":  # these have no loop over vectors
            continue
        # A softcap takes a reciprocal. Without one, the first pass takes four vectors at a time. In the gradient pass,
        # the loop without class weights is shorter.
        loads, stores = r"LD[SG]\S*" + VECTOR, r"STG\S*" + VECTOR
        found = {name: [] for name in budget}
        for loop in innermost_loops(code):
            capped = "capped_" if count(r"MUFU\.RCP", loop) else ""
            if not count(r"MUFU\.EX2", loop):
                continue
            if vectors := count(stores, loop):
                found[f"{capped}gradient"].append(len(loop) / vectors)
            elif (vectors := count(loads, loop)) == (1 if capped else 4):
                found[f"{capped}statistics"].append(len(loop) / vectors)
        lengths = [len(found[name]) for name in ("statistics", "gradient", "capped_gradient")]
        assert lengths == [1, 2, 1] and found["capped_statistics"], (threads, held)
        for name, of_loops in found.items():
            assert min(of_loops) / values_of_a_vector <= budget[name], (name, threads, held)


@in_source_tree
@pytest.mark.skipif(NVCC is None, reason="no nvcc here")
def test_eight_rows_of_the_embeddings_gradient_are_on_their_way_at_a_time(compiled) -> None:
    if CUOBJDUMP is None:
        pytest.skip("no cuobjdump here")
    _, out = compiled("embedding")
    code = run_command(CUOBJDUMP, "-sass", "-arch", "sm_90", str(out), cwd=out.parent).stdout
    kernels = [f for f in code.split("Function : ")[1:] if re.match(r"\w+sum_runs_kernelI\w+Li[48]E", f)]
    assert len(kernels) == 6  # dtypes, and tokens of 32 and 64 bits; with vectors of 16 bytes
    for kernel in kernels:
        loads_between_additions = [len(re.findall(r"LDG\S*" + VECTOR, part)) for part in re.split(r"\bFADD\b", kernel)]
        assert max(loads_between_additions) == 8, kernel.split()[0]
