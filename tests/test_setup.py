"""The build: builds that cannot succeed leave a Python package that says why. The wheel is in test_package.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fastgpt.ops import native
from helpers import run_command

ROOT = Path(__file__).resolve().parent.parent
in_source_tree = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the source tree")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a source distribution holds, so that nothing is built in this tree."""
    copy = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build_error.txt")
    for folder in ("fastgpt", "triton_kernels", "csrc", "benchmarks", "examples"):
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
    run_command(sys.executable, "-c", code, cwd=source, **environment)
    (made,) = out.iterdir()
    return made


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
        reason = f"^the extension: {native.BUILT_APART}$"
    elif case == "switched off":
        environment["FASTGPT_NATIVE"] = "0"
        reason = f"^the extension: {native.SWITCHED_OFF}$"
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
    assert re.search(reason, text, flags=re.MULTILINE), text


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
    for folder in ("csrc", "examples"):
        there = {f"{folder}/{file.name}" for file in (ROOT / folder).iterdir() if file.is_file()}
        assert there and there <= names
