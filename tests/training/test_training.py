"""The trainer: learns, stops where told, survives being killed, and resumes to the same bits."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fastgpt import GPT, GPTConfig
from fastgpt.baselines import build_model
from fastgpt.checkpoint import Checkpoint, CheckpointError
from fastgpt.config import TrainConfig
from fastgpt.data.corpus import Corpus
from fastgpt.data.layouts import IGNORED
from fastgpt.data.prefetch import Prefetcher
from fastgpt.machine import DeviceError, resolve_device
from fastgpt.training import TrainingError
from fastgpt.training.loop import Interrupted, Trainer
from fastgpt.training.run_folder import RunFolder, plot_loss, read_metrics
from fastgpt.training.step import Precision, learning_rate, make_optimizer, mean_loss, training_dtype, training_step

TEXT = "to be, or not to be, that is the question:\nwhether 'tis nobler in the mind to suffer\n" * 60
MODEL = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.1}
TRAIN = TrainConfig(
    batch_size=4, max_steps=12, eval_interval=4, eval_batches=2, log_interval=2, warmup_steps=2, device="cpu"
)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def corpus(text_file) -> Corpus:
    return Corpus.load(text_file, "char", block_size=16)


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> Corpus:
    path = tmp_path_factory.mktemp("data") / "names.txt"
    words = {word for word in TEXT.split() if len(word) > 1} | {"a" * n for n in range(2, 16)}
    path.write_text("\n".join(sorted(words)))
    return Corpus.load(path, "char", block_size=16, layout="names")


def trainer(corpus: Corpus, path: Path, cfg: TrainConfig = TRAIN, new: bool = True, **model_changes) -> Trainer:
    folder = RunFolder(path)
    if new:
        folder.create(dataclasses.asdict(cfg))
    model_config = GPTConfig(vocab_size=corpus.tokenizer.vocab_size, **{**MODEL, **model_changes})
    return Trainer(build_model(model_config, cfg.seed), corpus, cfg, folder, "fastgpt train --resume")


def assert_same_checkpoint(a: Path, b: Path) -> None:
    first, second = Checkpoint.load(a), Checkpoint.load(b)
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name
    for name in ("step", "tokens", "best_val"):
        assert first.state[name] == second.state[name]


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


@pytest.mark.parametrize("stop_at", [1, 5, 8])
def test_stopped_and_resumed_equals_uninterrupted(corpus, tmp_path, stop_at, monkeypatch):
    """A signal at any step, with dropout and gradient accumulation: weights, moments, random state, val losses."""
    cfg = dataclasses.replace(TRAIN, grad_accum=2)
    trainer(corpus, tmp_path / "whole", cfg).run()

    stopped = trainer(corpus, tmp_path / "parts", cfg)
    step = stopped._step

    def step_then_signal(batches):
        loss = step(batches)
        if stopped.state["step"] + 1 == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(stopped, "_step", step_then_signal)
    with pytest.raises(Interrupted, match=rf"SIGTERM: stopped at step {stop_at} .*Resume with: fastgpt train --resume"):
        stopped.run()

    torch.manual_seed(999)  # what another process would start with
    resumed = trainer(corpus, tmp_path / "parts", cfg, new=False)
    resumed.restore(Checkpoint.load(resumed.folder.latest))
    resumed.folder.rewind(resumed.state["step"])
    assert resumed.state["step"] == stop_at
    resumed.run()
    for name in ("latest", "best"):
        file = f"checkpoint/{name}.safetensors"
        assert_same_checkpoint(tmp_path / "whole" / file, tmp_path / "parts" / file)
    losses = [
        [(r["step"], r["loss"]) for r in read_metrics(tmp_path / run / "metrics.jsonl") if r["split"] == "val"]
        for run in ("whole", "parts")
    ]
    assert losses[0] == losses[1]


def cli(*args: str) -> tuple[int, str]:
    """The exit code and the output of `fastgpt ...`, in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "fastgpt", *args], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


SIGNALLED = """
import os, signal, sys
from fastgpt.cli import main
from fastgpt.training.run_folder import RunFolder

append = RunFolder.append

def append_then_signal(self, row):
    append(self, row)
    if (row["step"], row["split"]) == (100, "{split}"):
        os.kill(os.getpid(), signal.{name})

RunFolder.append = append_then_signal
sys.exit(main(sys.argv[1:]))
"""


def signalled(name: str, split: str, *args: str) -> tuple[int, str]:
    """As `cli`, in a process that sends itself the signal `name` once the row of `split` at step 100 is written."""
    program = SIGNALLED.format(name=name, split=split)
    done = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


SMALL = ["--block-size", "16", "--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--batch-size", "4"]
SMALL += ["--device", "cpu"]


def test_a_killed_process_resumes_to_the_same_bits(text_file, tmp_path):
    """SIGKILL leaves no time to save: the run goes on from its last checkpoint and ends where it would have."""
    options = ["train", "--data", str(text_file), *SMALL, "--eval-interval", "50", "--eval-batches", "2"]
    options += ["--max-steps", "130"]
    code, output = signalled("SIGKILL", "val", *options, "--out", str(tmp_path / "killed"))
    assert code == -signal.SIGKILL, output
    assert Checkpoint.load(tmp_path / "killed" / "checkpoint" / "latest.safetensors").state["step"] == 50
    for out, extra in (("killed", ["--resume"]), ("whole", [])):
        code, output = cli(*options, "--out", str(tmp_path / out), *extra)
        assert code == 0, output
    a, b = (tmp_path / run / "checkpoint" / "latest.safetensors" for run in ("killed", "whole"))
    assert Checkpoint.load(a).state["step"] == 130
    assert_same_checkpoint(a, b)
    rows = [[(r["step"], r["split"], r["loss"]) for r in read_metrics(tmp_path / run / "metrics.jsonl")]
            for run in ("killed", "whole")]  # fmt: skip
    assert rows[0] == rows[1]


def test_ctrl_c_saves_and_says_how_to_resume(text_file, tmp_path):
    out = tmp_path / "run"
    code, output = signalled("SIGINT", "train", "train", "--data", str(text_file), *SMALL, "--out", str(out))
    assert code == 1
    assert Checkpoint.load(out / "checkpoint" / "latest.safetensors").state["step"] == 100
    assert "SIGINT: stopped at step 100 and saved" in output
    assert f"Resume with: fastgpt train --out {out} --resume" in output
    assert "Traceback" not in output


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


def test_schedule():
    cfg = TrainConfig(lr=1.0, min_lr=0.1, warmup_steps=9, max_steps=109)
    rates = [learning_rate(step, cfg) for step in range(112)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == max(rates) == 1.0
    assert rates[59] == pytest.approx(0.55)
    assert rates[109:] == [0.1] * 3
    assert all(a > b for a, b in pairwise(rates[9:110]))
    assert learning_rate(0, TrainConfig(max_steps=0, warmup_steps=0, lr=1.0, min_lr=0.5)) == 0.5


def test_weight_decay_is_on_matrices_only(corpus):
    model = build_model(GPTConfig(vocab_size=9, **MODEL), 0)
    decayed, kept = make_optimizer(model, TRAIN).param_groups
    assert {p.ndim for p in decayed["params"]} == {2} and decayed["weight_decay"] == 0.1
    assert {p.ndim for p in kept["params"]} == {1} and kept["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


# ---- gradient accumulation ----


def masked(y: torch.Tensor, seed: int) -> torch.Tensor:
    """Targets left out at random, all of them in the first quarter of the rows."""
    keep = torch.rand(y.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    keep[: len(y) // 4] = False
    return torch.where(keep, y, IGNORED)


def rows_of(layout: str, corpus: Corpus, names: Corpus) -> tuple[torch.Tensor, torch.Tensor]:
    if layout == "names":
        return names.examples("train", 16).batch(12, seed=1, step=0)
    x, y = dataclasses.replace(corpus, layout="windows" if layout == "windows" else "blocks").examples(
        "train", 16
    ).batch(12, seed=1, step=0)  # fmt: skip
    return x, masked(y, 2) if layout == "masked" else y


@pytest.mark.parametrize("layout", ["blocks", "windows", "names", "masked"])
@pytest.mark.parametrize("splits", [[4, 4, 4], [3, 3, 3, 3], [1, 2, 9]], ids=str)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-7), (torch.float32, 1e-6)], ids=str)
@pytest.mark.filterwarnings("ignore:fastgpt. .* does not take the native backend")
def test_gradients_accumulated_are_those_of_one_batch(corpus, names, layout, splits, dtype, atol):
    """One step of plain gradient descent, from 12 rows at once and from the same rows in parts."""
    x, y = rows_of(layout, corpus, names)

    def step(sizes: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model = build_model(GPTConfig(vocab_size=40, **MODEL | {"dropout": 0.0}), 0).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        micro_batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
        precision = Precision(torch.device("cpu"), "float32")
        return training_step(model, model.loss, optimizer, micro_batches, precision, 0.0), list(model.parameters())

    (loss, weights), (expected_loss, expected) = step(splits), step([12])
    torch.testing.assert_close(loss, expected_loss, atol=1e-6, rtol=0)  # the trainer adds losses up in float32
    for p, q in zip(weights, expected, strict=True):
        torch.testing.assert_close(p, q, atol=atol, rtol=0)


def test_a_step_without_a_counted_target_moves_nothing_and_is_no_nan():
    model = build_model(GPTConfig(vocab_size=9, **MODEL), 0)
    before = [p.clone() for p in model.parameters()]
    x, y = torch.zeros(2, 4, 16, dtype=torch.int64), torch.full((2, 4, 16), IGNORED)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss = training_step(
        model, model.loss, optimizer, list(zip(x, y, strict=True)), Precision(torch.device("cpu"), "float32"), 1.0
    )
    assert loss == 0.0 and all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


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


def test_mean_loss_is_over_targets_in_batches_of_any_size(names):
    model = build_model(GPTConfig(vocab_size=names.tokenizer.vocab_size, **MODEL), 0).eval()
    x, y = names.examples("val", 16).evenly_spaced(9)
    y[4:6] = IGNORED
    precision = Precision(torch.device("cpu"), "float32")
    at_once = float(model.loss(x, y).detach())
    for batch_size in (1, 2, 4, 9, 100):
        assert mean_loss(model.loss, x, y, batch_size, precision) == pytest.approx(at_once, rel=1e-6)
    assert math.isnan(mean_loss(model.loss, x, torch.full_like(y, IGNORED), 4, precision))


# ---- half precision ----


@pytest.mark.parametrize(
    ("device", "has_bfloat16", "asked", "dtype", "why"),
    [
        ("cuda", True, "auto", torch.bfloat16, "this GPU has it"),
        ("cuda", False, "auto", torch.float16, "this GPU emulates bfloat16"),
        ("cuda", False, "bfloat16", torch.bfloat16, "asked for, but this GPU emulates it: float16 is faster"),
        ("cuda", True, "bfloat16", torch.bfloat16, "asked for"),
        ("cuda", True, "float16", torch.float16, "asked for"),
        ("cuda", True, "float32", torch.float32, "asked for"),
        ("cpu", True, "auto", torch.float32, "half precision is the default on CUDA alone"),
        ("mps", True, "auto", torch.float32, "half precision is the default on CUDA alone"),
        ("mps", False, "float16", torch.float16, "asked for"),
    ],
)
def test_the_dtype_of_training(monkeypatch, device, has_bfloat16, asked, dtype, why):
    """As PyTorch answers on a T4: bfloat16 is supported, unless one asks for it without emulation."""
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bfloat16 or including_emulation
    )
    assert training_dtype(torch.device(device), asked) == (dtype, why)


def test_a_device_without_autocast_trains_in_float32_alone():
    assert Precision(torch.device("meta"), "float32").dtype == torch.float32
    with pytest.raises(TrainingError, match="dtype: float16 needs autocast, which PyTorch does not have on 'meta'"):
        Precision(torch.device("meta"), "float16")


HALF = dataclasses.replace(TRAIN, dtype="float16", max_steps=10, grad_accum=2)


def overflow_at(run: Trainer, *steps: int) -> None:
    """Make the gradients of these steps overflow, as float16's do where the scale has become too large for them."""
    loss = run.loss

    def overflowing(x, y):
        value = loss(x, y)
        if run.state["step"] in steps:
            value.register_hook(lambda gradient: gradient * math.inf)
        return value

    run.loss = overflowing


def test_float16_trains_with_scaled_gradients(corpus, tmp_path):
    cfg = dataclasses.replace(HALF, max_steps=60, eval_interval=20, lr=1e-2, min_lr=1e-3, grad_accum=1)
    run = trainer(corpus, tmp_path, cfg, dropout=0.0)
    dtypes = set()
    hook = run.model.blocks[0].mlp.up.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
    run.run()
    hook.remove()
    assert dtypes == {torch.float16} and run.model.lm_head.weight.dtype == torch.float32
    val = [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl") if r["split"] == "val"]
    assert val[-1] < val[0] - 1.0
    assert run.precision.scaler.get_scale() > 1.0
    assert run.checkpoint().state["scaler"]["_growth_tracker"] == 60 - run.skipped_steps()


def test_a_step_whose_gradients_overflow_is_left_out(corpus, tmp_path, capsys):
    run = trainer(corpus, tmp_path, HALF)
    overflow_at(run, 2, 6)
    moved, step = [], run._step

    def watched(micro_batches):
        before = [p.detach().clone() for p in run.model.parameters()]
        loss = step(micro_batches)
        moved.append(any(not torch.equal(p, q) for p, q in zip(before, run.model.parameters(), strict=True)))
        return loss

    run._step = watched
    state = run.run()
    assert moved == [number not in (2, 6) for number in range(10)]
    assert state["step"] == 10 and run.skipped_steps() == 2
    assert run.precision.scaler.get_scale() == 2.0**14  # halved twice from PyTorch's 2**16
    assert {int(s["step"]) for s in run.optimizer.state.values()} == {8}
    assert "2 steps skipped, whose float16 gradients overflowed" in capsys.readouterr().out


def test_clipping_sees_gradients_without_their_scale(corpus, monkeypatch):
    """Plain gradient descent with a small clip: an unscaled gradient of norm 1e-3 moves the weights by that much."""
    model = build_model(GPTConfig(vocab_size=corpus.tokenizer.vocab_size, **MODEL), 0)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    batch = corpus.examples("train", 16).batch(4, seed=1, step=0)
    training_step(model, model.loss, optimizer, [batch], Precision(torch.device("cpu"), "float16"), 1e-3)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((after - before).norm()) == pytest.approx(1e-3, rel=1e-2)


def test_float16_resumes_to_the_same_bits(corpus, tmp_path):
    """With overflows on both sides of the stop: scale, growth and AdamW's own count of steps are in the checkpoint."""

    def run_to(path: Path, max_steps: int, new: bool = True) -> Trainer:
        constant = {"warmup_steps": 0, "min_lr": HALF.lr}  # the schedule is that of max_steps, which differ here
        run = trainer(corpus, path, dataclasses.replace(HALF, max_steps=max_steps, **constant), new)
        overflow_at(run, 1, 7)
        if not new:
            torch.manual_seed(999)
            run.restore(Checkpoint.load(run.folder.latest))
        run.run()
        return run

    run_to(tmp_path / "whole", 10)
    run_to(tmp_path / "parts", 6)
    resumed = run_to(tmp_path / "parts", 10, new=False)
    assert resumed.skipped_steps() == 2
    a, b = (tmp_path / run / "checkpoint" / "latest.safetensors" for run in ("whole", "parts"))
    assert_same_checkpoint(a, b)
    assert Checkpoint.load(a).state["scaler"] == Checkpoint.load(b).state["scaler"]


def test_a_checkpoint_from_before_the_scaler_resumes(corpus, tmp_path):
    """Without the scaler's state and AdamW's own count of steps, as checkpoints were; in float32 to the same bits."""
    for dtype in ("float32", "float16"):
        cfg = dataclasses.replace(TRAIN, dtype=dtype, max_steps=4)
        run = trainer(corpus, tmp_path / dtype, cfg)
        run.run()
        saved = Checkpoint.load(run.folder.latest)
        saved.state.pop("scaler", None)
        saved.tensors = {n: t for n, t in saved.tensors.items() if not n.startswith("step.")}
        resumed = trainer(corpus, tmp_path / dtype, cfg, new=False)
        resumed.restore(saved)
        assert resumed.precision.scaler.get_scale() == (2.0**16 if dtype == "float16" else 1.0)
        assert {float(s["step"]) for s in resumed.optimizer.state.values()} == {4.0}
        if dtype == "float32":
            before, after = run.checkpoint().tensors, resumed.checkpoint().tensors
            assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())


def test_gradients_that_overflow_without_a_scale_end_the_run(corpus, tmp_path):
    run = trainer(corpus, tmp_path, dataclasses.replace(HALF, max_steps=40, eval_interval=40))
    overflow_at(run, *range(40))
    with pytest.raises(
        TrainingError, match=r"step 18: the gradients overflow float16 even unscaled; .*--dtype float32"
    ):
        run.run()


def test_a_loss_that_is_not_finite_is_an_error_in_float16_too(corpus, tmp_path):
    run = trainer(corpus, tmp_path, HALF)
    loss = run.loss
    run.loss = lambda x, y: loss(x, y) * (math.nan if run.state["step"] == 5 else 1.0)
    with pytest.raises(TrainingError, match=r"step 6: the loss is nan; last good checkpoint: .*latest\.safetensors"):
        run.run()


# ---- devices ----


@pytest.mark.parametrize(
    ("cuda", "mps", "taken"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu"), (True, False, "cuda")]
)
def test_auto_takes_the_gpu_that_is_there(monkeypatch, cuda, mps, taken):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device("auto").type == taken


@pytest.mark.parametrize("name", ["nonsense", "", "cuda:999", "meta", "hpu", "vulkan", "mkldnn", "privateuseone"])
@pytest.mark.filterwarnings("ignore:'mkldnn'")
def test_a_device_that_is_not_there_is_refused_in_one_line(name):
    with pytest.raises(DeviceError) as error:
        resolve_device(name)
    assert str(error.value).startswith(f"device: {name!r} cannot be used here: ")
    assert "\n" not in str(error.value) and "INTERNAL" not in str(error.value) and len(str(error.value)) < 250


@pytest.mark.parametrize("name", ["cuda", "mps", "xpu"])
def test_a_gpu_that_is_missing_is_refused(name):
    module = torch.get_device_module(name)
    if module.is_available():
        assert resolve_device(name).type == name
        return
    with pytest.raises(DeviceError, match=f"device: '{name}' cannot be used here: "):
        resolve_device(name)


def test_the_random_state_of_any_gpu_is_kept(corpus, tmp_path, monkeypatch):
    """As on a Mac, with a stand-in for torch.mps: AdamW's count of steps stays on the CPU, where PyTorch wants it."""

    class Module:
        state = torch.arange(16, dtype=torch.uint8)

        def get_rng_state(self, device):
            assert device.type == "mps"
            return self.state

        def set_rng_state(self, state, device):
            assert device.type == "mps"
            self.state = state

    module = Module()
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    run = trainer(corpus, tmp_path, dataclasses.replace(TRAIN, max_steps=1))
    run.run()
    run.device = torch.device("mps")
    saved = run.checkpoint()
    assert torch.equal(saved.tensors["rng.mps"], torch.arange(16, dtype=torch.uint8))
    module.state = torch.zeros(16, dtype=torch.uint8)
    run.optimizer.defaults["fused"] = False
    run.restore(saved)
    assert torch.equal(module.state, torch.arange(16, dtype=torch.uint8))
    assert {s["step"].device.type for s in run.optimizer.state.values()} == {"cpu"}
    assert "rng.mps" not in trainer(corpus, tmp_path, new=False).checkpoint().tensors


def test_only_cuda_gets_asynchronous_copies(corpus, monkeypatch):
    """Elsewhere the memory they read is not pinned, and may be used again before they have read it."""
    to, asked = torch.Tensor.to, []

    def noted(tensor, device, non_blocking=False):
        asked.append(non_blocking)
        return to(tensor, device)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    with Prefetcher(corpus.examples("train", 16), 4, seed=1, device="meta") as batches:
        next(batches)
    assert asked == [False, False]


# ---- checkpoints ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.tensors.pop("exp_avg.ln_f.weight"), "tensor exp_avg.ln_f.weight is missing"),
        (lambda c: c.tensors.pop("model.ln_f.weight"), "tensor model.ln_f.weight is missing"),
        (lambda c: c.tensors.pop("step.ln_f.weight"), "tensor step.ln_f.weight is missing"),
        (lambda c: c.tensors.update({"step.ln_f.weight": torch.zeros(2)}), r"step.ln_f.weight has shape \(2,\)"),
        (lambda c: c.tensors.pop("rng.cpu"), "tensor rng.cpu is missing"),
        (lambda c: c.state.update(train_tokens=5), "field 'train_tokens' is 5"),
        (lambda c: c.state.pop("tokens"), "field 'state'"),
        (lambda c: c.tensors.update({"rng.cpu": torch.zeros(3, dtype=torch.uint8)}), "tensor rng.cpu"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(corpus, tmp_path, change, message):
    run = trainer(corpus, tmp_path)
    run.run()
    saved = Checkpoint.load(run.folder.latest)
    change(saved)
    fresh = trainer(corpus, tmp_path, new=False)
    before = [p.clone() for p in fresh.model.parameters()]
    with pytest.raises(CheckpointError, match=message):
        fresh.restore(saved)
    assert all(torch.equal(p, q) for p, q in zip(before, fresh.model.parameters(), strict=True))
    assert fresh.state["step"] == 0 and not fresh.optimizer.state


def test_a_folder_with_a_run_is_not_overwritten(corpus, tmp_path):
    run = trainer(corpus, tmp_path)
    run.run()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(TrainingError, match="already holds a run; add --resume"):
        trainer(corpus, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_disk_full_while_saving_names_the_file_and_keeps_the_old_checkpoint(corpus, tmp_path, monkeypatch):
    run = trainer(corpus, tmp_path)
    run.run()
    before = run.folder.latest.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastgpt.files.os.fsync", full)
    with pytest.raises(CheckpointError, match=r"latest\.safetensors: cannot be written: .*No space left"):
        run._save()
    assert run.folder.latest.read_bytes() == before


def test_metrics_reader(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(TrainingError, match="line 2 is not JSON"):
        read_metrics(path)


# ---- what users bring ----


def test_a_frozen_part_stays_as_it_is_and_resumes(corpus, tmp_path):
    """Fine-tuning the last block and the head: frozen weights are saved, but have no moments."""

    def frozen(path: Path, cfg: TrainConfig, new: bool = True) -> Trainer:
        folder = RunFolder(path)
        if new:
            folder.create({})
        model = build_model(GPTConfig(vocab_size=corpus.tokenizer.vocab_size, tie_weights=False, **MODEL), 0)
        for part in (model.token_embedding, model.position_embedding, model.blocks[0]):
            part.requires_grad_(False)
        return Trainer(model, corpus, cfg, folder)

    cfg = dataclasses.replace(TRAIN, warmup_steps=0, min_lr=TRAIN.lr)
    whole = frozen(tmp_path / "whole", cfg)
    before = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    whole.run()
    for name, p in whole.model.named_parameters():
        assert torch.equal(p, before[name]) == (not p.requires_grad), name
    frozen(tmp_path / "parts", dataclasses.replace(cfg, max_steps=5)).run()
    resumed = frozen(tmp_path / "parts", cfg, new=False)
    resumed.restore(Checkpoint.load(resumed.folder.latest))
    resumed.run()
    assert_same_checkpoint(whole.folder.latest, resumed.folder.latest)
    saved = Checkpoint.load(whole.folder.latest)
    assert saved.part("exp_avg").keys() == {n for n, p in whole.model.named_parameters() if p.requires_grad}
    assert saved.part("model").keys() == before.keys()


def test_moments_of_what_is_frozen_now_are_left_out(corpus, tmp_path):
    run = trainer(corpus, tmp_path, dataclasses.replace(TRAIN, max_steps=1))
    run.run()
    resumed = trainer(corpus, tmp_path, new=False)
    resumed.model.blocks[0].requires_grad_(False)
    resumed.restore(Checkpoint.load(run.folder.latest))
    assert len(resumed.optimizer.state) == sum(p.requires_grad for p in resumed.model.parameters())


def test_a_model_with_nothing_to_train_is_refused(corpus, tmp_path):
    model = build_model(GPTConfig(vocab_size=corpus.tokenizer.vocab_size, **MODEL), 0).requires_grad_(False)
    with pytest.raises(TrainingError, match="model: every parameter is frozen"):
        Trainer(model, corpus, TRAIN, RunFolder(tmp_path))


class Counting(GPT):
    """A user's model: a buffer that is kept and one that is not, and a weight that only odd passes use."""

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__(cfg)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.late = torch.nn.Parameter(torch.zeros(cfg.n_embd))

    def hidden(self, idx, cache=None):
        if self.training:
            self.passes += 1
        x = super().hidden(idx, cache)
        return x + self.late if self.passes % 2 else x


def test_buffers_and_weights_of_some_steps_resume_to_the_same_bits(corpus, tmp_path):
    def counting(path: Path, max_steps: int, new: bool = True) -> Trainer:
        folder = RunFolder(path)
        if new:
            folder.create({})
        torch.manual_seed(1)
        model = Counting(GPTConfig(vocab_size=corpus.tokenizer.vocab_size, **MODEL))
        cfg = dataclasses.replace(TRAIN, max_steps=max_steps, warmup_steps=0, min_lr=TRAIN.lr)
        run = Trainer(model, corpus, cfg, folder)
        if not new:
            run.restore(Checkpoint.load(folder.latest))
        run.run()
        return run

    whole = counting(tmp_path / "whole", 9)
    counting(tmp_path / "parts", 4)
    resumed = counting(tmp_path / "parts", 9, new=False)
    assert_same_checkpoint(whole.folder.latest, resumed.folder.latest)
    saved = Checkpoint.load(whole.folder.latest)
    assert int(saved.tensors["model.passes"]) == 9 and "model.scratch" not in saved.tensors
    assert float(saved.tensors["step.late"]) == 5.0 and float(saved.tensors["step.ln_f.weight"]) == 9.0


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


def test_a_full_disk_while_a_row_is_written_names_the_file(corpus, tmp_path, monkeypatch):
    """The error comes where the buffer is flushed, and again where the file is closed, as on a real disk."""
    run = trainer(corpus, tmp_path)
    written, append = [], run.folder.append

    class Full(io.TextIOBase):
        def write(self, text):
            return len(text)

        def close(self):
            raise OSError(28, "No space left on device")

    def rows_then_full(row):
        if len(written) == 5:
            monkeypatch.setattr("fastgpt.training.run_folder.open", lambda *args, **kwargs: Full(), raising=False)
        append(row)
        written.append(row)

    monkeypatch.setattr(run.folder, "append", rows_then_full)
    message = r"metrics\.jsonl: cannot be written: No space left on device; last good checkpoint: .*latest\.safetensors"
    with pytest.raises(TrainingError, match=message):
        run.run()
    monkeypatch.undo()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5


def test_a_loss_curve_that_cannot_be_written_does_not_fail_the_run(corpus, tmp_path):
    run = trainer(corpus, tmp_path, dataclasses.replace(TRAIN, max_steps=2))
    (tmp_path / "loss.png").mkdir()
    assert run.run()["step"] == 2
    assert "loss.png: cannot be written" in plot_loss(run.folder.metrics_path, tmp_path / "loss.png")


def test_a_folder_whose_name_looks_like_a_formula(corpus, tmp_path):
    run = trainer(corpus, tmp_path / r"lr$\nonsense{$", dataclasses.replace(TRAIN, max_steps=1))
    run.run()
    assert (run.folder.path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_settings_are_stored_as_toml(corpus, tmp_path):
    import tomllib

    trainer(corpus, tmp_path)
    stored = tomllib.loads((tmp_path / "config.toml").read_text())
    assert stored["lr"] == TRAIN.lr and "target_loss" not in stored
    assert json.loads(json.dumps(stored)) == {k: v for k, v in dataclasses.asdict(TRAIN).items() if v is not None}
