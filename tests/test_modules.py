"""Modules that users wrap, hook, parametrise, prune or replace: the fused code computes what calling them would."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from altered_models import (
    CFG,
    IDX,
    OF_THE_MODEL,
    REPLACED,
    TARGETS,
    Scaled,
    alterations,
    assert_same,
    built,
    by_calls,
    by_recomputation,
    doubling,
    embedding,
    gradients,
    losses_and_gradients,
    parts,
    replaced,
    scaled_output,
)

pytestmark = pytest.mark.usefixtures("nothing_said_yet")


@pytest.mark.filterwarnings("ignore:fastgpt", "ignore:.*weight_norm", "ignore:.*spectral_norm")
@pytest.mark.parametrize("alter", [*alterations(), *(pytest.param(a, id=name) for name, a in REPLACED.items())])
def test_loss_and_forward_are_what_the_modules_compute(alter) -> None:
    of_loss, of_forward = losses_and_gradients(alter)
    assert_same(of_loss, of_forward)
    model = built(alter)
    loss = F.cross_entropy(by_calls(model, IDX).flatten(0, 1), TARGETS.flatten())
    assert_same(of_loss, (loss.detach(), gradients(model, loss)))
    plain = built()
    assert not torch.equal(of_loss[0], plain.loss(IDX, TARGETS)) or any(
        not torch.allclose(grad, of_loss[1].get(name, torch.zeros(()).double()))
        for name, grad in gradients(plain, plain.loss(IDX, TARGETS)).items()
    ), "the alteration changes nothing, so this test would not notice its loss"


@pytest.mark.filterwarnings("ignore:fastgpt")
@pytest.mark.parametrize("place", ["token_embedding", "position_embedding"])
def test_sparse_gradients_of_an_embedding_stay_sparse(place: str) -> None:
    model = built(replaced(place, embedding(sparse=True)), cfg=dataclasses.replace(CFG, tie_weights=False))
    model.loss(IDX, TARGETS).backward()
    plain = built(cfg=dataclasses.replace(CFG, tie_weights=False))
    plain.loss(IDX, TARGETS).backward()
    sparse = model.get_submodule(place).weight.grad
    assert sparse.is_sparse
    torch.testing.assert_close(sparse.to_dense(), plain.get_submodule(place).weight.grad)


@pytest.mark.filterwarnings("ignore:fastgpt")
@pytest.mark.parametrize("name", [*(name for name in REPLACED if "over time" not in name), "all hooked"])
def test_generation_with_the_cache_runs_the_modules(name: str) -> None:
    alter = REPLACED.get(name, lambda model: [m.register_forward_hook(scaled_output) for m in parts(model)] and None)
    text = built(alter).generate(IDX[:, :3], 5, temperature=0.0)
    assert torch.equal(text, by_recomputation(built(alter), 3, 5))


def test_a_hook_on_every_module_sees_every_module() -> None:
    seen: list[nn.Module] = []
    model = built()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        with pytest.warns(UserWarning, match="there are hooks on every module"):
            model.loss(IDX, TARGETS)
        of_loss = seen.copy()
        seen.clear()
        model(IDX, TARGETS)
        of_forward = seen.copy()
        seen.clear()
        model.generate(IDX[:, :2], 1)
    finally:
        handle.remove()
    for found in (of_loss, of_forward, seen):
        assert {id(m) for m in parts(model)} <= {id(m) for m in found}
        assert len(found) == len({id(m) for m in found}), "each module is called once"


def test_the_flops_of_loss_and_forward_are_equal() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for of in (lambda m: m.loss(IDX, TARGETS), lambda m: m(IDX, TARGETS)[1]):
        with FlopCounterMode(display=False) as counter, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            of(built()).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (REPLACED["lm_head, LoRA"], r"lm_head is called .* logits .*: its forward is .*altered_models\.LoRA\.forward"),
        (lambda m: m.lm_head.register_forward_hook(scaled_output) and None, "lm_head is called .*: it has hooks"),
        (lambda m: doubling(m.lm_head), "lm_head is called .*: its weight is a Doubling"),
        (
            lambda m: parametrize.register_parametrization(m.lm_head, "weight", Scaled()) and None,
            "lm_head is called .*: its weight is computed from something else",
        ),
        (REPLACED["token_embedding, {'max_norm': 0.5}"], "embeddings are .*: token_embedding: it has max_norm=0.5"),
        (REPLACED["position_embedding, no weight"], "embeddings are .*: position_embedding: its forward is .*NoWeight"),
        (REPLACED["ln_1, RMSNorm"], r"a norm \(RMSNorm\) is called .*: its forward is torch.*RMSNorm\.forward"),
        (OF_THE_MODEL["forward hook"], "the model is called for its loss, and the logits .*: it has hooks"),
    ],
    ids=["LoRA", "hook", "subclass", "parametrisation", "max_norm", "wrapper", "RMSNorm", "model"],
)
def test_the_reason_for_not_fusing_is_given_once(alter, said: str) -> None:
    model = built(alter).float()
    with pytest.warns(UserWarning, match=f"^fastgpt: .*{said}"):
        model.loss(IDX, TARGETS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.loss(IDX, TARGETS)
        built(alter).float().loss(IDX, TARGETS)


def test_no_warning_for_a_plain_model_or_for_linears_that_are_never_fused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for alter in (None, REPLACED["lm_head, with a bias"], REPLACED["qkv, LoRA"]):
            built(alter).float().loss(IDX, TARGETS)
        built(REPLACED["lm_head, LoRA"]).float()(IDX, TARGETS)
        built(REPLACED["lm_head, LoRA"]).float().generate(IDX[:, :2], 2)
