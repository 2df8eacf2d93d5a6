"""What a run says of itself: its first lines, a line or a bar for its steps, and how long it will take."""

from __future__ import annotations

import dataclasses
import re
import sys

import pytest

from fastgpt import use_backend
from fastgpt.baselines import MODELS
from fastgpt.cli import main
from fastgpt.training import progress
from fastgpt.training.progress import Progress, duration, first_lines
from small_runs import TRAIN, trainer


def test_the_first_lines_name_model_data_device_and_steps(corpus, tmp_path):
    run = trainer(corpus, tmp_path)
    model, data, device, steps = first_lines(run, "preset small", "text.txt")
    parameters = f"{run.model.num_parameters():,} parameters"
    assert model == f"model: gpt of {parameters}, 2 layers, width 16, block 16 (preset small)"
    assert (
        f"data: text.txt, {len(corpus.train):,} tokens to train on" in data and f"of {len(set(corpus.train))}" in data
    )
    assert re.match(r"device: cpu, \d+ threads?, float32; (ops: \d by|every op by PyTorch)", device)
    assert steps == "steps: 12, each of 64 tokens, with an evaluation every 4"
    by_epochs = trainer(corpus, tmp_path / "epochs", dataclasses.replace(TRAIN, order="epochs"))
    n_blocks = len(corpus.train) // 16 - 1
    assert first_lines(by_epochs, "", "text.txt")[3] == f"{steps}; {n_blocks / 4:.1f} steps are an epoch"
    one_layer = first_lines(trainer(corpus, tmp_path / "one", n_layer=1), "preset small", "text.txt")
    assert ", 1 layer, width 16," in one_layer[0]


def test_the_backends_in_a_phrase_follow_what_was_asked_for(monkeypatch):
    with use_backend("torch"):
        assert progress.backends("cpu") == "every op by PyTorch (fastgpt doctor says why)"
    monkeypatch.setattr("fastgpt.ops.backend.unavailable", lambda name, device: None)
    assert re.fullmatch(r"ops: \d by native, \d by PyTorch", progress.backends("cpu"))


def test_without_a_terminal_each_logged_interval_has_a_line(corpus, tmp_path, capsys):
    trainer(corpus, tmp_path, dataclasses.replace(TRAIN, log_interval=3)).run()
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [int(m[1]) for line in lines if (m := re.match(r"step (\d+): loss [\d.]+, [\d,]+ tokens/s", line))] == [
        3,
        6,
        9,
        12,
    ]
    (estimate,) = (line for line in lines if "steps to go, about" in line)
    assert lines.index(estimate) == 2 and estimate.startswith("9 steps to go"), "as soon as steps were measured"
    assert captured.err == "", "no bar"


def test_a_run_inside_another_command_leaves_the_lines_out(corpus, tmp_path, capsys):
    trainer(corpus, tmp_path).run(lines=False)
    assert all("train loss" in line for line in capsys.readouterr().out.splitlines())


def test_a_terminal_has_a_bar_in_place_of_the_lines(corpus, tmp_path, monkeypatch, capsys):
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    trainer(corpus, tmp_path).run()
    captured = capsys.readouterr()
    assert "tokens/s" not in captured.out and "train loss" in captured.out
    assert "12/12" in captured.err


def test_a_pipe_gets_each_line_at_once(monkeypatch):
    flushed = []
    monkeypatch.setattr("builtins.print", lambda text, flush=False: flushed.append(flush))
    Progress(TRAIN, 0).interval(TRAIN.log_interval, 1, 2.0, 100.0, 1.0)
    assert flushed == [True, True]


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "about 1 s"), (40.3, "about 40 s"), (700, "about 12 min"), (20000, "about 5.6 h")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize("kind", MODELS)
def test_every_model_has_first_lines(kind, text_file, tmp_path, capsys):
    words = ["train", "--data", str(text_file), "--out", str(tmp_path / "run"), "--model", kind, "--device", "cpu"]
    assert main([*words, "--max-steps", "0", "--n-embd", "16", "--batch-size", "2", "--eval-batches", "1"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"model: {kind} of ") and "preset shakespeare-char-cpu, the default on cpu" in first
    assert ("layers" in first) == ("bigram" not in kind)
