"""Ceilings: each is the fastest of several ways, and bounds from above what was not measured."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.benchmarks.bench_embedding import EmbeddingShape
from fastgpt.benchmarks.bench_train_step import step_demand
from fastgpt.benchmarks.command import benchmark_names
from fastgpt.benchmarks.harness import ceilings
from fastgpt.benchmarks.harness.ceilings import Ceilings, Demand, Product, Traffic
from fastgpt.benchmarks.harness.models import ModelShape
from fastgpt.benchmarks.harness.op_work import OpShape

CPU = torch.device("cpu")
MB = 10**6


def known() -> Ceilings:
    """A cache of a few megabytes, and memory; a product of few rows, and a large one."""
    moved = {("read", MB): 8e9, ("write", MB): 4e9, ("copy", MB): 10e9, ("add", MB): 9e9}
    moved |= {("read", 9 * MB): 4e9, ("write", 9 * MB): 1e9, ("copy", 9 * MB): 3e9, ("add", 9 * MB): 2e9}
    return Ceilings("float32", moved, {(1, 64, 64): 1e9, (512, 64, 64): 8e9})


def seconds(demand: Demand) -> float:
    bound = known().bound(demand)
    assert bound is not None
    return bound.seconds


def test_a_bound_is_that_of_reading_or_writing_or_both_together():
    assert seconds(Demand(Traffic(read=8e9, written=0, footprint=MB))) == 1.0
    assert seconds(Demand(Traffic(read=0, written=8e9, footprint=MB))) == 2.0
    assert seconds(Demand(Traffic(read=7e9, written=3e9, footprint=MB))) == 1.0  # both, by a copy
    assert seconds(Demand(Traffic(read=8e9, written=0, footprint=9 * MB))) == 2.0
    assert known().bound(Demand()) is None and known().bound(Demand(Traffic(0, 0, 0))) is None


@pytest.mark.parametrize("footprint, rate", [(10, 8e9), (MB, 8e9), (9 * MB - 1, 8e9), (9 * MB, 4e9), (1e12, 4e9)])
def test_a_size_that_was_not_measured_is_as_fast_as_the_next_smaller_one(footprint, rate):
    assert known().bandwidth(footprint, ["read"]) == rate


@given(st.lists(st.tuples(st.integers(1, 99), st.floats(1, 99)), min_size=1, max_size=9), st.integers(1, 99))
def test_bandwidths_never_rise_with_the_size_and_are_never_below_what_was_measured(points, size):
    found = Ceilings("float32", {("read", at): rate for at, rate in points})
    rates = [found.bandwidth(at) for at in range(1, 100)]
    assert rates == sorted(rates, reverse=True)
    assert all(found.bandwidth(at) >= rate for (_, at), rate in found.moved.items())


def test_products_of_each_shape_have_their_own_ceiling_and_others_the_highest():
    slow, fast = Product(1, 64, 64, count=4), Product(512, 64, 64)
    expected = slow.flops / 1e9 + fast.flops / 8e9
    assert seconds(Demand(flops=slow.flops + fast.flops, products=(slow, fast))) == pytest.approx(expected)
    more = Demand(flops=slow.flops + fast.flops + 8e9, products=(slow, fast))
    assert seconds(more) == pytest.approx(expected + 1.0)
    name = known().bound(Demand(Traffic(1, 1, MB), flops=fast.flops, products=(fast,))).name
    assert name == "products at 8 GFLOP/s"


def test_the_best_of_two_measurements_counts():
    found = known()
    found.merge(Ceilings("float32", {("read", MB): 9e9, ("write", MB): 1e9, ("read", 5): 1e9}, {(1, 64, 64): 2e9}))
    assert found.moved["read", MB] == 9e9 and found.moved["write", MB] == 4e9 and found.moved["read", 5] == 1e9
    assert found.multiplied == {(1, 64, 64): 2e9, (512, 64, 64): 8e9}


def test_a_run_keeps_the_largest_copy_the_fastest_product_and_all_sizes():
    written = known().to_json()
    assert (written["bytes_per_s"], written["flops_per_s"], written["dtype"]) == (3e9, 8e9, "float32")
    assert ["write", 9 * MB, 1e9] in written["moved"] and len(written["moved"]) == 8
    assert written["products"] == [[1, 64, 64, 1e9], [512, 64, 64, 8e9]]


def test_what_is_known_is_not_measured_again(monkeypatch):
    """The ways are run, at small sizes; how long they take does not matter."""
    monkeypatch.setattr(ceilings, "SIZES", {"cpu": [2**17]})
    monkeypatch.setattr(ceilings, "LARGE", {"cpu": Product(8, 16, 8)})
    work = Demand(Traffic(1, 1, 2**18), flops=1, products=(Product(2, 3, 4, count=9), Product(20, 3, 4)))
    found = ceilings.measure_ceilings(CPU, work)
    assert {size for _, size in found.moved} == {2**17, 2**18} and {way for way, _ in found.moved} == set(
        ceilings.MIXED
    )
    assert set(found.multiplied) == {(8, 16, 8), (2, 3, 4), (20, 3, 4)}
    assert all(rate > 0 for rate in (*found.moved.values(), *found.multiplied.values()))
    nothing = ceilings.measure_ceilings(CPU, work, found)
    assert not nothing.moved and not nothing.multiplied


def test_the_fastest_way_in_its_best_round_counts(monkeypatch):
    """The calls are run; how long they take is given, in an order that is drawn anew in each round."""
    given = {"slow": [9.0, 8.0], "fast": [3.0, 5.0]}
    monkeypatch.setattr(ceilings, "interleave", lambda calls, clock, **options: given)
    assert ceilings._fastest([], CPU) == 3.0


def test_every_way_to_multiply_gives_the_same_product():
    a, b = torch.randn(5, 7), torch.randn(7, 6)
    for way in ceilings._ways_to_multiply(a, b):
        out = way()
        if out is not None:
            torch.testing.assert_close(out, a @ b)


def test_a_linear_layer_is_three_products_as_large_as_each_other():
    layer = ceilings.linear_products(12, 8, 32, backward=True, count=3)
    assert [p.shape for p in layer] == [(12, 8, 32), (12, 32, 8), (32, 12, 8)]
    assert {p.flops for p in layer} == {3 * 2 * 12 * 8 * 32}


def test_the_products_of_a_step_are_its_operations_without_those_of_attention():
    shape = ModelShape(B=2, T=16, L=3, H=2, C=8, V=40)
    demand = step_demand(shape, 1000)
    attention = 3.5 * 4 * 32 * (16 / 2) * 8 * 3
    assert sum(p.flops for p in demand.products) == demand.flops - attention
    assert demand.traffic == Traffic(16_000, 12_000, 16_000)


def shapes_of_ops() -> list[OpShape]:
    """Those of every benchmark, each kind of device."""
    modules = [importlib.import_module(f"fastgpt.benchmarks.bench_{name}") for name in benchmark_names()]
    marks = [mark for module in modules for f in vars(module).values() for mark in getattr(f, "pytestmark", ())]
    shapes = [shape for mark in marks if mark.name == "shapes" for shape in (*mark.kwargs["cpu"], *mark.kwargs["cuda"])]
    return list(dict.fromkeys(shape for shape in shapes if isinstance(shape, OpShape)))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", shapes_of_ops(), ids=lambda shape: f"{shape.op} {shape}")
def test_an_op_moves_at_least_its_arguments_and_results_and_no_more_of_its_products_than_it_says(shape, backward):
    demand = shape.demand(backward, itemsize=4)
    forward = shape.demand(False, itemsize=4).traffic
    assert demand.traffic.footprint == forward.total <= demand.traffic.total
    assert sum(p.flops for p in demand.products) <= (demand.flops or 0)


def test_an_embedding_reads_the_rows_that_occur():
    assert EmbeddingShape(1, 4, 1, 8).different_tokens == 1
    assert EmbeddingShape(1, 1, 50, 8).different_tokens == pytest.approx(1)
    assert EmbeddingShape(1, 1, 50, 8, zipf=True).different_tokens == pytest.approx(1)
    many = [EmbeddingShape(4, 1024, 500, 8, zipf=zipf).different_tokens for zipf in (False, True)]
    assert 300 < many[1] < many[0] < 500
