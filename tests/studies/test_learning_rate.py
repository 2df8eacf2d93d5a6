"""The study of the learning rate: which runs have diverged."""

from __future__ import annotations

import json

from fastgpt.cli import main
from fastgpt.studies import learning_rate


def test_a_run_that_does_not_train_has_diverged():
    rows = [{"width": 32, "lr": rate, "losses": losses} for rate, losses in
            ((1e-4, [3.5, 3.5]), (1e-3, [2.0, 2.1]), (1e-2, [2.05, 3.4]), (1e-1, [None, 2.0]))]  # fmt: skip
    assert learning_rate._best(rows) is rows[1]
    assert learning_rate._diverged(rows, 3.25) == [1e-2, 1e-1], "a rate that is too small has not diverged"
    assert "Diverged at 0.01, 0.1" in learning_rate._findings(rows, 3.25)


def test_a_run_that_is_not_finite_is_recorded(text_file, tmp_path):
    arguments = ["--quick", "--data", str(text_file), "--rates", "1e-3,1e30", "--widths", "16", "--steps", "5"]
    assert main(["study", "learning-rate", *arguments, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows[0]["losses"][0] < 4.0 and rows[1]["losses"] == [None]
