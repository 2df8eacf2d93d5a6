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


def test_what_normalisation_says_follows_the_numbers(results):
    found = results("normalisation")
    for row in found["dependence"]:
        row["future"] = 0.25 if row["norm"] == "layer norm" and row["mode"] == "eval" else 0.0
    assert (
        "its first half moved with layer norm in eval mode (0.25), and kept"
        in normalisation._dependence_on_neighbours(found)
    )
    found["coins"][0]["train"], found["coins"][1]["train"] = 0.69, 0.5
    assert (
        "that chance allows with batch norm: the model read the input of later positions"
        in normalisation._coin_flips_in_words(found)
    )
    found["coins"][1]["train"] = 0.69
    assert "None is below ln 2" in normalisation._coin_flips_in_words(found)
