"""The workflows of CI call the make targets that everyone calls, with no more permissions than they need."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = {
    path.name: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in (ROOT / ".github" / "workflows").glob("*.yml")
}
JOBS = [(file, name) for file, workflow in WORKFLOWS.items() for name in workflow["jobs"]]


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)[1].split())


def commands(job: dict) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def test_there_are_two():
    assert set(WORKFLOWS) == {"ci.yml", "gpu.yml"}


@pytest.mark.parametrize(("file", "job"), JOBS)
def test_what_touches_the_code_is_a_make_target(file, job):
    steps = WORKFLOWS[file]["jobs"][job]["steps"]
    if not any("actions/checkout" in step.get("uses", "") for step in steps):
        assert not any("make" in command for command in commands(WORKFLOWS[file]["jobs"][job]))
        return
    for command in commands(WORKFLOWS[file]["jobs"][job]):
        words = command.split()
        assert words[0] == "make" and words[1] in make_targets(), command
        dry = subprocess.run(
            ["make", "-n", "-o", ".venv/installed", "-C", str(ROOT), *words[1:]], capture_output=True, text=True
        )
        assert dry.returncode == 0, dry.stderr


def test_ci_does_all_that_the_machine_can():
    (job,) = WORKFLOWS["ci.yml"]["jobs"].values()
    assert [command.split()[1] for command in commands(job)] == [
        "install", "lint", "types", "test", "sanitize", "wheel",
    ]  # fmt: skip
    required = {"FASTGPT_NATIVE": "require", "FASTGPT_BROWSER": "require"}
    assert job["env"] == required, "else a failed build, or a missing browser, would make their tests skip"
    python = next(step["with"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
    assert python["cache"] == "pip" and (ROOT / python["cache-dependency-path"]).is_file()
    assert any("upload-artifact" in step.get("uses", "") and "whl" in step["with"]["path"] for step in job["steps"])


@pytest.mark.parametrize(("file", "job"), JOBS)
def test_only_a_job_without_the_code_may_write(file, job):
    workflow = WORKFLOWS[file]
    assert workflow["permissions"] == {"contents": "read"}
    this = workflow["jobs"][job]
    assert this["timeout-minutes"] <= 45
    uses_code = any("actions/checkout" in step.get("uses", "") for step in this["steps"])
    if uses_code:
        assert "permissions" not in this and "secrets" not in str(this)
        checkout = next(step for step in this["steps"] if "actions/checkout" in step.get("uses", ""))
        assert checkout["with"]["persist-credentials"] is False
    else:
        assert this["permissions"] == {"pull-requests": "write"}
    assert "concurrency" in this or "concurrency" in workflow or not uses_code


def test_a_gpu_machine_runs_a_pull_request_only_when_a_maintainer_says_so():
    workflow = WORKFLOWS["gpu.yml"]
    triggers = workflow[True]  # YAML reads the key "on" as a truth value
    assert set(triggers) == {"workflow_dispatch", "pull_request"} and triggers["pull_request"] == {"types": ["labeled"]}
    check = workflow["jobs"]["check"]
    assert "github.event.label.name == 'gpu'" in check["if"] and check["runs-on"] == ["self-hosted", "gpu"]
    upload = next(step for step in check["steps"] if "upload-artifact" in step.get("uses", ""))
    assert upload["if"] == "always()", "what was measured is kept, above all when something failed"
    assert [command.split()[1] for command in commands(check)] == ["gpu-check", "report", "compare"]
    comment = workflow["jobs"]["comment"]
    assert comment["needs"] == "check" and "gh pr comment" in commands(comment)[-1]
    assert "github.repository" in comment["steps"][-1]["if"]
