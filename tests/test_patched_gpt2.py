"""transformers' GPT-2 on the ops: the same losses, gradients, states and texts, and what falls back to its own code."""

from __future__ import annotations

import contextlib
import inspect

import pytest
import torch
from torch import nn

import fastgpt
from fastgpt import ops
from fastgpt.patched_gpt2 import why_block_unknown, why_head_unknown
from helpers import integers
from patched_models import IDS, V, assert_within_rule, exact_step, gpt2, step

pytestmark = pytest.mark.filterwarnings("ignore:fastgpt", "ignore:.*use_reentrant")


def compared(model: nn.Module, **kwargs) -> tuple[dict, dict]:
    """A step of the model and of the patched one, which is held to the rule."""
    theirs, oracle = step(model, **kwargs), exact_step(model, **kwargs)
    with fastgpt.patch(model):
        got = step(model, **kwargs)
    assert_within_rule(got, theirs, oracle)
    return got, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_loss_and_gradients_in_each_dtype(dtype):
    compared(gpt2().to(dtype))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_items_in_batch": torch.tensor(40)},
        {"num_items_in_batch": 40},
        {"ignore_index": 5},
        {"shift_labels": integers(V, 2, 12, seed=3)},
        {"attention_mask": torch.tensor([[0] * 5 + [1] * 7, [1] * 12])},
        {"position_ids": torch.arange(12).flip(0)[None]},
        {"token_type_ids": integers(V, 2, 12, seed=4)},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_arguments_of_a_call(kwargs):
    compared(gpt2(), **kwargs)


@pytest.mark.parametrize(
    "settings",
    [
        {"tie_word_embeddings": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"activation_function": "relu"},
        {"layer_norm_epsilon": 1e-3, "n_inner": 24},
        {"attn_implementation": "eager"},
        {"add_cross_attention": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_of_the_model(settings):
    compared(gpt2(**settings))


def test_autocast():
    model = gpt2()
    oracle = exact_step(model)
    with torch.autocast("cpu"):
        theirs = step(model)
        with fastgpt.patch(model):
            got = step(model)
    assert got["loss"].dtype == torch.float32
    # What autocast rounds to bfloat16 is held to the tolerance of bfloat16.
    for name, value in got.items():
        error, error_of_theirs = ((x - oracle[name]).abs().max() for x in (value, theirs[name]))
        assert error <= 2 * error_of_theirs + 8e-3


def test_cross_attention():
    model = gpt2(add_cross_attention=True)
    encoded = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    compared(model, encoder_hidden_states=encoded)


def test_losses_of_ten_steps():
    losses = {}
    for patched in (False, True):
        model = gpt2()
        with fastgpt.patch(model) if patched else contextlib.nullcontext():
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            losses[patched] = []
            for _ in range(10):
                losses[patched].append(float(step(model)["loss"]))
                optimizer.step()
    assert losses[False][-1] < losses[False][0] - 0.1
    assert losses[True] == pytest.approx(losses[False], abs=2e-5)


def test_dropout_is_drawn_by_the_seed_and_changes_nothing_in_evaluation():
    model = gpt2(dropout=0.3)
    fastgpt.patch(model)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(step(model)["loss"])
    assert drawn[0] == drawn[1] != drawn[2]
    patched = model.eval()(input_ids=IDS).logits
    fastgpt.unpatch(model)
    torch.testing.assert_close(patched, model(input_ids=IDS).logits)


# --- the output -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fused(monkeypatch) -> list[int]:
    """How often the head and the loss were one op."""
    called = []
    loss = ops.linear_cross_entropy
    monkeypatch.setattr(ops, "linear_cross_entropy", lambda *args, **kwargs: called.append(1) or loss(*args, **kwargs))
    return called


def test_logits_are_there_except_in_a_training_step(fused):
    model = gpt2()
    fastgpt.patch(model)
    assert model(input_ids=IDS, labels=IDS).logits is None and fused == [1]
    assert model(input_ids=IDS).logits.shape == (2, 12, V)
    assert model(input_ids=IDS, labels=IDS, return_dict=False)[1].shape == (2, 12, V)
    model.eval()
    out = model(input_ids=IDS, labels=IDS)
    assert out.logits.shape == (2, 12, V) and out.loss.item() == pytest.approx(out.loss.item()) and fused == [1]


def test_positional_labels(fused):
    model = gpt2()
    fastgpt.patch(model)
    before = list(inspect.signature(model.forward).parameters).index("labels") - 1
    out = model(IDS, *[None] * before, IDS)
    assert out.logits is None and out.loss.item() == model(input_ids=IDS, labels=IDS).loss.item()


def test_keep_logits(fused):
    model = gpt2()
    expected = model(input_ids=IDS, labels=IDS)
    made = fastgpt.patch(model, keep_logits=True)
    out = model(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(out.logits, expected.logits)
    assert fused == [] and "keep_logits=True" in str(made)
    fastgpt.unpatch(model)
    assert str(fastgpt.explain(model)).count("not patched") == 6


def test_hidden_states_and_attentions():
    model = gpt2()
    expected = model(input_ids=IDS, labels=IDS, output_hidden_states=True)
    fastgpt.patch(model)
    out = model(input_ids=IDS, labels=IDS, output_hidden_states=True)
    assert set(expected) - set(out) == {"logits"}
    for got, want in zip(out.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "alter",
    [
        pytest.param(lambda model: setattr(model, "loss_function", lambda *a, **k: torch.ones(())), id="own loss"),
        pytest.param(lambda model: model.lm_head.register_forward_hook(lambda *a: a[2] * 2), id="hook"),
        pytest.param(lambda model: setattr(model, "lm_head", nn.Sequential(model.lm_head)), id="wrapped head"),
        pytest.param(lambda model: model.transformer.h[0].ln_2.register_forward_hook(lambda *a: a[2] * 2), id="norm"),
        pytest.param(lambda model: nn.utils.parametrizations.weight_norm(model.lm_head), id="parametrized"),
    ],
)
@pytest.mark.parametrize("before", [True, False], ids=["altered before", "altered after"])
def test_what_was_altered_is_called(alter, before):
    theirs, patched = gpt2(tie_word_embeddings=False), gpt2(tie_word_embeddings=False)
    plain = theirs(input_ids=IDS, labels=IDS).loss
    alter(theirs)
    if before:
        alter(patched)
    fastgpt.patch(patched)
    if not before:
        alter(patched)
    out, want = patched(input_ids=IDS, labels=IDS), theirs(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(out.loss, want.loss)
    if "parametrizations" not in str(theirs):
        assert plain != want.loss or isinstance(theirs.lm_head, nn.Sequential), "the alteration changes nothing"


def test_a_batch_whose_labels_are_all_ignored():
    model = gpt2()
    fastgpt.patch(model)
    assert model(input_ids=IDS, labels=torch.full_like(IDS, -100)).loss.isnan()


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_generation(padding, options):
    model = gpt2().eval()
    mask = torch.ones_like(IDS)
    mask[0, :padding] = 0
    common = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = model.generate(IDS, **common, **options)
    with fastgpt.patch(model):
        got = model.generate(IDS, **common, **options)
    assert torch.equal(got, want) and got.shape == (2, 18)


# --- versions ---------------------------------------------------------------------------------------------------------


def test_code_that_is_not_known_is_left_alone(monkeypatch):
    model = gpt2()
    block = type(model.transformer.h[0])
    assert why_block_unknown(block) is None and why_head_unknown(type(model)) is None

    def scaled(self, hidden_states, cache=None, attention_mask=None, encoder_hidden_states=None, **kwargs):
        return hidden_states + self.scale * self.mlp(self.ln_2(self.attn(self.ln_1(hidden_states))[0]))

    def older(self, hidden_states, layer_past=None, **kwargs):
        return (hidden_states,)

    for forward, reason in ((scaled, "differs in scale"), (older, "takes other arguments")):
        monkeypatch.setattr(block, "forward", forward)
        assert reason in why_block_unknown(block)
        made = fastgpt.patch(gpt2())
        assert reason in str(made) and "sum and layer norm" not in str(made)
