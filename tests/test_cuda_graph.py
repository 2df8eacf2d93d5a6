"""Recording CUDA graphs: here with stand-ins for torch.cuda, in the order in which PyTorch asks for it."""

from __future__ import annotations

import contextlib

import pytest
import torch

from fastgpt import cuda_graph
from fastgpt.config import ConfigError


class Stream:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class Generator:
    """A generator that draws only outside of recordings, or within one that has begun and not failed."""

    def __init__(self):
        self.waiting = False

    def clone_state(self):
        return Generator()

    def graphsafe_set_state(self, other):
        self.waiting = other.waiting


@pytest.fixture
def pretend(monkeypatch):
    """torch.cuda with one device, as a log of what was asked of it."""
    log, generators, pools = [], [Generator()], []
    current = [Stream(log, "main")]

    @contextlib.contextmanager
    def stream(new):
        before, current[0] = current[0], new
        try:
            yield
        finally:
            current[0] = before

    class Graph:
        def register_generator_state(self, generator):
            generators.append(generator)
            log.append("register")

        def replay(self):
            log.append("replay")

    @contextlib.contextmanager
    def graph(recorded, pool, stream, capture_error_mode):
        log.append(f"begin {capture_error_mode}")
        pools.append(pool)
        current[0] = stream
        for generator in generators:
            generator.waiting = True
        yield  # what fails in here leaves stream, generators and memory pool as they are, as PyTorch 2.11 does
        pools.remove(pool)
        for generator in generators:
            generator.waiting = False
        current[0] = Stream(log, "main")
        log.append("end")

    fakes = {
        "device": lambda device: contextlib.nullcontext(),
        "current_device": lambda: 0,
        "current_stream": lambda: current[0],
        "Stream": lambda: Stream(log, "side"),
        "stream": stream,
        "CUDAGraph": Graph,
        "graph": graph,
        "default_generators": generators[:1],
        "graph_pool_handle": lambda: (0, 1),
    }
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda index, pool: pools.remove(pool))
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return log, current, pools


def test_a_warm_up_is_on_a_side_stream(pretend):
    log, current, _ = pretend
    assert cuda_graph.recorder(torch.device("cuda")).warm_up(lambda: current[0].name) == "side"
    assert log == ["side waits for main", "main waits for side"] and current[0].name == "main"


def test_a_recording_is_replayed(pretend):
    log, current, pools = pretend
    generator = Generator()
    recorder = cuda_graph.recorder(torch.device("cuda", 0))
    replay = recorder.record(lambda: (log.append("run"), current[0].name)[1], generator)
    assert log == ["register", "begin thread_local", "run", "end"] and current[0].name == "main"
    assert replay() == replay() == "side" and log[4:] == ["replay", "replay"]
    assert pools == []


def test_after_a_recording_that_fails_eager_work_goes_on(pretend):
    _, current, pools = pretend
    generator = Generator()

    def run():
        assert generator.waiting
        raise RuntimeError("not permitted")

    with pytest.raises(RuntimeError, match="not permitted"):
        cuda_graph.recorder(torch.device("cuda")).record(run, generator)
    assert current[0].name == "main" and not generator.waiting and not torch.cuda.default_generators[0].waiting
    assert pools == []


@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_other_devices_have_no_graphs(device):
    with pytest.raises(ConfigError, match=f"^cuda_graph: needs a CUDA device, and this is '{device}'"):
        cuda_graph.recorder(torch.device(device))


def test_what_a_graph_would_leave_out():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert cuda_graph.why_not_recorded(model) is None and cuda_graph.why_not_recorded(object()) is None
    handle = model[1][0].register_full_backward_hook(lambda *args: None)
    assert cuda_graph.why_not_recorded(model) == "1.0: it has hooks, which a graph would not run"
    handle.remove()
    model.register_forward_pre_hook(lambda *args: None)
    assert cuda_graph.why_not_recorded(model) == "the model: it has hooks, which a graph would not run"


def test_words():
    assert cuda_graph.words(RuntimeError("one line\nand another")) == "one line"
    assert cuda_graph.words(KeyError()) == "KeyError"
