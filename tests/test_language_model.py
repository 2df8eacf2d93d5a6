"""The loss and the generation of every model follow its forward, also where a user has changed the model."""

from __future__ import annotations

import pytest
import torch

from altered_models import (
    IDX,
    IN_PLACE,
    OF_THE_MODEL,
    TARGETS,
    NoWeight,
    assert_same,
    built,
    by_recomputation,
    losses_and_gradients,
    replaced,
)
from fastgpt.baselines import MODELS

pytestmark = pytest.mark.usefixtures("nothing_said_yet")


@pytest.mark.filterwarnings("ignore:fastgpt")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["forward hook", "own forward", "parametrisation", "tensor subclass"])
def test_loss_and_forward_agree_in_every_model(kind: str, name: str) -> None:
    embedding = "table" if kind == "bigram" else "token_embedding"
    for place in (embedding, "lm_head") if kind != "bigram" else (embedding,):
        alter = IN_PLACE[name]
        of_loss, of_forward = losses_and_gradients(lambda m, p=place, a=alter: a(m.get_submodule(p)) and None, kind)
        assert_same(of_loss, of_forward)
        assert not torch.equal(of_loss[0], built(kind=kind).loss(IDX, TARGETS).detach())


@pytest.mark.filterwarnings("ignore:fastgpt")
def test_a_wrapper_around_the_head_of_a_bigram_is_called() -> None:
    alter = replaced("lm_head", NoWeight)
    of_loss, of_forward = losses_and_gradients(alter, "bigram")
    assert_same(of_loss, of_forward)
    assert "lm_head.gain" in of_loss[1]


@pytest.mark.filterwarnings("ignore:fastgpt")
@pytest.mark.parametrize("name", OF_THE_MODEL)
def test_a_model_with_other_methods_is_called_for_its_loss_and_for_generation(name: str) -> None:
    alter = OF_THE_MODEL[name]
    of_loss, of_forward = losses_and_gradients(alter)
    assert_same(of_loss, of_forward)
    assert not torch.equal(of_loss[0], built().loss(IDX, TARGETS).detach())
    if name != "another hidden":  # reversing idx alone does not reverse what the cache holds
        assert torch.equal(built(alter).generate(IDX[:, :3], 9, temperature=0.0), by_recomputation(built(alter), 3, 9))


@pytest.mark.filterwarnings("ignore:fastgpt")
@pytest.mark.parametrize("kind", MODELS)
def test_a_hook_on_any_model_changes_what_it_generates(kind: str) -> None:
    plain = built(kind=kind).generate(IDX[:, :3], 5, temperature=0.0)
    model = built(OF_THE_MODEL["forward hook"], kind)
    assert torch.equal(model.generate(IDX[:, :3], 5, temperature=0.0), by_recomputation(model, 3, 5))
    assert not torch.equal(model.generate(IDX[:, :3], 5, temperature=0.0), plain)
