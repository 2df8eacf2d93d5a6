"""What the machine has and lacks: packages, tools, the extension; and wheels from a folder instead of a network."""

import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

# What is imported, the distribution that has it, and what does not run without it.
NEEDED = (
    ("pytest", "pytest", "steps 1 and 3"),
    ("xdist", "pytest-xdist", "tests beside each other in step 1, which is then too slow"),
    ("hypothesis", "hypothesis", "a few of step 1's tests"),
    ("pytest_benchmark", "pytest-benchmark", "step 3"),
    ("tomli_w", "tomli-w", "the training run of step 3"),
    ("tqdm", "tqdm", "the training run of step 3"),
    ("safetensors", "safetensors", "the training run of step 3"),
    ("transformers", "transformers", "a peer of step 3"),
    ("liger_kernel", "liger-kernel", "a peer of step 3"),
    ("quack", "quack-kernels", "a peer of step 3"),
)


class WheelError(RuntimeError):
    """The folder of wheels cannot be used; the message says why."""


def is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def lacking(*modules: str) -> str | None:
    """Why what needs these modules cannot run, in a few words; None where all are there."""
    named = {module: package for module, package, _ in NEEDED}
    gone = [named.get(module, module) for module in modules if not is_there(module)]
    return f"{' and '.join(gone)} {'is' if len(gone) == 1 else 'are'} not installed" if gone else None


def missing_line() -> str | None:
    """One line that names every package that is missing, and where its wheel is expected."""
    gone = [f"{package} ({what})" for module, package, what in NEEDED if not is_there(module)]
    if not gone:
        return None
    return f"not installed: {', '.join(gone)}. Put wheels into a folder and name it: make gpu-check WHEELS=dir"


def tool(name: str) -> str | None:
    """The path of a tool of the CUDA toolkit or of Nsight, which installations often leave off the PATH."""
    nsight = sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)
    beside = [Path("/usr/local/cuda/bin"), Path("/usr/local/cuda/compute-sanitizer"), *nsight]
    return shutil.which(name) or next((found for folder in beside if (found := shutil.which(name, path=folder))), None)


def install_wheels(folder: Path) -> None:
    """Install every wheel of the folder, and of the archives *.tar.xz in it, without a network."""
    if not folder.is_dir():
        raise WheelError(f"WHEELS={folder}: no such folder")
    with tempfile.TemporaryDirectory() as unpacked:
        for archive in sorted(folder.glob("*.tar.xz")):
            with tarfile.open(archive) as packed:
                packed.extractall(unpacked, filter="data")
        wheels = [str(wheel) for place in (folder, Path(unpacked)) for wheel in sorted(place.rglob("*.whl"))]
        if not wheels:
            raise WheelError(f"WHEELS={folder}: there are no wheels (*.whl, or *.tar.xz of them) in this folder")
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
        done = subprocess.run([sys.executable, *install, *wheels], capture_output=True, encoding="utf-8")
        if done.returncode != 0:
            raise WheelError(
                f"WHEELS={folder}: pip cannot install them: {(done.stderr or 'no message').splitlines()[-1]}"
            )
    importlib.invalidate_caches()


def extension_is_built(device_type: str) -> bool:
    """From the sources as they are now."""
    from fastgpt.ops import native

    try:
        native.load(device_type)
    except ImportError:
        return False
    return not native.is_stale()
