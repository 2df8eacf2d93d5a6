"""The study of normalisation: batch norm is PyTorch's, and who depends on whom is measured."""

from __future__ import annotations

import copy

import pytest
import torch

from fastgpt import GPTConfig
from fastgpt.studies import normalisation

SMALL = GPTConfig(vocab_size=11, block_size=12, n_layer=2, n_head=2, n_embd=8, dropout=0.0)


def test_batch_norm_is_torchs():
    torch.manual_seed(0)
    ours, theirs = normalisation.BatchNorm(5, [0.1, 0.5]), torch.nn.BatchNorm1d(5, momentum=0.5)
    for _ in range(3):
        x = torch.randn(4, 6, 5) * 3 + 1
        torch.testing.assert_close(ours(x), theirs(x.flatten(0, 1)).view_as(x))
    ours.which = 1
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x.flatten(0, 1)).view_as(x))


@pytest.mark.parametrize("kind", normalisation.KINDS)
def test_who_depends_on_its_neighbours(kind):
    model = normalisation.build(kind, SMALL, 0, [0.1])
    x = torch.randint(11, (4, 12), generator=torch.Generator().manual_seed(1))
    training, inference = (normalisation.dependence_of(model, x, train_mode=mode) for mode in (True, False))
    assert inference == {"other_rows": 0.0, "future": 0.0}
    if kind == "layer norm":
        assert training == {"other_rows": 0.0, "future": 0.0}
    else:
        assert training["other_rows"] > 1e-4 and training["future"] > 1e-4


def test_measuring_leaves_the_running_averages_alone():
    model = normalisation.build("batch norm", SMALL, 0, [0.1])
    before = copy.deepcopy(model.state_dict())
    x = torch.randint(11, (4, 12))
    normalisation.loss_in_mode(model, x, x, 2, train_mode=True)
    normalisation.dependence_of(model, x, train_mode=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def evaluations(*gaps: float) -> list[dict]:
    """Rows of one running average whose loss is so far above that of train mode."""
    return [{"step": step, "train": 2.0, "eval": [2.0 + gap]} for step, gap in enumerate(gaps, 1)]


def test_the_gap_between_modes_in_words():
    def text(*gaps: float) -> str:
        return normalisation._gap_between_modes(evaluations(0.0, 0.0), evaluations(*gaps), ["0.1"])

    assert "differs by up to +1.500, at step 1" in text(1.5, 0.25) and "at the end by +0.250 with 0.1" in text(
        1.5, 0.25
    )
    assert "batch norm's losses are never 0.01 apart" in text(0.004, -0.004)
    nothing = [{"step": 1, "train": None, "eval": [None]}]
    assert "no loss with batch norm is finite" in normalisation._gap_between_modes(evaluations(0.0), nothing, ["0.1"])


def test_what_normalisation_says_follows_the_numbers(results):
    found = results("normalisation")
    for row in found["dependence"]:
        row["other_rows"] = 0.0
        row["future"] = 0.25 if row["norm"] == "layer norm" and row["mode"] == "eval" else 0.0
    text = normalisation._dependence_on_neighbours(found)
    assert "moves a row's logits with no norm" in text and "layer norm in eval mode by 0.25" in text
    for row in found["dependence"]:
        row["future"] = 0.0
    assert "change a single bit" in normalisation._dependence_on_neighbours(found)
    found["coins"][0]["train"], found["coins"][1]["train"] = 0.69, 0.5
    assert ": batch norm tells a model through the batch's" in normalisation._coin_flips_in_words(found)
    found["coins"][1]["train"] = 0.69
    assert "none is below ln 2" in normalisation._coin_flips_in_words(found)
