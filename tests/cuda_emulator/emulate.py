"""Builds the CUDA kernels for the CPU, and runs checks.py on them: `python tests/cuda_emulator/emulate.py plain`.

csrc/*.cu are compiled by g++ as they stand, but for four rewritings of what is no C++. cuda_emulator.h has the part of
CUDA that they use. `address` and `thread` build and run under AddressSanitizer with UndefinedBehaviorSanitizer, and
under ThreadSanitizer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shutil.which("g++")
TORCH = Path(importlib.util.find_spec("torch").origin).parent
DEVICES = ("small device", "H100", "H100 without clusters", "H100 with plans")  # see emulated_cases.py
KERNELS = ("cross_entropy.cu", "embedding.cu")
HEADERS = ("cooperative_groups.h", "cuda_bf16.h", "cuda_fp16.h", "cuda_pipeline_primitives.h", "cuda_runtime.h")

FLAGS = ["-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-DUSE_CUDA"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-Wall", "-Wno-unknown-pragmas"]
SANITIZERS = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",  # the interpreter leaks; fibers have other stacks
    "TSAN_OPTIONS": f"halt_on_error=1:suppressions={HERE / 'tsan.supp'}",
}


def reason_to_skip() -> str | None:
    """Why the kernels cannot be emulated here, or None."""
    if not CSRC.is_dir():
        return "needs the source tree"
    return "no g++ here" if COMPILER is None else None


def as_cpp(source: str) -> str:
    """A .cu file as C++. Lines keep their numbers.

    __shared__ T name[N];                       a reference to the variable of the block that is running
    extern __shared__ T name[];                 a pointer to its dynamic shared memory
    kernel<<<blocks, threads, bytes, s>>>(...)  a call that runs the grid
    STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) registers for tensors on the CPU
    """
    shared = r"static const ::emulator::Shared<\1\3> \2_of_blocks{}; auto& \2 = \2_of_blocks.here();"
    dynamic = r"auto* \2 = static_cast<\1*>(::emulator::dynamic_shared_memory());"
    source = re.sub(r"extern __shared__ (\w+) (\w+)\[\];", dynamic, source)
    source = re.sub(r"__shared__ (\w+) (\w+)(\[[^;]*\])?;", shared, source)
    source = re.sub(r"(\w+(?:<[^;{}]*?>)?)<<<([^;{}]*?)>>>\(", r"::emulator::Grid{\2}.of(\1)(", source)
    return re.sub(r"(STABLE_TORCH_LIBRARY_IMPL\(\w+), CUDA,", r"\1, CPU,", source)


@dataclass(frozen=True)
class Mutation:
    """A fault that the checks have to see: `text` of a source file, replaced. `kind` of build sees it."""

    name: str
    kind: str
    file: str
    text: str
    replacement: str

    def apply(self, source: str) -> str:
        if (count := source.count(self.text)) != 1:
            raise ValueError(
                f"the mutation {self.name!r} replaces {self.text!r}, which csrc/{self.file} has {count} times: "
                "let it replace what does the same there now"
            )
        return source.replace(self.text, self.replacement)


MUTATIONS = (
    Mutation(
        "a group of asynchronous copies is not waited for",
        kind="plain",
        file="cross_entropy.cu",
        text="__pipeline_wait_prior(COPY_GROUPS - 1 - i)",
        replacement="__pipeline_wait_prior(COPY_GROUPS - i)",
    ),
    Mutation(
        "the reduction of a warp begins at 8",
        kind="plain",
        file="cross_entropy.cu",
        text="int offset = 16; offset > 0",
        replacement="int offset = 8; offset > 0",
    ),
    Mutation(
        "a warp's slot is missing",
        kind="plain",
        file="cross_entropy.cu",
        text="Part warps[THREADS / 32];",
        replacement="Part warps[THREADS / 32 - 1];",
    ),
    Mutation(
        "a token too far is read",
        kind="address",
        file="embedding.cu",
        text="at >= 0 && at < n",
        replacement="at >= 0 && at <= n",
    ),
)


@dataclass(frozen=True)
class Library:
    """The emulated kernels, compiled in one way."""

    kind: str
    mutation: Mutation | None = None

    def sources(self) -> list[tuple[Path, Mutation | None]]:
        """Each file with the mutation that changes it."""
        files = [CSRC / name for name in KERNELS] + [HERE / "emulator.cpp"]
        files += [HERE / "misuse.cu"] if self == Library("plain") else []
        return [(file, self.mutation if self.mutation and self.mutation.file == file.name else None) for file in files]


def build(folder: Path, libraries: list[Library]) -> dict[Library, Path]:
    """Compiles into `folder`, with as many processes as there are cores."""
    for header in HEADERS:
        (folder / header).write_text('#include "cuda_emulator.h"\n')
    wanted = {(library.kind, *source) for library in libraries for source in library.sources()}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        jobs = {key: pool.submit(_compile, folder, *key) for key in sorted(wanted, key=repr)}
        objects = {key: job.result() for key, job in jobs.items()}
        links = {
            library: pool.submit(
                _link,
                folder / f"{number}.so",
                library.kind,
                [objects[library.kind, *source] for source in library.sources()],
            )
            for number, library in enumerate(libraries)
        }
        return {library: link.result() for library, link in links.items()}


def _compile(folder: Path, kind: str, file: Path, mutation: Mutation | None) -> Path:
    stem = f"{file.stem}-{kind}" + (f"-{MUTATIONS.index(mutation)}" if mutation else "")
    source, made = file, folder / f"{stem}.o"
    # What takes longest is the compilation: where few cases are to run, it is kept short.
    flags = [*SANITIZERS[kind], "-O0" if mutation or kind == "address" else "-O1"]
    if file.suffix == ".cu":
        text = file.read_text(encoding="utf-8")
        text = as_cpp(mutation.apply(text) if mutation else text)
        source = folder / f"{stem}.cpp"
        source.write_text(f'#include "cuda_emulator.h"\n#line 1 "{file}"\n{text}', encoding="utf-8")
    elif kind == "thread":
        flags = ["-DEMULATOR_TSAN", "-O1"]  # the emulator itself is not instrumented
    include = [f"-I{folder}", f"-I{HERE}", f"-I{CSRC}", "-isystem", str(TORCH / "include")]
    _run_compiler([*FLAGS, *flags, *include, "-c", str(source), "-o", str(made)])
    return made


def _link(made: Path, kind: str, objects: list[Path]) -> Path:
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl"]
    _run_compiler(["-shared", "-Wl,-Bsymbolic", *SANITIZERS[kind], *map(str, objects), "-o", str(made), *libraries])
    return made


def _run_compiler(arguments: list[str]) -> None:
    done = subprocess.run([str(COMPILER), *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(done.args)}\n{done.stderr}")


def run(kind: str, jobs: list[tuple[Path, str, list[int]]]) -> list[dict]:
    """What checks.py finds for each job: a library of this kind, what to check, and the orders of the threads."""
    environment = {**os.environ, **SANITIZER_OPTIONS, "OMP_NUM_THREADS": "1"}
    if kind != "plain":
        # The sanitizer has to be the first library of the process, and to find C++'s exceptions when it starts.
        files = [{"address": "libasan.so", "thread": "libtsan.so"}[kind], "libstdc++.so.6"]
        environment["LD_PRELOAD"] = " ".join(
            subprocess.run([str(COMPILER), f"-print-file-name={file}"], capture_output=True, text=True).stdout.strip()
            for file in files
        )
    arguments = json.dumps([(str(library), *rest) for library, *rest in jobs])
    done = subprocess.run(
        [sys.executable, str(HERE / "checks.py"), arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"checks.py ended with exit code {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=SANITIZERS)
    parser.add_argument(
        "--orders", type=int, nargs="+", default=[0, 1, 2], help="0 ascending, 1 descending, else seeds"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library = Library(options.kind)
        path = build(Path(folder), [library])[library]
        found = run(options.kind, [(path, what, options.orders) for what in DEVICES])
    for what, result in zip(DEVICES, found, strict=True):
        print(f"{options.kind}, {what}: {result['cases']} cases, {len(result['failures'])} failures")
        print("".join(f"  {failure}\n" for failure in result["failures"][:10]), end="")
    if any(result["failures"] for result in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
