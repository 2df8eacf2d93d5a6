"""Everything that only a GPU can show, in one run: parity on the device, memory errors, and the benchmark suite.

    make gpu-check OUT=dir          installs this tree first; no network; under 8 minutes on an H100

Writes OUT/gpu_check.json (device, driver, versions, commit, and what ran, failed or was skipped), OUT/parity.json, the
suite's rows in OUT/<device>.jsonl and the raw times of each benchmark in OUT/bench_*.json. Without a GPU it runs too,
and says what it skipped. Exit code 1 when a step failed; a benchmark for which the time ran out did not fail, and
keeps the rows it has written.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from fastgpt import machine
from fastgpt.benchmarks.command import benchmark_names

ROOT = Path(__file__).resolve().parent.parent
TIME_LIMIT_S = 470
# Run after the ops, in this order: if the time runs out, the ops have been measured, which only a GPU can show.
AFTER_THE_OPS = ("train_step", "generate", "time_to_loss", "import", "recipe")
BENCHMARK_LIMIT_S = 120  # for each, so that one whose peers compile slowly leaves time for the others
# The smallest cases of each kernel, which both of the sanitizer's tools run.
SANITIZED = "one_token or blind_rows or (layer_norm and width_1) or (long_rows and infinities and classes_50257)"


def benchmarks_in_order() -> list[str]:
    ops = [name for name in benchmark_names() if name not in AFTER_THE_OPS]
    return [*ops, *AFTER_THE_OPS]


def step(name: str, command: list[str], deadline: float, why_not: str | None = None) -> dict:
    """Run `command` unless `why_not` says why it cannot run; the result, the seconds and the end of its output."""
    left = deadline - time.monotonic()
    if why_not is None and left < 5:
        why_not = f"the {TIME_LIMIT_S} s of this check are used up"
    if why_not is not None:
        print(f"{name}: skipped, {why_not}", flush=True)
        return {"step": name, "result": "skipped", "reason": why_not}
    print(f"{name}: {' '.join(command)}", flush=True)
    started = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace", timeout=left)
        result, said = ("passed" if done.returncode == 0 else "failed"), done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        result, said = "cut off", (error.stdout or b"").decode(errors="replace")
    seconds = round(time.monotonic() - started, 1)
    print("\n".join(said.splitlines()[-15:]), f"\n{name}: {result} after {seconds} s", flush=True)
    return {"step": name, "result": result, "seconds": seconds, "output": said[-6000:]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-check")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + TIME_LIMIT_S
    no_gpu = None if torch.cuda.is_available() else "there is no CUDA device"
    no_pytest = None if find_spec("pytest") else "pytest is not installed"
    no_suite = no_pytest or (None if find_spec("pytest_benchmark") else "pytest-benchmark is not installed")
    sanitizer = shutil.which("compute-sanitizer")
    no_sanitizer = None if sanitizer else "compute-sanitizer is not installed"
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "tests"]
    checked = [*tests, "-x", "-k", SANITIZED]
    report = [sys.executable, "-m", "fastgpt", "parity", "--device", "cuda", "--out", str(out / "parity.json")]
    steps = [
        step("parity on the device", tests, deadline, no_gpu or no_pytest),
        step("parity report", report, deadline, no_gpu),
    ]
    for tool in ("memcheck", "racecheck"):
        options = ["--tool", tool, "--error-exitcode", "1", "--kernel-name-exclude", "kns=at::"]
        command = [str(sanitizer), *options, *checked]
        # Under these tools a kernel is a hundred times slower, so they get a limit of their own.
        limit = min(deadline, time.monotonic() + 60)
        steps.append(step(f"compute-sanitizer {tool}", command, limit, no_gpu or no_pytest or no_sanitizer))
    device = torch.device("cpu" if no_gpu else "cuda")
    rows = out / f"{machine.device_slug(device)}.jsonl"
    suite = ["--device=cuda", f"--rows={rows}", "--benchmark-max-time=0.3"]
    for bench in benchmarks_in_order():
        file, raw = ROOT / "benchmarks" / f"bench_{bench}.py", out / f"bench_{bench}.json"
        command = [sys.executable, "-m", "pytest", str(file), *suite, f"--benchmark-json={raw}"]
        limit = min(deadline, time.monotonic() + BENCHMARK_LIMIT_S)
        steps.append(step(f"bench {bench}", command, limit, no_gpu or no_suite))
    written = {"environment": machine.facts(device), "steps": steps}
    (out / "gpu_check.json").write_text(json.dumps(written, indent=1), encoding="utf-8")
    print(f"written: {out / 'gpu_check.json'}")
    return int(any(_is_failure(s) for s in steps))


def _is_failure(step: dict) -> bool:
    """Not a sanitizer's step: what it finds is in the report, and its time may run out on correct kernels."""
    if step["step"].startswith("compute-sanitizer"):
        return False
    return step["result"] == "failed" or (step["result"] == "cut off" and not step["step"].startswith("bench "))


if __name__ == "__main__":
    sys.exit(main())
