"""The study of attention: its maps are those of the model."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fastgpt.cli import main
from fastgpt.plots import styled
from fastgpt.studies import attention
from figures import faults


def test_summary_of_a_head_that_looks_at_the_token_before():
    maps = torch.zeros(5, 5)
    maps[0, 0] = 1.0
    maps[range(1, 5), range(4)] = 1.0
    found = attention.summary(maps)
    assert found["previous"] == 1.0 and found["entropy"] == 0.0 and found["distance"] == pytest.approx(0.8)
    assert found["itself"] == pytest.approx(0.2) and found["first"] == pytest.approx(0.25)


def test_a_single_token_and_a_single_head(text_file, tmp_path):
    arguments = ["--steps", "2", "--data", str(text_file), "--prompt", "B", "--layer", "2", "--head", "4"]
    assert main(["study", "attention", *arguments, "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (row["layer"], row["head"], row["map"]) == (2, 4, [[1.0]])


def head(number: int, entropy: float, **shares: float) -> dict:
    row = {"layer": 1, "head": number, "distance": float(number), "entropy": entropy, "map": [[1.0], [0.5, 0.5]]}
    return row | {"itself": 0.2, "previous": 0.2, "first": 0.2, **shares}


def test_what_attention_says_follows_the_numbers():
    found = {"tokens": list("abcd"), "is_causal": True, "rows": [head(1, 0.1, previous=0.9), head(2, 0.7)]}
    assert "layer 1 head 1 looks 1.0 tokens away and layer 1 head 2 2.0" in attention._distances_in_words(found)
    assert "most selective is layer 1 head 1" in attention._entropies_in_words(found)
    assert "the token before in 1 head (layer 1 head 1)" in attention._habits_in_words(found)
    assert not attention._why_no_maps(found)


def test_attention_that_is_spread_evenly_is_not_drawn():
    even = sum(math.log(n) for n in range(1, 5)) / 4
    found = {"tokens": list("abcd"), "is_causal": True, "rows": [head(1, even), head(2, 0.95 * even)]}
    found["rows"][1]["distance"] = 1.01
    assert attention._distances_in_words(found) == "All heads look 1.0 tokens away on average."
    assert "the maps say nothing" in attention._entropies_in_words(found)
    assert "each map is one colour" in attention._why_no_maps(found)
    assert "No head gives more than half" in attention._habits_in_words(found)


WORDS = ("␣the", "Hello", "␣understanding␣", "<ff>", "$x$", "⏎")


@pytest.mark.parametrize(
    ("tokens", "n", "named"), [("Wgjp", 36, 36), ("Wgjp", 64, 32), (WORDS, 28, 28), (WORDS, 64, 22)]
)
def test_the_tokens_at_a_map_can_be_read(tokens, n, named):
    """As many as fit; a long word is shortened, and a dollar sign begins no formula."""
    row = {"map": [[1.0 / (i + 1)] * (i + 1) for i in range(n)]}
    figure = styled(attention._draw_head)(row, [tokens[i % len(tokens)] for i in range(n)])
    assert faults(figure) == []
    names = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert len(names) == named and max(map(len, names)) <= 10
    assert ("is named" in figure.axes[0].get_xlabel()) == (named < n)


@pytest.mark.parametrize(("n_layer", "n_head"), [(1, 2), (2, 8), (12, 12)])
def test_the_maps_of_all_heads_stand_side_by_side(n_layer, n_head):
    rows = [
        {"layer": i + 1, "head": j + 1, "map": [[i + j / 16], [0.0, i]]} for i in range(n_layer) for j in range(n_head)
    ]
    figure = styled(attention._draw_maps)({"rows": rows, "tokens": ["a", "b"]})
    assert faults(figure) == []
    image = figure.axes[0].images[0].get_array()
    for i in range(n_layer):
        for j in range(n_head):
            assert image[3 * i : 3 * i + 2, 3 * j : 3 * j + 2].tolist() == [[i + j / 16, 0.0], [0.0, i]]
    assert image.shape == (3 * n_layer - 1, 3 * n_head - 1) and image[:, 2].mask.all(), "gaps"
