"""What makes the tests see the same everywhere, set before fastgpt and triton are imported; and fixtures.

A test asserts what holds on every machine. What a user has set for FastGPT or for make, and what lies in the home
folder, is therefore not there; caches and settings go to temporary folders, here and in the processes that tests start.
The number of threads, the locale and the time zone stay as they are: the tests have to pass with any.
"""

import codecs
import contextlib
import functools
import importlib.util
import inspect
import locale
import os
import signal
from pathlib import Path

# Tensors are small, and cores may be shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where a test takes more threads than there are free cores, they must sleep while they wait, not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

with contextlib.suppress(ModuleNotFoundError):  # a rented GPU's machine may lack it; the tests for it do without
    import hypothesis
import numpy as np
import pytest
import torch

# The assertions of the modules that tests share show the compared values, too.
pytest.register_assert_rewrite(*(file.stem for file in Path(__file__).with_name("shared").glob("*.py")))
from gloo_processes import gloo  # noqa: E402, F401  -- a fixture

# Where the Triton kernels run: on the GPU if there is one, else on Triton's interpreter, which is chosen when a kernel
# is decorated.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

# What runs in the background of a shell without job control, or under nohup, ignores Ctrl-C, and so would the processes
# that the tests start, some of which are to be stopped by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# CI asks for the extension: what cannot be compiled there is an error, and elsewhere a reason to skip.
if os.environ.get("FASTGPT_NATIVE") == "require":
    os.environ["EXTENSION_REQUIRED"] = "1"
if os.environ.get("FASTGPT_BROWSER") == "require":  # so it does for the browser that opens the page of `fastgpt serve`
    os.environ["BROWSER_REQUIRED"] = "1"

# A backend that a user prefers, and what an outer `make` hands to the `make` that a test starts.
for name in [name for name in os.environ if name.startswith(("FASTGPT_", "MAKE", "MFLAGS"))]:
    del os.environ[name]

# How long an example takes is the machine's affair, and examples that failed elsewhere are not kept in the source tree.
if "hypothesis" in globals():
    hypothesis.settings.register_profile(
        "any machine",
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
        database=None,
        print_blob=True,
    )
    hypothesis.settings.load_profile("any machine")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For `pytest -n auto`: as many workers as there are cores for this process, and as the memory holds."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _memory_bytes() // BYTES_PER_WORKER))


BYTES_PER_WORKER = 1536 * 2**20  # the most that one was seen to take, compilers that it started included


def _memory_bytes() -> int:
    """The machine's memory, or what a container leaves of it."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such group; "max", which is no limit
            limits.append(int(Path(file).read_text()))
    return min(limits)


# The files that take longest: begun first, so that no worker is left alone with one of them at the end.
LONGEST = [
    *("triton_kernels/test_offline.py", "benchmarks/test_gpu_tune.py", "test_parity.py", "test_setup.py"),
    *("csrc/test_cuda.py", "test_cuda_emulated.py", "test_readme.py"),
    *("test_package.py", "training/test_loop_resume.py", "benchmarks/test_conftest.py", "ops/test_native.py"),
]
TESTS = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {TESTS / file: number for number, file in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test that asks for what this machine or this locale does not have is skipped, with the reason."""
    try:
        return (yield)
    except Exception as error:
        if reason := _missing(error):
            pytest.skip(reason)
        raise


def _missing(error: Exception) -> str | None:
    said = str(error)
    if type(error).__name__ in ("BackendError", "ImportError") and "fastgpt._C is not built" in said:
        return said
    of_compiler = type(error).__name__ in ("BackendCompilerFailed", "OpCheckError")
    if ASCII and of_compiler and ("'ascii' codec" in said or "duplicate template name" in said):
        return "PyTorch's compiler reads its sources in the locale's encoding, which LC_ALL=C PYTHONUTF8=0 makes ASCII"
    return None


ASCII = codecs.lookup(locale.getpreferredencoding(False)).name == "ascii"


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """An empty home folder, and every cache below it: what a user keeps there is neither read nor changed."""
    folder = tmp_path_factory.mktemp("home")
    caches = {"XDG_CACHE_HOME": "cache", "XDG_CONFIG_HOME": "config", "FASTGPT_CACHE": "cache/fastgpt"}
    caches |= {"MPLCONFIGDIR": "matplotlib", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        for name, below in caches.items():
            patch.setenv(name, str(folder / below))
        if kept := os.environ.get("KEPT_TRITON_CACHE"):  # `make gpu-check`: processes share what each has compiled
            patch.setenv("TRITON_CACHE_DIR", kept)
        yield folder


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter():
    """Triton's interpreter searches its whole language for builtins in each call of a function: here, once.

    It replaces them before a launch, and again before each call inside, which finds most of them replaced.
    """
    if os.environ["TRITON_INTERPRET"] == "0" or importlib.util.find_spec("triton") is None:
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    is_builtin = interpreter.tl.core.is_builtin

    @functools.cache
    def names_of_builtins(package) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtin(package, *others) -> None:
        for name in names_of_builtins(package):
            if is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", patch_builtin)
        yield


@pytest.fixture
def nothing_said_yet(monkeypatch):
    """What the model says once, that a module is called and not fused, it says again."""
    from fastgpt import modules

    monkeypatch.setattr(modules, "_said", set())


@pytest.fixture(autouse=True)
def floating_point_state():
    """Compiled code leaves the processor as it found it: x86 computes long double in registers that MMX shares."""
    yield
    assert np.longdouble(1.5) + 1 == 2.5, "compiled code has left the x87 registers in use"


@pytest.fixture(params=["avx512", "avx2", "generic"])
def instructions(request):
    """Each set of the extension's CPU kernels that runs on this processor."""
    from fastgpt.ops import native

    extension = native.load("cpu")
    widest = extension.instruction_set()
    if not extension.use_instruction_set(request.param):
        pytest.skip(f"no {request.param} here")
    yield request.param
    extension.use_instruction_set(widest)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    """A text that is long enough for a small run of the command line."""
    from command_line import TEXT  # not at the top: pytest has to rewrite its assertions first

    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def use_recorder(monkeypatch):
    """`use_recorder(stand_in)`: CUDA graphs come from a stand-in of shared/stand_in_graph.py."""

    def install(stand_in):
        from fastgpt import cuda_graph
        from fastgpt.training import adamw

        monkeypatch.setattr(cuda_graph, "recorder", lambda device: stand_in)
        # On a GPU, for which the CPU stands here, AdamW is PyTorch's with a graph and without.
        monkeypatch.setattr(adamw, "one_pass_choice", lambda: (False, "a test"))
        return stand_in

    return install
