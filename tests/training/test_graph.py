"""Training by a graph, for which there is a stand-in on the CPU: the bits of plain training, or else the reason."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgpt.checkpoint import Checkpoint
from fastgpt.cli import main
from fastgpt.config import ConfigError
from fastgpt.training import graph, step
from fastgpt.training.graph import CHECKED_STEPS, is_graphed
from fastgpt.training.loop import Interrupted, Trainer
from fastgpt.training.run_folder import read_metrics
from small_runs import TRAIN, assert_same_checkpoint, signal_at, trainer
from stand_in_graph import DoingNothing, Failing, StandIn

GRAPHED = dataclasses.replace(TRAIN, cuda_graph=True)


@pytest.fixture(autouse=True)
def rates_of_float32(monkeypatch):
    """Graphs read the learning rate from a float32 tensor: with such rates, plain steps have the same one."""
    rounded = lambda number, cfg: float(np.float32(step.learning_rate(number, cfg)))  # noqa: E731
    monkeypatch.setattr("fastgpt.training.loop.learning_rate", rounded)
    monkeypatch.setattr("fastgpt.training.adamw.one_pass_choice", lambda: (False, "as on a GPU"))


def same_run(a: Trainer, b: Trainer) -> None:
    assert_same_checkpoint(a.folder.latest, b.folder.latest)
    rows = [[(row["step"], row["split"], row["loss"], row["lr"]) for row in read_metrics(run.folder.metrics_path)]
            for run in (a, b)]  # fmt: skip
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"grad_accum": 3, "grad_clip": 0.01},
        {"grad_accum": 2, "dtype": "float16"},
        {"dtype": "bfloat16", "grad_clip": 0.0},
        {"layout": "names", "grad_accum": 2, "batch_size": 2},
    ],
    ids=str,
)
def test_the_bits_are_those_of_plain_training(corpus, names, tmp_path, use_recorder, changes):
    stand_in, runs = use_recorder(StandIn()), []
    for cuda_graph_or_not in (False, True):
        cfg = dataclasses.replace(TRAIN, cuda_graph=cuda_graph_or_not, **changes)
        runs.append(trainer(names if cfg.layout == "names" else corpus, tmp_path / str(cuda_graph_or_not), cfg))
        runs[-1].run()
    same_run(*runs)
    assert runs[1]._take.reason is None
    assert (stand_in.recordings, stand_in.replays) == (1, TRAIN.max_steps - 1)


@pytest.mark.parametrize("stop_at", [1, 3, 9])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_stopped_and_resumed_equals_plain_training_in_one_go(
    corpus, tmp_path, use_recorder, monkeypatch, stop_at, dtype
):
    use_recorder(StandIn())
    plain = trainer(corpus, tmp_path / "plain", dataclasses.replace(TRAIN, dtype=dtype))
    plain.run()
    cfg = dataclasses.replace(GRAPHED, dtype=dtype)
    stopped = trainer(corpus, tmp_path / "parts", cfg)
    signal_at(stop_at, stopped, monkeypatch)
    with pytest.raises(Interrupted):
        stopped.run()
    torch.manual_seed(999)
    resumed = trainer(corpus, tmp_path / "parts", cfg, new=False)
    resumed.restore(Checkpoint.load(resumed.folder.latest))
    resumed.run()
    assert_same_checkpoint(plain.folder.latest, resumed.folder.latest)
    assert Checkpoint.load(plain.folder.latest).state.get("scaler") == resumed.checkpoint().state.get("scaler")


def test_steps_that_overflow_float16_are_left_out_by_the_graph_too(corpus, tmp_path, use_recorder):
    """One of the overflows is in the steps that are checked, one later."""
    use_recorder(StandIn())
    runs = []
    for cuda_graph_or_not in (False, True):
        cfg = dataclasses.replace(TRAIN, dtype="float16", cuda_graph=cuda_graph_or_not)
        run = trainer(corpus, tmp_path / str(cuda_graph_or_not), cfg)
        loss = run.loss

        def overflowing(x, y, run=run, loss=loss):
            value = loss(x, y)
            if run.state["step"] in (2, 8):
                value.register_hook(lambda gradient: gradient * torch.inf)
            return value

        run.loss = overflowing
        run.run()
        assert run.skipped_steps() == 2
        runs.append(run)
    same_run(*runs)
    assert runs[1]._take.reason is None


class StaleRate(StandIn):
    """A graph that has the learning rate of its recording in it."""

    def again(self, run, kept):
        step_of_run = run.__self__  # the GraphedStep
        now = step_of_run._lr.clone()
        step_of_run._lr.fill_(1e-4)
        super().again(run, kept)
        step_of_run._lr.copy_(now)


class StaleBatch(StandIn):
    """A graph that reads other memory than its inputs are copied to."""

    def again(self, run, kept):
        inputs = run.__self__._inputs
        run.__self__._inputs = [(torch.zeros_like(x), y) for x, y in inputs]
        super().again(run, kept)
        run.__self__._inputs = inputs


class StaleDropout(StandIn):
    def again(self, run, kept):
        torch.manual_seed(0)
        super().again(run, kept)


class WrongLoss(StandIn):
    def again(self, run, kept):
        super().again(run, kept)
        kept[0].mul_(1.1)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (StaleRate, r"it does not do what an eager step does: token_embedding\.weight changes by"),
        (StaleBatch, "it does not do what an eager step does: token_embedding.weight changes by"),
        (StaleDropout, "it does not do what an eager step does: "),
        (DoingNothing, "it does not do what an eager step does: token_embedding.weight changes by"),
        (WrongLoss, "it does not do what an eager step does: the loss changes by"),
        (Failing, "operation not permitted when stream is capturing$"),
    ],
)
def test_a_wrong_graph_is_not_used_and_the_reason_is_said_once(corpus, tmp_path, use_recorder, wrong, reason):
    plain = trainer(corpus, tmp_path / "plain", TRAIN)
    plain.run()
    stand_in = use_recorder(wrong())
    run = trainer(corpus, tmp_path / "graphed", GRAPHED)
    with pytest.warns(UserWarning, match="fastgpt: training goes on without a CUDA graph: " + reason) as caught:
        run.run()
    assert len([warning for warning in caught if "CUDA graph" in str(warning.message)]) == 1
    assert run._take.reason is not None and stand_in.recordings == 1 and stand_in.replays <= 2
    same_run(plain, run)


class BreakingInTheOptimizer(StandIn):
    """The scaler has seen the gradients already, and the optimizer has the scale."""

    def record(self, run, generator=None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "_foreach_add_", None)  # the first function that fused AdamW calls
            run()


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_a_recording_that_fails_in_the_middle_of_a_step(corpus, tmp_path, use_recorder, grad_clip):
    use_recorder(BreakingInTheOptimizer())
    runs = []
    for cuda_graph_or_not in (False, True):
        cfg = dataclasses.replace(TRAIN, dtype="float16", grad_clip=grad_clip, cuda_graph=cuda_graph_or_not)
        runs.append(trainer(corpus, tmp_path / str(cuda_graph_or_not), cfg, dropout=0.0))
    runs[0].run()
    with pytest.warns(UserWarning, match="training goes on without a CUDA graph: 'NoneType' object is not callable"):
        runs[1].run()
    same_run(*runs)
    assert not any(group["capturable"] for group in runs[1].optimizer.param_groups)


def test_a_batch_of_another_shape_is_taken_eagerly(corpus, tmp_path, use_recorder):
    stand_in = use_recorder(StandIn())
    results = []
    for cuda_graph_or_not in (False, True):
        run = trainer(corpus, tmp_path / str(cuda_graph_or_not), dataclasses.replace(GRAPHED, cuda_graph=False))
        take = run._take_eagerly
        if cuda_graph_or_not:
            take = graph.GraphedStep(take, run.model, run.optimizer, run.precision, stand_in)
        run.model.train()
        examples = corpus.examples("train", 16)
        sizes = [4] * (CHECKED_STEPS + 2) + [3, 4, 1, 4]
        losses = [take([examples.batch(size, 1, number)], 2.0**-10) for number, size in enumerate(sizes)]
        results.append([*torch.stack(losses), *run.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert stand_in.replays == CHECKED_STEPS + 3


def test_a_model_with_hooks_is_trained_eagerly(corpus, tmp_path, use_recorder):
    use_recorder(StandIn())
    run = trainer(corpus, tmp_path, GRAPHED)
    seen = []
    run.model.blocks[1].register_forward_hook(lambda *args: seen.append(1))
    with pytest.warns(UserWarning, match="a CUDA graph: blocks.1: it has hooks, which a graph would not run"):
        run.run()
    assert len(seen) > TRAIN.max_steps


def test_steps_are_graphed_on_cuda_unless_something_else_is_asked_for():
    default = dataclasses.replace(TRAIN, cuda_graph=None)
    assert is_graphed(default, "cuda")
    assert not is_graphed(default, "cpu") and not is_graphed(default, "mps")
    assert not is_graphed(dataclasses.replace(default, compile=True), "cuda")
    assert not is_graphed(dataclasses.replace(default, cuda_graph=False), "cuda")
    assert is_graphed(dataclasses.replace(GRAPHED, compile=True), "cuda")


def test_without_a_gpu_it_is_refused_before_anything_is_written(corpus, text_file, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"^cuda_graph: needs a CUDA device, and this is 'cpu'; switch it off$"):
        trainer(corpus, tmp_path / "run", GRAPHED)
    out = tmp_path / "never"
    options = ["train", "--data", str(text_file), "--out", str(out), "--device", "cpu", "--cuda-graph"]
    assert main(options) == 2
    assert (
        capsys.readouterr().err == "fastgpt train: cuda_graph: needs a CUDA device, and this is 'cpu'; switch it off\n"
    )
    assert not Path(out).exists()


def test_a_small_model_is_tried_out(use_recorder):
    use_recorder(StandIn())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert graph.try_out(torch.device("cpu")) is None
    use_recorder(Failing())
    with pytest.warns(UserWarning, match="goes on without a CUDA graph"):
        assert graph.try_out(torch.device("cpu")) == "operation not permitted when stream is capturing"
