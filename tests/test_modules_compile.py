"""A model, altered or not, under torch.compile, torch.export, functional calls and activation checkpointing."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from altered_models import (
    IDX,
    OF_THE_MODEL,
    REPLACED,
    TARGETS,
    Scaled,
    assert_same,
    built,
    gradients,
    losses_and_gradients,
    parts,
    scaled_output,
)
from fastgpt import GPT
from fastgpt.ops.backend import unavailable

pytestmark = pytest.mark.usefixtures("nothing_said_yet")


COMPILED = {
    "plain": None,
    "LoRA": REPLACED["lm_head, LoRA"],
    "RMSNorm": REPLACED["ln_1, RMSNorm"],
    "wrapped embedding": REPLACED["token_embedding, no weight"],
    "hooks": lambda m: [part.register_forward_hook(scaled_output) for part in parts(m)] and None,
    "parametrisation": lambda m: parametrize.register_parametrization(m.lm_head, "weight", Scaled()) and None,
    "partial": lambda m: setattr(m.lm_head, "forward", functools.partial(type(m.lm_head).forward, m.lm_head)),
    "model": OF_THE_MODEL["another forward"],
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_graph_breaks_and_silently(name: str) -> None:
    torch._dynamo.reset()
    model = built(COMPILED[name]).float()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastgpt")
        loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")(IDX, TARGETS)
    found = gradients(model, loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = built(COMPILED[name]).float()
        expected = model(IDX, TARGETS)[1]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, gradients(model, expected))


class Loss(nn.Module):
    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx, targets):
        return self.model.loss(idx, targets)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_loss_is_the_fused_one(strict: bool) -> None:
    model = built().float()
    program = torch.export.export(Loss(model), (IDX, TARGETS), strict=strict)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert fused_ops() <= called
    torch.testing.assert_close(program.module()(IDX, TARGETS), model.loss(IDX, TARGETS))


def test_a_compiled_loss_is_the_fused_one() -> None:
    torch._dynamo.reset()
    called: set[str] = set()

    def look(graph, inputs):
        called.update(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(built().float().loss, fullgraph=True, backend=look)(IDX, TARGETS)
    assert fused_ops() <= called


def fused_ops() -> set[str]:
    if unavailable("native", "cpu"):
        pytest.skip("the ops of PyTorch's backend leave no mark in a graph")
    return {
        "fastgpt.embedding_native.default",
        "fastgpt.activation_native.default",
        "fastgpt.linear_cross_entropy_native.default",
    }


def test_other_weights_by_functional_call() -> None:
    """A tied weight is given once and is used in both places."""
    model, other = built(), built()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    params = {name: p.detach() for name, p in other.named_parameters()}

    def loss(params):
        return torch.func.functional_call(model, params, (IDX, TARGETS))[1]

    expected = other.loss(IDX, TARGETS)
    torch.testing.assert_close(loss(params), expected.detach())
    torch.testing.assert_close(torch.func.grad(loss)(params), gradients(other, expected))


def test_checkpointed_blocks() -> None:
    from torch.utils.checkpoint import checkpoint

    def alter(model) -> None:
        for block in model.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    plain, _ = losses_and_gradients(None)
    for found in losses_and_gradients(alter):
        assert_same(found, plain)


def test_blocks_compiled_one_by_one() -> None:
    torch._dynamo.reset()
    plain = built()
    expected = plain.loss(IDX, TARGETS)
    model = built()
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    model.lm_head.compile(backend="aot_eager", fullgraph=True)
    loss = model.loss(IDX, TARGETS)
    assert_same((loss.detach(), gradients(model, loss)), (expected.detach(), gradients(plain, expected)))
