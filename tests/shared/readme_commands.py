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


def check_output(words: list[str], output: str, folder: Path) -> None:
    """What a command of a document printed, and what it left in `folder`, where it ran with `quicker` options."""
    match words[1]:
        case "train":
            assert f"step {6 if '--resume' in words else 3}:" in output
        case "sample":
            prompt = words[words.index("--prompt") + 1]
            assert output.startswith(prompt)
            assert "--max-new-tokens" not in words or len(output) == len(prompt) + 200 + 1
        case "eval":
            assert "bits per byte" in output
        case "compare":
            assert "Settings that differ:" in output and (folder / "runs/compare.png").exists()
        case "plan":
            assert "on: 64 GPUs in 8 nodes, " in output
        case "doctor":
            assert "attention: runs on" in output
        case "data":
            assert ("blocks: 8 tokens" if words[2] == "show" else "tokens to train on and") in output
        case "learn":
            assert "| scaled up" in output and (folder / "runs/learn/report.html").exists()
        case "study":
            assert (folder / f"runs/study-{words[2]}/report.html").exists()
