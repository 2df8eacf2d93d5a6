"""What was tried to make FastGPT faster: files of levers, which people write and docs/performance.md shows.

A lever is a change that was predicted to save time, and measured. Each subject has a file of them,
benchmarks/results/levers/SUBJECT.toml:

    [[lever]]
    name = "the input's gradient is added inside the kernel"    # a plain phrase
    case = "layer_norm 4096 x 768"                              # the row that it was measured on
    predicted = 0.9                                             # the time that was expected, or words
    before = 1.3
    after = 0.95
    unit = "ms"
    kept = true
    why = "The sum no longer reads and writes memory once more."    # for one that was dropped, the reason
    lines = 12                                                  # of code that it costs
    commit = "0123456"                                          # that has it; or on which it was tried
    device = "AMD EPYC family 26 model 2, 2 cores"
"""

import math
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .rows import ResultsError


@dataclass(frozen=True)
class Lever:
    """One entry; see above."""

    name: str
    case: str
    predicted: float | str
    before: float
    after: float
    unit: str
    kept: bool
    why: str
    lines: int
    commit: str
    device: str


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


# By the annotations of `Lever`.
EXPECTED: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    str: ("text", _is_text),
    float: ("a number above 0", _is_number),
    float | str: ("a number above 0, or text", lambda value: _is_text(value) or _is_number(value)),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
}
COMMIT = re.compile(r"[0-9a-f]{7,40}")


def read_levers(folder: Path) -> dict[str, list[Lever]]:
    """The levers of each subject, by the names of the files in `folder`; nothing where there is no folder.

    Raises ResultsError, which names the file and the entry.
    """
    return {file.stem: _read_file(file) for file in sorted(folder.glob("*.toml"))}


def _read_file(file: Path) -> list[Lever]:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ResultsError(f"{file}: cannot be read: {error}") from None
    entries = content.pop("lever", None)
    if content or not isinstance(entries, list) or not entries:
        raise ResultsError(f"{file}: expected entries [[lever]] and nothing else")
    return [_lever(entry, f"{file}, lever {number}") for number, entry in enumerate(entries, 1)]


def _lever(entry: Any, where: str) -> Lever:
    if not isinstance(entry, dict):
        raise ResultsError(f"{where}: expected a table of keys, got {entry!r}")
    where += f" ({entry['name']})" if _is_text(entry.get("name")) else ""
    types = {f.name: f.type for f in fields(Lever)}
    for key in sorted(types.keys() ^ entry.keys()):
        raise ResultsError(f"{where}: {key}: {'is missing' if key in types else 'is no key of a lever'}")
    for key, type_ in types.items():
        expected, is_right = EXPECTED[type_]
        if not is_right(entry[key]):
            raise ResultsError(f"{where}: {key}: expected {expected}, got {entry[key]!r}")
    if not COMMIT.fullmatch(entry["commit"]):
        raise ResultsError(f"{where}: commit: expected the hash of a commit, got {entry['commit']!r}")
    return Lever(**entry)
