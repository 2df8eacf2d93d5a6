"""The training loop: it learns, reports and stops where it should."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fastgpt import GPTConfig
from fastgpt.baselines import build_model
from fastgpt.checkpoint import Checkpoint
from fastgpt.data.corpus import Corpus
from fastgpt.data.layouts import IGNORED
from fastgpt.training import TrainingError
from fastgpt.training.loop import Trainer
from fastgpt.training.run_folder import RunFolder, read_metrics
from small_runs import MODEL, TRAIN, trainer


def test_it_learns_and_writes_what_the_design_says(corpus, tmp_path):
    cfg = dataclasses.replace(TRAIN, max_steps=60, eval_interval=20, lr=1e-2, min_lr=1e-3)
    state = trainer(corpus, tmp_path, cfg, dropout=0.0).run()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows if r["split"] == "val"] == [0, 20, 40, 60]
    assert [r["step"] for r in rows if r["split"] == "train"] == list(range(2, 61, 2))
    for row in rows:
        assert list(row) == ["step", "split", "loss", "elapsed_s", "tokens", "tokens_per_s", "lr"]
        assert row["tokens"] == row["step"] * 4 * 16
    val = [r["loss"] for r in rows if r["split"] == "val"]
    assert val[0] == pytest.approx(math.log(corpus.tokenizer.vocab_size), abs=0.1)
    assert val[-1] < val[0] - 1.0
    assert state["step"] == 60 and state["best_val"] == min(val)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert Checkpoint.load(tmp_path / "checkpoint" / "best.safetensors").state["best_val"] == min(val)


def test_target_loss_ends_the_run_early(corpus, tmp_path):
    cfg = dataclasses.replace(TRAIN, max_steps=500, lr=1e-2, target_loss=2.9)
    state = trainer(corpus, tmp_path, cfg).run()
    assert state["step"] < 500 and state["best_val"] <= 2.9


def test_a_loss_that_is_not_finite_stops_the_run(corpus, tmp_path, monkeypatch):
    run = trainer(corpus, tmp_path)
    loss = run.loss
    monkeypatch.setattr(run, "loss", lambda x, y: loss(x, y) * (math.inf if run.state["step"] == 6 else 1.0))
    with pytest.raises(TrainingError, match=r"step 7: the loss is inf; last good checkpoint: .*latest\.safetensors"):
        run.run()
    assert Checkpoint.load(run.folder.latest).state["step"] == 4


def test_a_diverging_learning_rate_ends_in_that_error(corpus, tmp_path):
    cfg = dataclasses.replace(TRAIN, lr=1e30, min_lr=1e30, warmup_steps=0, grad_clip=0.0, max_steps=50)
    with pytest.raises(TrainingError, match=r"loss is (nan|inf)"):
        trainer(corpus, tmp_path, cfg).run()


def test_micro_batches_are_the_batches_of_consecutive_numbers(corpus, tmp_path, monkeypatch):
    cfg = dataclasses.replace(TRAIN, max_steps=4, grad_accum=3)
    run, seen = trainer(corpus, tmp_path, cfg), []
    step = run._step
    monkeypatch.setattr(run, "_step", lambda micro_batches: seen.extend(micro_batches) or step(micro_batches))
    run.run()
    examples = corpus.examples("train", 16)
    assert len(seen) == 12
    for number, (x, y) in enumerate(seen):
        expected = examples.batch(cfg.batch_size, cfg.seed, number)
        assert torch.equal(x, expected[0]) and torch.equal(y, expected[1])


def test_the_reported_training_loss_is_a_mean_over_targets(names, tmp_path, monkeypatch):
    """Of names: steps, and the micro-batches in them, have different numbers of targets."""
    cfg = dataclasses.replace(TRAIN, layout="names", batch_size=2, grad_accum=2, max_steps=4, log_interval=4)
    run, seen = trainer(names, tmp_path, cfg, dropout=0.0), []
    step = run._step

    def noted(micro_batches):
        with torch.no_grad():
            for x, y in micro_batches:
                seen.append((float(run.model.loss(x, y)), int((y != IGNORED).sum())))
        return step(micro_batches)

    monkeypatch.setattr(run, "_step", noted)
    run.run()
    assert len({n for _, n in seen}) > 1
    expected = sum(loss * n for loss, n in seen) / sum(n for _, n in seen)
    (row,) = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["split"] == "train"]
    assert row["loss"] == pytest.approx(expected, rel=1e-6)


def test_a_model_with_nothing_to_train_is_refused(corpus, tmp_path):
    model = build_model(GPTConfig(vocab_size=corpus.tokenizer.vocab_size, **MODEL), 0).requires_grad_(False)
    with pytest.raises(TrainingError, match="model: every parameter is frozen"):
        Trainer(model, corpus, TRAIN, RunFolder(tmp_path))


def test_zero_steps_evaluate_and_save(corpus, tmp_path):
    state = trainer(corpus, tmp_path, dataclasses.replace(TRAIN, max_steps=0)).run()
    assert state["step"] == 0 and math.isfinite(state["best_val"])
    assert [r["split"] for r in read_metrics(tmp_path / "metrics.jsonl")] == ["val"]
    resumed = trainer(corpus, tmp_path, dataclasses.replace(TRAIN, max_steps=2), new=False)
    resumed.restore(Checkpoint.load(resumed.folder.latest))
    assert resumed.run()["step"] == 2


def test_a_clip_of_zero_does_not_clip(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: pytest.fail("clipped"))
    assert trainer(corpus, tmp_path, dataclasses.replace(TRAIN, grad_clip=0.0, max_steps=2)).run()["step"] == 2


def test_a_short_text_is_evaluated_once(tmp_path):
    """A validation split of fewer blocks than one batch: each of them counts once, however many are asked for."""
    path = tmp_path / "short.txt"
    path.write_text("the cat sat on the mat, and the dog on the log. " * 5)
    short = Corpus.load(path, "char", block_size=16)
    blocks = short.examples("val", 16)
    assert len(blocks) < TRAIN.batch_size * 3
    run = trainer(short, tmp_path / "run", dataclasses.replace(TRAIN, batch_size=32, eval_batches=5, max_steps=2))
    with torch.no_grad():
        expected = float(run.model.eval().loss(*blocks.evenly_spaced(len(blocks))))
    assert run.evaluate("val") == pytest.approx(expected, rel=1e-6)
    assert run.run()["step"] == 2


def test_a_clock_that_stands_still(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("fastgpt.training.loop.time.perf_counter", lambda: 5.0)
    state = trainer(corpus, tmp_path).run()
    assert state["elapsed_s"] == 0.0
    assert {r["tokens_per_s"] for r in read_metrics(tmp_path / "metrics.jsonl")} == {0.0}
