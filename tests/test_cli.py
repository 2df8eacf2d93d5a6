"""The command line as a whole: the table of commands, their help, and what needs no PyTorch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastgpt import __version__
from fastgpt.cli import COMMANDS, main
from fastgpt.studies.settings import STUDIES


def test_help_version_and_no_command(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastgpt {__version__}\n"
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        assert "--help" in (text := capsys.readouterr().out)
        assert main(["help", name]) == 0 and capsys.readouterr().out == text
    assert main(["help", "trian"]) == 2 and "did you mean 'train'" in capsys.readouterr().err
    assert (
        main(["data"]) == 2 and "'data' needs a command after it; there are show, prepare\n" in capsys.readouterr().err
    )


@pytest.mark.parametrize("command", ["train", "sample", "learn", *(f"study {name}" for name in STUDIES)])
def test_help_needs_no_torch(command):
    code = f"import sys; from fastgpt.cli import main; assert main({[*command.split(), '--help']}) == 0; "
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True, capture_output=True)


def test_of_the_processes_of_torchrun_the_first_names_what_is_wrong_in_the_command_line(tmp_path, monkeypatch, capsys):
    """Another one waits to be ended, and speaks only after that: an end of its own would end the first unheard."""
    heard: list[str] = []
    monkeypatch.setattr("fastgpt.cli.time.sleep", lambda seconds: heard.append(capsys.readouterr().err))
    wrong = {("--no-such",): 2, ("--out", str(tmp_path), "--resume"): 1}
    for arguments, code in wrong.items():
        for rank, pauses in (("0", []), ("1", [""])):
            heard.clear()
            monkeypatch.setenv("LOCAL_RANK", rank)
            assert main(["train", *arguments]) == code
            assert heard == pauses and capsys.readouterr().err.startswith("fastgpt train: ")


def test_commands_that_torchrun_would_only_repeat_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    for size, code in (("1", 0), ("2", 2)):
        monkeypatch.setenv("WORLD_SIZE", size)
        assert main(["data", "show"]) == code
    assert "torchrun: only fastgpt train shares its work among processes" in capsys.readouterr().err
    assert main(["data", "show", "--help"]) == 0
