"""How numbers become parts of sentences."""

import pytest

from fastgpt.studies.words import counted, find_row, listed, loss_text


def test_numbers_in_words():
    assert [counted(n, "row") for n in (0, 1, 8)] == ["0 rows", "1 row", "8 rows"]
    assert listed(["a", "b"]) == "a, b" and listed([]) == "none" and listed([], "no row") == "no row"
    assert loss_text(1.23456) == "1.235" and loss_text(None) == "not finite"


def test_a_row_is_found_by_all_of_its_values():
    rows = [{"depth": 2, "norm": "pre"}, {"depth": 2, "norm": "post"}]
    assert find_row(rows, depth=2, norm="post") is rows[1] and find_row(rows, depth=2) is rows[0]
    with pytest.raises(StopIteration):
        find_row(rows, depth=3)
