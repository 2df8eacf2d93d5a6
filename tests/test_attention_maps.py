"""The weights of attention: times v they are what the model's own attention gave."""

from __future__ import annotations

import pytest
import torch

from fastgpt import GPT, GPTConfig
from fastgpt.attention_maps import capture, weights_of_head

SMALL = GPTConfig(vocab_size=11, block_size=12, n_layer=2, n_head=2, n_embd=8, dropout=0.3)


def model_of(is_causal: bool = True) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**vars(SMALL), "is_causal": is_causal}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)  # maps far from even
    return model


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_maps_are_those_of_the_model(is_causal):
    """Times v they give what the op gave, and through the projection what the layer gave."""
    model = model_of(is_causal)
    idx = torch.randint(11, (1, 9))
    outputs = []
    hooks = [block.attn.register_forward_hook(lambda m, i, out: outputs.append(out)) for block in model.blocks]
    captured = capture(model, idx)
    for hook in hooks:
        hook.remove()
    assert len(captured) == 2 and model.training
    for block, (maps, v, out), output in zip(model.blocks, captured, outputs, strict=True):
        torch.testing.assert_close(maps @ v, out, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(block.attn.proj((maps @ v).transpose(1, 2).reshape(1, 9, 8)), output)
        torch.testing.assert_close(maps.sum(-1), torch.ones(1, 2, 9))
        assert (maps.triu(1) == 0).all() == is_causal


def test_one_head_alone_has_the_same_weights_and_leaves_no_hook():
    model, idx = model_of(), torch.randint(11, (1, 9))
    captured = capture(model, idx)
    for layer in (1, 2):
        for head in (1, 2):
            weights = weights_of_head(model, idx, layer, head)
            torch.testing.assert_close(weights, captured[layer - 1][0][0, head - 1])
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("layer", "head", "problem"), [(0, 1, "layer: the model has layers 1 to 2, got 0"), (1, 3, "head: ")]
)
def test_a_layer_or_head_that_is_not_there_is_named(layer, head, problem):
    with pytest.raises(ValueError, match=problem):
        weights_of_head(model_of(), torch.zeros(1, 3, dtype=torch.int64), layer, head)
