"""The order of epochs: each example once an epoch, in an order that follows from the seed, epoch and place alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.config import ConfigError, TrainConfig
from fastgpt.data.layouts import Blocks, Completions, Names, Windows
from fastgpt.data.order import of_epochs, permuted
from fastgpt.data.prefetch import Prefetcher

LENGTHS = np.array([[2, 1], [1, 2], [2, 2]])


def examples_of_each_layout() -> list:
    names = np.array([0, 5, 6, 0, 7, 0, 8, 9, 0])
    return [
        Blocks(np.arange(103), 10),
        Blocks(np.arange(12), 10),
        Windows(np.arange(50), 10),
        Names(names, 4, boundary=0),
        Completions(np.arange(10), 4, LENGTHS),
    ]


def taken(examples, batch_size: int, seed: int, steps: range) -> list[tuple[int, ...]]:
    """The rows of some batches, by which the examples above are known."""
    batches = [examples.batch(batch_size, seed, step, "epochs")[0] for step in steps]
    return [tuple(row) for row in torch.cat(batches).tolist()]


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1))
def test_it_is_a_permutation(n: int, key: int) -> None:
    keys = np.random.default_rng(key).integers(0, 2**64, size=8, dtype=np.uint64)
    assert np.array_equal(np.sort(permuted(np.arange(n), n, keys)), np.arange(n))


@pytest.mark.parametrize("n", [2**31 + 11, 2**40 + 1, 2**62])
def test_it_needs_no_memory_for_the_examples_that_are_not_asked_for(n: int) -> None:
    places = np.concatenate([np.arange(1000), n - 1 - np.arange(1000)])
    found = permuted(places, n, np.arange(1, 9, dtype=np.uint64))
    assert len(set(found.tolist())) == 2000 and found.min() >= 0 and found.max() < n
    assert 0.45 < (found / n).mean() < 0.55, "from everywhere"


@pytest.mark.parametrize("examples", examples_of_each_layout())
@pytest.mark.parametrize("batch_size", [1, 4, 40])
def test_each_example_comes_once_an_epoch(examples, batch_size: int) -> None:
    n = examples.epoch_size
    rows = taken(examples, batch_size, 3, range(-(-3 * n // batch_size)))
    for epoch in range(3):
        assert len(set(rows[epoch * n : (epoch + 1) * n])) == n, "also where a batch has the end of an epoch"
    if not isinstance(examples, Blocks) or isinstance(examples, Windows):
        assert n == len(examples), "all of them"


def test_the_blocks_of_an_epoch_touch_and_begin_anywhere() -> None:
    examples = Blocks(np.arange(1003), 10)
    assert examples.epoch_size == 99
    offsets = set()
    for epoch in range(40):
        starts = sorted(of_epochs(epoch * 99 + np.arange(99), len(examples), 10, seed=1).tolist())
        assert starts == list(range(starts[0], starts[0] + 990, 10)) and starts[0] < 10
        offsets.add(starts[0])
    assert offsets == set(range(10))


def test_epochs_and_seeds_have_different_orders() -> None:
    examples = Windows(np.arange(210), 10)
    orders = [tuple(taken(examples, 200, seed, range(epoch, epoch + 1))) for seed in (1, 2) for epoch in range(3)]
    assert len(set(orders)) == 6
    assert all(order != tuple(sorted(order)) for order in orders)


def test_places_of_an_epoch_are_taken_evenly() -> None:
    """Over many seeds, each example comes at each place: the chi-squared statistic of 12 * 12 counts is ordinary."""
    n, seeds = 12, 2400
    counts = np.zeros((n, n))
    for seed in range(seeds):
        counts[np.arange(n), of_epochs(np.arange(n), n, 1, seed)] += 1
    statistic = ((counts - seeds / n) ** 2 / (seeds / n)).sum()
    assert 80 < statistic < 170, "(n - 1)**2 = 121 degrees of freedom: a standard deviation of 16"


def test_the_order_is_that_of_older_runs() -> None:
    # Recorded once: another order would break the resuming of older runs.
    assert of_epochs(np.arange(95, 105), 1000, 10, seed=1).tolist() == [984, 94, 874, 54, 434, 372, 882, 332, 552, 832]


def test_a_batch_follows_from_its_step_alone() -> None:
    examples = Blocks(np.arange(1003), 10)
    straight = taken(examples, 8, 3, range(40))
    assert taken(examples, 8, 3, range(33, 35)) == straight[33 * 8 : 35 * 8]
    assert taken(examples, 4, 3, range(66, 70)) == straight[33 * 8 : 35 * 8], "however it is divided"
    with Prefetcher(examples, 8, 3, start_step=33, order="epochs") as batches:
        assert [tuple(row) for row in next(batches)[0].tolist()] == straight[33 * 8 : 34 * 8]


def test_unknown_orders() -> None:
    with pytest.raises(ValueError, match="order: expected one of random, epochs, got 'sorted'"):
        Blocks(np.arange(50), 10).batch(4, 0, 0, "sorted")
    with pytest.raises(ConfigError, match="order: expected one of random, epochs, got 'sorted'"):
        TrainConfig(order="sorted")
