"""The GPU check: tasks in time, resumed and interrupted; what it writes; wheels; Nsight Compute's tables."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from fastgpt.benchmarks.gpu_check import __main__ as command
from fastgpt.benchmarks.gpu_check import counters, packages, summary, tasks
from fastgpt.benchmarks.gpu_check.tasks import Book, Task, run_stages

ROOT = Path(__file__).resolve().parents[2]
FACTS = {"device": "A GPU", "torch": "2.11.0", "commit": "0123456789abcdef", "date": "2026-01-02"}


def python(program: str, name: str = "a task", limit_s: float = 60, **more) -> Task:
    return Task(name, (sys.executable, "-c", program), limit_s, **more)


def book(out: Path, **state) -> Book:
    return Book(out, 1, {"sources": "1", **state}, FACTS, out)


def written(out: Path, step: int = 1) -> dict[str, dict]:
    return {record["name"]: record for record in json.loads((out / f"step{step}.json").read_text())["tasks"]}


def run(out: Path, *stages: list[Task], **state) -> Book:
    kept = book(out, **state)
    run_stages(stages, kept, time.monotonic() + 60)
    return kept


def test_what_each_task_did_is_written(tmp_path):
    kept = run(
        tmp_path,
        [python("print('well')", "good"), python("print('why'); raise SystemExit(3)", "bad")],
        [python("", "cannot", why_not="no GPU"), python("raise SystemExit(1)", "may fail", may_fail=True)],
        [python("import time; time.sleep(60)", "slow", limit_s=0.3, may_be_cut=True)],
    )
    found = written(tmp_path)
    assert [found[name]["result"] for name in ("good", "bad", "cannot", "may fail", "slow")] == [
        "passed", "failed", "skipped", "failed", "cut off",
    ]  # fmt: skip
    assert [name for name in found if found[name]["fails"]] == ["bad"] and kept.failed
    assert found["bad"]["reason"] == "why" and found["cannot"]["reason"] == "no GPU"
    assert (tmp_path / "logs" / "step1-good.txt").read_text() == "well\n"


def test_tasks_of_a_stage_run_beside_each_other_and_stages_do_not(tmp_path):
    """Each of the first two waits for the other's file; the third needs both."""
    wait = "import pathlib, time\npathlib.Path('{0}').touch()\nwhile not pathlib.Path('{1}').exists(): time.sleep(0.01)"
    both = "import pathlib; assert pathlib.Path('x').exists() and pathlib.Path('y').exists()"
    run(tmp_path, [python(wait.format("x", "y"), "one"), python(wait.format("y", "x"), "two")], [python(both, "three")])
    assert {record["result"] for record in written(tmp_path).values()} == {"passed"}


def test_a_task_that_is_cut_off_fails_where_it_must_end(tmp_path):
    assert run(tmp_path, [python("import time; time.sleep(60)", "slow", limit_s=0.3)]).failed
    assert written(tmp_path)["slow"]["result"] == "cut off"


def test_a_process_is_stopped_with_those_that_it_has_started(tmp_path):
    """The child's end of the pipe closes when the child ends, too."""
    child = "import time; print('begun', flush=True); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == b"begun\n"
    tasks._stop(process)
    assert process.returncode != 0 and process.stdout.read() == b""
    process.stdout.close()


def test_what_passed_is_not_run_again_for_the_same_sources_and_machine(tmp_path):
    count = "import pathlib; p = pathlib.Path('n'); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    again = [python(count, "counted"), python("raise SystemExit(1)", "bad", may_fail=True)]
    for _ in range(2):
        run(tmp_path, again)
    assert (tmp_path / "n").read_text() == "x" and written(tmp_path)["counted"]["reason"] == "done before"
    run(tmp_path, again, sources="2")
    assert (tmp_path / "n").read_text() == "xx"
    run(tmp_path, [python(count, "counted", is_kept=False)], sources="2")
    assert (tmp_path / "n").read_text() == "xxx"
    (tmp_path / "step1.json").write_text("{broken")
    run(tmp_path, again, sources="2")
    assert (tmp_path / "n").read_text() == "xxxx"


def test_when_the_steps_time_is_used_up_the_rest_is_skipped(tmp_path):
    kept = book(tmp_path)
    run_stages([[python("", "late")]], kept, time.monotonic() + 1)
    assert written(tmp_path)["late"] == {
        "name": "late", "result": "skipped", "fails": False, "reason": "the time of this step was used up",
        "command": f"{sys.executable} -c ''",
    }  # fmt: skip


def test_an_interruption_leaves_what_is_known(tmp_path):
    program = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from fastgpt.benchmarks.gpu_check import __main__ as command, steps
from fastgpt.benchmarks.gpu_check.tasks import Task
slow = "print('begun', flush=True); import time; time.sleep(60)"
programs = dict(quick="", slow=slow)
steps.STEPS.clear()
steps.STEPS[1] = lambda plan: [[Task(name, (sys.executable, "-c", code), 60)] for name, code in programs.items()]
sys.exit(command.main(["--out", {str(tmp_path)!r}, "--dry-run"]))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out = tmp_path / "rehearsal"
    log = out / "logs" / "step1-slow.txt"
    while not (log.is_file() and log.read_text()):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "interrupted" in said.decode()
    assert {name: record["result"] for name, record in written(out).items()} == {
        "quick": "passed", "slow": "interrupted",
    }  # fmt: skip
    assert "| slow  | interrupted |" in (out / "summary.md").read_text(encoding="utf-8")


def test_without_a_gpu_nothing_is_claimed(tmp_path, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert command.main(["--out", str(tmp_path), "--step", "1"]) == 1
    assert "no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_pytest_says_is_read():
    printed = "....s\nSKIPPED [2] tests/test_x.py:3: no GPU\nFAILED tests/test_y.py::test - wrong\n"
    printed += "1 failed, 4 passed in 3.2s\n"
    assert tasks.pytest_outcome(printed) == {
        "outcome": "1 failed, 4 passed in 3.2s", "failed_tests": ["FAILED tests/test_y.py::test - wrong"],
        "skipped_tests": ["SKIPPED [2] tests/test_x.py:3: no GPU"],
    }  # fmt: skip
    section = (
        "=== FastGPT against its best peer ===\nattention B1, bfloat16, forward: 0.25 ms, sdpa cudnn takes 1.20x\n"
    )
    section += "absent from attention: flash-attn, it has no flash_attn_func\nrows: x.jsonl\n3 passed in 3s\n"
    assert tasks.bench_outcome(section) == {
        "outcome": "3 passed in 3s",
        "said": [
            "attention B1, bfloat16, forward: 0.25 ms, sdpa cudnn takes 1.20x",
            "absent from attention: flash-attn, it has no flash_attn_func",
        ],
    }
    assert tasks.collected("tests/test_x.py: 3\ntests/a/test_y.py: 2\n") == {"selected": 5, "outcome": "5 selected"}
    assert tasks.collected("3/7 tests collected (4 deselected) in 0.1s")["selected"] == 3
    assert tasks.collected("no tests collected (7 deselected)")["result"] == "failed"


def test_the_summary_says_what_ran_what_failed_and_on_what(tmp_path):
    found = {"kernel": "forward_kernel", "launches": 1, "time_us": 91.23, "gb_per_s": 1834.0, "dram_percent": 55.1}
    run(
        tmp_path,
        [python("print('1 failed in 2s'); raise SystemExit(1)", "tests", reader=tasks.pytest_outcome)],
        [python("", "ncu", reader=lambda printed: {"counters": found | {"tensor_percent": None, "registers": 168.0}})],
    )
    text = summary.write(tmp_path).read_text(encoding="utf-8")
    assert "A GPU, torch 2.11.0, commit 0123456789, 2026-01-02." in text and "rehearsal" not in text
    assert "- Step 1, is it right? **failed**: 1 failed, 1 passed" in text and "- Step 2" in text
    assert "| ncu  | forward_kernel |     91.2 | 1,830 | 55.1 %" in text
    run(tmp_path, [python("", "tests")], rehearsal=True)
    assert summary.REHEARSED in summary.markdown(tmp_path)


# --- packages ---------------------------------------------------------------------------------------------------------


def test_missing_packages_are_one_line_that_says_where_wheels_go(monkeypatch):
    monkeypatch.setattr(packages, "is_there", lambda module: module not in ("xdist", "tomli_w"))
    line = packages.missing_line()
    assert "pytest-xdist (tests beside" in line and "tomli-w (the training run" in line and "WHEELS=dir" in line
    assert "\n" not in line and packages.lacking("pytest", "tomli_w", "xdist") == (
        "tomli-w and pytest-xdist are not installed"
    )
    assert packages.lacking("pytest") is None


@pytest.mark.parametrize("option", ["nanogpt", "lecture", "data"])
def test_what_is_brought_along_has_to_be_there(option, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--out", str(tmp_path), "--dry-run", f"--{option}", "nowhere"])
    assert stopped.value.code == 2 and "nowhere: there is no such file or folder" in capsys.readouterr().err


def test_wheels_that_cannot_be_installed_are_an_error_in_one_line(tmp_path, capsys):
    with pytest.raises(packages.WheelError, match="no such folder"):
        packages.install_wheels(tmp_path / "none")
    with pytest.raises(packages.WheelError, match="no wheels"):
        packages.install_wheels(tmp_path)
    with zipfile.ZipFile(tmp_path / "broken-1.0-py3-none-any.whl", "w"):
        pass
    assert command.main(["--out", str(tmp_path / "out"), "--dry-run", "--wheels", str(tmp_path)]) == 1
    assert f"WHEELS={tmp_path}: pip cannot install them" in capsys.readouterr().err


def test_what_cannot_be_written_is_an_error_in_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    assert command.main(["--out", str(tmp_path / "file" / "below"), "--dry-run"]) == 1
    (tmp_path / "rehearsal" / "summary.md").mkdir(parents=True)
    monkeypatch.setattr(command.steps, "STEPS", {})
    assert command.main(["--out", str(tmp_path), "--dry-run"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("gpu_check: ") and "below" in first
    assert second.startswith("gpu_check: ") and "summary.md" in second


# --- Nsight Compute ---------------------------------------------------------------------------------------------------

NAMES = ["ID", "Kernel Name", "dram__bytes.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed"]
NAMES += ["gpu__time_duration.sum", "launch__registers_per_thread"]
NAMES += ["sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active", "sm__pipe_other.avg"]


def table(*launches: list[str]) -> str:
    units = ["", "", "Mbyte", "%", "us", "register/thread", "%", "%"]
    quoted = [",".join(f'"{cell}"' for cell in row) for row in (NAMES, units, *launches)]
    return "\n".join(["==PROF== Connected to process 1", "rows of the program", *quoted, ""])


def test_the_counters_are_read_in_their_units():
    (found,) = counters.read(table(["0", "forward_kernel", "1,677.5", "83.2", "600", "168", "61.5", "n/a"])).values()
    assert found == {
        "kernel": "forward_kernel", "launches": 1, "time_us": 600.0, "gb_per_s": pytest.approx(2795.8, rel=1e-4),
        "dram_percent": 83.2, "tensor_percent": 61.5, "registers": 168.0,
    }  # fmt: skip


def test_no_counters_are_said_and_only_a_refusal_is_no_failure():
    refused = counters.read("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission ...")
    assert refused["result"] == "skipped" and "ERR_NVGPUCTRPERM" in refused["reason"]
    assert counters.read("==PROF== Disconnected")["result"] == "failed"
    assert counters.read(table())["reason"] == "ncu saw no launch of the kernel"
