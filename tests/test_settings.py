"""Settings: what the command line, a file, a run and a preset give, and which of them counts."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import tomllib

import pytest

from command_line import SMALL
from fastgpt import cli, config, settings
from fastgpt.cli import COMMANDS, Command, Group, main
from fastgpt.ops.backend import BACKENDS


def test_settings_come_from_command_line_then_file_then_preset(text_file, tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text(
        f'preset = "shakespeare-char-cpu"\ndata = "{text_file}"\nout = "{tmp_path / "out"}"\n'
        "n_layer = 1\nn_embd = 8\nn_head = 2\nmax_steps = 2\nbatch_size = 3\neval_batches = 1\ndropout = 0\n"
    )
    assert main(["train", "--config", str(file), "--n-embd", "12"]) == 0
    stored = tomllib.loads((tmp_path / "out" / "config.toml").read_text())
    assert (stored["n_embd"], stored["n_layer"], stored["block_size"]) == (12, 1, 64)
    capsys.readouterr()
    settings = tmp_path / "sample.toml"
    settings.write_text(f'checkpoint = "{tmp_path / "out"}"\nmax_new_tokens = 3\n')
    assert main(["sample", "--config", str(settings)]) == 0
    assert len(capsys.readouterr().out) == 1 + 3 + 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize = 3\n", "unknown setting 'batchsize'; did you mean batch_size?"),
        ("zzz = 3\n", "unknown setting 'zzz'; known: activation, "),
        ("lr = \n", "not a TOML file"),
        ('lr = "fast"\n', "lr: expected a number, got 'fast'"),
        ("bias = 1\n", "bias: expected true or false"),
        ("data = 3\n", "data: expected text"),
        ("preset = [[1]]\n", "preset: expected text, got ([1],)"),
        ("tokenizer = 3\n", "tokenizer: expected text"),
        ("seed = 2024-01-01\n", "seed: expected an integer, got datetime.date(2024, 1, 1)"),
        ("seed = 1e400\n", "seed: expected an integer, got inf"),
        ("lr = nan\n", "lr: expected a finite number"),
        ("[train]\nlr = 0.1\n", "[train] is a table; write the settings themselves"),
        ("data = {file = 'x'}\n", "[data] is a table"),
        ("data = ['x']\n", "data: expected text, got ('x',)"),
        ('data = ""\n', "--data: is empty"),
        ("data = 'caf\udce9'\n", "run.toml: not a TOML file: not UTF-8"),
    ],
)
def test_bad_settings_files(text, message, tmp_path, capsys):
    (tmp_path / "run.toml").write_bytes(text.encode(errors="surrogateescape"))
    arguments = ["--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "out")]
    if "data" not in text:
        arguments += ["--data", "x.txt"]
    assert main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("train --preset gpt2 --help", "blocks, L. (default: 12)"),
        ("train --help", "blocks, L. (default: 4; on a GPU 6)"),
        ("study depth --quick -h", "training steps of each network. (default: 60)"),
    ],
)
def test_help_shows_the_values_in_effect(words, shown, capsys):
    assert main(words.split()) == 0
    assert shown in " ".join(capsys.readouterr().out.split())


def test_help_of_settings_that_cannot_be_is_an_error(capsys):
    assert main("train --preset none --help".split()) == 2
    assert "preset: expected one of" in capsys.readouterr().err


def test_a_runs_settings_without_a_tokenizer_have_the_default_one(text_file, tmp_path):
    out = tmp_path / "out"
    assert main(["train", "--data", str(text_file), "--out", str(out), *SMALL]) == 0
    lines = (out / "config.toml").read_text().splitlines()
    (out / "config.toml").write_text("\n".join(line for line in lines if not line.startswith("tokenizer")))
    assert main(["train", "--out", str(out), "--resume", "--max-steps", "7"]) == 0


# --- paths ---


def settings_classes(commands: dict[str, Command | Group] = COMMANDS, prefix: str = "") -> dict[str, type]:
    """The settings of every command, by the words that call it: "train", "study depth"."""
    found: dict[str, type] = {}
    for name, command in commands.items():
        if isinstance(command, Group):
            found |= settings_classes(command.commands, f"{prefix}{name} ")
        else:
            found[prefix + name] = command.settings
    return found


def test_every_setting_that_is_a_path_is_known_as_one():
    """What help says is a file, a folder or a checkout; a new setting of that kind is to be added to PATHS."""
    said = set()
    for base in {base for cls in settings_classes().values() for base in cls.__mro__ if dataclasses.is_dataclass(base)}:
        # A field's help is its line of the docstring, or the comment above it or beside it.
        fields = re.findall(r"((?:^ +#.*\n)*)^ +(\w+): (.*)$", inspect.getsource(base), re.M)
        said |= {
            name for above, name, rest in fields if re.search(r"\b(files?|folders?|checkout|gpt\.py)\b", above + rest)
        }
    names = {field.name for cls in settings_classes().values() for field in dataclasses.fields(cls)}
    assert said & names == set(settings.PATHS)


@pytest.mark.parametrize("name", sorted(settings.PATHS))
def test_home_is_expanded_in_every_path_of_every_command(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "empty.toml").write_text("")
    for command, cls in settings_classes().items():
        if name not in {field.name for field in dataclasses.fields(cls)}:
            continue
        file = "~/empty.toml" if name == "config" else "~/a/b"
        expected = str(tmp_path / file[2:])
        for arguments in ([f"--{name}={file}"], [f"--{name}", file]):
            value = getattr(cli.parse([*command.split(), *arguments])[1], name)
            assert value == ((expected,) if isinstance(value, tuple) else expected)
        if name != "config":
            text = f'["{file}"]' if isinstance(value, tuple) else f'"{file}"'
            (tmp_path / "path.toml").write_text(f"{name} = {text}\n")
            value = getattr(cli.parse([*command.split(), "--config=~/path.toml"])[1], name)
            assert value == ((expected,) if isinstance(value, tuple) else expected)


def test_home_is_expanded_for_a_run_and_its_resumption(text_file, tmp_path, monkeypatch, capsys):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    shutil.copy(text_file, home / "text.txt")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    assert main(["train", "--data=~/text.txt", "--out=~/run", *SMALL]) == 0
    stored = tomllib.loads((home / "run" / "config.toml").read_text())
    assert stored["data"] == str(home / "text.txt") and stored["out"] == str(home / "run")
    (home / "more.toml").write_text('out = "~/run"\nresume = true\nmax_steps = 9\n')
    assert main(["train", "--config=~/more.toml"]) == 0
    assert main(["sample", "--checkpoint=~/run", "--max-new-tokens", "2"]) == 0
    assert list(here.iterdir()) == [], "no folder is called ~"


def test_a_run_that_was_moved_resumes_from_another_directory(text_file, tmp_path, monkeypatch, capsys):
    (tmp_path / "a").mkdir(), (tmp_path / "b" / "c").mkdir(parents=True)
    shutil.copy(text_file, tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path / "a")
    assert main(["train", "--data", "../b/../text.txt", "--out", "../a/run", *SMALL]) == 0
    shutil.move(tmp_path / "a" / "run", tmp_path / "b" / "moved")
    monkeypatch.chdir(tmp_path / "b" / "c")
    capsys.readouterr()
    assert main(["train", "--out", "../moved", "--resume", "--max-steps", "9"]) == 0
    said = capsys.readouterr().out
    changed = [line.partition(":")[0] for line in said.splitlines() if " -> " in line]
    assert changed == ["max_steps"] and "step 9:" in said


# --- values ---


def test_a_value_may_begin_with_a_dash():
    for text in ("-x", "--x", "-", "--", "- a", "-1", "--prompt=x", "a=b"):
        assert cli.parse(["sample", "--prompt=" + text, "--seed", "4"])[1].prompt == text
    assert cli.parse(["sample", "--max_new_tokens", "3", "--top-p", "0.5"])[1].max_new_tokens == 3
    assert cli.parse(["bench", "--only", "a", "b", "--quick"])[1].only == ("a", "b")


def test_the_presets_are_those_that_help_names(capsys):
    assert main(["train", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"settings to start from ({', '.join(config.PRESETS)})" in said


def test_the_backends_are_those_of_the_ops():
    assert config.BACKENDS == BACKENDS


@pytest.mark.parametrize(
    ("options", "is_said"),
    [(["--optimizer", "adamw"], True), (["--optimizer", "adamw", "--lr", "0.004"], False), ([], False)],
)
def test_a_rate_that_the_preset_chose_for_another_optimizer_is_said(options, is_said, text_file, tmp_path, capsys):
    words = ["train", "--preset", "shakespeare-char-cpu", "--data", str(text_file), "--out", str(tmp_path / "out")]
    assert main([*words, *SMALL, "--max-steps", "1", *options]) == 0
    said = "lr: 0.016 is the preset's, chosen for muon; --optimizer adamw learns better with an --lr of its own"
    assert (said in capsys.readouterr().out) == is_said


def test_a_run_without_its_settings_is_not_said_to_be_none(tmp_path, capsys):
    (tmp_path / "checkpoint").mkdir()
    assert main(["train", "--out", str(tmp_path), "--resume"]) == 1
    assert (
        f"config.toml: is missing, and has the settings of the run; --init-from {tmp_path}" in capsys.readouterr().err
    )
