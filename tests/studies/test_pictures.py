"""What the pictures of the studies share: panels with a grid, and losses that are missing."""

import math

import pytest

from fastgpt.studies.pictures import or_nan, panels


def test_panels_are_an_array_whatever_their_number():
    pytest.importorskip("matplotlib")
    for rows, columns in ((1, 1), (2, 3)):
        figure, axes = panels(4.0, 3.0, rows, columns)
        assert axes.shape == (rows, columns) and tuple(figure.get_size_inches()) == (4.0, 3.0)


def test_a_loss_that_is_missing_leaves_a_gap():
    first, second = or_nan([1.5, None])
    assert first == 1.5 and math.isnan(second)
