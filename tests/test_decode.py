"""Which tokens take one op: those of models as they were built; and that the others are computed by their modules."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastgpt
from altered_models import CFG, IDX, OF_THE_MODEL, REPLACED, LoRASubclass, alterations, built, by_recomputation
from fastgpt import GPT, GPTConfig, decode
from fastgpt.ops.backend import unavailable

REASON = unavailable("native", "cpu")
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.filterwarnings("ignore:fastgpt"),
]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of the cache at each call of the op."""
    seen: list[int] = []
    run = decode.decode_
    monkeypatch.setattr(decode, "decode_", lambda *args: seen.append(args[3]) or run(*args))
    return seen


def greedy(model: GPT, new: int = 5) -> torch.Tensor:
    return model.generate(IDX[:, :3], new, temperature=0.0)


def test_a_plain_models_tokens_take_it_but_for_the_prompt(taken: list[int]) -> None:
    model = built().float()
    assert torch.equal(greedy(model), by_recomputation(model, 3, 5)) and taken == [3, 4, 5, 6]
    assert torch.equal(model.generate(IDX[:, :3].int(), 5, temperature=0.0), by_recomputation(model, 3, 5).int())
    assert len(taken) == 8
    with fastgpt.use_backend("torch"):
        greedy(model)
    assert len(taken) == 8


# One computes in float64 alone, and one for whole blocks alone.
NOT_SERVED = "lm_head, quantised", "ln_f, over time and features"
ALTERED = [*alterations(), *(pytest.param(alter, id=n) for n, alter in REPLACED.items() if n not in NOT_SERVED)]


@pytest.mark.parametrize("alter", ALTERED)
def test_an_altered_model_is_computed_by_its_modules(alter, taken: list[int], request) -> None:
    models = [built().float(), built().float()]
    for model in models:
        torch.manual_seed(1)
        alter(model)
    assert torch.equal(greedy(models[0].float(), 3), by_recomputation(models[1].float(), 3, 3))
    assert taken == ([3, 4] if "lm_head, with a bias" in request.node.name else [])  # which is a plain linear


@pytest.mark.parametrize("name", OF_THE_MODEL)
def test_a_model_with_other_methods_does_not_take_it(name: str, taken: list[int]) -> None:
    greedy(built(OF_THE_MODEL[name]).float())
    assert taken == []


def add_hook(model: GPT) -> None:
    model.blocks[1].mlp.up.register_forward_hook(lambda module, args, out: out * 1.5)


def add_pre_hook_to_block(model: GPT) -> None:
    model.blocks[0].register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))


def replace_module(model: GPT) -> None:
    model.blocks[0].attn.proj = nn.Linear(12, 12)


def replace_parameter(model: GPT) -> None:
    model.blocks[0].mlp.down.weight = nn.Parameter(torch.randn(12, 48))


def replace_block(model: GPT) -> None:
    model.blocks[0] = model.blocks[1]


def replace_forward(model: GPT) -> None:
    forward = model.blocks[0].attn.forward
    model.blocks[0].attn.forward = lambda *args: forward(*args) * 1.5


def replace_class(model: GPT) -> None:
    model.blocks[0].attn.qkv.__class__ = LoRASubclass


def change_eps(model: GPT) -> None:
    model.blocks[1].ln_2.eps = 0.5


def change_activation(model: GPT) -> None:
    model.blocks[0].mlp.activation = "relu"


def bound_the_embedding(model: GPT) -> None:
    model.token_embedding.max_norm = 0.01


BETWEEN = [
    add_hook, add_pre_hook_to_block, replace_module, replace_parameter, replace_block, replace_forward, replace_class,
    change_eps, change_activation, bound_the_embedding,
]  # fmt: skip


@pytest.mark.parametrize("change", BETWEEN, ids=lambda f: f.__name__)
def test_a_change_between_two_tokens_counts(change: Callable[[GPT], None], taken: list[int]) -> None:
    """The logits after the change are those of the modules, with the keys and values from before it."""
    found = []
    for backend in ("auto", "torch"):
        model = built().float().eval()
        torch.manual_seed(0)
        with torch.no_grad(), fastgpt.use_backend(backend):
            cache = model.new_cache(3)
            model.next_logits(IDX[:, :3], cache)
            before = model.next_logits(IDX[:, 3:4], cache)
            change(model)
            found.append(model.next_logits(IDX[:, 4:5], cache))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert taken == [3] and not torch.allclose(found[0], before)


@torch.no_grad()
def test_what_changes_in_place_is_seen(taken: list[int]) -> None:
    model = built().float().eval()
    cache = model.new_cache(3)
    model.next_logits(IDX[:, :1], cache)
    model.blocks[0].mlp.up.weight.mul_(2.0)
    model.blocks[0].ln_1.weight.data = torch.randn(12)
    found = model.next_logits(IDX[:, 1:2], cache)
    twin = model.new_cache(3)
    twin.tensor, twin.length = cache.tensor.clone(), 1
    with fastgpt.use_backend("torch"):
        torch.testing.assert_close(found, model.next_logits(IDX[:, 1:2], twin), rtol=1e-4, atol=1e-5)
    assert taken == [1]


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "post"}, {"norm": "none"}, {"residual": False}, {"feed_forward": False}, {"activation": "relu2"},
        {"bias": False}, {"tie_weights": False}, {"n_head": 12}, {"norm": "none", "residual": False},
    ],
    ids=str,
)  # fmt: skip
def test_every_setting(changes: dict, taken: list[int]) -> None:
    cfg = GPTConfig(**{**CFG.__dict__, **changes})
    model = built(cfg=cfg).float()
    assert torch.equal(greedy(model), by_recomputation(model, 3, 5))
    served = cfg.norm == "pre" and cfg.residual and cfg.feed_forward
    assert len(taken) == (4 if served else 0)


@torch.no_grad()
def test_which_calls_do_not_take_it(taken: list[int]) -> None:
    model = built().float().eval()

    def one(model=model, idx=IDX[:, 1:2], n=3):
        cache = model.new_cache(n)
        model.next_logits(IDX[:n, :1], cache)
        return model.next_logits(idx[:n], cache)

    with torch.autocast("cpu"):
        one()
    with torch.enable_grad():
        built().requires_grad_(False).next_logits(IDX[:, :1])
    one(built().eval())
    one(idx=IDX[:, 1:3])
    model.blocks[0].attn.train()
    one()
    model.eval()
    model.blocks[0].attn.qkv.weight.data = model.blocks[0].attn.qkv.weight.t().contiguous().t()
    one()
    wide = IDX.repeat(3, 1)
    cache = model.new_cache(9)
    model.next_logits(wide[:, :1], cache)
    model.next_logits(wide[:, 1:2], cache)
    assert taken == []
    with pytest.raises(ValueError, match=r"^cache: made for 3 sequences, got 2"):
        one(built().float().eval(), idx=IDX[:2, 1:2])
    one(built().float().eval())
    assert taken == [1]


@torch.no_grad()
def test_data_that_the_op_does_not_take_between_two_tokens_goes_to_the_modules(taken: list[int]) -> None:
    found = []
    for backend in ("auto", "torch"):
        model = built().float().eval()
        cache = model.new_cache(3)
        with fastgpt.use_backend(backend):
            for t in range(4):
                if t == 2:
                    weight = model.blocks[0].mlp.up.weight
                    weight.data = (2.0 * weight).t().contiguous().t()
                logits = model.next_logits(IDX[:, t : t + 1], cache)
        found.append(logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert taken == [1, 2]  # of which the second was refused, and not tried again
    model = built().float().eval()
    cache = model.new_cache(3)
    model.next_logits(IDX[:, :1], cache)
    model.next_logits(IDX[:, 1:2], cache)
    model.half()
    with pytest.raises(TypeError, match=r"^k: has dtype torch.float32, but q has torch.float16"):
        model.next_logits(IDX[:, 2:3], cache)
    with pytest.raises(TypeError, match=r"^tokens: expected int64"):
        built().float().eval().next_logits(torch.ones(3, 1), cache)


@torch.no_grad()
def test_a_cache_that_another_model_uses_does_not_bring_the_first_ones_weights() -> None:
    first, second = built().float().eval(), built().float().eval()
    for p in second.parameters():
        p.mul_(1.5)
    cache = first.new_cache(3)
    first.next_logits(IDX[:, :1], cache)
    first.next_logits(IDX[:, 1:2], cache)
    twin = copy.deepcopy(cache)
    assert twin.decoder is None and cache.decoder is not None
    found = second.next_logits(IDX[:, 2:3], cache)
    with fastgpt.use_backend("torch"):
        torch.testing.assert_close(found, second.next_logits(IDX[:, 2:3], twin), rtol=1e-4, atol=1e-5)
