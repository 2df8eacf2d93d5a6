"""Every benchmark, on small shapes."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter

import pytest
import torch

from fastgpt.benchmarks import (
    bench_import,
    bench_linear,
    bench_patch,
    bench_time_to_loss,
    bench_train_step,
    bench_training_loop,
)
from fastgpt.benchmarks.bench_attention import AttentionShape
from fastgpt.benchmarks.bench_cross_entropy import CrossEntropyShape
from fastgpt.benchmarks.bench_data import PARTS, DataShape, data_work
from fastgpt.benchmarks.bench_embedding import EmbeddingShape
from fastgpt.benchmarks.bench_generate import GenerationShape, generate_work
from fastgpt.benchmarks.bench_layer_norm import AddLayerNormShape, LayerNormShape
from fastgpt.benchmarks.bench_linear import LinearShape
from fastgpt.benchmarks.bench_linear_cross_entropy import LinearCrossEntropyShape
from fastgpt.benchmarks.bench_linear_log_probs import LinearLogProbsShape
from fastgpt.benchmarks.bench_patch import patch_work
from fastgpt.benchmarks.bench_train_step import TrainStepShape, train_step_work
from fastgpt.benchmarks.harness import step_profile, suite
from fastgpt.benchmarks.harness.models import ModelShape
from fastgpt.benchmarks.harness.op_work import op_work
from fastgpt.benchmarks.publish import rows
from fastgpt.config import TrainConfig
from fastgpt.data.corpus import Corpus

CPU = torch.device("cpu")
MODEL = """
import torch
class GPTLanguageModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(vocab_size, vocab_size)
    def forward(self, x, y=None):
        logits = self.table(x)
        return logits, None if y is None else torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
"""
NANOGPT = MODEL.replace("GPTLanguageModel", "GPT").replace("__init__(self):", "__init__(self, c):").replace(
    "vocab_size", "c.vocab_size"
) + """
    def generate(self, x, n):
        return torch.cat([x, x.new_zeros(len(x), n)], dim=1)
class GPTConfig:
    def __init__(self, **settings):
        self.__dict__.update(settings)
"""  # fmt: skip


@pytest.fixture
def checkouts(tmp_path, setting) -> suite.Setting:
    """Stand-ins for the two checkouts; the lecture's script would train, and must not run."""
    (tmp_path / "model.py").write_text(NANOGPT)
    (tmp_path / "gpt.py").write_text(MODEL + "\nraise SystemExit('the script ran')\n")
    given = {"nanogpt": str(tmp_path), "lecture": str(tmp_path / "gpt.py")}
    return suite.Setting(CPU, seconds=0.0, min_rounds=3, min_time=0.0, **given)


def peer_names(run: suite.Suite) -> set[str]:
    assert rows.read([run.path]).rows == run.rows
    ours = [row for row in run.rows if row.implementation == "fastgpt"]
    assert all(row.median_ms > 0 and row.verdict and row.backend in ("torch", "native") for row in ours)
    return {row.implementation for row in run.rows} - {"fastgpt"}


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_op_benchmarks(run, setting, direction):
    for shape in (
        AttentionShape(1, 2, 16, 8),
        AttentionShape(1, 2, 16, 8, Hkv=1, dropout=0.2),
        EmbeddingShape(2, 8, 30, 16, zipf=True),
        LayerNormShape(8, 16),
        AddLayerNormShape(8, 16, 0.1),
        CrossEntropyShape(8, 33),
        CrossEntropyShape(8, 33, z_loss=0.1, softcap=3.0),
        LinearCrossEntropyShape(8, 16, 33),
        LinearCrossEntropyShape(8, 16, 33, z_loss=0.1, softcap=3.0),
        LinearLogProbsShape(8, 16, 33),
        LinearShape(8, 16, 33, bias=True),
    ):
        run.measure_contenders(op_work(setting, shape, direction))
    assert peer_names(run) == {"sdpa flash", "sdpa math", "torch", "torch logsumexp"}
    assert run.absent["attention"]["flash-attn"] == "its kernels run on CUDA devices only"
    assert "flex attention, B1 H2 T16 D8 causal, " + direction in run.absent["attention"]
    assert {row.direction for row in run.rows} == {direction}
    assert [row.parity_error_ratio is None for row in run.rows if ", dropout" in row.shape].count(False) == 2


@pytest.mark.parametrize("reason", [None, "not measured to be faster"])
def test_the_benchmark_of_an_internal_op_tells_what_was_measured(setting, monkeypatch, reason):
    monkeypatch.setattr(bench_linear, "linear_choice", lambda kernel: (reason is None, reason or "it is faster"))
    work = op_work(setting, LinearShape(8, 16, 33), "forward")
    remark = reason and f"linear was measured on torch, not on native: {reason}"
    assert (work.backend, work.remark) == ("torch" if reason else "native", remark)


def test_decoding_benchmark(run, setting):
    run.measure_contenders(op_work(setting, AttentionShape(1, 2, 16, 8, one_query=True), "forward"))
    assert "sdpa flash" in {row.implementation for row in run.rows}
    assert run.rows[0].flops == 4 * 2 * 16 * 8


def test_training_step_benchmark(run, checkouts):
    run.measure_contenders(train_step_work(checkouts, TrainStepShape(B=2, T=8, L=1, H=2, C=16, V=33)))
    assert {row.implementation for row in run.rows} == {
        "fastgpt", "nanoGPT", "lecture", "transformers sdpa", "transformers eager",
    }  # fmt: skip
    assert run.rows[0].extra["tokens_per_s"] > 0 and run.rows[0].parity_error_ratio <= 2.0
    told = {row.implementation: row.extra.get("ms_by_kind", {}).keys() for row in run.rows}
    assert told["fastgpt"] == told["nanoGPT"] == {*step_profile.COLUMNS, "profiled step"} and not told["lecture"]


PATCHED = ModelShape(B=2, T=8, L=1, H=2, C=16, V=33, dropout=0.1)


def test_a_patched_model_is_compared_with_the_same_model_as_it_is(run, setting):
    pytest.importorskip("transformers", minversion="5")
    run.measure_contenders(patch_work(setting, PATCHED))
    assert [row.implementation for row in run.rows] == ["fastgpt", "transformers sdpa"]
    assert run.rows[0].parity_error_ratio <= 2.0 and run.rows[0].extra["tokens_per_s"] > 0


def test_a_patched_model_with_other_losses_is_not_measured(run, setting, monkeypatch):
    pytest.importorskip("transformers", minversion="5")
    monkeypatch.setattr(bench_patch, "LOSS_TOLERANCE", {"cpu": -1.0})
    with pytest.raises(suite.ParityError, match="the loss of step 1 is"):
        run.measure_contenders(patch_work(setting, PATCHED))
    assert not run.rows


def test_compiled_peers_are_compared_with_an_eager_step_and_say_how_long_the_first_one_took(
    run, checkouts, monkeypatch
):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    run.measure_contenders(
        train_step_work(checkouts, TrainStepShape(B=2, T=8, L=1, H=2, C=16, V=33, peers_compiled=True))
    )
    told = {row.implementation: "first_step_s" in row.extra for row in run.rows}
    assert told == {"fastgpt": False, "nanoGPT": True, "transformers sdpa": True}
    assert all(row.shape.endswith(", peers compiled") and "ms_by_kind" not in row.extra for row in run.rows)


def test_the_first_call_alone_is_told_and_compiles_into_an_empty_cache(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    extra, caches = {}, []
    call = bench_train_step.first_told(lambda: caches.append(os.environ["TORCHINDUCTOR_CACHE_DIR"]), extra)
    call()
    seconds = extra["first_step_s"]
    call()
    assert extra["first_step_s"] is seconds and caches[0] != "elsewhere" and caches[1] == "elsewhere"


def test_a_graphed_training_step_is_rehearsed(run, checkouts):
    rehearsal = dataclasses.replace(checkouts, rehearsal=True)
    shape = TrainStepShape(B=2, T=8, L=1, H=2, C=16, V=33, graphed=True)
    run.measure_contenders(train_step_work(rehearsal, shape))
    assert [row.implementation for row in run.rows] == ["fastgpt", "nanoGPT"]
    assert run.rows[0].shape.endswith(", CUDA graph")


def test_a_step_that_no_graph_takes_is_not_measured_as_one(run, checkouts, monkeypatch):
    def refuse(self, run, generator=None):
        raise RuntimeError("cannot be captured")

    monkeypatch.setattr(bench_train_step.RunAgain, "record", refuse)
    rehearsal = dataclasses.replace(checkouts, rehearsal=True)
    shape = TrainStepShape(B=2, T=8, L=1, H=2, C=16, V=33, graphed=True)
    with pytest.raises(RuntimeError, match="no CUDA graph: cannot be captured"), pytest.warns(UserWarning):
        run.measure_contenders(train_step_work(rehearsal, shape))
    assert not run.rows


def test_generation_benchmark(run, checkouts):
    run.measure_contenders(generate_work(checkouts, GenerationShape(B=1, T=40, L=1, H=2, C=16, V=33, new=5)))
    names = [row.implementation for row in run.rows]
    assert names == ["fastgpt", "nanoGPT", "transformers sdpa", "transformers eager"]
    assert run.rows[0].parity_error_ratio <= 2.0 and run.rows[0].extra["tokens_per_s"] > 0


def test_graphed_generation_is_compared_with_eager_generation(run, checkouts):
    rehearsal = dataclasses.replace(checkouts, rehearsal=True)
    shape = GenerationShape(B=1, T=40, L=1, H=2, C=16, V=33, new=5, graphed=True)
    run.measure_contenders(generate_work(rehearsal, shape))
    assert [row.implementation for row in run.rows] == ["fastgpt", "fastgpt eager"]
    assert run.rows[0].shape.endswith(", CUDA graph")


def test_generation_benchmark_past_the_context(run, checkouts):
    shape = GenerationShape(B=2, T=40, L=1, H=2, C=16, V=33, new=5, prompt=40)
    run.measure_contenders(generate_work(checkouts, shape))
    assert [row.implementation for row in run.rows] == ["fastgpt", "nanoGPT"]
    assert run.rows[0].shape == "B2 L1 H2 C16 V33, prompt 40, 5 new tokens, exact window"
    assert run.rows[0].flops == 2 * (2 * 5 * 40) * 2 * 16**2, "the keys and values of whole windows"
    assert run.absent["generate"][f"transformers sdpa, {shape}"] == "it has no positions after n_positions"
    run.rows.clear(), run.demands.clear()
    run.measure_contenders(generate_work(checkouts, dataclasses.replace(shape, stride=20)))
    assert [row.implementation for row in run.rows] == ["fastgpt", "fastgpt exact window"]
    assert run.rows[0].shape.endswith(", stride 20") and run.rows[0].parity_error_ratio <= 2.0


def test_generation_benchmark_of_unequal_prompts(run, checkouts):
    shape = GenerationShape(B=3, T=40, L=1, H=2, C=16, V=33, new=5, prompt=7, shorter=3)
    assert shape.lengths == [7, 4, 1] and shape.tiny().lengths == [7, 5]
    run.measure_contenders(generate_work(checkouts, shape))
    names = [row.implementation for row in run.rows]
    assert names == ["fastgpt", "transformers sdpa", "transformers eager", "fastgpt one at a time"]
    assert run.rows[0].shape.endswith(", unequal prompts") and run.rows[0].parity_error_ratio <= 2.0
    assert run.absent["generate"][f"nanoGPT, {shape}"] == "it has no mask for padding"


def test_time_to_loss_benchmark(run, checkouts, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_time_to_loss, "EVAL_INTERVAL", 2)
    monkeypatch.setattr(bench_time_to_loss, "EVAL_BLOCKS", 12)
    (tmp_path / "text.txt").write_text("To be, or not to be: that is the question. " * 100)
    goal, corpus = bench_time_to_loss.Goal("shakespeare-char-cpu", 9.0), Corpus.load(str(tmp_path / "text.txt"))
    run.measure_contenders(bench_time_to_loss.time_to_loss_work(checkouts, goal, corpus))
    assert {row.implementation for row in run.rows} == {"fastgpt", "nanoGPT", "nanoGPT at its best rate"}
    assert all(row.extra["val_loss"] <= 9.0 and row.rounds == 3 for row in run.rows)


def test_training_loop_benchmark(run, checkouts, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("To be, or not to be: that is the question. " * 100)
    settings = ({"block_size": 8, "n_layer": 1, "n_head": 1, "n_embd": 8}, {"batch_size": 2, "grad_accum": 2})
    monkeypatch.setattr(bench_training_loop, "preset", lambda name: settings)
    short, corpus = bench_training_loop.ShortRun("small", 6), Corpus.load(str(tmp_path / "text.txt"))
    run.measure_contenders(bench_training_loop.training_loop_work(checkouts, short, corpus))
    ours, alone = run.rows
    names = (ours.shape, ours.implementation, alone.implementation)
    assert names == ("small, 6 steps on shakespeare", "fastgpt", "steps alone")
    names = {f"{part}_share" for part in ("evaluation", "checkpoint", "metrics", "waiting")}
    assert set(ours.extra) == names and all(0.0 <= share < 1.0 for share in ours.extra.values()) and not alone.extra


def test_shares_are_those_at_the_intervals_of_the_preset():
    seconds = Counter(evaluation=8.0, checkpoint=2.0, metrics=6.0, waiting=3.0)
    calls = Counter(evaluation=4, checkpoint=2, metrics=3, waiting=12)
    cfg = TrainConfig(eval_interval=10, log_interval=5, grad_accum=2)
    # 2 evaluations of 2 s in 10 steps, a checkpoint of 1 s in 10, 2 s of metrics in 5, and two waits of 0.25 s in each.
    found = bench_training_loop.shares(seconds, calls, 3.5, cfg)
    assert found == {"evaluation_share": 0.1, "checkpoint_share": 0.025, "metrics_share": 0.1, "waiting_share": 0.12}


def test_the_loss_of_nanogpts_readme_is_the_goal_on_its_text_alone():
    goal = bench_time_to_loss.Goal("shakespeare-char-cpu", 1.88)
    assert goal.on("tinyshakespeare") == goal and goal.on("shakespeare").loss == 2.5


def test_a_peer_may_train_on_after_its_recipe_until_the_loss_is_reached(run, checkouts, tmp_path, monkeypatch):
    short = {"nanoGPT": dataclasses.replace(bench_time_to_loss.NANOGPT["shakespeare-char-cpu"]["nanoGPT"], max_steps=2)}
    monkeypatch.setattr(bench_time_to_loss, "NANOGPT", {"shakespeare-char-cpu": short})
    monkeypatch.setattr(bench_time_to_loss, "EVAL_INTERVAL", 2)
    monkeypatch.setattr(bench_time_to_loss, "EVAL_BLOCKS", 12)
    losses = iter([3.0, 2.0])
    monkeypatch.setattr(bench_time_to_loss, "mean_loss", lambda *arguments: next(losses))
    (tmp_path / "text.txt").write_text("To be, or not to be: that is the question. " * 100)
    goal, corpus = bench_time_to_loss.Goal("shakespeare-char-cpu", 2.5), Corpus.load(str(tmp_path / "text.txt"))
    work = bench_time_to_loss.time_to_loss_work(checkouts, goal, corpus)
    assert work.contenders["nanoGPT"]() > 0.0 and work.extra["nanoGPT"] == {"val_loss": 2.0, "steps": 4}


def test_import_benchmark(run, monkeypatch):
    statements = {"fastgpt": "import json", "transformers": "import package_that_is_nowhere", "csv": "import csv"}
    monkeypatch.setattr(bench_import, "STATEMENTS", statements)
    monkeypatch.setattr(bench_import, "PROGRAM", bench_import.PROGRAM.replace("import torch", "import abc"))
    bench_import.bench_import(run.measure_contenders)
    assert [row.implementation for row in run.rows] == ["fastgpt", "csv"]
    assert "is not installed" in run.absent["import"]["transformers"]
    assert run.rows[0].extra["import_torch_ms"] >= 0.0


def test_data_benchmark(run, tmp_path):
    for part in PARTS:
        (tmp_path / part).mkdir()
        work = data_work(DataShape(part, 0.01, B=2, T=8, steps=2), tmp_path / part)
        run.measure_contenders(dataclasses.replace(work, min_rounds=1))
    assert [(row.direction, row.implementation) for row in run.rows] == [
        ("prepare", "fastgpt"), ("start", "fastgpt"), ("step", "fastgpt"), ("step", "nanoGPT's way"),
    ]  # fmt: skip
    assert all(row.extra.get("peak_mb", 11) > row.extra.get("own_mb", 10) >= 10 for row in run.rows)
    assert run.rows[0].extra["million_characters_per_s"] > 0
