"""The command line and what is around it: consoles, pipes, full disks, warnings and Ctrl-C."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from command_line import SMALL
from fastgpt.__main__ import format_warning
from fastgpt.cli import main
from fastgpt.training.run_folder import read_metrics

# --- consoles ---


@pytest.fixture(scope="module")
def unicode_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unicode")
    (folder / "text.txt").write_text("☃é€ ж" * 300, encoding="utf-8")
    assert main(["train", "--data", str(folder / "text.txt"), "--out", str(folder / "run"), *SMALL]) == 0
    return folder / "run"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8", "utf-16", "koi8-r"])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_console_gets_the_characters_it_lacks_escaped(encoding, errors, unicode_run, monkeypatch):
    def said(encoding: str, errors: str) -> str:
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
        monkeypatch.setattr(sys, "stdout", stream)
        arguments = "--prompt ☃é --max-new-tokens 40 --seed 5 --temperature 3".split()
        assert main(["sample", "--checkpoint", str(unicode_run), *arguments]) == 0
        assert (stream.errors == errors) == encoding.startswith("utf"), "what can take any text stays as it is"
        return stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]

    whole = said("utf-8", "strict")
    assert len(whole) == 2 + 40 + 1
    assert said(encoding, errors) == whole.encode(encoding, "backslashreplace").decode(encoding)


def fastgpt(arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", f"{sys.executable} -m fastgpt {arguments}"], capture_output=True, **options)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("command", ["--help", "data show", "train --help"])
def test_a_full_disk_under_stdout_is_one_line(command):
    done = fastgpt(f"{command} > /dev/full", text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "No space left on device" in done.stderr


@pytest.mark.parametrize("command", ["--help", "data show", "train --help"])
def test_a_closed_stdout_or_a_reader_that_has_gone_is_no_failure(command):
    for shell in (f"{command} >&-", f"{command} >&- 2>&-", f"{command} | true; exit ${{PIPESTATUS[0]}}"):
        done = fastgpt(shell, text=True)
        assert (done.returncode, done.stderr, done.stdout) == (0, "", ""), shell


def test_training_whose_reader_has_gone_has_not_done_its_work(text_file, tmp_path):
    def arguments(out: str) -> str:
        return f"train --data {text_file} --out {tmp_path / out} {' '.join(SMALL)}"

    done = fastgpt(f"{arguments('first')} | true; exit ${{PIPESTATUS[0]}}", text=True)
    assert done.returncode == 1
    assert done.stderr == "fastgpt train: stopped: whatever read its output has gone\n"
    assert fastgpt(f"{arguments('second')} >&-").returncode == 0, "one that is closed takes everything"
    assert len(read_metrics(tmp_path / "second" / "metrics.jsonl")) == 5


def test_a_warning_is_one_line_without_a_place_in_the_source(text_file, tmp_path):
    arguments = f"train --data {text_file} --out {tmp_path / 'run'} {' '.join(SMALL)}"
    done = fastgpt(arguments, text=True, env={**os.environ, "FASTGPT_CACHE": str(text_file / "no folder")})
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    (about_the_cache,) = [line for line in lines if "FASTGPT_CACHE" in line]
    assert about_the_cache.startswith("fastgpt: warning: ")
    assert not [line for line in lines if ".py:" in line]


def test_a_warning_that_is_not_for_the_user_keeps_its_place_in_the_source():
    shown = format_warning("old", DeprecationWarning, "elsewhere.py", 3, "call()")
    assert shown == "elsewhere.py:3: DeprecationWarning: old\n  call()\n"
    assert format_warning("fastgpt: new", UserWarning, "elsewhere.py", 3) == "fastgpt: warning: new\n"


# --- Ctrl-C ---


def interrupted(code: str, folder: Path, *command: str) -> subprocess.CompletedProcess:
    """The end of a process that prints "busy" somewhere in `code` and then gets a SIGINT."""
    (folder / "program.py").write_text(textwrap.dedent(code))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    arguments = command or ("program.py",)
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "busy\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


SLOW = "import time\nprint('busy', flush=True)\ntime.sleep(60)\n"


@pytest.mark.parametrize(
    "end", ["finally: pass", "except BaseException: pass", "except BaseException: raise ImportError"]
)
def test_ctrl_c_amid_the_import_of_torch_is_one_line(end, tmp_path):
    """A torch that takes long, and does with an exception what C code might do with it."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"try:\n{textwrap.indent(SLOW, '    ')}{end}\n")
    done = interrupted("", tmp_path, "-m", "fastgpt", "doctor")
    assert (done.returncode, done.stdout, done.stderr.strip()) == (1, "", "fastgpt: stopped")


def test_ctrl_c_amid_a_command_is_one_line(tmp_path):
    code = f"""
        import sys
        from fastgpt import __main__, cli

        def slow(arguments):
            try:
                exec({SLOW!r})
            finally:
                print("tidied up")

        cli.COMMANDS["doctor"] = cli.COMMANDS["doctor"]._replace(run=slow)
        sys.argv = ["fastgpt", "doctor"]
        sys.exit(__main__.main())
    """
    done = interrupted(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (1, "tidied up\n", "fastgpt doctor: stopped")


def test_ctrl_c_after_a_command_changes_nothing(tmp_path):
    code = f"""
        import atexit, sys
        from fastgpt import __main__, cli

        atexit.register(lambda: exec({SLOW.replace("60", "1")!r}))
        cli.COMMANDS["doctor"] = cli.COMMANDS["doctor"]._replace(run=lambda settings: 0)
        sys.argv = ["fastgpt", "doctor"]
        sys.exit(__main__.main())
    """
    done = interrupted(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it(tmp_path):
    code = """
        import signal, sys
        from fastgpt import __main__

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.argv = ["fastgpt", "--version"]
        __main__.main()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True)


@pytest.mark.parametrize("ends", ["return 3", "raise SystemExit(3)"])
@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_one_of_several_processes_is_not_taken_down(ends, rank):
    """Threads of gloo, which may abort the process then, are stood in for by what is called at its end."""
    code = f"""
        import atexit, sys
        from fastgpt import __main__, cli

        def run(settings):
            print("trained", end="")
            {ends}

        atexit.register(lambda: print(" and taken down", end=""))
        cli.COMMANDS["train"] = cli.COMMANDS["train"]._replace(run=run)
        sys.argv = ["fastgpt", "train", "--out", "run"]
        sys.exit(__main__.main())
    """
    of_torchrun = {"RANK": rank, "WORLD_SIZE": "2"} if rank else {}
    environment = {key: value for key, value in os.environ.items() if key != "RANK"} | of_torchrun
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (3, "trained" if rank else "trained and taken down")
