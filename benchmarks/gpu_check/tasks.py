"""Runs the commands of a step in time, some beside each other, and writes down what each of them did.

OUT/stepN.json is written whenever a task has ended, so that what is known survives an interruption, and OUT/logs has
what each task printed. A task that passed is taken from there when the step runs again, if the machine and the sources
are the same.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgpt.files import atomic_path

POLL_S = 0.1
TAIL = 4000  # characters of a task's output that the file of the step holds

# Reads what a task printed. Keys that mean something here: "result" and "reason" replace what the exit code says.
Reader = Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """A command and its limits."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    why_not: str | None = None  # why it cannot run here
    environment: Mapping[str, str] = field(default_factory=dict)
    may_be_cut: bool = False  # its time may run out without a failure: what it did until then counts
    may_fail: bool = False
    is_kept: bool = True  # not run again where it has passed
    reader: Reader = lambda printed: {}


@dataclass
class Book:
    """The record of one step: OUT/stepN.json."""

    out: Path
    step: int
    state: dict[str, Any]  # what must be equal for an earlier result to count
    facts: dict[str, Any]
    root: Path  # where commands run
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    earlier: dict[str, dict[str, Any]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(self.file.read_text(encoding="utf-8"))
            if found["state"] == self.state:
                self.earlier = {record["name"]: record for record in found["tasks"]}

    @property
    def file(self) -> Path:
        return self.out / f"step{self.step}.json"

    def log(self, task: Task) -> Path:
        return self.out / "logs" / f"step{self.step}-{re.sub(r'[^a-z0-9]+', '-', task.name.lower())}.txt"

    def add(self, task: Task, result: str, **more: Any) -> None:
        is_failure = result == "failed" or (result in ("cut off", "interrupted") and not task.may_be_cut)
        record = {"name": task.name, "result": result, "fails": is_failure and not task.may_fail, **more}
        self.records[task.name] = record | {"command": shlex.join(task.command)}
        self.write()
        reason = more.get("reason")
        print(f"step {self.step}, {task.name}: {result}{f', {reason}' if reason else ''}", flush=True)

    def write(self) -> None:
        seconds = round(time.monotonic() - self.started, 1)
        written = {"step": self.step, "seconds": seconds, "state": self.state, "environment": self.facts}
        with atomic_path(self.file) as temporary:
            tasks = list(self.records.values())
            temporary.write_text(json.dumps(written | {"tasks": tasks}, indent=1) + "\n", encoding="utf-8")

    @property
    def failed(self) -> bool:
        return any(record["fails"] for record in self.records.values())


@dataclass
class _Running:
    task: Task
    process: subprocess.Popen
    started: float
    end: float


def run_stages(stages: Sequence[Sequence[Task]], book: Book, deadline: float) -> None:
    """Run each stage's tasks beside each other, and a stage after the one before it. Raises KeyboardInterrupt late."""
    for stage in stages:
        running = [started for task in stage if (started := _start(task, book, deadline))]
        try:
            while running:
                running = [one for one in running if not _has_ended(one, book)]
                time.sleep(POLL_S if running else 0.0)
        except KeyboardInterrupt:
            for one in running:
                _stop(one.process)
                _finish(one, book, "interrupted")
            raise


def _start(task: Task, book: Book, deadline: float) -> _Running | None:
    """None where there is nothing to wait for."""
    known = book.earlier.get(task.name, {})
    now = time.monotonic()
    if task.why_not is not None:
        book.add(task, "skipped", reason=task.why_not)
    elif task.is_kept and known.get("result") == "passed":
        kept = {
            key: value for key, value in known.items() if key not in ("name", "result", "fails", "command", "reason")
        }
        book.add(task, "passed", reason="done before", **kept)
    elif deadline - now < 5:
        book.add(task, "skipped", reason="the time of this step was used up")
    else:
        print(f"step {book.step}, {task.name}: {shlex.join(task.command)}", flush=True)
        with book.log(task).open("wb") as output:
            process = subprocess.Popen(
                task.command,
                cwd=book.root,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **task.environment},
                start_new_session=True,  # so that its own processes end with it
            )
        return _Running(task, process, now, min(deadline, now + task.limit_s))
    return None


def _has_ended(one: _Running, book: Book) -> bool:
    code = one.process.poll()
    if code is None and time.monotonic() < one.end:
        return False
    if code is None:
        _stop(one.process)
        _finish(one, book, "cut off")
    else:
        _finish(one, book, "passed" if code == 0 else "failed")
    return True


def _finish(one: _Running, book: Book, result: str) -> None:
    printed = book.log(one.task).read_text(encoding="utf-8", errors="replace")
    more = {"seconds": round(time.monotonic() - one.started, 1), **one.task.reader(printed)}
    if result == "cut off":
        more.setdefault("reason", f"after {more['seconds']:.0f} s")
    elif result == "failed":
        more.setdefault("reason", next((line for line in reversed(printed.splitlines()) if line.strip()), "no output"))
    result = more.pop("result", result) if result in ("passed", "failed") else result
    book.add(one.task, result, **more, **({} if result == "passed" else {"output": printed[-TAIL:]}))


def _stop(process: subprocess.Popen) -> None:
    """The process and what it has started, first asked and then made to end."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=3)
    process.wait()


def pytest_outcome(printed: str) -> dict[str, Any]:
    """What a session of pytest counted, and the tests that failed or were skipped, with the reasons."""
    lines = printed.splitlines()
    counted = [line.strip("= ") for line in lines if re.match(r"=*\s*\d+ (passed|failed|skipped|error)", line)]
    found: dict[str, Any] = {"outcome": counted[-1]} if counted else {}
    for key, starts in (("failed_tests", ("FAILED ", "ERROR ")), ("skipped_tests", ("SKIPPED ",))):
        if named := [line for line in lines if line.startswith(starts)]:
            found[key] = named[:50]
    return found


def bench_outcome(printed: str) -> dict[str, Any]:
    """The same of a benchmark, with what it says of its cases and of the peers that are missing."""
    _, _, said = printed.partition("FastGPT against its best peer")
    kept = re.compile(r"absent from |NOTE: |rehearsed, not measured: |\w+ .*: [\d.e+]+ ms")
    return pytest_outcome(printed) | {"said": [line for line in said.splitlines()[1:] if kept.match(line)]}


def collected(printed: str) -> dict[str, Any]:
    """How many tests `pytest --collect-only -q` has selected. None is a failure: the expression is out of date."""
    counts = re.findall(r"(\d+)(?:/\d+)? tests? collected", printed)
    selected = (
        int(counts[-1]) if counts else sum(int(n) for n in re.findall(r"^\S+\.py: (\d+)$", printed, re.MULTILINE))
    )
    return (
        {"selected": selected, "outcome": f"{selected} selected"}
        if selected
        else {"result": "failed", "reason": "it selects no test"}
    )
