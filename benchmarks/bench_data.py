"""What data costs as it grows: to prepare a text, to start a run on it, and to draw the batch of a step.

Each is measured in a process of its own, after its imports. In the row's `extra`, `peak_mb` is the most memory that it
had, and `own_mb` is that without the pages of files, which the system takes back when it needs room: a map of tokens
counts what was read of it. The peer of a step is what nanoGPT does: it cuts one row of the batch after the other out of
a memory map, here of the first shard alone.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from fastgpt.benchmarks.harness.suite import OURS, Work

NANOGPT = "nanoGPT's way"
PARTS = ("prepare", "start", "step")
_LINE = b"The quick brown fox jumps over the lazy dog.\n"

# What is timed, after `BEFORE`. The names in capitals come with each program.
BEFORE = {
    "prepare": "from fastgpt.data.prepare import prepare",
    "start": "from fastgpt.data.corpus import Corpus",
    "step": """
import numpy as np, torch
from fastgpt.data.corpus import Corpus
examples = Corpus.load(TOKENS).examples("train", T)
""",
}
TIMED = {
    "prepare": """
prepared = prepare([TEXT], "char", Path(TOKENS))
assert len(prepared.train) + len(prepared.val) == N_BYTES
""",
    "start": 'Corpus.load(TOKENS, block_size=T).examples("train", T).batch(B, seed=1, step=0)',
    "step": """
for step in range(STEPS):
    examples.batch(B, seed=1, step=step)
""",
}
NANOGPT_STEP = """
for step in range(STEPS):
    data = np.memmap(SHARD, dtype=np.uint16, mode="r")
    places = torch.randint(len(data) - T, (B,))
    x = torch.stack([torch.from_numpy(data[i : i + T].astype(np.int64)) for i in places])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in places])
"""
PROGRAM = """
import json, sys, time
from pathlib import Path
globals().update(json.loads(sys.argv[1]))
{before}
begin = time.perf_counter()
{timed}
seconds = time.perf_counter() - begin
status = Path("/proc/self/status")
memory = dict(line.split(":") for line in status.read_text().splitlines()) if status.exists() else {{}}
print(json.dumps([seconds, {{key: memory[key].split()[0] for key in ("VmHWM", "RssFile") if key in memory}}]))
"""


@dataclass(frozen=True)
class DataShape:
    """A part of the work on a text of so many megabytes."""

    part: str
    megabytes: float
    B: int = 32  # the batch of a step
    T: int = 256
    steps: int = 200

    def __str__(self) -> str:
        batch = f", B{self.B} T{self.T}" if self.part == "step" else ""
        return f"{self.megabytes:g} MB of text{batch}"


@pytest.mark.shapes(cpu=[DataShape(part, 10**n) for n in range(4) for part in PARTS], cuda=[])
def bench_data(run_work, shape):
    with TemporaryDirectory() as folder:
        run_work(data_work(shape, Path(folder)))


def data_work(shape: DataShape, folder: Path) -> Work:
    """The work on a text that is made in `folder`."""
    n_bytes = round(shape.megabytes * 1e6)
    text, tokens = folder / "text.txt", folder / "tokens"
    _write_lines(text, n_bytes)
    names = {"TEXT": str(text), "TOKENS": str(tokens), "SHARD": str(tokens / "tokens-00000.bin"), "N_BYTES": n_bytes}
    names |= {"B": shape.B, "T": shape.T, "STEPS": shape.steps}
    extra: dict[str, dict[str, Any]] = {OURS: {}, NANOGPT: {}}

    def seconds_of(part: str, timed: str, name: str = OURS) -> float:
        program = PROGRAM.format(before=BEFORE[part], timed=timed)
        seconds, memory = _run(program, names)
        extra[name] |= memory
        return seconds / (shape.steps if part == "step" else 1)

    def prepare() -> float:
        for file in tokens.glob("*"):
            file.unlink()
        seconds = seconds_of("prepare", TIMED["prepare"])
        extra[OURS]["million_characters_per_s"] = float(f"{n_bytes / seconds / 1e6:.3g}")
        return seconds

    contenders = {OURS: prepare}
    if shape.part != "prepare":
        prepare()
        extra[OURS].clear()
        contenders = {OURS: lambda: seconds_of(shape.part, TIMED[shape.part])}
    if shape.part == "step":
        contenders[NANOGPT] = lambda: seconds_of("step", NANOGPT_STEP, NANOGPT)
    return Work(
        op="data", shape=str(shape), direction=shape.part, dtype="none", contenders=contenders, extra=extra,
        error_ratio=lambda name: None, reports_seconds=True, min_rounds=3,
    )  # fmt: skip


def _write_lines(path: Path, n_bytes: int) -> None:
    lines = _LINE * 10_000
    with open(path, "wb") as file:
        for first in range(0, n_bytes, len(lines)):
            file.write(lines[: n_bytes - first])


def _run(program: str, names: dict[str, Any]) -> tuple[float, dict[str, int]]:
    """The seconds that the program told, and its memory in MB, which only Linux tells."""
    command = [sys.executable, "-c", program, json.dumps(names)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    seconds, memory = json.loads(done.stdout.splitlines()[-1])
    kb = {key: int(value) for key, value in memory.items()}
    if not kb.keys() >= {"VmHWM", "RssFile"}:
        return seconds, {}
    return seconds, {"peak_mb": round(kb["VmHWM"] / 1e3), "own_mb": round((kb["VmHWM"] - kb["RssFile"]) / 1e3)}
