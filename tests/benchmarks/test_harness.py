"""Measuring: contenders take turns, and medians, ratios and peaks are computed from what is measured."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastgpt.benchmarks.harness import host, measure
from fastgpt.benchmarks.publish.rows import Spread

CPU = torch.device("cpu")


def test_contenders_take_turns():
    ran = []
    calls = {name: lambda name=name: ran.append(name) for name in "ABC"}
    times = measure.interleave(calls, measure.wall_clock, seconds=0.0, min_rounds=30, warmups=1)
    rounds = ["".join(ran[i : i + 3]) for i in range(0, len(ran), 3)]
    assert all(sorted(one) == ["A", "B", "C"] for one in rounds)
    assert len(set(rounds)) == 6  # every order, so that each contender comes after each other one
    assert {name: len(values) for name, values in times.items()} == {"A": 30, "B": 30, "C": 30}


class FakeTime:
    """A clock whose calls are numbers: each takes so many seconds, of a time that nothing else moves."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def __call__(self, calls, iterations):
        times = [n * seconds for seconds, n in zip(calls, iterations, strict=True)]
        self.now += sum(times)
        return times


@pytest.mark.parametrize(
    ("seconds", "min_rounds", "rounds"),
    [(3.0, 1, 8), (3.0, 20, 20), (0.0, 5, 5), (1e6, 1, measure.MAX_ROUNDS)],  # a round takes 0.75 s
)
def test_rounds_go_on_for_the_time_given(seconds, min_rounds, rounds, monkeypatch):
    clock = FakeTime(monkeypatch)
    times = measure.interleave({"A": 0.5, "B": 0.25}, clock, seconds=seconds, min_rounds=min_rounds, warmups=1)
    assert times == {"A": [0.5] * rounds, "B": [0.25] * rounds}


def test_a_short_call_is_repeated_within_its_turn():
    seen = []

    def clock(calls, iterations):
        seen.append(dict(zip(calls, iterations, strict=True)))
        return [n * t for n, t in zip(iterations, calls, strict=True)]

    times = measure.interleave({"A": 0.001, "B": 0.2}, clock, seconds=0.0, min_rounds=2, warmups=1, min_time=0.01)
    assert seen == [{0.001: 1, 0.2: 1}, {0.001: 10, 0.2: 1}, {0.001: 10, 0.2: 1}]
    assert times == {"A": [pytest.approx(0.001)] * 2, "B": [0.2, 0.2]}


def test_a_reported_clock_takes_the_calls_word():
    assert measure.reported_clock([lambda: 3.0, lambda: 4], [1, 1]) == [3.0, 4.0]


def test_spread_is_median_and_percentiles():
    assert measure.spread_of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == Spread(3.5, 2.0, 5.0)
    assert measure.spread_of([2.0]) == Spread(2.0, 2.0, 2.0)


def test_ratios_are_taken_inside_a_round():
    """A machine that is three times slower in half of the rounds: the ratio does not notice."""
    ours, theirs = [1.0, 3.0, 1.0, 3.0], [2.0, 6.0, 2.0, 6.0]
    assert measure.ratio_of(theirs, ours) == Spread(2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("spread", "expected"),
    [((1.5, 1.01, 2.0), "faster"), ((0.8, 0.7, 0.99), "slower"), ((1.2, 0.9, 1.5), "noise"), ((1, 1, 1), "noise")],
)
def test_the_verdict_is_noise_where_the_percentiles_straddle_1(spread, expected):
    assert measure.verdict_of(Spread(*spread)) == expected


def test_peak_memory_is_what_a_call_adds_however_often_it_ran():
    call = lambda: torch.ones(2**23)  # noqa: E731  (32 MiB)
    if measure.peak_bytes(call, CPU) is None:
        pytest.skip("resident memory cannot be read from /proc here")
    for _ in range(3):
        assert 30 << 20 < measure.peak_bytes(call, CPU) < 40 << 20


def host_clock(calls, iterations):
    """Every call returns the seconds that it takes."""
    return [sum(call() for _ in range(n)) for call, n in zip(calls, iterations, strict=True)]


def test_the_host_is_what_a_replay_does_without():
    captured = lambda call: lambda: host.CALLS * 0.25  # noqa: E731
    assert host.host_times(lambda: 1.0, host_clock, captured) == host.HostTimes(1.0, 0.25)


def test_a_graph_is_recorded_by_what_puts_right_a_recording_that_fails(monkeypatch):
    log = []

    class Recorder:
        def warm_up(self, run):
            run()
            log.append("recorded")

        def record(self, run):
            return run

    monkeypatch.setattr(host.cuda_graph, "recorder", lambda device: Recorder())
    host.captured(lambda: log.append("call"))()
    assert log == ["call"] * host.CALLS + ["recorded"] + ["call"] * host.CALLS


def test_a_call_that_cannot_be_captured_says_why():
    def refuse(call):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    found = host.host_times(lambda: 1.0, host_clock, refuse)
    assert found == host.HostTimes(1.0, None, "operation not permitted when stream is capturing")


def test_short_calls_are_timed_many_at_once():
    counts = []

    def clock(calls, iterations):
        counts.append(iterations[-1])
        return [1e-4 * n for n in iterations]

    host.host_times(lambda: None, clock, lambda call: call)
    assert counts[1:6] == [201] * host.ROUNDS, "20 ms of 0.1 ms, in whole turns of three"
