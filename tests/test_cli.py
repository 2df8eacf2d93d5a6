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
