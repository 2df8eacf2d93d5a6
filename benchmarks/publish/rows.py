"""The rows that the suite writes: what a line says, and the files of them.

A file holds JSON lines. Each is one implementation in one comparison (`Row`) or one run of the suite (`Run`). It has
every field of its class in the order in which they are listed here, then those of `Line`; what is not known is null,
and a field that is `known_later` is then left out.

Files travel: they come from another machine, from another version, or from an upload that broke off. So each line is
checked when it is read, and an error names its file and line.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from fastgpt.files import atomic_path

OURS = "fastgpt"  # the implementation that the others are compared with


class ResultsError(ValueError):
    """Results that cannot be read; the message names the file and the line."""


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


class CaseKey(NamedTuple):
    """What was measured and on which machine, whoever did it: rows of equal keys are compared with each other."""

    machine: str
    op: str
    shape: str
    dtype: str
    direction: str


def known_later() -> Any:
    """A field that a line has only where it is known: on GPUs alone, say, or not in older rows."""
    return field(default=None, metadata={"left out": True})


# --- the schema: a field's type is what a line is checked against, see EXPECTED --------------------------------------


@dataclass(kw_only=True)
class Line:
    """What every line says of where and when it was measured, as `fastgpt.machine.facts` finds it."""

    kind: ClassVar[str]

    device: str  # the name of the GPU or the processor
    driver: str | None = None
    clocks_mhz: float | None = None  # the GPU's clock, or the mean of the processor's cores
    threads: float | None = None  # that PyTorch used
    cpu_capability: str | None = None  # the instruction set that PyTorch used
    python: str | None = None
    torch: str | None = None
    triton: str | None = None
    cuda: str | None = None  # null on a CPU
    fastgpt: str | None = None
    commit: str | None = None  # followed by "+" where files had changed since
    date: str | None = None
    other_keys: dict = field(default_factory=dict)  # of a line that another version wrote: they are kept as they are

    @property
    def machine(self) -> str:
        """What must be equal for times to be compared: the GPU; on a CPU also its threads and instruction set."""
        if self.cuda is not None:
            return self.device
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}" if self.threads else None
        return ", ".join(part for part in (self.device, self.cpu_capability, threads) if part)

    def to_json(self) -> str:
        values = {f.name: getattr(self, f.name) for f in _schema(type(self))}
        for f in _schema(type(self)):
            if values[f.name] is None and f.metadata.get("left out"):
                del values[f.name]
        facts = {f.name: values.pop(f.name) for f in _schema(Line)}
        return json.dumps({"kind": self.kind, **values, **facts, **self.other_keys})


@dataclass(kw_only=True)
class Row(Line):
    """One implementation in one comparison. Times are of one call."""

    kind = "row"

    op: str  # "attention", "train_step", ...: the benchmark
    shape: str  # "B8 H6 T256 D64 causal": the sizes of the work
    dtype: str
    direction: str  # "forward", "forward+backward", "step", "generate", "train", "import", "prepare", "start"
    implementation: str  # "fastgpt", or the peer's name
    backend: str | None = None  # of a row of FastGPT: the backend that served the op
    median_ms: float
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: float | None = None
    # On a GPU, of calls that follow each other; in the times above, preparing a call is hidden (harness/host.py).
    eager_ms: float | None = known_later()
    graph_ms: float | None = known_later()  # the same calls, replayed as a CUDA graph
    # A peer's time over FastGPT's, taken inside each round; in a row of FastGPT that of its best peer.
    ratio: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    best_peer: str | None = None  # of a row of FastGPT: the peer with the smallest median
    verdict: str | None = None  # FastGPT is "faster", "slower", or the percentiles lie on both sides of 1: "noise"
    bytes: float | None = None  # the least memory traffic
    flops: float | None = None  # operations
    roofline_fraction: float | None = None  # the least time that the machine needs, see `ceiling`, over the median
    # By what that least time is bound, such as "reading 42 MB at 83 GB/s". Rows without it are older: the larger of
    # bytes over the speed of one copy from memory, and flops over that of one large product.
    ceiling: str | None = known_later()
    peak_bytes: float | None = None  # how far memory rises during one call, its results included
    parity_error_ratio: float | None = None  # error over (PyTorch's error + tolerance / 2); up to 2 passes
    extra: dict = field(default_factory=dict)  # more figures by name: tokens_per_s, tflop_per_s, gb_per_s, val_loss

    @property
    def host_share(self) -> float | None:
        """The part of `eager_ms` in which the GPU waits for the host."""
        if not self.eager_ms or self.graph_ms is None:
            return None
        return max(0.0, 1.0 - self.graph_ms / self.eager_ms)

    @property
    def case(self) -> CaseKey:
        return CaseKey(self.machine, self.op, self.shape, self.dtype, self.direction)


@dataclass(kw_only=True)
class Run(Line):
    """One run of the suite."""

    kind = "run"

    ops: list = field(default_factory=list)  # what it measured
    # bytes_per_s, flops_per_s, dtype: the fastest copy from memory and matrix product. Newer runs also have what was
    # measured at each size: moved [[way, bytes, bytes per second]], products [[m, k, n, flops per second]].
    ceilings: dict = field(default_factory=dict)
    # {op: {peer: why it was not measured}}; "peer, shape, direction" where it was measured in other cases.
    absent: dict = field(default_factory=dict)


def _schema(kind: type[Line]) -> list[Field]:
    return [f for f in fields(kind) if f.name != "other_keys"]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


EXPECTED: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    str: ("text", lambda value: isinstance(value, str) and value != ""),
    str | None: ("text or null", lambda value: value is None or isinstance(value, str)),
    float: ("a number above 0", lambda value: _is_number(value) and value > 0),
    float | None: ("a number or null", lambda value: value is None or (_is_number(value) and value >= 0)),
    list: ("a list or null", lambda value: isinstance(value, list)),
    dict: ("an object or null", lambda value: isinstance(value, dict)),
}


def from_json(text: str) -> Row | Run:
    """The line that `text` is. Raises ValueError: the key, what was expected and what is there."""
    values = json.loads(text, parse_constant=_refuse_constant)
    kinds = {kind.kind: kind for kind in (Row, Run)}
    if not isinstance(values, dict) or str(values.get("kind")) not in kinds:
        raise ValueError('expected an object with "kind": "row" or "run"')
    kind = kinds[values.pop("kind")]
    known = {}
    for f in _schema(kind):
        value = values.pop(f.name, None)
        if value is None and f.type in (dict, list):
            value = f.type()
        expected, is_right = EXPECTED[f.type]
        if not is_right(value):
            raise ValueError(f"{f.name}: expected {expected}, got {value!r}")
        known[f.name] = value
    return kind(**known, other_keys=values)


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a measurement")


# --- rows together ---------------------------------------------------------------------------------------------------


def by_case(rows: Iterable[Row]) -> dict[CaseKey, dict[str, Row]]:
    """case -> implementation -> row, in the order of the rows."""
    cases: dict[CaseKey, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row.case, {})[row.implementation] = row
    return cases


def peers_of(rows: Iterable[Row]) -> list[str]:
    """The implementations that FastGPT was compared with."""
    return list(dict.fromkeys(row.implementation for row in rows if row.implementation != OURS))


@dataclass
class Results:
    """All rows and runs of some files, in the order in which they were read."""

    rows: list[Row] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    def machines(self) -> list[str]:
        return list(dict.fromkeys(row.machine for row in self.rows))

    def of_machine(self, machine: str) -> Self:
        return type(self)(*([line for line in lines if line.machine == machine] for lines in (self.rows, self.runs)))

    def of_op(self, op: str) -> list[Row]:
        return [row for row in self.rows if row.op == op]

    def ceilings_of(self, row: Row) -> dict[str, Any]:
        """What the newest run that measured the row's op found of its machine's speed; empty where none did."""
        found = [run.ceilings for run in self.runs if row.op in run.ops and run.machine == row.machine]
        measured = (c for c in reversed(found) if c.get("bytes_per_s") and c.get("flops_per_s"))
        return next(measured, {})


# --- files -----------------------------------------------------------------------------------------------------------


def read(paths: Iterable[Path]) -> Results:
    """Rows and runs of files, and of every *.jsonl of folders. A row replaces an earlier one of the same work."""
    rows: dict[tuple[CaseKey, str], Row] = {}
    runs = []
    for file in _files(paths):
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ResultsError(f"{file}: cannot be read: {reason}") from None
        for number, text_line in enumerate(text.split("\n"), 1):
            if not text_line.strip():
                continue
            try:
                line = from_json(text_line)
            except ValueError as error:  # json's own errors are ValueErrors too
                raise ResultsError(f"{file}, line {number}: {error}") from None
            if isinstance(line, Run):
                runs.append(line)
            else:
                rows[line.case, line.implementation] = line
    return Results(list(rows.values()), runs)


def _files(paths: Iterable[Path]) -> list[Path]:
    files = []
    for path in paths:
        if not path.exists():
            raise ResultsError(f"{path}: no such file or folder")
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found:
            raise ResultsError(f"{path}: this folder holds no results (*.jsonl)")
        files += found
    return files


def write(path: Path, rows: Sequence[Row], run: Run) -> None:
    """Add `rows` and their `run` to the file, whole or not at all.

    A row replaces the older one of the same work and implementation, whatever the number of threads was then; a run
    replaces those of which it measured every op again.
    """
    there = read([path]) if path.exists() else Results()
    replaced = {_identity(row) for row in rows}
    kept = [row for row in there.rows if _identity(row) not in replaced]
    runs = [other for other in there.runs if not set(other.ops) <= set(run.ops)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        lines = [line.to_json() for line in (*runs, run, *kept, *rows)]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _identity(row: Row) -> tuple[str, ...]:
    return *row.case[1:], row.implementation
