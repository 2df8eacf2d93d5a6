"""`make gpu-tune`: measure which launch configuration of each kernel is the fastest on this GPU, and write the tables.

    make gpu-tune OUT=dir           after 8 minutes it begins with no further kernel; no network
    python -m fastgpt.benchmarks.gpu_tune --out DIR [--jobs N] [--kernels NAME ...] [--time-limit S] [--dry-run]

For each subject (gpu_tune_subjects.py), the most valuable one first:

1. Every candidate is compiled without the GPU, in as many processes as there are cores. One that spills registers, or
   that the chip has no room for, is dropped. The others are then in Triton's cache. (The kernels in csrc/ are compiled
   already; their candidates are the plans that they may be given.)
2. On the GPU each candidate's results and gradients are compared with the default's, and with the formula in float64 by
   the rule of `fastgpt.parity`; three runs have to give the same bits. A candidate that fails is dropped.
3. The default and the candidates are timed in turn, as replays of CUDA graphs, on inputs that are not in the L2 cache.
4. The fastest candidate gets an entry, if it is faster than the default by more than 2 %, beyond the noise.

OUT/tune.jsonl has a line for each candidate: dropped, wrong or timed; begun, if it ended the process; right, if the
time ran out before it was timed. Only those that are right are measured again, so that the same command goes on where
it was. OUT/tuned.toml is written after every subject, and holds the entries of all of them, those of the kernels in
csrc/ in OUT/tuned_cuda.toml. FASTGPT_TUNED=OUT/tuned.toml uses both; copied into triton_kernels/ they are the package's
own.

--dry-run rehearses all of it without a GPU: candidates are compiled for sm_90, checked by Triton's interpreter on small
inputs (in place of the CUDA kernels, those for the CPU run), and timed by a clock that makes its times up. Its
table names no device, and says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt import machine, parity
from fastgpt.benchmarks.gpu_tune_subjects import Choices, Subject, no_numbers, random_on, subjects_for
from fastgpt.benchmarks.harness.measure import Call, DeviceClock, interleave, ratio_of, spread_of
from fastgpt.files import atomic_path
from fastgpt.ops.backend import unavailable
from fastgpt.triton_kernels import tuned

TIME_LIMIT_S = 470
LEAST_GAIN = 1.02
SECONDS = 0.06  # of each contender's timing
COPIES = 3  # of the inputs, taken in turn, so that none of them is found in the L2 cache
LAUNCHES = 6  # in a CUDA graph
REPEATS = 3  # of a result that has to have the same bits
TABLES = ("tuned.toml", "tuned_cuda.toml")


# --- 1. compile -------------------------------------------------------------------------------------------------------

_compiled: list[tuple[str, Any]] = []


def begin_compiling(arch: int, n_multiprocessors: int) -> None:
    """The first thing that a process of the pool does: what it launches is compiled, and not interpreted."""
    global _compiled
    os.environ["TRITON_INTERPRET"] = "0"
    from fastgpt.triton_kernels.target import compile_launches

    _compiled = compile_launches(arch, n_multiprocessors)


def compile_candidate(subject: Subject, arch: int, choices: Choices | None) -> dict[str, int]:
    """The figures of the machine code of the subject's kernel, if it is compiled; in a process of the pool."""
    if not subject.compiled:
        return {}
    from fastgpt.triton_kernels.offline import machine_code

    _compiled.clear()
    with tuned.use(_table_of(subject, arch, choices)):
        subject.results(subject.inputs(no_numbers, full=True))
    suffix = f"{subject.kernel.rpartition('.')[2]}_kernel"
    kernel = next(kernel for name, kernel in _compiled if name.endswith(suffix))
    return machine_code(kernel, arch)


def why_dropped(subject: Subject, arch: int, choices: Choices, code: dict[str, int]) -> str | None:
    """Why the candidate may not be an entry of a table; `code` are the figures of its machine code, if any."""
    if code.get("spilled_bytes"):
        return f"spills {code['spilled_bytes']} bytes"
    origin: dict[str, Any] = dict.fromkeys(("time_us", "default_us"), 1.0)
    origin |= dict.fromkeys(("device", "driver", "torch", "triton", "date", "commit"), "unknown")
    facts = {key: code[key] for key in ("registers", "shared_bytes") if key in code}
    try:
        tuned.entry_of(subject.entry(arch, choices, facts | origin).row())
    except tuned.TableError as error:
        return str(error)
    return None


def _table_of(subject: Subject, arch: int, choices: Choices | None) -> tuned.Table:
    """The table under which the subject is launched by these choices; None stands for the default."""
    return tuned.Table() if choices is None else tuned.Table.of(subject.entry(arch, choices))


# --- 2. check ---------------------------------------------------------------------------------------------------------


class Check:
    """Compares a subject's results with the formula's, whose error PyTorch's own bounds, and with the default's."""

    def __init__(self, subject: Subject, timer: Timer) -> None:
        self.subject, self.timer = subject if timer.full else subject.small(), timer
        self.inputs = self.subject.inputs(random_on(timer.device, seed=0), timer.full)
        self.oracle = self.subject.by_formula(self.inputs)
        torchs = self.subject.by_pytorch(self.inputs, timer.device)
        self.torch_errors = {name: parity.max_error(torchs[name], value) for name, value in self.oracle.items()}
        self.default = self.results(None)

    def results(self, choices: Choices | None) -> dict[str, Tensor]:
        with tuned.use(_table_of(self.subject, self.timer.arch, choices)):
            return self.subject.results(self.inputs)

    def why_wrong(self, choices: Choices | None) -> str | None:
        """What is wrong with the results under `choices`, or with the default's under None."""
        first = self.default if choices is None else self.results(choices)
        part = self.subject.part(first)
        for name, expected in self.oracle.items():
            limit = 2.0 * self.torch_errors[name] + parity.tolerance(part[name].dtype, expected)
            error = parity.max_error(part[name], expected)
            if not error <= limit:
                return f"{name}: error {error:.2e} against the formula, more than {limit:.2e}"
        for name, expected in self.default.items():
            limit = 2.0 * parity.tolerance(expected.dtype, expected)
            error = parity.max_error(first[name], expected.double())
            if not error <= limit:
                return f"{name}: differs from the default's by {error:.2e}, more than {limit:.2e}"
        for _ in range(REPEATS - 1 if self.timer.full else 1):
            again = self.results(choices)
            if different := [name for name, value in first.items() if not torch.equal(value, again[name])]:
                return f"{', '.join(different)}: other bits in a second run"
        return None


# --- 3. time ----------------------------------------------------------------------------------------------------------


class GraphTimer:
    """On a GPU: a contender is the replay of a graph of launches, whose time is the device's alone."""

    full = True

    def __init__(self) -> None:
        self.device = "cuda"
        self.clock = DeviceClock()
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.arch = 10 * properties.major + properties.minor
        self.n_multiprocessors = properties.multi_processor_count

    def contender(self, calls: Sequence[Call]) -> Call:
        calls[0]()  # outside the graph: what the first launch of a kernel does cannot be captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(LAUNCHES):
                calls[i % len(calls)]()
        return graph.replay


class MadeUpTimer:
    """Without a GPU: every call runs once, and each contender is said to be 1 % faster than the one before it."""

    full = False
    device, arch, n_multiprocessors = "cpu", 90, 132

    def __init__(self) -> None:
        self.made_up: dict[Call, float] = {}

    def contender(self, calls: Sequence[Call]) -> Call:
        calls[0]()
        replay = partial(int)  # does nothing, and is equal to no other one
        self.made_up[replay] = LAUNCHES * 1e-4 * 0.99 ** len(self.made_up)
        return replay

    def clock(self, calls: Sequence[Call], iterations: Sequence[int]) -> list[float]:
        return [self.made_up[call] * n for call, n in zip(calls, iterations, strict=True)]


Timer = GraphTimer | MadeUpTimer


def time_candidates(subject: Subject, timer: Timer, candidates: Sequence[Choices]) -> list[dict[str, Any]]:
    """For each candidate its time, the default's, and the spread of their ratio; above 1 the candidate is faster."""
    subject = subject if timer.full else subject.small()
    inputs = [subject.inputs(random_on(timer.device, seed), timer.full) for seed in range(COPIES if timer.full else 1)]
    contenders = {}
    for number, choices in enumerate([None, *candidates]):
        with tuned.use(_table_of(subject, timer.arch, choices)):
            contenders[str(number)] = timer.contender([subject.timed(x) for x in inputs])
    seconds = SECONDS if timer.full else 0.0
    default, *others = interleave(contenders, timer.clock, seconds=seconds, min_rounds=5, warmups=2).values()
    found = []
    for times in others:
        ratio = ratio_of(default, times)
        found.append(
            {
                "time_us": _microseconds(times), "default_us": _microseconds(default),
                "ratio": round(ratio.median, 4), "p20": round(ratio.p20, 4), "p80": round(ratio.p80, 4),
            }
        )  # fmt: skip
    return found


def _microseconds(times: Sequence[float]) -> float:
    """The median time of one launch."""
    return round(spread_of(times).median / LAUNCHES * 1e6, 3)


# --- what is known so far ---------------------------------------------------------------------------------------------


class Log:
    """OUT/tune.jsonl: the outcome of each candidate, and where it was measured."""

    def __init__(self, file: Path, origin: dict[str, Any]) -> None:
        self.file, self.origin = file, origin
        written = file.read_text(encoding="utf-8") if file.exists() else ""
        if written and not written.endswith("\n"):  # the process was ended while it wrote a line
            file.write_text(written + "\n", encoding="utf-8")
        rows = [row for row in map(_row, written.splitlines()) if row is not None]
        same = [row for row in rows if all(row.get(key) == value for key, value in origin.items() if key != "date")]
        self.rows = {_identity(row["subject"], row["choices"]): row for row in same}

    def has(self, subject: Subject, choices: Choices) -> bool:
        """Whether nothing is left to do; what was right, and not timed before the time ran out, is done again."""
        row = self.rows.get(_identity(subject.name, choices))
        return row is not None and row["outcome"] != "right"

    def add(self, subject: Subject, choices: Choices, outcome: str, **facts: Any) -> None:
        row = {"subject": subject.name, "choices": choices, "outcome": outcome, **facts, **self.origin}
        self.rows[_identity(subject.name, choices)] = row
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def entries(self, subjects: Sequence[Subject], arch: int) -> list[tuned.Entry]:
        """For each subject its fastest candidate, where that is faster than the default beyond the noise."""
        found = []
        for subject in subjects:
            timed = [row for row in self.rows.values() if row["subject"] == subject.name and row["outcome"] == "timed"]
            best = max(timed, key=lambda row: row["ratio"], default=None)
            if best is not None and best["ratio"] > LEAST_GAIN and best["p20"] > 1.0:
                keys = ("registers", "shared_bytes", "time_us", "default_us", *self.origin)
                facts = {key: best[key] for key in keys if key in best}
                found.append(subject.entry(arch, best["choices"], facts))
        return sorted(found, key=lambda entry: tuple(map(str, entry.key)))


def _row(line: str) -> dict[str, Any] | None:
    """A line of the log; None for one that was cut off when the process was ended."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _identity(subject: str, choices: Choices) -> str:
    return f"{subject} {sorted(choices.items())}"


def origin_of(timer: Timer) -> dict[str, Any]:
    """What a table says about where its times come from."""
    facts = machine.facts(torch.device(timer.device))
    if not timer.full:
        facts |= {"device": tuned.MADE_UP, "driver": "none"}
    wanted = ("device", "driver", "torch", "triton", "date", "commit")
    return {key: str(facts[key] or "unknown") for key in wanted}


def write_tables(out: Path, entries: Sequence[tuned.Entry], origin: dict[str, Any]) -> None:
    for name in TABLES:
        rows = [e.row() for e in entries if tuned.KERNELS[e.kernel].of_csrc == (name == TABLES[1])]
        head = [f"# Written by gpu_tune on {origin['device']}.", *explanation_of_keys(name), ""]
        with atomic_path(out / name) as temporary:
            temporary.write_text("\n".join([*head, *map(_toml, rows)]), encoding="utf-8")


def explanation_of_keys(name: str) -> list[str]:
    """The comments of the package's own table, from its first empty one on: a table that replaces it keeps them."""
    lines = tuned.DEFAULT.with_name(name).read_text(encoding="utf-8").splitlines()
    comments = [line for line in lines if line.startswith("#")]
    return comments[comments.index("#") :]


def _toml(row: dict[str, Any]) -> str:
    """An entry in TOML, whose numbers and texts are written as in JSON; a rented machine may have no tomli_w."""
    return "".join(
        ["[[entry]]\n", *(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in row.items())]
    )


# --- all of it --------------------------------------------------------------------------------------------------------


Compiling = tuple[Choices | None, Future]  # None for the default


def tune(
    subjects: Sequence[Subject], timer: Timer, log: Log, out: Path, jobs: int, deadline: float, most: int | None
) -> bool:
    """Whether every subject that was begun before the deadline could be tuned, and the default's results were right."""
    spawn = multiprocessing.get_context("spawn")
    compiling = (timer.arch, timer.n_multiprocessors)
    right = True
    with ProcessPoolExecutor(jobs, spawn, begin_compiling, compiling) as pool:
        waiting = []
        for subject in subjects:
            if reason := unavailable(subject.backend, timer.device):
                print(f"{subject.name}: not tuned, {subject.backend} does not work here: {reason}", flush=True)
                continue
            new = [choices for choices in subject.candidates(timer.arch)[:most] if not log.has(subject, choices)]
            # First the default: it is compared with, and should be in Triton's cache by then.
            both = [None, *new] if new else []
            waiting.append(
                (subject, [(choices, pool.submit(compile_candidate, subject, timer.arch, choices)) for choices in both])
            )
        for subject, candidates in waiting:
            if time.monotonic() > deadline:
                print(f"{subject.name}: not begun, the time is used up; the same command goes on", flush=True)
                continue
            try:
                right &= _tune_subject(subject, timer, log, candidates)
            except Exception as error:  # no memory for the formula, say: the other subjects go on
                if timer.full:
                    torch.cuda.synchronize()  # raises where this process can use the GPU no longer
                print(f"{subject.name}: not tuned: {_first_line(error)}", flush=True)
                right = False
            write_tables(out, log.entries(subjects, timer.arch), log.origin)
        pool.shutdown(cancel_futures=True)
    return right


def _tune_subject(subject: Subject, timer: Timer, log: Log, candidates: Sequence[Compiling]) -> bool:
    compiled = list(_fitting(subject, timer.arch, log, candidates))
    if compiled:
        check = Check(subject, timer)
        if wrong := check.why_wrong(None):
            print(f"{subject.name}: the default is wrong, so that nothing can be compared with it: {wrong}", flush=True)
            return False
        right = list(_right(subject, log, compiled, check))
        if right:
            times = time_candidates(subject, timer, [choices for choices, _ in right])
            for (choices, code), found in zip(right, times, strict=True):
                log.add(subject, choices, "timed", **code, **found)
    print(_summary(subject, log), flush=True)
    return True


def _fitting(
    subject: Subject, arch: int, log: Log, candidates: Sequence[Compiling]
) -> Iterator[tuple[Choices, dict[str, int]]]:
    """The candidates that the chip has room for, each with the figures of its machine code."""
    for choices, code in candidates:
        error = code.exception()
        if isinstance(error, BrokenExecutor):  # a process of the pool has died, whose candidate is not known
            raise error
        if choices is None:
            continue
        if error is not None:
            log.add(subject, choices, "dropped", why=f"does not compile: {_first_line(error)}")
        elif why := why_dropped(subject, arch, choices, code.result()):
            log.add(subject, choices, "dropped", why=why, **code.result())
        else:
            yield choices, code.result()


def _right(
    subject: Subject, log: Log, candidates: Sequence[tuple[Choices, dict[str, int]]], check: Check
) -> Iterator[tuple[Choices, dict[str, int]]]:
    """The candidates whose results are right. One that ends this process is not tried again: the log knows it."""
    for choices, code in candidates:
        log.add(subject, choices, "begun", **code)
        try:
            wrong = check.why_wrong(choices)
        except Exception as error:  # of set_cuda_plans, say, which asks the chip; Triton's errors are of many types
            if check.timer.full:
                torch.cuda.synchronize()  # raises where this process can use the GPU no longer
            wrong = _first_line(error)
        if wrong:
            log.add(subject, choices, "wrong", why=wrong, **code)
        else:
            log.add(subject, choices, "right", **code)
            yield choices, code


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _summary(subject: Subject, log: Log) -> str:
    rows = [row for row in log.rows.values() if row["subject"] == subject.name]
    counts = {kind: sum(row["outcome"] == kind for row in rows) for kind in ("dropped", "wrong", "timed", "begun")}
    best = max((row["ratio"] for row in rows if row["outcome"] == "timed"), default=None)
    of_all = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
    return f"{subject.name}: {of_all}; " + (
        f"the fastest is {best:.3f} times as fast as the default" if best else "none was timed"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_tune", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="a folder for tune.jsonl, tuned.toml and tuned_cuda.toml"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--kernels", nargs="+", default=[], choices=sorted(tuned.KERNELS), help="only these")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT_S, help="seconds after which nothing is begun")
    parser.add_argument("--dry-run", action="store_true", help="rehearse without a GPU; the times are made up")
    parser.add_argument("--quick", action="store_true", help="of each kernel one kind of call and two candidates")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {options.jobs}")
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu_tune: there is no CUDA device; --dry-run rehearses without one", file=sys.stderr)
        return 1
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: cannot be made a folder: {error.strerror}")
    os.environ["TRITON_INTERPRET"] = "1" if options.dry_run else "0"
    timer = MadeUpTimer() if options.dry_run else GraphTimer()
    log = Log(options.out / "tune.jsonl", origin_of(timer))
    subjects = subjects_for(timer.arch, options.kernels)
    if options.quick:
        kernels = [subject.kernel for subject in subjects]
        subjects = [subject for i, subject in enumerate(subjects) if subject.kernel not in kernels[:i]]
    deadline = time.monotonic() + options.time_limit
    try:
        right = tune(subjects, timer, log, options.out, options.jobs, deadline, 2 if options.quick else None)
    except RuntimeError as error:
        if "CUDA error" not in str(error):
            raise
        print(f"gpu_tune: {_first_line(error)}; the same command goes on after that candidate", file=sys.stderr)
        return 1
    tables = [options.out / name for name in TABLES if (options.out / name).exists()]
    print(f"written: {', '.join(map(str, tables))}: {len(tuned.read(*tables).entries)} entries")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
