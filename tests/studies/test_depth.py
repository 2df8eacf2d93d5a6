"""The study of depth: gradients and initialisations, and what it says of its numbers."""

from __future__ import annotations

import math
import re

import pytest
import torch

from fastgpt import GPT, GPTConfig, ops
from fastgpt.studies import depth
from fastgpt.studies.page import Page

SMALL = GPTConfig(vocab_size=11, block_size=12, n_layer=2, n_head=2, n_embd=8, dropout=0.0)


@pytest.mark.parametrize("norm", ["pre", "post", "none"])
@pytest.mark.parametrize("residual", [True, False])
def test_the_gradient_at_a_block_is_that_of_the_stream(norm, residual):
    """Against a forward from the stream on, written out: what ends the network reads x + branch."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**vars(SMALL), "norm": norm, "residual": residual})).double()
    idx, targets = torch.randint(11, (2, 2, 12)).unbind(0)
    found = depth.layers(model, idx, targets)
    assert all(p.grad is None for p in model.parameters())
    kept = []
    hook = model.blocks[-1].register_forward_hook(lambda block, inputs, output: kept.append(output))
    model.hidden(idx)
    hook.remove()
    x, branch = kept[0]
    stream = (x if branch is None else x + branch).detach().requires_grad_()
    last = stream if model.ln_f is None else model.ln_f(stream)
    ops.linear_cross_entropy(last, model.lm_head.weight, targets).backward()
    assert found["gradient"][-1] == pytest.approx(float(stream.grad.norm()), rel=1e-3)
    assert found["activation"][-1] == pytest.approx(float(stream.detach().square().mean().sqrt()), rel=1e-3)
    assert len(found["gradient"]) == 2


@pytest.mark.parametrize(("init", "std"), [("plain", 0.02), ("large", 0.5), ("xavier", math.sqrt(2 / (64 + 192)))])
def test_initialisations(init, std):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_embd=64, n_head=2))
    before = model.token_embedding.weight.clone()
    depth.redraw(model, init)
    assert float(model.blocks[0].attn.qkv.weight.detach().std()) == pytest.approx(std, rel=0.03)
    assert torch.equal(model.token_embedding.weight, before)


def test_what_depth_says_of_a_clear_effect(results):
    found = results("depth")
    deepest = max(row["depth"] for row in found["rows"])
    for row in found["rows"]:
        row["loss"] = 1.0 if row["residual"] else 9.0
        row["before"]["gradient"] = [1e-9, *[1.0] * (row["depth"] - 1)] if not row["residual"] else [1.0] * row["depth"]
    assert "12 of 12 with residual connections learned" in depth._who_learned(found, deepest)
    assert "0 of 12 without them" in depth._who_learned(found, deepest)
    found["repeats"] = [1.0, 1.25]
    text = depth._one_change(found, deepest)
    assert "more than the 0.250 between seeds: no residual connections (+8.000)" in text
    assert "not told apart from chance: plain initialisation, xavier initialisation" in text
    assert "from 1e-09 times with scaled initialisation" in depth._signals_in_words(found["rows"], deepest)


def test_what_depth_says_where_nothing_is_seen(results):
    found = results("depth")
    deepest = max(row["depth"] for row in found["rows"])
    for row in found["rows"]:
        row["loss"] = 9.0
        row["before"]["gradient"] = [1.0] * row["depth"]
    assert "None of the 24 networks" in depth._who_learned(found, deepest)
    assert "did not learn either" in depth._one_change(found, deepest)
    assert "none vanishes or explodes" in depth._signals_in_words(found["rows"], deepest)
    assert "have no way to go" in depth._signals_in_words(found["rows"], 1)
    for row in found["rows"]:
        row["loss"] = 1.0
    assert "All 24 networks" in depth._who_learned(found, deepest)
    assert "no single change moves that" in depth._one_change(found, deepest)


def test_a_network_that_diverged_is_shown_as_a_dash(results):
    found = results("depth")
    for row in found["rows"]:
        row["loss"] = None
        row["before"] = {key: [None] * len(values) for key, values in row["before"].items()}
    text = " ".join(Page(found).text().split())
    assert re.search(r"\| *– *\|", text) and "had no finite loss" in text
    assert 'No picture of "Validation loss by depth, one panel an initialisation": no network ended' in text
    assert "no network had finite numbers" in text
