"""The commands of the README and of docs/, as a reader would type them, and what makes each short enough for a test."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

README = (Path(__file__).resolve().parent.parent.parent / "README.md").read_text(encoding="utf-8")
SPEECH = "ROMEO. But soft, what light through yonder window breaks?\nJULIET. It is KING HENRY, 1599!\n\n"
SPEECH += "ABCDEFGHIJKLMNOPQRSTUVWXYZ: abcdefghijklmnopqrstuvwxyz\n\n"  # all that the examples prompt with
QUICKER = {
    "train": ["--max-steps", "3", "--eval-batches", "1"],
    "learn": ["--steps", "1"],
    "study": ["--steps", "1"],
}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def shell_commands(text: str = README) -> list[list[str]]:
    lines = [line for block in blocks("sh", text) for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def quicker(options: list[str], command: str) -> list[str]:
    """The options with fewer steps; a run that is resumed goes on for three more."""
    options = list(options)
    if "--max-steps" in options:
        del options[(i := options.index("--max-steps")) : i + 2]
    options += QUICKER.get(command, [])
    if "--resume" in options:
        options[options.index("--max-steps") + 1] = "6"
    return options
