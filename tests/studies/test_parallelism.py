"""The study of parallelism: where times cross, and how many steps must follow one another."""

from __future__ import annotations

import pytest

from fastgpt.studies import parallelism
from fastgpt.studies.page import Page


def test_crossings():
    assert parallelism.crossings([16, 64, 256], [2.0, 0.5, 0.25]) == [pytest.approx(32.0)]
    assert parallelism.crossings([16, 64], [2.0, 1.5]) == []
    assert len(parallelism.crossings([1, 2, 4], [0.5, 2.0, 0.5])) == 2


def test_sequential_steps():
    assert [parallelism.sequential_steps("gpt", 4, context) for context in (16, 2048)] == [4, 4]
    assert [parallelism.sequential_steps("lstm", 4, context) for context in (1, 16)] == [4, 19]


def test_what_parallelism_says_follows_the_numbers(results):
    found = results("parallelism")
    contexts = sorted({row["context"] for row in found["rows"]})
    assert len(found["rows"]) == 4 * 2 * 2 * 2 and all(row["rounds"] >= 3 for row in found["rows"])
    for row in found["rows"]:
        row["ms"] = 1.0 if row["model"] == "gpt" else row["context"] / 12.0
    text = parallelism._crossovers(found["rows"], contexts, 1, "forward")
    assert "slower than the RNN up to about 12 tokens, faster from there" in text and "GPT at 16" in text


def test_a_model_is_shown_at_its_best_rate(results):
    found = results("parallelism")
    for row in found["losses"]:
        row["loss"] = 1.0 if row["lr"] == {"gpt": 1e-3}.get(row["model"], 3e-3) else None
    assert {row["lr"] for row in parallelism._best_curve(found, "gpt")} == {1e-3}
    assert {row["lr"] for row in parallelism._best_curve(found, "lstm")} == {3e-3}
    for row in found["losses"]:
        row["loss"] = None
    assert "without a finite loss" in parallelism._losses_in_words(found)
    assert "no model ended with a finite loss" in Page(found).text()


def test_what_it_says_of_speeds_and_losses(results):
    found = results("parallelism")
    rows, contexts, batches = found["rows"], [8, 16], [1, 2]
    for row in rows:
        is_gpt = row["model"] == "gpt"
        row["ms"] = 1.0 if is_gpt else 4.0
        row["p25"], row["p75"] = (0.9, 1.1) if is_gpt else (3.9, 4.1)
        row["tokens_per_s"] = 1000.0 if is_gpt or row["context"] == 8 else 250.0
    text = parallelism._speeds_in_words(rows, contexts, batches)
    assert "with 2 rows the GPT is the fastest" in text and "the RNN 4.00" in text
    assert "the GPT 100% of 1,000 at 8, the RNN 25% of 1,000" in parallelism._growth(rows, contexts, 2)
    for row in rows:
        row |= {"ms": 1.0, "p25": 0.9, "p75": 1.1, "tokens_per_s": 1000.0}
    assert "none is clearly the fastest" in parallelism._speeds_in_words(rows, contexts, batches)
    assert "No model's tokens per second fall" in parallelism._growth(rows, contexts, 2)
    for row in found["losses"]:
        row["loss"] = 1.0 if row["model"] == "gru" else 9.0
    text = parallelism._losses_in_words(found)
    assert "the GRU has the lowest loss" in text and "the GPT, the RNN and the LSTM did not learn" in text
    for row in found["losses"]:
        row["loss"] = 9.0
    assert "No model learned anything" in parallelism._losses_in_words(found)
