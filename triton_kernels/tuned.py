"""Tuned tables: the launch configurations that were measured to be faster than the ones chosen by hand.

A table is a TOML file of entries. An entry says for which architecture, kernel and kind of call it counts, what it
chooses (tile, warps, stages, programs), what the compiler made of it, and where and when it was measured; tuned.toml,
beside this file, explains each key. `make gpu-tune` measures and writes tables. A call that has no entry takes the
configuration of attention_configs.py or layer_norm.py. Nothing is tuned while a program runs.

The Triton kernels' table is tuned.toml, and that of the CUDA kernels in csrc/ is tuned_cuda.toml. FASTGPT_TUNED=FILE
names another tuned.toml; the CUDA kernels' table is then FILE with `_cuda` before its suffix, if there is such a file.
A table is read once in a process, when the first kernel asks for it. This module imports neither triton nor torch.
"""

import contextlib
import inspect
import os
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

DEFAULT = Path(__file__).with_name("tuned.toml")
VARIABLE = "FASTGPT_TUNED"
MADE_UP = "none: a dry run, whose times are made up"  # the device of an entry that a rehearsal of the sweep wrote

# Bytes of shared memory that a program may have, by compute capability (CUDA C++ Programming Guide, "Compute
# Capabilities", the maximum for a thread block).
SHARED_LIMIT = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448}
SHARED_LIMIT |= {120: 101376, 121: 101376}
_REGISTERS_OF_A_MULTIPROCESSOR = 65536
_LANES = 32
_STATIC_BYTES = 1024  # of csrc/cross_entropy.cu, beside the part of a row

P = ParamSpec("P")
R = TypeVar("R")


class TableError(ValueError):
    """A table cannot be used; the message names the file, the entry, the key and the reason."""


# --- what an entry may say --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Values:
    """The values that a key may have, and their description in words."""

    words: str
    allow: Callable[[Any], bool]


def _integers(least: int, most: int) -> Values:
    return Values(f"an integer from {least} to {most}", lambda x: type(x) is int and least <= x <= most)


def _powers_of_two(least: int, most: int) -> Values:
    def allow(x: Any) -> bool:
        return type(x) is int and least <= x <= most and x & (x - 1) == 0

    return Values(f"a power of two from {least} to {most}", allow)


_FLAG = Values("true or false", lambda x: type(x) is bool)
_TEXT = Values("a text that is not empty", lambda x: type(x) is str and bool(x.strip()))
_TIME = Values("a number above 0", lambda x: type(x) in (int, float) and 0.0 < x < float("inf"))

# What a call is looked up by. `bucket_of` maps the sizes of a call to these values.
_CALL = {
    "head_size": _powers_of_two(16, 256),
    "element_size": _powers_of_two(2, 4),
    "longest": _powers_of_two(16, 2**30),
    "descriptors": _FLAG,
    "dropout": _FLAG,
    "group": _integers(1, 2),
    "n_rows": _powers_of_two(16, 256),
    "width": _powers_of_two(16, 16384),
    "passes": _integers(1, 2),
    "classes": _powers_of_two(16, 2**30),
    "tokens": _powers_of_two(16, 2**30),
}
_CHOICES = {
    "BLOCK_M": _powers_of_two(16, 256),
    "BLOCK_N": _powers_of_two(16, 256),
    "ROWS": _powers_of_two(1, 256),
    "num_warps": _powers_of_two(1, 32),
    "num_stages": _integers(1, 8),
    "STAGES": _integers(1, 4),
    "programs": _integers(1, 32),
    "persistent": _integers(0, 32),
    "threads": _powers_of_two(32, 512),
    "blocks": Values("0, 1, 2, 4 or 8", lambda x: type(x) is int and x in (0, 1, 2, 4, 8)),
    "chunk": Values("a multiple of 8 from 8 to 128", lambda x: type(x) is int and x in range(8, 129, 8)),
}
_OF_THE_GRID = ("programs", "persistent")  # the kernel itself does not take them
_COMPILED = {"registers": _integers(1, 255), "shared_bytes": _integers(0, 2**20)}
_ORIGIN = dict.fromkeys(("time_us", "default_us"), _TIME) | dict.fromkeys(
    ("device", "driver", "torch", "triton", "date", "commit"), _TEXT
)


@dataclass(frozen=True)
class Kernel:
    """A kernel that a table may name: the keys its calls are looked up by, and those that an entry chooses."""

    call: tuple[str, ...]
    choices: tuple[str, ...]
    # The choice that is the length of the tiles which the kernel's loop loads two at a time; "" where there is none.
    loop_tile: str = ""
    of_csrc: bool = False  # built with the package, so that an entry has no figures of the compiler


_TILED = ("head_size", "element_size", "longest", "descriptors", "dropout")
KERNELS = {
    "attention.forward": Kernel(_TILED, ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "persistent"), "BLOCK_N"),
    "attention.grad_q": Kernel(_TILED, ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), "BLOCK_N"),
    "attention.grad_kv": Kernel((*_TILED, "group"), ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), "BLOCK_M"),
    "attention.decode": Kernel(
        ("head_size", "element_size", "n_rows"), ("BLOCK_N", "num_warps", "num_stages", "programs"), "BLOCK_N"
    ),
    "layer_norm.forward": Kernel(("width",), ("ROWS", "num_warps")),
    "layer_norm.backward": Kernel(("width",), ("ROWS", "STAGES", "num_warps", "programs")),
    "cross_entropy": Kernel(("element_size", "passes", "classes"), ("threads", "blocks"), of_csrc=True),
    "embedding": Kernel(("element_size", "tokens"), ("chunk",), of_csrc=True),
}


def bucket_of(key: str, value: Any) -> Any:
    """The value that an entry has for a call's `value`: sizes are rounded up to powers of two, 3 heads count as 2."""
    if key in ("head_size", "longest", "n_rows", "width", "classes", "tokens"):
        return max(16, 1 << (value - 1).bit_length())
    return min(value, 2) if key == "group" else value


@dataclass(frozen=True)
class Entry:
    arch: int
    kernel: str
    call: dict[str, Any]  # in the order of Kernel.call
    choices: dict[str, int]
    facts: dict[str, Any] = field(default_factory=dict)  # what the compiler made of it, and where it was measured

    @property
    def key(self) -> tuple:
        return self.arch, self.kernel, *self.call.values()

    def row(self) -> dict[str, Any]:
        """The entry as the file has it."""
        return {"arch": self.arch, "kernel": self.kernel, **self.call, **self.choices, **self.facts}


def entry_of(row: dict[str, Any]) -> Entry:
    """The entry of a file's row. Raises TableError with the key and the reason, for the caller to add the place."""
    arch, name = row.get("arch"), row.get("kernel")
    if type(arch) is not int or arch not in SHARED_LIMIT:
        raise TableError(f"arch: expected one of {', '.join(map(str, SHARED_LIMIT))}, got {arch!r}")
    if not isinstance(name, str) or name not in KERNELS:
        raise TableError(f"kernel: expected one of {', '.join(KERNELS)}, got {name!r}")
    kernel = KERNELS[name]
    call, choices = {key: _CALL[key] for key in kernel.call}, {key: _CHOICES[key] for key in kernel.choices}
    facts = _ORIGIN if kernel.of_csrc else _COMPILED | _ORIGIN
    wanted = call | choices | facts
    if unknown := sorted(row.keys() - wanted - {"arch", "kernel"}):
        raise TableError(f"{unknown[0]}: {name} has no such key; it has {', '.join(wanted)}")
    for key, values in wanted.items():
        if key not in row:
            raise TableError(f"{key}: is missing; expected {values.words}")
        if not values.allow(row[key]):
            raise TableError(f"{key}: expected {values.words}, got {row[key]!r}")
    entry = Entry(arch, name, *({key: row[key] for key in part} for part in (call, choices, facts)))
    _check_fit(entry, kernel)
    return entry


def _check_fit(entry: Entry, kernel: Kernel) -> None:
    """Refuse what the chip has no room for.

    `shared_bytes` and `registers` are the compiler's figures, which the sweep records. They would not change with a
    tile that somebody edits, so the tile is checked by itself, too: a pipeline of n stages keeps at least n - 1 pairs
    of the tiles that the loop loads in shared memory.
    """
    if kernel.of_csrc:
        _check_plan(entry)
        return
    limit, threads = SHARED_LIMIT[entry.arch], _LANES * entry.choices["num_warps"]
    shared, registers = entry.facts["shared_bytes"], entry.facts["registers"]
    if shared > limit:
        raise TableError(f"shared_bytes: {shared} are more than the {limit} that a program may have on sm_{entry.arch}")
    if registers * threads > _REGISTERS_OF_A_MULTIPROCESSOR:
        raise TableError(f"registers: {registers} for each of {threads} threads do not fit a multiprocessor's 65536")
    if kernel.loop_tile:
        rows, stages = entry.choices[kernel.loop_tile], entry.choices["num_stages"]
        tiles = (stages - 1) * 2 * rows * entry.call["head_size"] * entry.call["element_size"]
        if tiles > limit:
            raise TableError(
                f"{kernel.loop_tile}: tiles of {rows} rows in {stages} stages take at least {tiles} bytes of shared "
                f"memory, more than the {limit} that a program may have on sm_{entry.arch}"
            )


def _check_plan(entry: Entry) -> None:
    """Refuse a plan that csrc/cross_entropy.cu has no kernel for; `set_cuda_plans` says what each one means."""
    if entry.kernel != "cross_entropy":
        return
    threads, blocks = entry.choices.values()
    row_bytes = entry.call["element_size"] * entry.call["classes"]
    if threads < 128:
        if (threads, blocks) != (32, 1) or row_bytes > 512:
            raise TableError("threads: fewer than 128 are 32, with 1 block, for rows of at most 512 bytes")
        return
    if entry.call["passes"] == 1 and blocks > 0:
        raise TableError(f"blocks: a row that is read once is not kept, so that 0 is expected, got {blocks}")
    if blocks > 1 and (entry.arch < 90 or threads < 256):
        raise TableError(f"blocks: clusters of {blocks} need sm_90 or newer, and 256 threads or more")
    limit = SHARED_LIMIT[entry.arch] - _STATIC_BYTES
    if blocks > 0 and row_bytes // blocks > limit:
        raise TableError(
            f"blocks: {row_bytes // blocks} bytes of a row for each of {blocks} blocks are more than the {limit} of "
            f"shared memory that sm_{entry.arch} has for them"
        )


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """The entries of the files that were read, by `Entry.key`."""

    files: tuple[Path, ...] = ()
    entries: dict[tuple, Entry] = field(default_factory=dict)

    @classmethod
    def of(cls, *entries: Entry) -> "Table":
        return cls((), {entry.key: entry for entry in entries})


def read(*files: Path) -> Table:
    """The table in `files`. Raises TableError naming the file, the entry and the reason."""
    entries: dict[tuple, Entry] = {}
    for file in files:
        try:
            content = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:  # ValueError: it is no UTF-8, or no TOML
            raise TableError(f"{file}: cannot be read as a tuned table: {error}") from None
        rows = content.pop("entry", [])
        if content or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            found = ", ".join(content) or "entry"
            raise TableError(f"{file}: expected only tables that begin with [[entry]], got {found}")
        for number, row in enumerate(rows, start=1):
            place = f"{file}: entry {number} ({row.get('kernel', 'of no kernel')})"
            try:
                entry = entry_of(row)
            except TableError as error:
                raise TableError(f"{place}: {error}") from None
            if entry.key in entries:
                raise TableError(f"{place}: another entry before it is for the same calls; leave one of them")
            entries[entry.key] = entry
    return Table(files, entries)


def named_files() -> tuple[Path, ...]:
    """The files of the table in use: those that FASTGPT_TUNED names, else those of this package that are there."""
    named = os.environ.get(VARIABLE, "")
    file = Path(named).expanduser() if named else DEFAULT
    for_cuda = file.with_name(f"{file.stem}_cuda{file.suffix}")
    if named and not file.is_file():
        raise TableError(f"{VARIABLE}: there is no file {named}; name a table that `make gpu-tune` wrote, or unset it")
    return tuple(path for path in (file, for_cuda) if path.is_file())


_in_use: Table | None = None
_followers: list[Callable[[], object]] = []  # to be called when another table is in use


def table() -> Table:
    """The table that this process uses, read at the first call."""
    global _in_use
    if _in_use is None:
        found = read(*named_files())
        if any(entry.facts["device"] == MADE_UP for entry in found.entries.values()):
            raise TableError(f"{found.files[0]}: a rehearsal wrote this table, and its times are made up; name another")
        _in_use = found
    return _in_use


@contextlib.contextmanager
def use(replacement: Table) -> Iterator[None]:
    """Within the context, every kernel is launched as `replacement` says; an empty Table() means by the defaults."""
    global _in_use
    before = _in_use
    try:
        _replace(replacement)  # raises where the chip refuses a plan
        yield
    finally:
        _replace(before)


def _replace(replacement: Table | None) -> None:
    global _in_use
    _in_use = replacement
    for follow in _followers:
        follow()


def on_change(follow: Callable[[], object]) -> None:
    """Have `follow` called whenever another table is in use."""
    _followers.append(follow)


def describe(arch: int | None) -> str:
    """One line for people: the table in use, and how many of its entries are for the GPU of this machine, if any."""
    try:
        entries = table().entries.values()
        names = ", ".join(map(str, table().files)) or "none"
    except TableError as error:
        return f"tuned table: cannot be used: {error}"
    here = "no GPU here" if arch is None else f"{sum(entry.arch == arch for entry in entries)} for sm_{arch}"
    return f"tuned table: {names}; entries: {len(entries)}, {here}"


# --- what a call takes ------------------------------------------------------------------------------------------------


def lookup(kernel: str, arch: int, **call: Any) -> Entry | None:
    """The entry for a call; `call` are its sizes, which `bucket_of` rounds."""
    entries = table().entries
    if not entries:
        return None
    return entries.get((arch, kernel, *(bucket_of(key, call[key]) for key in KERNELS[kernel].call)))


def plans(kernel: str, arch: int) -> list[tuple[int, ...]]:
    """A CUDA kernel's entries for the architecture, each as the numbers of its calls followed by what it chooses."""
    entries = table().entries.values()
    return [(*e.call.values(), *e.choices.values()) for e in entries if (e.arch, e.kernel) == (arch, kernel)]


def tunable(kernel: str, choice: str | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function that chooses a configuration: a table's entry for the call overrides what it returns.

    The function's arguments are those keys of the kernel's calls that it needs, and `arch`. It returns launch options
    as a dict, into which an entry's choices are merged. With `choice` it returns the value of that one choice instead.
    Results are cached, because every launch asks for one.
    """

    def decorate(default: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(default)

        @lru_cache(maxsize=1024)
        @wraps(default)
        def tuned(*args: P.args, **kwargs: P.kwargs) -> R:
            fallback = default(*args, **kwargs)
            entry = lookup(kernel, **signature.bind(*args, **kwargs).arguments)
            if entry is None:
                return fallback
            if choice is not None:
                return entry.choices[choice]  # type: ignore[return-value]
            launch = {key: value for key, value in entry.choices.items() if key not in _OF_THE_GRID}
            return fallback | launch  # type: ignore[operator]

        on_change(tuned.cache_clear)
        return tuned  # type: ignore[return-value]

    return decorate
