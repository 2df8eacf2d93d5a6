"""`fastgpt bench` as it is typed; what the suite measures and how is tested with the suite."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt.benchmarks import bench_recipe, command
from fastgpt.benchmarks.harness import ceilings, models
from fastgpt.benchmarks.harness.suite import Setting, Suite
from fastgpt.benchmarks.publish import rows
from fastgpt.cli import main


def rows_file(path: Path) -> Path:
    work = {"op": "embedding", "shape": "B1", "dtype": "float32", "direction": "forward", "device": "A CPU"}
    lines = [{"kind": "row", "implementation": "fastgpt", "median_ms": 1.0, **work}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def collected(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """What would be measured."""
    env = {**os.environ, "PYTEST_ADDOPTS": "--collect-only"}
    run = [sys.executable, "-m", "fastgpt", "bench", *arguments]
    return subprocess.run(run, cwd=cwd, capture_output=True, text=True, env=env)


def test_the_suite_runs_from_any_folder(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")  # of somebody else's project
    done = collected("--only", "embedding", "--quick", "--device", "cpu", "--out", "rows", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert found and all(line.startswith("bench_embedding.py::bench_embedding[") for line in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pytest.ini"], "nothing is left behind"


def test_it_says_what_is_missing(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "pytest_benchmark" else find(name))
    assert main(["bench", "--quick"]) == 1
    said = capsys.readouterr().err
    assert said == "fastgpt bench: pytest-benchmark is not installed: pip install 'fastgpt-kernels[bench]'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "fly"], "--only: there is no benchmarks/bench_fly.py; there are activation, attention"),
        (["--device", "tpu"], "--device: expected auto, cpu or cuda, got 'tpu'"),
        (["--results", "rows.jsonl"], "--results: is what --report reads"),
        (["--report", "--quick"], "--quick: is for measuring"),
        (["--config", "bench.toml"], "only: expected a list of texts"),
    ],
)
def test_bad_usage_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("bench.toml").write_text("only = [1]\n")
    assert main(["bench", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_settings_come_from_a_file_too(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(command, "run_suite", lambda *arguments: asked.update(all=arguments) or 0)
    (tmp_path / "bench.toml").write_text('only = ["embedding", "attention"]\ndevice = "cpu"\nquick = true\n')
    there = str(tmp_path)
    assert main(["bench", "--config", str(tmp_path / "bench.toml"), "--nanogpt", there, "--out", "x"]) == 0
    paths = {"nanogpt": there, "lecture": None, "data": None}
    assert asked["all"] == (("embedding", "attention"), "cpu", "x", True, paths)


def test_report_reads_files_and_folders(tmp_path, capsys):
    (tmp_path / "more").mkdir()
    paths = [str(rows_file(tmp_path / "a.jsonl")), str(rows_file(tmp_path / "more" / "b.jsonl").parent)]
    assert main(["bench", "--report", "--results", *paths, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "### embedding" in printed.out and "results.md" in printed.err
    assert (tmp_path / "out" / "results.md").exists() and (tmp_path / "out" / "results" / "report.html").exists()


def test_rows_go_to_runs_and_reports_read_them_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--report"]) == 1
    assert "runs/bench: nothing was measured here yet; run fastgpt bench" in capsys.readouterr().err
    asked = []
    monkeypatch.setattr(pytest, "main", lambda arguments: asked.extend(arguments) or 0)
    assert main(["bench", "--only", "embedding", "--device", "cpu"]) == 0
    (rows,) = (Path(word.removeprefix("--rows=")) for word in asked if word.startswith("--rows="))
    assert rows.parent == Path("runs/bench") and rows.suffix == ".jsonl"
    rows.parent.mkdir(parents=True)
    rows_file(rows)
    assert main(["bench", "--report"]) == 0
    assert (tmp_path / "runs" / "bench-report" / "results.md").exists()


def test_report_names_the_line_that_is_wrong(tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text("{}\n")
    assert main(["bench", "--report", "--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "bad.jsonl, line 1: expected an object" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_recipe_is_a_training_run_and_its_last_validation(tmp_path, monkeypatch):
    """The model and the text are small, since the recipe itself takes minutes."""
    settings = ({"block_size": 8, "n_layer": 1, "n_head": 1, "n_embd": 8}, {"batch_size": 2, "max_steps": 4})
    for module in (bench_recipe, models):
        monkeypatch.setattr(module, "preset", lambda name: settings)
    text = tmp_path / "tinyshakespeare.txt"
    text.write_text("To be, or not to be: that is the question. " * 20)
    setting = Setting(torch.device("cpu"), data=str(text))
    suite = Suite(setting, tmp_path / "rows.jsonl")
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda *args: ceilings.MADE_UP)
    bench_recipe.bench_recipe(suite.measure_contenders, setting, bench_recipe.Recipe("shakespeare-char-cpu"))
    (row,) = rows.read([tmp_path / "rows.jsonl"]).rows
    assert (row.op, row.shape, row.rounds) == ("recipe", "shakespeare-char-cpu", 1)
    assert row.median_ms > 0 and row.extra["steps"] == 4 and 0 < row.extra["val_loss"] < 10
    assert row.parity_error_ratio <= 2.0
    for other in (Setting(torch.device("cpu"), data="shakespeare"), Setting(torch.device("cpu"), quick=True)):
        with pytest.raises(pytest.skip.Exception, match="it takes minutes"):
            bench_recipe.bench_recipe(suite.measure_contenders, other, bench_recipe.Recipe("shakespeare-char-cpu"))
