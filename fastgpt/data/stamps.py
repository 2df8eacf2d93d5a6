"""What is known of a file's content, kept until the file changes, so that a later start need not read the file.

    digest = known(Path("corpus.txt"), sha256_of)["sha256"]     # reads the file once

A file counts as unchanged while its path, size, time of modification and inode are the same. That is not trusted for a
file that was modified shortly before it was read: a clock that is too coarse could give a later change the same time
(git's documentation calls this racy).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cache import cached, read_with_sum, sha256, with_sum

_COARSEST_CLOCK_NS = 2 * 10**9  # FAT keeps times in steps of 2 s
_READ_AT_ONCE = 1 << 20  # bytes
Found = dict[str, Any]  # JSON


def known(path: Path, find: Callable[[Path], Found]) -> Found:
    """What `find` gives for the content of the file `path`, or gave when the file was the same.

    Raises OSError where the file cannot be read.
    """
    stamp = _stamp(path)
    return _kept(path, find, stamp, lambda: {"stamp": stamp, "read_at": time.time_ns(), "found": find(path)})


def note(path: Path, find: Callable[[Path], Found], found: Found) -> None:
    """Keep what `find` would give for a file that this process has just written, and that no other one writes."""
    stamp = _stamp(path)
    later = stamp["mtime_ns"] + 2 * _COARSEST_CLOCK_NS
    _kept(path, find, stamp, lambda: {"stamp": stamp, "read_at": later, "found": found})


def _kept(
    path: Path, find: Callable[[Path], Found], stamp: dict[str, Any], make: Callable[[], dict[str, Any]]
) -> Found:
    def read(kept: Path) -> dict[str, Any] | None:
        try:
            content = json.loads(read_with_sum(kept))  # a damaged one could be taken for true
            is_same = content["stamp"] == stamp and stamp["mtime_ns"] < content["read_at"] - _COARSEST_CLOCK_NS
            return content if is_same and isinstance(content["found"], dict) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    words = f"{find.__module__}.{find.__qualname__} {stamp['path']}"
    kept = cached(
        f"stamp-{sha256(words)}.json",
        read=read,
        make=make,
        parts=lambda content: [with_sum(json.dumps(content))],
        consequence="the files of the data are read anew at each start",
    )
    return kept["found"]


def sha256_of(path: Path) -> dict[str, str]:
    """The hash of a file's bytes, as {"sha256": ...}."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_READ_AT_ONCE):
            digest.update(piece)
    return {"sha256": digest.hexdigest()}


def _stamp(path: Path) -> dict[str, Any]:
    real = path.resolve()
    status = os.stat(real)
    return {"path": str(real), "size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}
