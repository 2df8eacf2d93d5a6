"""The command line of the GPU check: python -m fastgpt.benchmarks.gpu_check --out DIR [--step N] [--dry-run]"""

import argparse
import hashlib
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgpt import machine
from fastgpt.benchmarks.harness.suite import REHEARSAL
from fastgpt.files import FileError

from . import packages, steps, summary
from .tasks import Book, run_stages


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check", description="What only a GPU can show; docs/gpu.md explains it.")
    parser.add_argument("--out", type=Path, default=steps.ROOT / "runs" / "gpu-check", metavar="DIR")
    parser.add_argument("--step", type=int, choices=steps.STEPS, help="default: all of them, one after the other")
    parser.add_argument("--dry-run", action="store_true", help="rehearse without a GPU, into DIR/rehearsal")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="install the wheels in this folder first")
    there = {"type": existing}  # what is missing is said now, and not minutes later
    parser.add_argument("--nanogpt", metavar="DIR", help="a checkout of karpathy/nanoGPT, to compare with", **there)
    parser.add_argument("--lecture", metavar="FILE", help="gpt.py of karpathy/ng-video-lecture, the same", **there)
    parser.add_argument("--data", metavar="FILE", help="tinyshakespeare.txt, to train on", **there)
    return parser.parse_args(argv)


def existing(path: str) -> Path:
    """`path`, absolute, because commands run in the sources' folder. ArgumentTypeError where nothing is there."""
    if not Path(path).exists():
        raise argparse.ArgumentTypeError(f"{path}: there is no such file or folder")
    return Path(path).resolve()


def source_digest() -> str:
    """Of every file that a step runs or compiles. A commit alone does not say what has changed since."""
    digest = hashlib.sha256()
    for folder, pattern in (
        *((folder, "*.py") for folder in ("fastgpt", "triton_kernels", "benchmarks", "tests")),
        *((folder, "*.toml") for folder in ("triton_kernels", "tests")),
        ("csrc", "*"),
    ):
        for file in sorted(path for path in (steps.ROOT / folder).rglob(pattern) if path.is_file()):
            digest.update(f"{file.relative_to(steps.ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def state_of(plan: steps.Plan, facts: dict[str, Any], step: int) -> dict[str, Any]:
    """What makes an earlier result count: the sources, the machine and its versions; for times also the table."""
    state = {key: facts[key] for key in ("device", "driver", "python", "torch", "triton", "cuda", "commit")}
    state |= {"sources": source_digest(), "rehearsal": plan.rehearsal}
    if step > 2:
        tables = sorted(plan.table.parent.glob("*.toml"))
        state["tables"] = [hashlib.sha256(table.read_bytes()).hexdigest()[:16] for table in tables]
    return state


def run(options: argparse.Namespace) -> int:
    """Returns the exit code: 1 where something failed."""
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("there is no CUDA device here; --dry-run (make gpu-check DRY_RUN=1) rehearses the steps", file=sys.stderr)
        return 1
    out = options.out.resolve() / ("rehearsal" if options.dry_run else "")
    out.mkdir(parents=True, exist_ok=True)
    if options.wheels:
        packages.install_wheels(options.wheels)
    if line := packages.missing_line():
        print(line, flush=True)
    data = options.data
    if options.dry_run and data is None:
        data = out / "tinyshakespeare.txt"
        data.write_text("To be, or not to be: that is the question.\n" * 100, encoding="utf-8")
    given = [value and str(value) for value in (options.nanogpt, options.lecture, data)]
    plan = steps.plan_for(out, options.dry_run, *given)
    facts = machine.facts(torch.device("cpu" if options.dry_run else "cuda"))
    if options.dry_run:
        facts["device"] = REHEARSAL
    elif facts["commit"] is None:
        print("the commit of these sources is not known, and such rows are not published: give COMMIT=hash", flush=True)
    failed = False
    try:
        for step in [options.step] if options.step else steps.STEPS:
            limit = float("inf") if options.dry_run else steps.STEP_LIMIT_S
            deadline = time.monotonic() + limit
            book = Book(out, step, state_of(plan, facts, step), facts, steps.ROOT)
            try:
                run_stages(steps.STEPS[step](plan), book, deadline)
            finally:
                book.write()
            failed |= book.failed
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        failed = True
    finally:
        print(f"written: {summary.write(out)}", flush=True)
    return int(failed)


def main(argv: Sequence[str] | None = None) -> int:
    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)  # as a time limit sends it
    try:
        return run(options_of(argv))
    except (packages.WheelError, FileError, OSError) as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
