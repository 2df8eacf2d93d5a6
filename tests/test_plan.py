"""The plan of training on many GPUs: its counts are those of real models, and its errors name the option."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from fastgpt import GPT, GPTConfig, plan
from fastgpt.benchmarks.harness.counted import Saved, bytes_of, flops_of, moments
from fastgpt.cli import main
from fastgpt.config import ConfigError, TrainConfig
from fastgpt.ops.backend import unavailable
from fastgpt.plan import Cluster, Job, Plan
from fastgpt.training.step import make_optimizer

SMALL = {"vocab_size": 97, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32, "dropout": 0.0}
VARIANTS = {
    "as it is": {},
    "three blocks without biases": {"n_layer": 3, "bias": False},
    "post-norm": {"norm": "post"},
    "no norm": {"norm": "none"},
    "branches alone": {"residual": False},
    "a head of its own": {"tie_weights": False},
    "attention alone": {"feed_forward": False},
}


def model_of(**changes) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**SMALL | changes)).train()


def batch_of(cfg: GPTConfig, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.arange(n * cfg.block_size).view(n, cfg.block_size) % cfg.vocab_size
    return x, x.roll(-1, 1)


# ---- counts, against a real model ----


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_parameters(changes):
    model = model_of(**changes)
    assert plan.parameters(model.cfg) == model.num_parameters()
    block = [tuple(p.shape) for p in model.blocks[0].parameters()]
    assert sorted(plan.block_shapes(model.cfg)) == sorted(block)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_activations_and_operations(changes):
    model = model_of(**changes)
    saved = Saved(model)
    x, y = batch_of(model.cfg, 3)
    with saved.counting():
        model.loss(x, y)
    assert saved.n_bytes == plan.activations(model.cfg, 3, 4)
    assert flops_of(lambda: model.loss(x, y).backward()) == plan.flops(model.cfg, 3).total


class Checkpointed(torch.nn.Module):
    """A block of which PyTorch keeps the input alone."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs):
        return torch.utils.checkpoint.checkpoint(self.block, *inputs, use_reentrant=False)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_activations_and_operations_with_activation_checkpointing(changes):
    model = model_of(**changes)
    model.blocks = torch.nn.ModuleList(map(Checkpointed, model.blocks))
    saved = Saved(model)
    x, y = batch_of(model.cfg, 3)
    with saved.counting():
        model.loss(x, y)
    assert saved.n_bytes == plan.activations(model.cfg, 3, 4, checkpointing=True)
    assert flops_of(lambda: model.loss(x, y).backward()) == plan.flops(model.cfg, 3, checkpointing=True).total


def test_operations_of_the_passes():
    model = model_of()
    losses = []
    forward = flops_of(lambda: losses.append(model.loss(*batch_of(model.cfg, 2))))
    expected = plan.flops(model.cfg, 2)
    assert forward == expected.forward and flops_of(losses[0].backward) == expected.backward


@pytest.mark.skipif(
    unavailable("native", "cpu") is not None, reason="attention keeps more without an extension or a GPU"
)
@pytest.mark.parametrize("changes", [{}, {"bias": False, "norm": "post"}, {"norm": "none"}], ids=str)
def test_activations_and_casts_of_weights_in_half_precision(changes):
    model = model_of(**changes)
    saved = Saved(model)
    with saved.counting(), torch.autocast("cpu", torch.bfloat16):
        model.loss(*batch_of(model.cfg, 3)).backward()
    activations, copies = plan.activations(model.cfg, 3, 2), plan.half_copies(model.cfg, 2)
    assert saved.n_bytes == activations + copies


def test_dropout_keeps_seeds_and_one_mask():
    """The one mask is that of the embeddings, of one byte a number on a GPU."""
    model = model_of(dropout=0.1)
    saved = Saved(model)
    with saved.counting():
        model.loss(*batch_of(model.cfg, 3))
    without_mask = plan.activations(model.cfg, 3, 4) - 3 * 16 * 32
    assert without_mask <= saved.n_bytes <= without_mask + 4 * 3 * 16 * 32
    assert plan.seeds(model.cfg) == 8 * 2 * 3


def test_weights_gradients_and_moments():
    model = model_of()
    optimizer = make_optimizer(model, TrainConfig())
    model.loss(*batch_of(model.cfg, 2)).backward()
    optimizer.step()
    parts = plan.memory(model.cfg, Job(batch_size=2, dtype="float32"))
    assert bytes_of(model.parameters()) == parts["weights"]
    assert bytes_of(p.grad for p in model.parameters()) == parts["gradients"]
    assert bytes_of(moments(optimizer)) == parts["moments"]


# ---- bounds ----


def test_shards_are_the_parts_of_the_rows():
    """As torch.chunk cuts them: 10 rows in 4 parts are 3, 3, 3 and 1."""
    assert plan.count([(10, 7), (3,)], 4) == 3 * 7 + 1
    for n in (1, 2, 3, 4, 7, 16):
        assert plan.count([(10, 7)], n) == len(torch.zeros(10, 7).chunk(n)[0]) * 7


def test_one_gpu_exchanges_nothing():
    alone = Plan(GPTConfig(), Job(parallel="fsdp"))
    assert alone.sent == {} and alone.seconds["communication"] == 0.0 and alone.way == "alone"
    assert alone.memory == Plan(GPTConfig(), Job()).memory


def test_what_a_ring_sends():
    """Each of 4 processes sends 3 of 4 quarters to scatter the sums, and 3 to gather them."""
    assert plan.ring_half(400, 4) == 300 and plan.ring_all_reduce(400, 4) == 600
    cfg = GPTConfig.preset("gpt2")
    n_bytes = 4 * plan.parameters(cfg)
    assert Plan(cfg, Job(gpus=8, batch_size=8, grad_accum=4)).sent == {"all_reduce": 2 * 7 / 8 * n_bytes}
    sharded = Job(gpus=8, parallel="fsdp", batch_size=8, dtype="float32")
    once = Plan(cfg, sharded).sent
    assert once["all_gather_forward"] == once["reduce_scatter"] > once["all_gather_backward"]
    half = Plan(cfg, dataclasses.replace(sharded, dtype="bfloat16")).sent
    assert half["all_gather_backward"] == once["all_gather_backward"] / 2
    # What is outside the blocks is gathered in float32, and gradients are added up in it.
    assert half["all_gather_forward"] == once["all_gather_forward"] - half["all_gather_backward"]
    assert half["reduce_scatter"] == once["reduce_scatter"]
    again = Plan(cfg, dataclasses.replace(sharded, grad_accum=3)).sent
    assert again == pytest.approx({name: 3 * n for name, n in once.items()})


def test_sharding_takes_less_memory_and_more_messages():
    cfg = GPTConfig.preset("gpt2-xl")
    ddp, fsdp = (Plan(cfg, Job(gpus=64, parallel=way, batch_size=64)) for way in ("ddp", "fsdp"))
    for part in ("weights", "gradients", "moments"):
        assert fsdp.memory[part] < 1.1 * ddp.memory[part] / 64
    assert fsdp.total_memory < ddp.total_memory / 3 and fsdp.largest_batch > ddp.largest_batch


def test_the_largest_batch_fits_and_one_more_does_not():
    for parallel in ("ddp", "fsdp"):
        for checkpointing in (False, True):
            job = Job(gpus=8, parallel=parallel, batch_size=8, activation_checkpointing=checkpointing)
            found = Plan(GPTConfig.preset("gpt2-large"), job, Cluster(memory_gb=40.0))
            most = found.largest_batch
            assert most > 8 and most % 8 == 0
            for batch_size, fits in ((most, True), (most + 8, False)):
                asked = Job(**{**vars(job), "batch_size": batch_size})
                assert Plan(found.cfg, asked, found.cluster).fits is fits
    assert Plan(GPTConfig.preset("gpt2-xl"), Job(), Cluster(memory_gb=16.0)).largest_batch == 0


def test_checkpointing_trades_operations_for_memory():
    cfg = GPTConfig.preset("gpt2")
    kept, again = (Plan(cfg, Job(batch_size=8, activation_checkpointing=on)) for on in (False, True))
    assert again.memory["activations"] + again.memory["block_again"] < kept.memory["activations"] / 3
    assert kept.flops < again.flops < 1.4 * kept.flops


def test_times():
    """A step of 3 units of computing (1 forward) and some of sending."""
    cfg, job = GPTConfig.preset("gpt2"), Job(gpus=16, batch_size=16, grad_accum=2)
    one = plan.flops(cfg, 1)
    cluster = Cluster(flops=float(one.total), efficiency=0.5, bandwidth_gb_s=100.0, network_gb_s=1.0)
    found = Plan(cfg, job, cluster).seconds
    assert found["compute"] == pytest.approx(2 * 2.0), "two micro-steps at half of the rate"
    (sent,) = Plan(cfg, job, cluster).sent.values()
    assert found["communication"] == pytest.approx(sent / 1e9), "the network is the slower link"
    assert found["not_overlapped"] == pytest.approx(found["compute"] + found["communication"])
    assert found["overlapped"] == pytest.approx(found["compute"]), "less than the last backward pass"
    slow = Plan(cfg, job, Cluster(flops=float(one.total), efficiency=0.5, network_gb_s=0.1)).seconds
    hidden = 2.0 * one.backward / one.total
    assert slow["overlapped"] == pytest.approx(slow["compute"] + slow["communication"] - hidden)
    inside = Plan(cfg, Job(gpus=8, batch_size=8), cluster)
    assert inside.seconds["communication"] == pytest.approx(inside.sent["all_reduce"] / 100e9)


# ---- the command ----


def test_the_command_prints_a_plan(capsys):
    assert main(["plan", "--preset", "gpt2-xl", "--gpus", "64"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "model: 1,557,611,200 parameters, 1,024 tokens of context\non: 64 GPUs in 8 nodes, ddp, bfloat16"
    )
    assert "batch: 768 sequences, 12 on each GPU: 786,432 tokens per step" in text, "the preset's batch on each GPU"
    assert "of 80 GB: fits; the largest --batch-size that fits is " in text and "all reduce, sent" in text
    assert main(["plan", "--preset", "gpt2-xl", "--memory-gb", "24"]) == 0
    text = capsys.readouterr().out
    assert "does not fit; not even one sequence on each GPU fits" in text
    assert (
        "less memory is taken with --parallel fsdp on several GPUs or with --activation-checkpointing or with" in text
    )


def test_the_command_prints_json(capsys):
    words = "plan --gpus 2 --parallel fsdp --batch-size 4 --dtype float32 --n-layer 3 --json"
    assert main(words.split()) == 0
    found = json.loads(capsys.readouterr().out)
    expected = Plan(GPTConfig.preset("gpt2", n_layer=3), Job(2, "fsdp", 4, dtype="float32"))
    assert found == json.loads(json.dumps(expected.to_json()))
    assert found["memory_bytes"]["total"] == sum(expected.memory.values())


def test_the_command_needs_no_torch():
    code = "import sys; from fastgpt.cli import main; assert main(['plan', '--gpus', '8']) == 0; "
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--gpus 0", "--gpus: expected an integer of at least 1, got 0"),
        ("--gpus 8 --batch-size 12", "--batch-size: expected a multiple of gpus=8, got 12"),
        ("--batch-size 0", "--batch-size: expected an integer of at least 1, got 0"),
        ("--grad-accum 0", "--grad-accum: expected an integer of at least 1, got 0"),
        ("--parallel tensor", "--parallel: expected one of auto, ddp, fsdp, got 'tensor'"),
        ("--dtype int8", "--dtype: expected one of auto, float32, bfloat16, float16, got 'int8'"),
        ("--memory-gb 0", "--memory-gb: expected more than 0, got 0.0"),
        (
            "--dtype float16 --gpus 2 --parallel fsdp",
            "--dtype: expected bfloat16 or float32 with parallel=fsdp, as in training, got 'float16'",
        ),
        ("--memory-gb 1e300", "--memory-gb: expected a number from 1e-30 to 1e30, got 1e+300"),
        ("--efficiency 1e-300", "--efficiency: expected a number from 1e-30 to 1e30, got 1e-300"),
        ("--flops -1", "--flops: expected more than 0, got -1.0"),
        ("--efficiency 1.5", "--efficiency: expected a number in (0, 1], got 1.5"),
        ("--bandwidth-gb-s 0", "--bandwidth-gb-s: expected more than 0, got 0.0"),
        ("--network-gb-s 0", "--network-gb-s: expected more than 0, got 0.0"),
        ("--gpus-per-node 0", "--gpus-per-node: expected an integer of at least 1, got 0"),
        ("--n-head 7", "--n-embd: expected a multiple of n_head=7, got 768"),
    ],
)
def test_errors_name_the_option(words, error, capsys):
    assert main(["plan", *words.split()]) == 2
    assert capsys.readouterr().err == f"fastgpt plan: {error}\n"


def test_a_model_of_any_size_takes_no_memory_to_plan():
    cfg = GPTConfig(vocab_size=2, block_size=1024, n_layer=2**31 - 1, n_head=1, n_embd=8)
    found = Plan(cfg, Job(gpus=2, batch_size=2, parallel="fsdp"))
    per_block = plan.count(plan.block_shapes(cfg))
    assert found.n_parameters == (2**31 - 1) * per_block + plan.count(plan.root_shapes(cfg))
    assert not found.fits and found.largest_batch == 0


def test_errors_name_the_argument():
    with pytest.raises(ConfigError, match=r"^batch_size: expected a multiple of gpus=4, got 6$"):
        Job(gpus=4, batch_size=6)
