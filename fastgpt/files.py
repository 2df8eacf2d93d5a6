"""Files and paths: how a user's path is read, and how a file is written so that no reader ever sees half of it.

It imports neither PyTorch nor NumPy: the command line uses it before either is needed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .config import ConfigError

_OPEN_FILES = 256  # more than a program has open besides its data


class FileError(RuntimeError):
    """A file cannot be written, or cannot be read as what it should be. The message names the file and the reason."""


def expand_path(path: str | os.PathLike[str]) -> Path:
    """`path` with a leading ~ or ~user replaced by that home folder, as a shell replaces it.

    Every path that a user can give goes through this function: no shell sees `--out=~/run` or a path in a TOML file.
    A name that the locale's encoding lacks, as "é" under LC_ALL=C, is encoded as UTF-8, as it is on today's disks.
    Raises ConfigError where the home folder is unknown.
    """
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        path = os.fsdecode(os.fspath(path).encode("utf-8", "surrogateescape"))
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.exists(expanded):  # else a folder would be made whose name is "~"
        home = expanded.split("/")[0]
        raise ConfigError(f"{os.fspath(path)!r}: the home folder {home!r} is not known here; give the path without it")
    return Path(expanded)


def cache_dir() -> Path:
    """FASTGPT_CACHE, else XDG_CACHE_HOME/fastgpt, else ~/.cache/fastgpt; it need not exist yet.

    A relative XDG_CACHE_HOME is left aside, as the XDG Base Directory Specification asks.
    """
    if own := os.environ.get("FASTGPT_CACHE"):
        return expand_path(own)
    shared = expand_path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else expand_path("~/.cache")) / "fastgpt"


def readable(name: str) -> str:
    """A path or a command-line argument as text to show: where the locale is not UTF-8, Python keeps bytes in it."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Write `path` as a whole or not at all: write the temporary file that this gives, and it replaces `path`.

    A reader, or a second process that writes the same file, sees the old file or the new one, never a part of one. The
    new file is on the disk before it takes the name. It keeps the old one's mode; without an old one it has the mode
    that the umask gives, so that a group can share it. If writing fails, `path` is unchanged, no temporary file is
    left, and FileError is raised.

    >>> with atomic_path(folder / "config.json") as temporary:
    ...     temporary.write_text("{}", encoding="utf-8")
    """
    temporary = _temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = _mode_to_keep(path, temporary)
        yield temporary
        with open(temporary, "rb+") as file:
            os.chmod(temporary, mode)  # safetensors writes files that only their owner can read
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except Exception as error:  # safetensors reports a full disk with an exception type of its own
        reason = getattr(error, "strerror", None) or error  # an OSError's text names the temporary file
        raise FileError(f"{path}: cannot be written: {reason}; what was there before is untouched") from error
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or the folder is not a folder: nothing was left
            temporary.unlink()


def _temporary_name(path: Path) -> Path:
    """A name in the same folder that no other writer uses: no other thread, and no other machine on a shared disk."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def _mode_to_keep(path: Path, probe: Path) -> int:
    """The mode of the file at `path`; if there is none, the mode that a new file, made and removed at `probe`, gets."""
    if not path.exists():
        probe.touch()
        path = probe
    mode = stat.S_IMODE(path.stat().st_mode)
    probe.unlink(missing_ok=True)
    return mode


def sync_folder(folder: Path) -> None:
    """Put the folder's new entry on the disk, too: otherwise a power cut may undo the rename."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_output_folder(folder: Path) -> None:
    """Make the folder of --out. Raises FileError where it cannot be made, or no file can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise FileError(
            f"{folder}: the output folder cannot be written: {error.strerror or error}; give another --out"
        ) from error


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Make `folder` as a whole or not at all: fill the temporary folder that this gives, and it takes the name.

    It lies beside `folder`, which must not exist, or be empty. If anything fails, `folder` is as it was, and the
    temporary one is gone. Raises FileError where `folder` holds something, or cannot be made.

    >>> with new_folder(Path("models/first")) as temporary:
    ...     (temporary / "config.json").write_text("{}", encoding="utf-8")
    """
    folder = folder.resolve()
    temporary = _temporary_name(folder)
    try:
        if folder.exists() and any(folder.iterdir()):
            raise FileError(f"{folder}: holds something already; give another folder")
        temporary.mkdir(parents=True)
    except OSError as error:
        raise FileError(
            f"{folder}: the output folder cannot be written: {error.strerror}; give another --out"
        ) from error
    try:
        yield temporary
        _take_name(temporary, folder)
    except FileError as error:
        if str(temporary) not in str(error):
            raise
        raise FileError(str(error).replace(str(temporary), str(folder))) from error
    except OSError as error:
        raise FileError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_name(temporary: Path, folder: Path) -> None:
    """Rename `temporary`, once its files are on the disk, to `folder`, which may be an empty folder."""
    for file in temporary.iterdir():
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())
    if folder.exists():
        folder.rmdir()
    os.replace(temporary, folder)
    sync_folder(folder.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` what the file `source` is now: a hard link where the file system has them, else a copy."""
    temporary = _temporary_name(target)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise FileError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def allow_open_files(n: int) -> None:
    """Let this process have `n` more files open than the few of any program: a memory map keeps its file open.

    Raises FileError where the system sets a limit below that.
    """
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return
    needed = n + _OPEN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise FileError(f"{n:,} files have to be open at once, and the system allows {hard:,}: raise ulimit -n")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
