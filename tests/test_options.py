"""Options: how a command's words are read, and what its help and the shells' completion show."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess

import pytest

from fastgpt.benchmarks.command import benchmark_names
from fastgpt.cli import COMMANDS, Command, Group, main
from fastgpt.options import completion, options_of, read
from fastgpt.settings import (
    BenchSettings,
    CompareSettings,
    DataPrepareSettings,
    PlanSettings,
    SampleSettings,
    TrainSettings,
    UsageError,
)


def each_command(commands: dict[str, Command | Group] = COMMANDS, line: str = "") -> dict[str, type]:
    """The settings of every command, by the words that call it."""
    found: dict[str, type] = {}
    for name, command in commands.items():
        words = f"{line} {name}".strip()
        found |= each_command(command.commands, words) if isinstance(command, Group) else {words: command.settings}
    return found


def test_every_option_has_a_help_text():
    for line, kind in each_command().items():
        for option in options_of(kind):
            assert option.help.endswith("."), f"{line} {option.flag}: {option.help!r}"


@pytest.mark.parametrize(("line", "needs"), [("train", ["--out"]), ("eval", ["--checkpoint", "--data"])])
def test_what_a_command_needs_comes_first(line, needs, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    assert main([*line.split(), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(flag in lines[0] for flag in needs)
    of_options = [text.split()[0] for text in lines if text.startswith("  --")]
    assert lines.index("required:") < lines.index("options:") and of_options[: len(needs)] == needs


def test_help_has_no_type_of_python(capsys):
    for line in each_command():
        assert main([*line.split(), "--help"]) == 0
        said = capsys.readouterr().out
        assert not [word for word in ("None", "STR", "INT", "FLOAT", "{") if word in said], line


def test_help_says_what_is_free_text(capsys):
    assert main(["sample", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--prompt TEXT" in said and "--stop TEXT" in said


def test_help_names_the_benchmarks(capsys):
    (only,) = (option for option in options_of(BenchSettings) if option.name == "only")
    assert only.help.rstrip(".").partition(": ")[2].split(", ") == benchmark_names()


@pytest.mark.parametrize("line", ["", "study", "train", "sample", "study normalisation"])
def test_help_fits_a_narrow_terminal_and_is_plain_text(line, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    assert main([*line.split(), "--help"]) == 0
    said = capsys.readouterr().out
    long = [text for text in said.splitlines() if len(text) > 40 and " " in text.strip()]
    assert not long and "\x1b" not in said


def test_help_shows_both_values_where_the_device_decides(capsys):
    assert main(["train", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "blocks, L. (default: 4; on a GPU 6)" in said and "(default: gelu)" in said
    assert main(["train", "--preset", "gpt2", "--help"]) == 0
    said = capsys.readouterr().out
    assert "on a GPU" not in said.partition("--n-layer")[2].partition("--n-head")[0]
    assert "--dropout X " in said, "0.0 is a number, though it equals False"


def test_words_are_read_as_what_their_option_is():
    words = ["--out", "a", "--max_steps", "3", "--lr=1e-4", "--no-bias", "--resume", "--target-loss", "-1"]
    expected = {"out": "a", "max_steps": 3, "lr": 1e-4, "bias": False, "resume": True, "target_loss": -1.0}
    assert read(TrainSettings, words, "fastgpt train") == expected
    assert read(SampleSettings, ["runs/demo", "--seed", "1"], "") == {"checkpoint": "runs/demo", "seed": 1}
    assert read(BenchSettings, ["--only", "a", "b", "--quick"], "") == {"only": ("a", "b"), "quick": True}
    assert read(DataPrepareSettings, ["--data", "a", "--data", "b", "c"], "") == {"data": ("a", "b", "c")}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a b", {"runs": ("a", "b")}),
        ("a b --out x", {"runs": ("a", "b"), "out": "x"}),
        ("--out x a b", {"runs": ("a", "b"), "out": "x"}),
        ("a --out x b c", {"runs": ("a", "b", "c"), "out": "x"}),
        ("--runs a b", {"runs": ("a", "b")}),
        ("--out x --runs a --config y b", {"runs": ("a", "b"), "out": "x", "config": "y"}),
        ("--out x", {"out": "x"}),
    ],
)
def test_words_need_no_option_where_a_command_takes_several_of_them(words, expected):
    assert read(CompareSettings, words.split(), "fastgpt compare") == expected


def test_the_help_of_a_command_that_takes_words_shows_them(capsys):
    assert main(["compare", "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: fastgpt compare RUN... [options]\n") and "--runs RUN [RUN ...]" in said
    with pytest.raises(UsageError, match="--zzz: no such option; see fastgpt compare --help"):
        read(CompareSettings, ["a", "--zzz", "b"], "fastgpt compare")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--promt x", "--promt: no such option; did you mean --prompt?"),
        ("--zzz", "--zzz: no such option; see fastgpt sample --help"),
        ("--prom x", "--prom: no such option; did you mean --prompt?"),
        ("--seed 3 runs/demo", "'runs/demo': every value belongs to an option; did you mean --checkpoint runs/demo?"),
        ("runs/demo more", "'more': every value belongs to an option; see fastgpt sample --help"),
        ("--seed many", "--seed: expected an integer, got 'many'"),
        ("--top-p much", "--top-p: expected a number, got 'much'"),
        ("--seed", "--seed: expected one argument"),
        ("--prompt --seed 3", "--prompt: expected one argument"),
        ("--cuda-graph=yes", "--cuda-graph"),
        ("-x", "-x: no such option; see fastgpt sample --help"),
    ],
)
def test_words_that_are_no_options_are_refused_with_the_remedy(words, said):
    with pytest.raises(UsageError) as error:
        read(SampleSettings, words.split(), "fastgpt sample")
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_a_value_without_its_option_is_told_which_one_it_may_be():
    for kind, flag in ((TrainSettings, "--data"), (BenchSettings, "--only"), (PlanSettings, "--preset")):
        with pytest.raises(UsageError, match=f"'a': every value belongs to an option; did you mean {flag} a[?]"):
            read(kind, ["a"], "fastgpt")


def test_a_text_that_is_given_again_is_one_of_several():
    given = read(SampleSettings, ["runs/demo", "--prompt", "a b", "--stop=--", "--prompt=-c", "--stop=x"], "")
    assert given == {"checkpoint": "runs/demo", "prompt": ("a b", "-c"), "stop": ("--", "x")}
    assert read(SampleSettings, ["--prompt=a"], "") == {"prompt": "a"}
    with pytest.raises(UsageError, match="'b': every value belongs to an option"):
        read(SampleSettings, ["--prompt", "a", "b"], "fastgpt sample")


def test_the_settings_of_a_command_are_of_kinds_that_can_be_read():
    for kind in each_command().values():
        assert {option.kind for option in options_of(kind)} <= {"int", "float", "bool", "str", "texts", "tuple"}
        assert len(options_of(kind)) == len(dataclasses.fields(kind))


# --- completion ---


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_shell_can_complete_commands_and_options(shell, capsys):
    assert main(["--print-completion", shell]) == 0
    said = capsys.readouterr().out
    assert "fastgpt" in said and "learning-rate" in said and "--max-new-tokens" in said


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("fastgpt sa", ["sample"]),
        ("fastgpt study learn", ["learning-rate"]),
        ("fastgpt sample --max", ["--max-new-tokens"]),
        ("fastgpt sample --prompt x --top-", ["--top-k", "--top-p"]),
    ],
)
def test_bash_completes_a_line(line, expected, capsys):
    assert main(["--print-completion", "bash"]) == 0
    words = line.split()
    asked = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _fastgpt; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", capsys.readouterr().out + asked], capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (expected, "")


def test_an_unknown_shell_is_refused():
    with pytest.raises(UsageError, match="expected bash or zsh, got 'fish'"):
        completion("fish", {})
