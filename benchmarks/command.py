"""What `fastgpt bench` does: run the suite, from a source tree or an installed wheel, or report on rows."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

HERE = Path(__file__).resolve().parent
DEFAULT_ROWS = Path("runs") / "bench"  # not benchmarks/results, whose rows are committed
DEFAULT_REPORT = Path("runs") / "bench-report"


class BenchError(RuntimeError):
    """The suite cannot be started; the message says what is missing and how to get it."""


def benchmark_names() -> list[str]:
    """What --only takes: bench_attention.py is "attention"."""
    return sorted(file.stem.removeprefix("bench_") for file in HERE.glob("bench_*.py"))


def run_suite(only: Sequence[str], device: str, out: str | None, quick: bool, paths: dict[str, str | None]) -> int:
    """Run the suite, or `only` some of its benchmarks, and return the exit code of the command: 0, 1 or 2.

    `out` is a file of rows (*.jsonl), or a folder for a file named after the device; None is runs/bench. `paths` are
    the suite's options that name checkouts and data.
    """
    for package in ("pytest", "pytest-benchmark"):
        if find_spec(package.replace("-", "_")) is None:
            raise BenchError(f"{package} is not installed: pip install 'fastgpt-kernels[bench]'")
    import pytest

    rows = _rows_file(Path(out) if out else DEFAULT_ROWS, device)
    _check_writable(rows)
    options = [f"--device={device}", f"--rows={rows}", *(["--quick"] if quick else [])]
    options += [f"--{name}={path}" for name, path in paths.items() if path is not None]
    files = [str(HERE / f"bench_{name}.py") for name in only or benchmark_names()]
    # pytest reads the suite's settings, not those of the working directory's project, and writes nothing there.
    settings = ["-c", str(HERE / "pytest.ini"), "--rootdir", str(HERE)]
    with TemporaryDirectory() as storage:
        code = pytest.main([*settings, f"--benchmark-storage=file://{storage}", *options, *files])
    return {pytest.ExitCode.OK: 0, pytest.ExitCode.USAGE_ERROR: 2}.get(pytest.ExitCode(code), 1)


def _check_writable(rows: Path) -> None:
    """Refuse a file that cannot be written before anything is measured, and leave nothing behind."""
    folder = next(parent for parent in rows.absolute().parents if parent.exists())
    try:
        with rows.open("ab") if rows.exists() else TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BenchError(f"--out {rows}: cannot be written: {error.strerror}") from None


def _rows_file(out: Path, device: str) -> Path:
    if out.suffix == ".jsonl":
        return out
    import torch

    from fastgpt.machine import device_slug

    on_gpu = device != "cpu" and torch.cuda.is_available()
    return out / f"{device_slug(torch.device('cuda' if on_gpu else 'cpu'))}.jsonl"


def write_report(results: Sequence[str], out: str | None) -> None:
    """Write results.md, its pictures and report.html into the folder `out`, and print the tables."""
    from .publish.report import markdown, write
    from .publish.rows import read

    folder = Path(out) if out else DEFAULT_REPORT
    if not results and not DEFAULT_ROWS.is_dir():
        raise BenchError(f"{DEFAULT_ROWS}: nothing was measured here yet; run fastgpt bench, or name rows by --results")
    found = read(map(Path, results or [DEFAULT_ROWS]))
    page = write(found, folder)
    print(markdown(found, pictures=None), end="")
    print(f"written: {folder / 'results.md'}, {page}", file=sys.stderr)
