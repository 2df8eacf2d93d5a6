"""What each step runs, on a GPU and in a rehearsal. A step is a list of stages, whose tasks run beside each other."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import counters
from .packages import extension_is_built, lacking, tool
from .tasks import Task, bench_outcome, collected, pytest_outcome

ROOT = Path(__file__).resolve().parents[2]
STEP_LIMIT_S = 470  # of each step, so that it ends within eight minutes
SWEEP_S = 380  # after which it begins nothing; the build of the extension comes before it
WORKERS = 12  # of pytest: each compiles kernels on a core, and four cores are left for what runs beside them

# The tests whose kernels are in the extension, or may be. They wait until it is built; the others do not.
NATIVE = "native or cross_entropy or embedding or scaled or model"
TRITON_TESTS = (
    *("test_attention.py", "test_attention_persistent.py", "test_layer_norm.py", "test_dropout.py", "test_rounding.py"),
)
# The smallest cases of each kernel, for tools under which a kernel takes a hundred times as long.
SANITIZED = {
    "triton": ("tests/test_gpu.py", "(tma_300 or decode_300 or (layer_norm and width_33)) and bfloat16"),
    "cuda": ("tests/test_gpu.py", "long_rows and infinities and classes_50257"),
}
# Bytes that nothing may touch follow each allocation; calls that PyTorch makes to see whether they fail do not count.
SANITIZERS = {"memcheck": ["--padding", "256", "--report-api-errors", "no"], "racecheck": [], "synccheck": []}
# In the names of kernels that compute-sanitizer leaves out: namespace at, PyTorch's own; and cuDNN, in whose kernels
# racecheck sees hazards, because they synchronise by what it does not follow.
NOT_OURS = ("N2at", "cudnn")
# In this order: if the time runs out, the ops have been measured.
BENCHMARKS = {
    **{"attention": 130, "layer_norm": 60, "cross_entropy": 50, "train_step": 110, "linear_cross_entropy": 40},
    **{"embedding": 40, "generate": 60, "recipe": 120},
}
MODEL_BENCHMARKS = ("train_step", "generate", "recipe")


@dataclass(frozen=True)
class Plan:
    """Where and with what the steps run."""

    out: Path
    rehearsal: bool
    device_slug: str
    cores: int
    architecture: str = "9.0"  # of the GPU
    nanogpt: str | None = None
    lecture: str | None = None
    data: str | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Compiled kernels are kept from one process to the next, outside the folder that is carried home."""
        kept = ROOT / "build" / "gpu-check"
        caches = {"TRITON_CACHE_DIR": str(kept / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor")}
        return caches | {"KEPT_TRITON_CACHE": caches["TRITON_CACHE_DIR"]}

    @property
    def table(self) -> Path:
        """Of tuned launch configurations, which step 2 writes; in a folder, because its *.jsonl are no rows."""
        return self.out / "tune" / "tuned.toml"

    @property
    def tuned(self) -> dict[str, str]:
        table = self.table
        return self.environment | ({"FASTGPT_TUNED": str(table)} if table.is_file() else {})


def python(*words: str) -> tuple[str, ...]:
    return (sys.executable, *words)


def pytest(*words: str) -> tuple[str, ...]:
    return python("-m", "pytest", "-p", "no:cacheprovider", *words)


def build(plan: Plan) -> Task:
    """The extension, for the GPU's architecture alone, which takes a third of the time."""
    return Task(
        "build of the extension",
        python("setup.py", "--quiet", "build_ext", "--inplace"),
        300,
        why_not="it is built" if extension_is_built("cuda") else None,
        environment={"TORCH_CUDA_ARCH_LIST": plan.architecture, "FASTGPT_NATIVE": "require"},
        is_kept=False,  # another machine has to build it again
    )


# --- step 1: is it right? ---------------------------------------------------------------------------------------------


def triton_tests() -> tuple[str, ...]:
    files = [f"tests/triton_kernels/{file}" for file in TRITON_TESTS]
    return (*files, "tests/test_gpu.py", "tests/test_gpu_dtypes.py", "-k", f"not ({NATIVE})")


def native_tests() -> tuple[str, ...]:
    files = (
        "tests/test_gpu.py",
        "tests/test_gpu_replays.py",
        "tests/test_gpu_graphs.py",
        "tests/test_triton_training.py",
    )
    return (*files, "-k", f"{NATIVE} or replays or graphs or training")


def marked_tests() -> tuple[str, ...]:
    """The tests of other files that are marked as needing a GPU."""
    others = [file for file in (ROOT / "tests").rglob("test_*.py") if not file.name.startswith("test_gpu")]
    files = sorted(file for file in others if "pytest.mark.gpu" in file.read_text(encoding="utf-8"))
    return (*(str(file.relative_to(ROOT)) for file in files), "-m", "gpu")


TEST_GROUPS = {
    "tests of the Triton kernels": triton_tests,
    "tests of the CUDA kernels": native_tests,
    "other tests of devices": marked_tests,
}


def _tests(plan: Plan, name: str, limit_s: float) -> Task:
    selection = TEST_GROUPS[name]()
    why_not = lacking("pytest", *(["hypothesis"] if "-m" in selection else []))  # other files' tests import it
    if plan.rehearsal:
        command = pytest("--collect-only", *selection)
        return Task(f"{name}, selected", command, 200, why_not, reader=collected)
    workers = min(WORKERS, max(1, plan.cores - 4))
    beside = ["-n", str(workers), "--dist", "loadgroup"] if lacking("xdist") is None else []
    command = pytest(*beside, "-rfEs", "--durations=5", *selection)
    return Task(name, command, limit_s, why_not, plan.environment, reader=pytest_outcome)


def sanitizer_command(checker: str, program: str, selection: Sequence[str]) -> tuple[str, ...]:
    options = ["--tool", checker, *SANITIZERS[checker], "--error-exitcode", "1"]
    options += ["--target-processes", "application-only"]
    options += [word for name in NOT_OURS for word in ("--kernel-name-exclude", f"kns={name}")]
    return (program, *options, *pytest("-x", "-rfE", *selection))


def _sanitized(plan: Plan, kernels: str, checkers: Sequence[str], limit_s: float) -> list[Task]:
    file, expression = SANITIZED[kernels]
    if plan.rehearsal:
        command = pytest("--collect-only", file, "-k", expression)
        return [Task(f"sanitized cases of {kernels}, selected", command, 200, lacking("pytest"), reader=collected)]
    program = tool("compute-sanitizer")
    why_not = lacking("pytest") or (None if program else "compute-sanitizer is not installed")
    # Without PyTorch's own pool of memory, every tensor is an allocation, past whose end nothing may be read.
    environment = {**plan.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Task(
            f"{checker}, {kernels}",
            sanitizer_command(checker, program or "compute-sanitizer", (file, "-k", expression)),
            limit_s,
            why_not,
            environment,
            may_be_cut=True,
            reader=pytest_outcome,
        )
        for checker in checkers
    ]


def step_1(plan: Plan) -> list[list[Task]]:
    if plan.rehearsal:
        interpreted = ("tests/test_gpu_dtypes.py", "tests/test_gpu_replays.py")
        persistent = "tests/triton_kernels/test_attention_persistent.py"
        compiled = python("-m", "fastgpt.triton_kernels.offline", "--arch", "90", "--part", "0/30")
        cuda = pytest("tests/csrc/test_cuda.py", "-k", "compile_within")
        selected = [_tests(plan, name, 0) for name in TEST_GROUPS]
        selected += [task for kernels in SANITIZED for task in _sanitized(plan, kernels, (), 0)]
        on_interpreter = Task("on the interpreter", pytest("-rs", *interpreted, persistent), 400, reader=pytest_outcome)
        offline = Task("Triton for sm_90", compiled, 400, environment={"TRITON_INTERPRET": "0"})
        return [*([task] for task in selected), [on_interpreter, Task("nvcc for sm_90", cuda, 500)], [offline]]
    parity = python("-m", "fastgpt", "parity", "--device", "cuda", "--out", str(plan.out / "parity.json"))
    both = ("memcheck", "racecheck")
    return [
        [build(plan), _tests(plan, "tests of the Triton kernels", 300), *_sanitized(plan, "triton", both, 200)],
        [
            _tests(plan, "tests of the CUDA kernels", 200),
            _tests(plan, "other tests of devices", 100),
            *_sanitized(plan, "cuda", [*both, "synccheck"], 150),
            Task("parity report", parity, 150, environment=plan.environment, may_be_cut=True),
        ],
    ]


# --- step 2: which launch configuration is fastest? -------------------------------------------------------------------


def step_2(plan: Plan) -> list[list[Task]]:
    sweep = python("-m", "fastgpt.benchmarks.gpu_tune", "--out", str(plan.table.parent))
    if plan.rehearsal:
        return [[Task("sweep, rehearsed", (*sweep, "--jobs", "1", "--dry-run", "--quick"), 600)]]
    # It writes its tables whenever it is through with a kernel, and it goes on where it has ended.
    command = (*sweep, "--jobs", str(plan.cores), "--time-limit", str(SWEEP_S))
    sweeping = Task("sweep", command, STEP_LIMIT_S, environment=plan.environment, may_be_cut=True)
    return [[build(plan)], [sweeping]]


# --- step 3: how fast is it? ------------------------------------------------------------------------------------------


def _suite(plan: Plan, *names: str) -> tuple[str, ...]:
    """The benchmarks with pytest's options as the suite has them."""
    suite = ROOT / "benchmarks"
    rows = plan.out / ("rehearsal.jsonl" if plan.rehearsal else f"{plan.device_slug}.jsonl")
    options = ["--rehearse"] if plan.rehearsal else ["--device=cuda", "--benchmark-max-time=0.2"]
    options += [f"--rows={rows}"]
    given = {"nanogpt": plan.nanogpt, "lecture": plan.lecture, "data": plan.data}
    options += [f"--{name}={value}" for name, value in given.items() if value is not None]
    files = [str(suite / f"bench_{name}.py") for name in names]
    return pytest("-c", str(suite / "pytest.ini"), "--rootdir", str(suite), *options, *files)


def step_3(plan: Plan) -> list[list[Task]]:
    why_not = lacking("pytest", "pytest_benchmark")
    if plan.rehearsal:
        # torch.compile would compile for the CPU, minutes long, what is not measured there.
        environment = {"TORCH_COMPILE_DISABLE": "1"}
        command = _suite(plan, *BENCHMARKS)
        return [[Task("benchmarks, rehearsed", command, 500, why_not, environment, reader=bench_outcome)]]
    # What the peers compile is compiled beside each other, so that it is found in the caches when they are measured.
    ops = [name for name in BENCHMARKS if name not in MODEL_BENCHMARKS]
    beside = ["-n", str(min(6, plan.cores))] if lacking("xdist") is None else []
    compiling = (*_suite(plan, *ops), "--benchmark-disable", *beside)
    no_cache = why_not or lacking("xdist")
    stages = [[build(plan)]]
    stages += [[Task("compiling the peers", compiling, 120, no_cache, plan.tuned, may_be_cut=True, may_fail=True)]]
    for name, limit_s in BENCHMARKS.items():
        reason = why_not
        if name == "recipe":
            text = None if plan.data else "no text was given: DATA=.../tinyshakespeare.txt"
            if plan.data and Path(plan.data).stem != "tinyshakespeare":  # the benchmark would be skipped
                text = f"{plan.data}: the text has to be in a file called tinyshakespeare.txt"
            reason = why_not or lacking("tomli_w", "tqdm", "safetensors") or text
        raw = f"--benchmark-json={plan.out / f'bench_{name}.json'}"
        command = (*_suite(plan, name), raw)
        stages += [[Task(f"bench {name}", command, limit_s, reason, plan.tuned, may_be_cut=True, reader=bench_outcome)]]
    return stages


# --- step 4: what limits it? ------------------------------------------------------------------------------------------


def step_4(plan: Plan) -> list[list[Task]]:
    if plan.rehearsal:
        environment = {"TRITON_INTERPRET": "1"}
        return [
            [Task(f"{name}, rehearsed", python("-m", counters.MODULE, name, "--dry-run"), 200, environment=environment)]
            for name in counters.CASES
        ]
    program = tool("ncu")
    why_not = None if program else "ncu (Nsight Compute) is not installed"
    stages = [[build(plan)]]
    for name in counters.CASES:
        command = counters.command(program or "ncu", name)
        stages += [[Task(f"ncu {name}", command, 90, why_not, plan.tuned, reader=counters.read)]]
    return stages


STEPS = {1: step_1, 2: step_2, 3: step_3, 4: step_4}


def plan_for(out: Path, rehearsal: bool, nanogpt: str | None, lecture: str | None, data: str | None) -> Plan:
    import torch

    from fastgpt.machine import device_slug

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    device = torch.device("cpu" if rehearsal else "cuda")
    major, minor = (9, 0) if rehearsal else torch.cuda.get_device_capability()
    return Plan(out, rehearsal, device_slug(device), cores, f"{major}.{minor}", nanogpt, lecture, data)
