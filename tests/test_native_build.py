"""The build: what the extension says of itself, builds that cannot succeed, nvcc. The wheel is in test_package.py."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

from fastgpt import doctor
from fastgpt.ops import native
from fastgpt.ops.backend import unavailable

ROOT = Path(__file__).resolve().parent.parent
REASON = unavailable("native", "cpu")
built = pytest.mark.skipif(REASON is not None, reason=str(REASON))
in_source_tree = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the source tree")
CUDA_PATH = os.pathsep.join(["/usr/local/cuda/bin", os.environ.get("PATH", "")])
NVCC = shutil.which("nvcc", path=CUDA_PATH)
TRITON = importlib.util.find_spec("triton")  # its wheel carries a disassembler
TRITON_BIN = Path(TRITON.origin).parent / "backends" / "nvidia" / "bin" if TRITON else Path()
CUOBJDUMP = shutil.which("cuobjdump", path=os.pathsep.join([CUDA_PATH, str(TRITON_BIN)]))


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a source distribution holds, so that nothing is built in this tree."""
    copy = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build_error.txt")
    for folder in ("fastgpt", "triton_kernels", "csrc", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, copy / file)
    return copy


def make(source: Path, kind: str, **environment: str) -> Path:
    """The wheel or sdist that the build backend makes in this very environment, as --no-build-isolation does."""
    out = source.parent / f"{kind}-out"
    out.mkdir()
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    run(sys.executable, "-c", code, cwd=source, **environment)
    (made,) = out.iterdir()
    return made


@built
def test_build_info() -> None:
    info = native.build_info()
    assert info["torch"].split(".")[0].isdigit() and "-O3" in info["flags"] and info["compiler"] != "unknown"
    from fastgpt import _build_info

    features = _build_info.cpu_features()
    used = native.load("cpu").instruction_set()
    assert used in ("avx512", "avx2", "generic")
    assert used == "generic" or any(feature.startswith(used) for feature in features)


@built
def test_doctor_shows_the_instruction_set() -> None:
    text = doctor.report()
    assert re.search(r"backend native: works \((avx512|avx2|generic), built by ", text), text


@built
def test_importing_fastgpt_does_not_load_the_extension() -> None:
    code = "import sys, fastgpt; assert 'fastgpt._C' not in sys.modules, 'loaded'"
    run(sys.executable, "-c", code, cwd=Path.cwd())


@built
def test_an_exported_program_finds_the_kernels_in_a_new_process(tmp_path: Path) -> None:
    from fastgpt import GPT, GPTConfig

    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=16)).eval()
    tokens = torch.randint(11, (2, 8))
    with torch.no_grad():
        program = torch.export.export(model, (tokens, tokens))
        expected = model(tokens, tokens)
    assert {"fastgpt.embedding_native.default", "fastgpt.cross_entropy_native.default"} <= {
        str(node.target) for node in program.graph.nodes
    }
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((tokens, *expected), tmp_path / "results.pt")
    code = """
import sys, torch, fastgpt
tokens, logits, loss = torch.load("results.pt")
program = torch.export.load("program.pt2").module()
assert "fastgpt._C" not in sys.modules
found = program(tokens, tokens)
assert torch.equal(found[0], logits) and torch.equal(found[1], loss)
try:
    torch.ops.fastgpt.linear_native(torch.eye(2).to_sparse(), torch.eye(2), None)
except NotImplementedError as error:
    assert "fastgpt::linear_native has no kernel for these tensors on cpu" in str(error)
else:
    raise AssertionError("a sparse tensor was taken")
"""
    run(sys.executable, "-c", code, cwd=tmp_path)


BACKENDS = [name for name, there in (("native", REASON is None), ("triton", TRITON is not None)) if there]
FIRST_CALLS = {
    "fake tensors": "with FakeTensorMode(): embed(torch.zeros(3, 4))",
    "default dtype": "torch.set_default_dtype(torch.float64); embed(torch.zeros(3, 4, dtype=torch.float32))",
    "trace": "graph = make_fx(embed)(torch.zeros(3, 4)); assert len(graph.graph.nodes) <= 4, graph.code",
    "gradient": "torch.func.grad(lambda table: embed(table).sum())(torch.zeros(3, 4))",
}


@pytest.mark.parametrize("context", FIRST_CALLS)
def test_where_the_first_call_is_made_does_not_decide_for_the_process(context: str) -> None:
    """Triton too, whose test launches a kernel."""
    code = f"""
import torch, fastgpt
from fastgpt import ops
from fastgpt.ops.backend import unavailable
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
def embed(table):
    unavailable("triton", "cpu")
    return ops.embedding(torch.zeros(1, 2, dtype=torch.int64), table)
{FIRST_CALLS[context]}
for backend in {BACKENDS}:
    assert unavailable(backend, "cpu") is None, unavailable(backend, "cpu")
"""
    run(sys.executable, "-c", code, cwd=Path.cwd(), TRITON_INTERPRET="1")


def test_a_missing_module_says_why(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    monkeypatch.setitem(native.MODULES, "cpu", "_not_there")
    with pytest.raises(ImportError, match="this installation was made without it"):
        native.load("cpu")
    (tmp_path / "_build_error.txt").write_text("fastgpt._not_there: tensor.h:1: error: no\n")
    with pytest.raises(ImportError, match=r"fastgpt\._not_there is not built: tensor\.h:1: error: no"):
        native.load("cpu")
    (tmp_path / "_build_error.txt").write_text("the extension: there was no torch\n")
    with pytest.raises(ImportError, match=r"fastgpt\._not_there is not built: there was no torch"):
        native.load("cpu")
    with pytest.raises(ImportError, match="no kernels for mps"):
        native.load("mps")


@in_source_tree
@pytest.mark.parametrize(
    "case", ["no torch", "switched off", "broken compiler", "no compiler, no ninja", "broken source"]
)
def test_a_build_that_cannot_succeed_leaves_the_python_package(source: Path, tmp_path: Path, case: str) -> None:
    environment = {"FASTGPT_CUDA": "0"}
    if case == "no torch":
        hidden = tmp_path / "hidden" / "torch"
        hidden.mkdir(parents=True)
        (hidden / "__init__.py").write_text("raise ModuleNotFoundError('no torch', name='torch')")
        environment["PYTHONPATH"] = str(hidden.parent)
        reason = "--no-build-isolation"
    elif case == "switched off":
        environment["FASTGPT_NATIVE"] = "0"
        reason = "FASTGPT_NATIVE=0"
    elif case == "broken compiler":
        environment["CXX"] = "no-such-compiler"
        reason = "no-such-compiler"
    elif case == "no compiler, no ninja":  # then it is setuptools, not ninja, that calls the compiler
        environment |= {"PATH": str(tmp_path), "CXX": "no-such-compiler"}
        reason = r"fastgpt\._C: .*no-such-compiler"
    else:
        if shutil.which(os.environ.get("CXX", "c++")) is None:
            pytest.skip("no C++ compiler here")
        environment |= {"LC_ALL": "de_DE.UTF-8", "LANGUAGE": "de"}  # where the compiler's translations are installed
        for file in ("tensor.h", "build_info.cpp"):
            (source / "csrc" / file).write_text("#error the header is broken\n")
        reason = r"csrc/tensor.h:1:2: error: #error the header is broken"
    wheel = zipfile.ZipFile(make(source, "wheel", **environment))
    assert not any(name.endswith(".so") for name in wheel.namelist())
    text = wheel.read("fastgpt/_build_error.txt").decode()
    assert re.search(reason, text), text


@in_source_tree
def test_a_setuptools_that_is_too_old_is_named_with_the_remedy(source: Path) -> None:
    code = "import runpy, setuptools; setuptools.__version__ = '65.5.0'; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "setuptools 77 or newer" in done.stderr and "pip install --upgrade setuptools" in done.stderr


@in_source_tree
def test_a_build_that_is_required_fails(source: Path) -> None:
    # With ninja the compiler's own words come first, and only the end of the output is kept.
    with pytest.raises(AssertionError, match=r"no-such-compiler|Error compiling objects"):
        make(source, "wheel", FASTGPT_NATIVE="require", FASTGPT_CUDA="0", CXX="no-such-compiler")


@in_source_tree
def test_source_distribution_holds_the_sources(source: Path) -> None:
    with tarfile.open(make(source, "sdist", FASTGPT_NATIVE="0")) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {f"csrc/{file.name}" for file in (ROOT / "csrc").iterdir()} <= names


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
        return run(*command, "-Xptxas=-v", cwd=folder).stderr, out

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
    code = run(CUOBJDUMP, "-sass", "-arch", architecture, str(out), cwd=out.parent).stdout
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
