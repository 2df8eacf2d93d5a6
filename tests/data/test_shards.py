"""Shards are read as the one array that they make together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.data.layouts import Blocks, Windows
from fastgpt.data.shards import ShardedTokens, windows

WHOLE = np.arange(100, 147, dtype=np.uint16)


def sharded(*ends: int) -> ShardedTokens:
    return ShardedTokens(np.split(WHOLE, ends))


@given(st.lists(st.integers(0, 47), max_size=5).map(sorted), st.integers(-60, 60), st.integers(-60, 60), st.data())
def test_slices_and_gathers_are_those_of_the_whole(ends, start, stop, data) -> None:
    tokens = sharded(*ends)
    part = tokens[start:stop]
    assert isinstance(part, ShardedTokens) and np.array_equal(part, WHOLE[start:stop])
    assert len(tokens) == 47 and tokens.shape == WHOLE.shape and tokens.dtype == np.uint16
    places = np.array(data.draw(st.lists(st.integers(-47, 46), min_size=6, max_size=6))).reshape(2, 3)
    found = tokens[places]
    assert np.array_equal(found, WHOLE[places]) and found.dtype == np.uint16 and found.shape == (2, 3)
    assert tokens[-1] == tokens[46] == 146
    assert part[: len(part)].dtype == np.uint16 and part[np.zeros((2, 0), dtype=int)].shape == (2, 0)


@given(st.lists(st.integers(0, 47), max_size=5).map(sorted), st.integers(0, 47), st.data())
def test_windows_are_those_of_the_whole(ends, length, data) -> None:
    starts = np.array(data.draw(st.lists(st.integers(0, 47 - length), max_size=4)), dtype=int)
    found = sharded(*ends).windows(starts, length)
    assert np.array_equal(found, windows(WHOLE, starts, length)) and found.shape == (len(starts), length)
    assert found.dtype == np.uint16


@pytest.mark.parametrize(("start", "length"), [(-1, 3), (45, 3), (0, 48)])
def test_windows_outside(start, length) -> None:
    with pytest.raises(IndexError, match="are outside of the 47 tokens"):
        sharded(20).windows(np.array([start]), length)


def test_slices_are_views() -> None:
    shards = [np.zeros(5, np.uint16), np.zeros(5, np.uint16)]
    tokens = ShardedTokens(shards)[2:8]
    shards[0][4] = shards[1][0] = 7
    assert np.asarray(tokens).tolist() == [0, 0, 7, 7, 0, 0]


@pytest.mark.parametrize("layout", [Blocks, Windows])
def test_batches_are_those_of_the_whole(layout) -> None:
    whole, parts = (layout(tokens, 8) for tokens in (WHOLE, sharded(3, 3, 20, 33)))
    for order in ("random", "epochs"):
        for one, other in zip(whole.batch(16, 1, 2, order), parts.batch(16, 1, 2, order), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("which", [47, -48, [0, 47], [-48], 1.0, [True], None])
def test_places_that_there_are_not(which) -> None:
    with pytest.raises(IndexError, match=r"outside of the 47 tokens|expected integers"):
        sharded(20)[which]
    with pytest.raises(IndexError, match="step 1"):
        sharded(20)[::2]


def test_shards_that_cannot_be_one() -> None:
    for shards in ([], [WHOLE, WHOLE.astype(np.uint32)]):
        with pytest.raises(ValueError, match="shards: expected arrays of one dtype"):
            ShardedTokens(shards)
    with pytest.raises(ValueError, match="copy"):
        np.asarray(sharded(20), copy=False)
