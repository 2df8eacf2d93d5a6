"""The tests, run again under conditions that another machine may have: `make test-conditions`.

    python tests/conditions.py                              # every condition, each a run of all tests
    python tests/conditions.py --only busy strange -- tests/training -x

One line a condition: whether it passed, the most memory that the run and its subprocesses took, pytest's last line.
Memory is the sum of the processes' proportional shares (PSS), read twice a second from /proc, so it is Linux's alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEMORY_LIMIT = 3 * 2**30
STRANGE = {
    **{
        "LC_ALL": "C",
        "TZ": "Asia/Kolkata",
        "HOME": "/nonexistent",
        "PYTHONHASHSEED": "7",
        "PYTHONDONTWRITEBYTECODE": "1",
    },
    **{"FASTGPT_BACKEND": "triton", "FASTGPT_CACHE": "/nonexistent", "MPLCONFIGDIR": "/nonexistent"},
}
# What is set for the run; "busy" has loops beside it, "one core" is pinned, "strange" starts elsewhere with umask 077.
CONDITIONS = {
    "busy": {},
    "one core": {"OMP_NUM_THREADS": "1"},
    "three threads": {"OMP_NUM_THREADS": "3"},
    "strange": STRANGE,
    "ascii": {"LC_ALL": "C", "PYTHONUTF8": "0"},
}


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def family(pid: int) -> list[int]:
    """The process and all that descend from it."""
    found = [pid]
    with contextlib.suppress(OSError):  # it has ended
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                found += family(int(child))
    return found


def memory(pid: int) -> int:
    """Bytes that the process and its descendants take now; a page that n of them share counts 1/n for each."""
    kilobytes = 0
    for one in family(pid):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return 1024 * kilobytes


def run(name: str, arguments: list[str]) -> tuple[int, int, str]:
    """Exit code, most memory in bytes, and pytest's last line."""
    absolute = [str(ROOT / word) if (ROOT / word.split("::")[0]).exists() else word for word in arguments]
    command = [sys.executable, "-m", "pytest", "-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder", *absolute]
    command += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
    options: dict = {"cwd": ROOT, "env": {**os.environ, **CONDITIONS[name]}}
    if name == "strange":
        options |= {"cwd": "/", "umask": 0o077}
    if name == "one core":
        options["preexec_fn"] = lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    most = 0
    with busy_loops(2 if name == "busy" else 0), tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)
        while process.poll() is None:
            most = max(most, memory(process.pid))
            time.sleep(0.5)
        output.seek(0)
        text = output.read().decode(errors="replace").strip()
    if process.returncode:
        print(text, file=sys.stderr)
    return process.returncode, most, text.splitlines()[-1] if text else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CONDITIONS, default=list(CONDITIONS), metavar="CONDITION")
    parser.add_argument("pytest", nargs="*", help="what pytest is given, after --; default: all tests")
    asked = parser.parse_args()
    failed = False
    for name in asked.only:
        code, most, last = run(name, asked.pytest or [str(ROOT / "tests")])
        failed |= code != 0 or most > MEMORY_LIMIT
        print(f"{name}: {'failed' if code else 'passed'}, {most / 2**30:.1f} GB, {last}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
