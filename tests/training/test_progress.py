"""What a run says of itself: its first lines, a line or a bar for its steps, and how long it will take."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import threading

import pytest
import torch

from fastgpt import use_backend
from fastgpt.baselines import MODELS
from fastgpt.cli import main
from fastgpt.machine import memory_in_use
from fastgpt.training import progress
from fastgpt.training.progress import Progress, duration, first_lines, size
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
    memory = "" if memory_in_use(torch.device("cpu")) is None else r", [\d,.]+ [MG]B"
    assert [line for line in lines if re.fullmatch(rf"step 9: loss .* tokens/s, about [\d.]+ \w+ left{memory}", line)]
    assert [line for line in lines if re.fullmatch(rf"step 12: loss .* tokens/s{memory}", line)], "nothing is left"
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


def on_a_terminal(*command: str) -> str:
    """What a command writes to the terminal that it runs on, which has 100 columns."""
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, (24).to_bytes(2, sys.byteorder) + (100).to_bytes(2, sys.byteorder) + bytes(4))
    written: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(ours, 65536):
                written.append(data)
        except OSError:  # Linux's way to say that the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    done = subprocess.run(command, stdin=its, stdout=its, stderr=its)
    os.close(its)
    reader.join()
    os.close(ours)
    text = b"".join(written).decode()
    assert done.returncode == 0, text
    return text


def test_the_bar_of_a_terminal_shows_loss_speed_time_left_and_memory(text_file, tmp_path):
    words = ["train", "--data", str(text_file), "--out", str(tmp_path / "run"), "--device", "cpu", "--n-embd", "16"]
    words += ["--n-layer", "1", "--batch-size", "4", "--eval-batches", "1", "--log-interval", "2"]
    words += ["--max-steps", "40", "--eval-interval", "20"]  # the line of each evaluation has the bar drawn again
    text = on_a_terminal(sys.executable, "-m", "fastgpt", *words)
    bars = [part for part in re.split(r"[\r\n]+", text) if re.match(r" *\d+%\|", part)]
    memory = "" if memory_in_use(torch.device("cpu")) is None else r", [\d,.]+ [MG]B"
    pattern = rf" *\d+%\|.*\| \d+/40, loss \d\.\d{{3}}, [\d,]+ tokens/s, about [\d.]+ \w+ left{memory}"
    assert [bar for bar in bars if re.fullmatch(pattern, bar.rstrip("\x1b[A "))], text
    assert all(len(bar) <= 100 for bar in bars)
    assert "\nstep 40: train loss" in text.replace("\r", "\n") and "step 2: loss" not in text


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


def test_the_time_left_counts_the_evaluations_to_come(capsys):
    shown = Progress(dataclasses.replace(TRAIN, max_steps=100, eval_interval=40), 0)
    shown.evaluated(1000.0)
    shown.interval(20, 10, 2.0, 100.0, elapsed_s=10.0)  # evaluations at 40, 80 and 100
    assert f"80 steps to go, {duration(80 * 1.0 + 3 * 1000.0)} at 1,000 ms a step" in capsys.readouterr().out
    shown.interval(80, 10, 2.0, 100.0, elapsed_s=20.0)
    assert f"{duration(20 * 1.3 + 1000.0)} left" in capsys.readouterr().out


def test_memory_is_told_where_it_is_known():
    assert [size(n) for n in (None, 312_400_000, 1_260_000_000)] == ["", "312 MB", "1.3 GB"]


@pytest.mark.parametrize("kind", MODELS)
def test_every_model_has_first_lines(kind, text_file, tmp_path, capsys):
    words = ["train", "--data", str(text_file), "--out", str(tmp_path / "run"), "--model", kind, "--device", "cpu"]
    assert main([*words, "--max-steps", "0", "--n-embd", "16", "--batch-size", "2", "--eval-batches", "1"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"model: {kind} of ") and "preset shakespeare-char-cpu, the default on cpu" in first
    assert ("layers" in first) == ("bigram" not in kind)
