"""Builds the compiled extension and maps the folders of the packages; all other metadata is in pyproject.toml.

The extension is three modules: fastgpt._build_info (pybind11), fastgpt._C (CPU) and fastgpt._C_cuda. Each is optional
and built alone, so that one may fail without the others. If a module cannot be built (no torch at build time, no
compiler, an error of the compiler), the Python package is installed all the same and works without it. The reason is
written to fastgpt/_build_error.txt, from which `fastgpt doctor` prints it.

FASTGPT_NATIVE=0        builds no module
FASTGPT_NATIVE=require  fails the installation if a module cannot be built
FASTGPT_CUDA=1          tries the CUDA module and prints what is missing for it
FASTGPT_CUDA=0          leaves the CUDA module out
Without FASTGPT_CUDA the CUDA module is built where nvcc is found and torch has CUDA, with or without a GPU.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import setuptools
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

if int(setuptools.__version__.partition(".")[0]) < 77:  # they reject pyproject.toml's licence and name no remedy
    sys.exit(
        f"FastGPT is built by setuptools 77 or newer, and this is {setuptools.__version__}; "
        "pip install --upgrade setuptools brings a newer one"
    )

ROOT = Path(__file__).resolve().parent
NATIVE = os.environ.get("FASTGPT_NATIVE", "auto")
CUDA = os.environ.get("FASTGPT_CUDA", "auto")
ARCHITECTURES = "8.0;9.0;10.0+PTX"  # A100, H100, B200; newer GPUs compile the PTX
ERROR_FILE = "_build_error.txt"
source_hash = runpy.run_path(str(ROOT / "fastgpt" / "ops" / "source_hash.py"))["source_hash"]

# Py_LIMITED_API: one build for every Python from 3.10 on; TORCH_TARGET_VERSION: for every torch from 2.11 on.
DEFINES = ["-DPy_LIMITED_API=0x030A0000", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
# A fused multiply-add rounds once instead of twice. No code reads the errno of exp and log.
CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden"]
# Error messages begin with the path of a source file: without this option, the path on the machine that built it.
CXX_FLAGS.append(f"-fmacro-prefix-map={ROOT}/=")
if platform.machine().lower() in ("x86_64", "amd64"):
    # With MMX, GCC may move data through registers that long double arithmetic shares, and breaks it process-wide.
    CXX_FLAGS.append("-mno-mmx")
CPU_SOURCES = [
    "adamw",
    "bindings",
    "activation",
    "attention",
    "cross_entropy",
    "decode",
    "embedding",
    "layer_norm",
    "linear",
    "matmul",
    "orthogonal",
    "tensor",
    "large_blocks",
    "kernels",
    "kernels_generic",
]
CPU_SOURCES += ["kernels_avx2", "kernels_avx512"]  # these files compile to nothing for other processors
CUDA_SOURCES = ["bindings_cuda.cpp", "cross_entropy.cu", "embedding.cu"]


def first_line(command: list[str]) -> str:
    try:
        output = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return output.strip().splitlines()[0] if output.strip() else "unknown"


def find_cuda() -> str | None:
    """The folder of a CUDA toolkit with both nvcc and headers. (torch accepts the grandparent folder of any nvcc.)"""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    for home in candidates:
        if home and (Path(home) / "bin" / "nvcc").exists() and (Path(home) / "include" / "cuda_runtime.h").exists():
            return home
    return None


@contextlib.contextmanager
def recorded_output() -> Iterator[list[str]]:
    """Collects what this process and its subprocesses write to stdout and stderr; prints it to stderr at the end."""
    lines: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, target)
                os.close(copy)
            file.seek(0)
            text = file.read().decode(errors="replace")
            lines += text.splitlines()
            sys.stderr.write(text)


def compiler_error(lines: list[str], error: BaseException) -> str:
    """The first line of a compiler's or linker's output that reports an error."""
    for line in lines:
        if re.search(r"\berror\b|not found", line, re.IGNORECASE) and not re.match(r"ninja:|FAILED|\[", line):
            return line.strip()
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


class Optional(build_ext):
    """A build_ext that continues after a module that cannot be built, and writes the reason to a file."""

    errors: list[str]

    def package_folder(self) -> Path:
        return ROOT / "fastgpt" if self.inplace or self.editable_mode else Path(self.build_lib) / "fastgpt"

    def run(self) -> None:
        self.errors = list(not_tried)
        with self.optional("the extension"):
            super().run()
        write_errors(self.package_folder(), self.errors)

    def build_extensions(self) -> None:
        modules, folder = self.extensions, self.build_temp
        for module in modules:
            self.extensions = [module]
            self.build_temp = os.path.join(folder, module.name)  # two modules compile a cross_entropy.o
            kept, module.optional = module.optional, False  # for an optional module setuptools discards the error
            with self.optional(module.name):
                super().build_extensions()
            module.optional = kept
        self.extensions, self.build_temp = modules, folder

    @contextlib.contextmanager
    def optional(self, what: str) -> Iterator[None]:
        lines: list[str] = []
        try:
            with recorded_output() as lines:
                yield
        except (Exception, SystemExit) as error:
            if NATIVE == "require":
                raise
            self.errors.append(f"{what}: {compiler_error(lines, error)}")
            print(f"fastgpt: not built: {self.errors[-1]}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return [file for file in super().get_outputs() if os.path.exists(file)]


class BuildPython(build_py):
    """A build_py that writes the reason where building a module was not attempted."""

    def run(self) -> None:
        super().run()
        write_errors(ROOT / "fastgpt" if self.editable_mode else Path(self.build_lib) / "fastgpt", not_tried)


def write_errors(folder: Path, errors: list[str]) -> None:
    file = folder / ERROR_FILE
    if errors:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(errors) + "\n", encoding="utf-8")
    else:
        file.unlink(missing_ok=True)


def modules() -> tuple[list, type]:
    """The extension modules to build and the build_ext class for them. Raises where no module can be built."""
    if NATIVE == "0":
        raise RuntimeError("switched off by FASTGPT_NATIVE=0")
    if NATIVE not in ("auto", "require"):
        raise RuntimeError(f"FASTGPT_NATIVE: expected 0, auto or require, got {NATIVE!r}")
    os.environ["LC_ALL"] = "C"  # compilers translate their messages, but `compiler_error` searches for English words
    cuda_home = find_cuda()
    if cuda_home:
        os.environ["CUDA_HOME"] = cuda_home  # torch.utils.cpp_extension reads it when it is imported
    try:
        import torch
    except ModuleNotFoundError:
        # `pip install .` hides the installed torch from the build. What the user is told is made by ops/native.py.
        raise RuntimeError("it was built apart from PyTorch") from None
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
        raise RuntimeError(f"torch {torch.__version__} is older than 2.11, the first with a complete stable ABI")
    from torch.utils import cpp_extension

    with_cuda = CUDA == "1" or (CUDA != "0" and torch.version.cuda is not None and cuda_home is not None)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    architectures = os.environ["TORCH_CUDA_ARCH_LIST"] if with_cuda else ""
    compiler = os.environ.get("CXX", "c++")
    facts = {
        "COMPILER": first_line([compiler, "--version"]),
        "FLAGS": " ".join(CXX_FLAGS),
        "TORCH": torch.__version__,
        "CUDA_VERSION": torch.version.cuda or "" if with_cuda else "",
        "CUDA_ARCHITECTURES": architectures,
        "SOURCE_HASH": source_hash(ROOT / "csrc"),
    }
    # Written to a header instead of -D options, because strings with spaces would pass through two shells and ninja.
    header = ROOT / "build" / "build_facts.h"
    header.parent.mkdir(exist_ok=True)
    quoted = (f'#define FASTGPT_{name} "{value.replace(chr(34), chr(39))}"\n' for name, value in facts.items())
    header.write_text("".join(quoted), encoding="utf-8")

    def module(kind, name: str, sources: list[str], flags, **more):
        made = kind(f"fastgpt.{name}", sources, extra_compile_args=flags, extra_link_args=["-s"], **more)
        made.optional = NATIVE != "require"  # an editable installation then accepts a missing file
        return made

    cpu = [f"csrc/{name}.cpp" for name in CPU_SOURCES]
    info_flags = {"cxx": [*CXX_FLAGS, "-include", str(header)]}
    found = [
        module(cpp_extension.CppExtension, "_build_info", ["csrc/build_info.cpp"], info_flags),
        module(cpp_extension.CppExtension, "_C", cpu, {"cxx": CXX_FLAGS + DEFINES}, py_limited_api=True),
    ]
    if with_cuda:
        # -UNDEBUG keeps the assertions, which check the range of targets and tokens.
        nvcc_flags = ["-std=c++17", "-O3", "-DUSE_CUDA", "-UNDEBUG", "--threads=2", *DEFINES]
        flags = {"cxx": CXX_FLAGS + DEFINES, "nvcc": nvcc_flags}
        cuda = [f"csrc/{file}" for file in CUDA_SOURCES]
        try:
            if torch.version.cuda is None:
                raise RuntimeError(f"torch {torch.__version__} has no CUDA libraries to link with")
            if cuda_home is None:
                raise RuntimeError("no CUDA toolkit with nvcc was found; set CUDA_HOME")
            found.append(module(cpp_extension.CUDAExtension, "_C_cuda", cuda, flags, py_limited_api=True))
        except Exception as error:
            if NATIVE == "require":
                raise
            not_tried.append(f"fastgpt._C_cuda: {error}")

    class TorchOptional(Optional, cpp_extension.BuildExtension):
        pass

    return found, TorchOptional


not_tried: list[str] = []
command: type = Optional
extensions: list = []
try:
    extensions, command = modules()
except Exception as error:  # for any reason: the Python package is installed without the extension
    if NATIVE == "require":
        raise
    not_tried.append(f"the extension: {error}")
for reason in not_tried:
    print(f"fastgpt: not built: {reason}", file=sys.stderr)

# These folders are installed inside fastgpt: a top-level package triton_kernels belongs to the Triton project.
folders = find_packages(include=["triton_kernels*", "benchmarks*"])
inside_fastgpt = {f"fastgpt.{package}": package.replace(".", "/") for package in folders}
setup(
    packages=[*find_packages(include=["fastgpt*"]), *inside_fastgpt],
    package_dir={"fastgpt": "fastgpt", **inside_fastgpt},
    ext_modules=extensions,
    cmdclass={"build_ext": command, "build_py": BuildPython},
)
