"""`fastgpt.patch` and `unpatch` on models of PyTorch's layers: what is replaced, what is not, and the way back."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastgpt
from fastgpt import ops
from helpers import tiny
from patched_models import IDS, OwnAttention, OwnModel, assert_within_rule, gpt2, in_float64, own_step, step

pytestmark = pytest.mark.usefixtures("nothing_said_yet")
OPS = ("attention", "layer_norm", "add_layer_norm", "embedding", "cross_entropy", "activation", "linear_cross_entropy")


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """How often each op is called."""
    called = dict.fromkeys(OPS, 0)

    def watched(name, op):
        def call(*args, **kwargs):
            called[name] += 1
            return op(*args, **kwargs)

        return call

    for name in OPS:
        monkeypatch.setattr(ops, name, watched(name, getattr(ops, name)))
    return called


def state(model: nn.Module) -> dict[str, tuple]:
    """All that `unpatch` has to restore, and the parameters, by the name of a module."""
    return {
        name: (type(module), {key: id(value) for key, value in vars(module).items()}, list(module.state_dict()))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("make", [OwnModel, gpt2])
def test_unpatch_restores_everything(make):
    model = make()
    hook = model.register_forward_hook(lambda *args: None)
    if make is gpt2:
        step(model)
    before, parameters = state(model), dict(model.named_parameters())
    patched = state(fastgpt.patch(model).model)
    assert {name for name in before if before[name][0] is not patched[name][0]}, "nothing was patched"
    assert {name: it[1:] for name, it in before.items()} == {name: it[1:] for name, it in patched.items()}
    fastgpt.unpatch(model)
    assert state(model) == before and hook.id in model._forward_hooks
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    if make is gpt2:
        assert model.config._attn_implementation == "sdpa"
    fastgpt.unpatch(model)  # which has nothing to do
    assert state(model) == before


def test_the_ops_compute_what_the_model_did(calls):
    model = OwnModel()
    theirs, oracle = own_step(model), own_step(in_float64(model))
    assert not any(calls.values())
    with fastgpt.patch(model):
        got = own_step(model)
    assert_within_rule(got, theirs, oracle)
    counts = {"attention": 2, "layer_norm": 5, "embedding": 2, "cross_entropy": 1, "activation": 2}
    assert calls == dict.fromkeys(OPS, 0) | counts
    assert own_step(model).keys() and calls == dict.fromkeys(OPS, 0) | counts, "the model is its own again"


def test_other_models_are_not_touched(calls):
    patched, other = OwnModel(), OwnModel()
    fastgpt.patch(patched)
    own_step(other)
    nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 2, 4, 8), is_causal=True)
    assert not any(calls.values())
    assert type(nn.LayerNorm(3)) is nn.LayerNorm and nn.LayerNorm.forward.__module__.startswith("torch.")


def test_patching_twice_is_harmless():
    model = OwnModel()
    first = fastgpt.patch(model)
    once = state(model)
    with fastgpt.patch(model) as second:
        assert state(model) == once and str(second) == str(first)
    assert state(model) == once, "the second patch changed nothing, so its end undoes nothing"
    fastgpt.unpatch(model)
    assert type(model.norm) is nn.LayerNorm


def test_the_end_of_the_block_undoes_it_after_an_error_too():
    model = OwnModel()
    with pytest.raises(ZeroDivisionError), fastgpt.patch(model):
        raise ZeroDivisionError
    assert type(model.norm) is nn.LayerNorm


@pytest.mark.parametrize("make", [OwnModel, gpt2])
@pytest.mark.parametrize("again", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_patched_and_can_be_unpatched(calls, make, again):
    model = make()
    fastgpt.patch(model)
    if again == "deepcopy":
        copied = copy.deepcopy(model)
    elif again == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        copied = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    run = own_step if make is OwnModel else step
    fastgpt.unpatch(model)
    expected = run(model)
    assert not any(calls.values())
    got = run(copied)
    assert calls["layer_norm"] and calls["attention"]
    torch.testing.assert_close(got["loss"], expected["loss"])
    fastgpt.unpatch(copied)
    calls.update(dict.fromkeys(OPS, 0))
    torch.testing.assert_close(run(copied)["loss"], expected["loss"])
    assert not any(calls.values())


@pytest.mark.parametrize("change", [lambda m: m.double(), lambda m: m.bfloat16(), lambda m: m.to("cpu")])
@pytest.mark.filterwarnings("ignore:fastgpt")
def test_dtypes_change_after_patching(change):
    model = OwnModel()
    fastgpt.patch(model)
    got = own_step(change(model))
    fastgpt.unpatch(model)
    want = own_step(model)
    rtol = 0.05 if want["loss"].dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got["loss"], want["loss"], rtol=rtol, atol=0)


# --- what is left alone -----------------------------------------------------------------------------------------------


def test_a_model_that_is_not_known_is_left_alone_in_words():
    with pytest.warns(UserWarning, match="patch changes nothing in this Linear: print"):
        made = fastgpt.patch(nn.Linear(2, 2))
    assert str(made) == "Linear on cpu\n  left alone: nothing in it is known"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastgpt.patch(nn.Linear(3, 3))  # it has been said


class RootMeanSquare(nn.LayerNorm):
    def forward(self, x):
        return x / x.square().mean(-1, keepdim=True).sqrt() * self.weight


class OwnLoss(nn.Module):
    def forward(self, logits, targets):
        return nn.functional.cross_entropy(logits, targets)


@pytest.mark.filterwarnings("ignore:fastgpt")
@pytest.mark.parametrize(
    "module, reason",
    [
        (nn.LayerNorm(4, elementwise_affine=False), "it has no weight"),
        (nn.LayerNorm((2, 4)), "it normalises 2 dimensions"),
        (nn.Embedding(5, 4, padding_idx=0), "it has padding_idx=0"),
        (nn.Embedding(5, 4, sparse=True), "it has sparse=True"),
        (RootMeanSquare(4), "it is not exactly torch.nn.LayerNorm"),
        (nn.MultiheadAttention(4, 2), "PyTorch's own class"),
        (OwnLoss(), "calls F.cross_entropy"),
        (fastgpt.nn.LayerNorm(4), "it is FastGPT's own"),
        (tiny(), "it is FastGPT's own"),
        (parametrize.register_parametrization(nn.LayerNorm(4), "weight", nn.Identity()), "or parametrized"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_report_has_a_reason(module, reason):
    before = {name: type(part) for name, part in module.named_modules()}
    made = fastgpt.patch(nn.ModuleDict({"part": module}))
    assert reason in str(made) and "part" in str(made) and not made.report.used
    assert {name: type(part) for name, part in module.named_modules()} == before


def test_a_forward_that_was_replaced_in_the_instance_stays():
    model = OwnModel()
    model.norm.forward = lambda x: x * 0
    made = fastgpt.patch(model)
    assert "norm: its forward was replaced in this instance" in str(made)
    assert model.norm(torch.ones(1, 32)).eq(0).all()


def test_modules_that_are_used_twice_are_patched_once():
    norm = nn.LayerNorm(4)
    model = nn.Sequential(norm, nn.Linear(4, 4), norm)
    assert fastgpt.patch(model).report.used == {("layer norm", "layer_norm"): ["0"]}


# --- what is done to a patched model ----------------------------------------------------------------------------------


def test_hooks_run(calls):
    model, seen = OwnModel(), []
    model.blocks[0].ln_1.register_forward_hook(lambda module, args, out: seen.append(out) or out * 2)
    model.tokens.register_forward_pre_hook(lambda module, args: seen.append(args))
    want = own_step(model)
    fastgpt.patch(model)
    got = own_step(model)
    assert len(seen) == 4 and calls["layer_norm"] == 5
    torch.testing.assert_close(got, want)


def test_a_parametrization_of_a_patched_module_is_computed_and_refuses_unpatch():
    class Doubled(nn.Module):
        def forward(self, weight):
            return weight * 2

    model = OwnModel()
    fastgpt.patch(model)
    parametrize.register_parametrization(model.norm, "weight", Doubled())
    got = model(IDS)
    patched = state(model)
    with pytest.raises(ValueError, match="changed the class of a ParametrizedLayerNorm after it was patched"):
        fastgpt.unpatch(model)
    assert state(model) == patched
    parametrize.remove_parametrizations(model.norm, "weight")  # which keeps the doubled weight
    fastgpt.unpatch(model)
    torch.testing.assert_close(model(IDS), got)


@pytest.mark.parametrize("make", [OwnModel, gpt2])
def test_what_wrapped_a_forward_meanwhile_still_works_after_unpatch(calls, make):
    """accelerate does so to a model for mixed precision, and to modules that it moves between devices."""
    model = make()
    fastgpt.patch(model)
    kept = [module for module in model.modules() if type(module).forward is not nn.Module.forward]
    for module in kept:
        module.forward = module.forward  # a bound method of the patched class
    call = (lambda: own_step(model)) if make is OwnModel else (lambda: step(model))
    want = call()
    fastgpt.unpatch(model)
    calls.update(dict.fromkeys(OPS, 0))
    torch.testing.assert_close(call()["loss"], want["loss"])
    assert not calls["attention"]


def test_checkpointing_draws_the_same_masks_again(calls):
    steps = []
    for checkpointed in (False, True):
        model = OwnModel(dropout=0.3)
        model.checkpointed = checkpointed
        fastgpt.patch(model)
        torch.manual_seed(1)
        steps.append(own_step(model))
    assert calls["attention"] == 2 + 4
    torch.testing.assert_close(steps[0], steps[1], rtol=0, atol=0)


def test_explain_before_and_after():
    model = OwnModel()
    report = fastgpt.explain(model)
    assert not report.used and "not patched: attention" in str(report)
    fastgpt.patch(model)
    report = fastgpt.explain(model)
    assert not report.unused and report.used[("attention, called in a forward", "attention")] == [
        "blocks.0.attn",
        "blocks.1.attn",
    ]
    assert type(model.blocks[0].attn).__name__ == "OwnAttention" and isinstance(model.blocks[0].attn, OwnAttention)


@pytest.mark.parametrize("function", [fastgpt.patch, fastgpt.unpatch, fastgpt.explain])
@pytest.mark.parametrize("value", [None, "gpt2", nn.LayerNorm], ids=str)
def test_bad_input_is_named(function, value):
    with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module, got "):
        function(value)


def test_bad_options_are_named():
    with pytest.raises(TypeError, match=r"^keep_logits: "):
        fastgpt.patch(OwnModel(), keep_logits=1)


def test_two_models_that_share_a_part_are_patched_one_by_one():
    """The name in a model's config is also given to the models within it, which are another model's too."""
    first, second = gpt2(), gpt2()
    second.transformer = first.transformer
    fastgpt.patch(first)
    with fastgpt.patch(second):
        assert second.config._attn_implementation == first.config._attn_implementation == "fastgpt"
    assert second.config._attn_implementation == "sdpa"
    assert first.config._attn_implementation == "fastgpt"
    fastgpt.unpatch(first)
    assert first.config._attn_implementation == "sdpa"
