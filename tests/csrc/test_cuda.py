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
    budgets = tomllib.loads((ROOT / "tests" / "kernel_budgets_cuda.toml").read_text(encoding="utf-8"))[name]

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
    code = run_command(CUOBJDUMP, "-sass", "-arch", architecture, str(out), cwd=out.parent).stdout
    kernels = {}
    for function in code.split("Function : ")[1:]:
        if match := re.match(r"\w+cross_entropy_kernelI(\w+?)Li\d+ELNS0_4HeldE(\d)", function):
            dtype, held = match.group(1), ("registers", "shared memory", "cluster", "nowhere")[int(match.group(2))]
            kernels[dtype, held] = {
                "arrivals": function.count("UCGABAR_ARV"),
                "waits": function.count("UCGABAR_WAIT"),
                "remote stores": len(re.findall(r"\bST\.E\b", function)),  # by generic address: neither STG nor STS
                "copies": len(re.findall(r"\bLDGSTS\.E\S*\.128\b", function)),
                "traps": function.count("BPT.TRAP"),
            }
    assert len(kernels) == 12  # 3 dtypes, 4 places
    for (_, held), counts in kernels.items():
        if held == "cluster" and architecture == "sm_80":  # has no clusters: the kernel is there, and is never launched
            assert counts["traps"] and not counts["arrivals"] and not counts["copies"]
        elif held == "cluster":  # all have begun; the statistics are exchanged; the smoothing term is
            assert counts["arrivals"] == counts["waits"] >= 3 and counts["remote stores"] >= 2 and counts["copies"]
        else:
            assert not counts["arrivals"] and not counts["waits"] and not counts["remote stores"]
            assert bool(counts["copies"]) == (held == "shared memory")
