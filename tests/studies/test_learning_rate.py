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
    arguments += ["--repeats", "1"]
    assert main(["study", "learning-rate", *arguments, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows[0]["losses"][0] < 4.0 and rows[1]["losses"] == [None]


def two_sizes(small: dict[float, float], large: dict[float, float]) -> dict:
    """Results of two sizes: the loss at each rate, of two seeds that differ by 0.02."""
    rows = [
        {"width": width, "lr": rate, "losses": [loss - 0.01, loss + 0.01], "curve": []}
        for width, losses in ((32, small), (64, large))
        for rate, loss in losses.items()
    ]
    sizes = {"parameters": {"32": 100, "64": 400}, "data": {"frequency_loss": 3.3}, "settings": {"repeats": 2}}
    return {"rows": rows, **sizes}


def test_what_it_says_of_rates_follows_the_numbers():
    found = two_sizes({1e-4: 3.0, 1e-3: 2.5, 1e-2: 2.0}, {1e-4: 3.0, 1e-3: 2.0, 1e-2: 3.4})
    assert "0.01 for 100 parameters (loss 2.000); 0.001 for 400" in learning_rate._best_in_words(found)
    assert "0.001, is below that of the smallest, 0.01" in learning_rate._sizes_in_words(found)
    assert "none for 100 parameters and 0.01 for 400" in learning_rate._divergence_in_words(found)
    found = two_sizes({1e-3: 2.01, 1e-2: 2.0}, {1e-3: 2.0, 1e-2: 2.01})
    assert "not told apart from 0.001" in learning_rate._best_in_words(found)
    assert "may share their best rate" in learning_rate._sizes_in_words(found)
    assert "None of the rates tried diverged" in learning_rate._divergence_in_words(found)
    found = two_sizes({1e-3: 3.4, 1e-2: 3.3}, {1e-3: 3.4, 1e-2: 3.3})
    assert "none for 100 parameters, which learned nothing" in learning_rate._best_in_words(found)
    assert "are not compared" in learning_rate._sizes_in_words(found)
    assert "As no model learned anything" in learning_rate._divergence_in_words(found)
    found = two_sizes({1e-3: 2.0, 1e-2: 3.0}, {1e-3: 2.0, 1e-2: 3.0})
    assert "have the same best rate, 0.001" in learning_rate._sizes_in_words(found)
