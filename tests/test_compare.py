"""`fastgpt compare`: the figures of its table, the curves of its picture, and runs that are not whole."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

import fastgpt
from command_line import SMALL
from fastgpt.checkpoint import Checkpoint, count_parameters
from fastgpt.cli import main
from fastgpt.compare import MARKERS, MOST_RUNS, Run, curves, differences, distinct_names, overview, read_run, shortened
from fastgpt.training.run_folder import read_metrics
from figures import faults
from sharded_checkpoints import write_sharded


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text_file) -> Path:
    """Two runs, `a/run` and `b/run`; the tests read them and leave them as they are."""
    folder = tmp_path_factory.mktemp("runs")
    for name, more in (("a", []), ("b", ["--lr", "0.002", "--n-embd", "8"])):
        assert main(["train", "--data", str(text_file), "--out", str(folder / name / "run"), *SMALL, *more]) == 0
    return folder


def compared(capsys, *words: object) -> list[str]:
    capsys.readouterr()
    assert main(["compare", *map(str, words)]) == 0
    return capsys.readouterr().out.splitlines()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def made_run(name: str, n: int, settings: dict | None = None, **changes) -> Run:
    rows = [
        {"step": step, "split": split, "loss": 4.0 - step / 1000, "elapsed_s": step / 100, "tokens": step * 1024}
        for step in range(0, n + 1, 10)
        for split in ("train", "val")
    ]
    return Run(name, [{**row, **changes} for row in rows], settings or {}, 1000)


# --- the table ---


def test_the_table_has_what_the_runs_have_written(trained, tmp_path, capsys):
    lines = compared(capsys, trained / "a" / "run", trained / "b" / "run", "--out", tmp_path / "both.png")
    assert cells(lines[0]) == ["run", "best val loss", "at step", "tokens", "seconds", "tokens/s", "parameters"]
    for line, name in zip(lines[2:4], ("a", "b"), strict=True):
        path = trained / name / "run"
        rows = read_metrics(path / "metrics.jsonl")
        best = min((row for row in rows if row["split"] == "val"), key=lambda row: row["loss"])
        speed = f"{rows[-1]['tokens'] / rows[-1]['elapsed_s']:,.0f}" if rows[-1]["elapsed_s"] else "–"
        model, _ = fastgpt.load(path)
        assert cells(line) == [
            *(f"{name}/run", f"{best['loss']:.4f}", str(best["step"]), f"{best['tokens']:,}"),
            *(f"{best['elapsed_s']:,.1f}", speed, f"{model.num_parameters():,}"),
        ]
    start = lines.index("Settings that differ:")
    table = [cells(line) for line in lines[start + 1 :] if line.startswith("|")]
    assert table[0] == ["setting", "a/run", "b/run"]
    assert sorted(table[2:]) == [["lr", "0.016", "0.002"], ["n_embd", "16", "8"]]
    assert lines[-1] == f"picture: {tmp_path / 'both.png'}"
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_a_setting_that_a_file_leaves_out_has_its_default():
    runs = [made_run("a", 10, {"lr": 1e-3, "out": "x"}), made_run("b", 10, {"seed": 1337, "target_loss": 2.0})]
    assert differences([*runs, made_run("no settings", 10)]) == {"target_loss": [None, 2.0]}
    assert differences([made_run("a", 10, {"log": "none", "threads": 2}), made_run("b", 10, {"log": "wandb"})]) == {
        "threads": [2, None]
    }


def test_a_run_without_an_evaluation_has_no_best_loss():
    run = made_run("young", 20, split="train")
    assert cells(overview([run]).splitlines()[2]) == ["young", "–", "–", "–", "–", "102,400", "1,000"]


def test_losses_of_different_things_are_called_so(trained, tmp_path, capsys):
    other = shutil.copytree(trained / "a" / "run", tmp_path / "other")
    text = (other / "config.toml").read_text(encoding="utf-8")
    (other / "config.toml").write_text(text.replace('tokenizer = "char"', 'tokenizer = "bpe"'), encoding="utf-8")
    said = "the losses are not of the same thing: tokenizer differs; fastgpt eval gives bits per byte"
    assert said in compared(capsys, trained / "a" / "run", other, "--out", tmp_path / "x.png")
    assert said not in compared(capsys, trained / "a" / "run", trained / "b" / "run", "--out", tmp_path / "x.png")


def test_parameters_are_counted_without_reading_them(trained, tmp_path):
    path = trained / "a" / "run"
    best = Checkpoint.load(path / "checkpoint" / "best.safetensors")
    sharded = write_sharded(best, tmp_path / "checkpoint" / "step-00000006")
    model, _ = fastgpt.load(path)
    assert count_parameters(best.path) == count_parameters(sharded) == model.num_parameters()  # type: ignore[arg-type]


# --- names ---


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/r/a", "/r/b"], ["a", "b"]),
        (["/r/x/a", "/r/y/a", "/r/b"], ["x/a", "y/a", "b"]),
        (["/r/x/a/1", "/r/y/a/1", "/r/y/b/1"], ["x/a/1", "y/a/1", "b/1"]),
        (["/a", "/r/a"], ["/a", "r/a"]),
    ],
)
def test_equal_names_are_told_apart_by_what_is_before_them(paths, names):
    assert distinct_names([Path(path) for path in paths]) == names


# --- runs that are not whole ---


def test_a_run_that_is_training_or_was_stopped_is_compared_as_far_as_it_is(trained, tmp_path, capsys):
    run = shutil.copytree(trained / "a" / "run", tmp_path / "stopped")
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:3]) + '\n{"step": 6, "spl', encoding="utf-8")
    (run / "checkpoint" / "best.safetensors").write_bytes(b"half")
    said = compared(capsys, trained / "b" / "run", run, "--out", tmp_path / "x.png")
    cut = "the last line of metrics.jsonl is cut off, as of a run that is killed, and left out"
    assert f"stopped: {cut}" in said
    assert "stopped: is at step 3 of 6: it is still training, or was stopped" in said
    assert [cells(line)[-1] for line in said if line.startswith("| stopped")] == ["–"], "parameters are not known"


def test_a_run_that_has_reached_its_target_is_not_called_stopped(tmp_path):
    for target, n_notes in ((3.0, 0), (1.0, 1)):
        (tmp_path / "config.toml").write_text(f"max_steps = 100\ntarget_loss = {target}\n", encoding="utf-8")
        row = {"step": 50, "split": "val", "loss": 2.9}
        (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        assert len(read_run(tmp_path, "run").notes) == n_notes


def test_a_run_without_numbers_is_left_out_and_one_given_twice_is_shown_once(trained, tmp_path, capsys):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.toml").touch()
    run = trained / "a" / "run"
    (tmp_path / "link").symlink_to(run)
    said = compared(capsys, run, tmp_path / "new", "--out", tmp_path / "x.png", tmp_path / "link")
    assert "new: has no numbers yet, and is left out" in said
    assert f"{tmp_path / 'link'}: is given more than once, and shown once" in said
    assert any("One run was compared with no other" in line for line in said)
    assert main(["compare", str(tmp_path / "new")]) == 2
    assert "--runs: no run has numbers yet; new: has no numbers yet" in capsys.readouterr().err


def test_runs_of_equal_settings(trained, tmp_path, capsys):
    copy = shutil.copytree(trained / "a" / "run", tmp_path / "copy")
    assert "Their settings are the same." in compared(capsys, trained / "a" / "run", copy, "--out", tmp_path / "x.png")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("", 2, "--runs is missing: give the folders of runs, as in fastgpt compare runs/first runs/second"),
        ("nowhere", 2, "--runs: nowhere: no such folder"),
        ("file", 2, "--runs: file: is a file; give the folder of the run"),
        ("empty", 2, "--runs: empty: is not a run: it has no metrics.jsonl, as fastgpt train --out writes it"),
        ("learn", 2, "--runs: learn: holds the stages of fastgpt learn; give folders of learn/stages"),
        ("run --out picture.jpg", 2, "--out: expected a file that ends in .png, got 'picture.jpg'"),
        ("run --seed 3", 2, "--seed: no such option; see fastgpt compare --help"),
        ("damaged", 1, "metrics.jsonl: line 1 is not a JSON object with a step"),
        ("other", 1, "metrics.jsonl: the row of step 1 has no split or no loss"),
        ("toml", 1, "config.toml: not a TOML file"),
        ("run --out folder.png", 1, "folder.png: cannot be written"),
    ],
)
def test_what_is_no_run_is_said(words, code, said, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "learn/stages", "damaged", "other", "toml", "folder.png/x"):
        Path(folder).mkdir(parents=True)
    Path("file").touch()
    shutil.copytree(trained / "a" / "run", "run")
    Path("damaged/metrics.jsonl").write_text("nonsense\n{}\n", encoding="utf-8")
    Path("other/metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
    Path("toml/config.toml").write_text("lr = \n", encoding="utf-8")
    assert main(["compare", *words.split()]) == code
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1


def test_more_runs_than_can_be_told_apart_are_refused(trained, tmp_path, capsys):
    for n in range(MOST_RUNS + 1):
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / "config.toml").touch()
    assert main(["compare", *map(str, tmp_path.iterdir())]) == 2
    assert f"--runs: a picture tells {MOST_RUNS} runs apart, and these are {MOST_RUNS + 1}" in capsys.readouterr().err


def test_without_matplotlib_there_is_the_table_and_a_picture_that_is_asked_for_is_an_error(
    trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = compared(capsys, trained / "a" / "run")
    assert said[0].startswith("| run") and said[-1].startswith("no picture: matplotlib is not installed: pip install")
    assert main(["compare", str(trained / "a" / "run"), "--out", "x.png"]) == 1
    assert "matplotlib is not installed" in capsys.readouterr().err


# --- the picture ---


def test_the_picture_has_both_losses_of_each_run_over_steps_tokens_and_seconds():
    runs = [made_run("first", 2000), made_run("a $run$", 500)]
    figure = curves(runs)
    assert faults(figure) == []
    assert [axes.get_xlabel() for axes in figure.axes] == ["step", "tokens", "seconds of training"]
    for axes, per_step in zip(figure.axes, (1, 1024, 1 / 100), strict=True):
        assert axes.get_ylabel() == "loss (nats per token)"
        assert len(axes.lines) == 4
        for (train, val), run, last in zip((axes.lines[:2], axes.lines[2:]), runs, (2000, 500), strict=True):
            steps = range(10, last + 1, 10)
            assert list(val.get_xdata()) == pytest.approx([step * per_step for step in steps]), "and not step 0"
            assert list(val.get_ydata()) == [4.0 - step / 1000 for step in steps]
            assert list(train.get_xdata()) == list(val.get_xdata()) and val.get_label() == run.name
            assert len(steps) / val.get_markevery() <= MARKERS
            assert train.get_linewidth() < val.get_linewidth() and train.get_color() == val.get_color()
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in figure.axes[0].lines[1::2]]
    assert len({marker for _, marker, _ in looks}) == len({dashes for *_, dashes in looks}) == 2
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["first", "a $run$"]


@pytest.mark.parametrize("n", [1, 2, MOST_RUNS])
def test_a_picture_of_any_number_of_runs_can_be_read(n):
    runs = [made_run(f"{'a long name ' * 8}{number}", 100 * (number + 1)) for number in range(n)]
    assert faults(curves(runs)) == []


@pytest.mark.parametrize("steps", [0, 10])
def test_a_picture_of_few_rows(steps):
    assert faults(curves([made_run("run", steps), made_run("train", steps, split="train")])) == []


def test_long_names_lose_their_middle():
    assert shortened("a" * 60) == "a" * 60
    assert shortened("a" * 50 + "b" * 50) == "a" * 29 + "…" + "b" * 29
