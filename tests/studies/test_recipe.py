"""The study of recipes: when a recipe has reached the loss, and which is the fastest."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fastgpt import GPTConfig
from fastgpt.config import TrainConfig
from fastgpt.data.corpus import Corpus
from fastgpt.studies import recipe
from fastgpt.studies.settings import RecipeSettings

SHAPE = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, dropout=0.0)


@pytest.fixture
def run(text_file):
    """run(loss, **changes): one run of a tiny model."""
    corpus = Corpus.load(str(text_file), "char")
    shape = dataclasses.replace(SHAPE, vocab_size=corpus.tokenizer.vocab_size)

    def run(loss: float, **changes) -> dict:
        cfg = TrainConfig(**{"batch_size": 2, "max_steps": 60, "warmup_steps": 0, "lr": 1e-2, **changes})
        return recipe._run(RecipeSettings(loss=loss, device="cpu"), corpus, shape, cfg, 1)

    return run


def row(name: str, *seconds: float, optimizer: str = "adamw", reached: bool = True) -> dict:
    runs = [{"seconds": s, "reached": reached, "steps": 25, "loss": 1.9, "curve": [[25, s, 1.9]]} for s in seconds]
    return {"name": name, "recipe": {"optimizer": optimizer}, "runs": runs}


def test_a_run_ends_with_the_first_evaluation_at_the_loss(run):
    assert [run(99.0)[key] for key in ("reached", "steps")] == [True, 25]


def test_a_run_that_does_not_reach_the_loss_ends_with_its_recipe(run):
    found = run(0.01)
    assert (found["reached"], found["steps"]) == (False, 60)
    assert [steps for steps, _, _ in found["curve"]] == [25, 50, 60] and found["curve"][-1][2] == found["loss"]


def test_a_run_whose_loss_is_not_finite_ends_and_has_not_reached_the_loss(run, monkeypatch):
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: [p.grad.mul_(1e30) for p in parameters]
    )
    found = run(math.inf, lr=1e30, min_lr=0.0)
    assert found["loss"] is None and not found["reached"] and found["steps"] < 60


def test_every_recipe_has_a_name_of_its_own_and_differs_from_the_others():
    names, recipes = zip(*recipe.recipes(8), strict=True)
    assert len(set(names)) == len(names) == len(set(recipes))


def test_only_a_recipe_that_reached_the_loss_with_every_seed_is_the_fastest():
    slow, fast = row("slow", 5.0, 7.0, 6.0), row("fast", 1.0, 2.0, 3.0)
    never = row("never", 0.1, reached=False)
    assert recipe._seconds(slow) == 6.0 and recipe._seconds(never) is None
    assert recipe._fastest([slow, fast, never]) is fast and recipe._fastest([never]) is None


def test_fewer_variants_leave_the_recipes_themselves():
    assert [name for name, _ in recipe.recipes(0)] == [recipe.NANOGPT, recipe.OURS]
    assert len(recipe.recipes(1)) == 4


def test_the_findings_follow_from_the_rows():
    rows = [row(recipe.NANOGPT, 40.0), row("rate 4e-3", 20.0), row(recipe.OURS, 8.0, 8.2, optimizer="muon")]
    assert recipe._preset_in_words(rows) == (
        "The preset reached the loss in 8.1 seconds; nanoGPT's recipe took 4.94 times that."
    )
    assert "(rate 4e-3) took 20.0 seconds, 2.47 times the preset's" in recipe._adamw_in_words(rows)
    assert recipe._fastest_in_words(rows) == "No recipe tried was faster than the preset."
    near, far = row("near", 7.0, optimizer="muon"), row("far", 1.0, optimizer="muon")
    assert "do not tell the two apart" in recipe._fastest_in_words([*rows, near])
    assert (
        recipe._fastest_in_words([*rows, far]) == "The fastest of all (far) took 1.0 seconds, 0.12 times the preset's."
    )
    rows[0]["runs"][0]["reached"] = False
    assert "nanoGPT's recipe did not with every seed" in recipe._preset_in_words(rows)
    rows[2]["runs"][0]["reached"] = False
    assert "The preset did not reach the loss" in recipe._preset_in_words(rows)
    assert recipe._fastest_in_words([rows[0], rows[2]]) == "No recipe reached the loss with every seed."
