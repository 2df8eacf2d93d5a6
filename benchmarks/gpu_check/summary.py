"""OUT/summary.md: what the steps found, in the order in which a reader asks."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastgpt.benchmarks.publish import cells
from fastgpt.files import atomic_path
from fastgpt.report import markdown_table

STEPS = {1: "is it right?", 2: "which launch configuration is fastest?", 3: "how fast is it?", 4: "what limits it?"}
REHEARSED = "**This is a rehearsal: nothing here was measured, and no kernel ran on a GPU.**"


def read_steps(out: Path) -> dict[int, dict[str, Any]]:
    found = {}
    for step in STEPS:
        file = out / f"step{step}.json"
        if file.is_file():
            found[step] = json.loads(file.read_text(encoding="utf-8"))
    return found


def write(out: Path) -> Path:
    text = markdown(out)
    with atomic_path(out / "summary.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return out / "summary.md"


def markdown(out: Path) -> str:
    steps = read_steps(out)
    parts = ["# GPU check", *_origins(steps.values())]
    if any(step["state"].get("rehearsal") for step in steps.values()):
        parts.append(REHEARSED)
    parts.append(_verdicts(steps))
    for number, step in steps.items():
        parts += [f"## Step {number}: {STEPS[number]}", _table(step)]
        parts += [_quoted(task) for task in step["tasks"] if task["fails"]]
        parts += _details(step)
    if counters := [task for step in steps.values() for task in step["tasks"] if task.get("counters")]:
        parts += ["## What the counters say", _counters(counters)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _origins(steps: Iterable[dict[str, Any]]) -> list[str]:
    """Machine and versions; more than one line where steps ran on several machines or commits."""
    lines = []
    for step in steps:
        facts = step["environment"]
        named = ("driver", "python", "torch", "triton", "cuda", "fastgpt")
        versions = [f"{key} {facts[key]}" for key in named if facts.get(key)]
        commit = cells.short_commit(facts.get("commit")) or "unknown"
        lines.append(f"{facts.get('device')}, {', '.join(versions)}, commit {commit}, {facts.get('date')}.")
    return list(dict.fromkeys(lines))


def _verdicts(steps: dict[int, dict[str, Any]]) -> str:
    said = []
    for number, question in STEPS.items():
        if number not in steps:
            said.append(f"- Step {number}, {question} It has not run.")
            continue
        tasks = steps[number]["tasks"]
        counts = {result: sum(task["result"] == result for task in tasks) for result in dict.fromkeys(_results(tasks))}
        counted = ", ".join(f"{count} {result}" for result, count in counts.items())
        verdict = "**failed**" if any(task["fails"] for task in tasks) else "no failure"
        said.append(f"- Step {number}, {question} {verdict}: {counted}, in {steps[number]['seconds']:.0f} s.")
    return "\n".join(said)


def _results(tasks: Iterable[dict[str, Any]]) -> list[str]:
    return [task["result"] for task in tasks]


def _table(step: dict[str, Any]) -> str:
    rows = [
        [task["name"], task["result"], task.get("seconds"), task.get("outcome") or task.get("reason")]
        for task in step["tasks"]
    ]
    return markdown_table(["task", "result", "seconds", "outcome or reason"], rows)


def _quoted(task: dict[str, Any]) -> str:
    """The end of what a task that failed has printed; all of it is in OUT/logs."""
    failed = "\n".join(task.get("failed_tests", [])) or "\n".join(task.get("output", "").splitlines()[-15:])
    return f"{task['name']}:\n\n```text\n{failed.replace('```', '` ` `')}\n```"


def _details(step: dict[str, Any]) -> list[str]:
    skipped = [f"- {line}" for task in step["tasks"] for line in task.get("skipped_tests", [])]
    said = [f"- {line}" for task in step["tasks"] for line in task.get("said", [])]
    told = ["Tests that were skipped:", "\n".join(dict.fromkeys(skipped))] if skipped else []
    return told + (["What the benchmarks say:", "\n".join(dict.fromkeys(said))] if said else [])


def _counters(tasks: Iterable[dict[str, Any]]) -> str:
    headers = ["case", "kernel", "time, us", "GB/s", "of the memory's peak", "of the tensor cores' peak", "registers"]
    rows = []
    for task in tasks:
        found = task["counters"]
        values = [found.get(key) for key in ("time_us", "gb_per_s")]
        percents = [found.get(key) for key in ("dram_percent", "tensor_percent")]
        shown = [None if value is None else f"{value:.3g} %" for value in percents]
        measured = [cells.short(value) for value in values]
        rows.append([task["name"], found.get("kernel"), *measured, *shown, found.get("registers")])
    return markdown_table(headers, rows)
