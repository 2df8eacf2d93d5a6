"""Recipe: the small GPT of the demo, trained by several recipes until its validation loss is that of nanoGPT's.

The model, the text and the validation are the same for all. A recipe is what a TrainConfig holds: the optimizer, its
learning rates, how they rise and fall over how many steps, and the batch size. The number of steps is part of it,
because the loss falls fastest while the rates come to their end. A run ends once it has reached the loss, or with its
steps. Its seconds are those of the steps and of drawing their batches; evaluation is not counted.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from typing import Any

from ..config import GPTConfig, TrainConfig, preset
from ..data.corpus import Corpus
from ..machine import resolve_device
from ..plots import FAINT, line_style, panels
from .experiment import SMALL_GPT, at_least, described, finite, load_corpus, new_gpt, training_steps, validation_loss
from .page import Row, counted, find_row, loss_text, or_nan
from .settings import RecipeSettings

OURS, NANOGPT = "the preset", "nanoGPT's recipe"
EVAL_INTERVAL = 25

Changes = dict[str, Any]
OF_NANOGPT: list[Changes] = [
    {"lr": 4e-3, "min_lr": 4e-4, "max_steps": 1250},
    {"lr": 2e-3, "min_lr": 2e-4, "max_steps": 1500},
    {"lr": 8e-3, "min_lr": 8e-4, "max_steps": 1250},
]
OF_PRESET: list[Changes] = [
    {"muon_lr": 0.02},
    {"muon_lr": 0.08},
    {"lr": 0.004},
    {"lr": 0.032},
    {"lr_decay": "cosine"},
    {"warmup_steps": 100},
    {"batch_size": 8, "max_steps": 550},
    {"batch_size": 16, "max_steps": 300},
]


def recipes(variants: int) -> list[tuple[str, TrainConfig]]:
    """What is compared, by name: nanoGPT's recipe, the preset's, and of each so many with some settings changed."""
    found = []
    nanogpt, ours = TrainConfig(batch_size=12, max_steps=2000), TrainConfig(**preset(SMALL_GPT)[1])
    for name, recipe, changed in ((NANOGPT, nanogpt, OF_NANOGPT), (OURS, ours, OF_PRESET)):
        found.append((name, recipe))
        found += [(_name(name, changes), dataclasses.replace(recipe, **changes)) for changes in changed[:variants]]
    return found


def _name(recipe: str, changes: Changes) -> str:
    return f"{recipe}, " + ", ".join(f"{name} {value}" for name, value in changes.items())


def measure(settings: RecipeSettings) -> dict[str, Any]:
    at_least(settings, repeats=1, most_steps=1, eval_blocks=1, variants=0)
    shape = GPTConfig.preset(SMALL_GPT)
    corpus = load_corpus(settings, shape.block_size)
    shape = dataclasses.replace(shape, vocab_size=corpus.tokenizer.vocab_size)
    rows = []
    for name, recipe in recipes(settings.variants):
        recipe = dataclasses.replace(recipe, max_steps=min(recipe.max_steps, settings.most_steps))
        runs = [_run(settings, corpus, shape, recipe, settings.seed + i) for i in range(settings.repeats)]
        rows.append({"name": name, "recipe": dataclasses.asdict(recipe), "runs": runs})
        print(f"{name}: {_steps_text(rows[-1])}", flush=True)
    return {"data": described(corpus, settings, shape.block_size), "rows": rows}


def _run(settings: RecipeSettings, corpus: Corpus, shape: GPTConfig, recipe: TrainConfig, seed: int) -> Row:
    """Train to the loss, or to the recipe's end. `curve` has [steps, seconds, validation loss] of each evaluation."""
    model = new_gpt(shape, seed).to(resolve_device(settings.device))
    steps = training_steps(model, corpus, dataclasses.replace(recipe, seed=seed))
    curve: list[list[float | None]] = []
    taken, seconds, is_over = 0, 0.0, False
    while not is_over:
        began, todo = time.perf_counter(), min(EVAL_INTERVAL, recipe.max_steps - taken)
        losses = list(itertools.islice(steps, todo))
        seconds += time.perf_counter() - began
        taken += len(losses)
        loss = validation_loss(model, corpus, settings.eval_blocks)
        curve.append([taken, round(seconds, 2), finite(loss)])
        is_reached = loss <= settings.loss
        is_over = is_reached or taken == recipe.max_steps or len(losses) < todo  # the last loss was not finite
    return {"reached": is_reached, "steps": taken, "seconds": round(seconds, 2), "loss": finite(loss), "curve": curve}


# ---- what is shown ----


def show(results: dict[str, Any], page: Any) -> None:
    settings, rows = results["settings"], results["rows"]
    page.paragraph(
        f"The model of the preset {SMALL_GPT} was trained on {results['data']['name']} by "
        f"{counted(len(rows), 'recipe')}, each with {counted(settings['repeats'], 'seed')}, until its validation loss "
        f"was at most {settings['loss']:g} nats; it was measured every {EVAL_INTERVAL} steps. A recipe has reached the "
        f"loss when all of its seeds have, and its seconds are their median."
    )
    page.picture(
        "curves",
        "Validation loss by seconds of training, first seed",
        lambda: _draw(results),
        nothing=""
        if any(loss for row in _drawn(rows) for *_, loss in row["runs"][0]["curve"])
        else "no loss is finite",
    )
    page.findings(_preset_in_words(rows), _adamw_in_words(rows), _fastest_in_words(rows))
    with page.numbers():
        page.paragraph(f"nanoGPT's recipe: {_recipe_text(find_row(rows, name=NANOGPT)['recipe'])}.")
        page.paragraph(f"The preset: {_recipe_text(find_row(rows, name=OURS)['recipe'])}.")
        page.paragraph(
            f"The loss is that of {counted(settings['eval_blocks'], 'block')} of the validation text. Other work on "
            f"the machine makes the seconds longer, and leaves the steps as they are."
        )
        page.table(
            ["recipe", "steps of each seed", "loss of each seed", "seconds to the loss"],
            [[row["name"], _steps_text(row), _losses_text(row), _seconds_text(row)] for row in rows],
        )


def _recipe_text(recipe: Row) -> str:
    adamw = f"AdamW at {recipe['lr']:g}, with betas of {recipe['beta1']:g} and {recipe['beta2']:g}"
    if recipe["optimizer"] == "muon":
        momentum = f"a momentum of {recipe['muon_momentum']:g}"
        adamw = f"Muon at {recipe['muon_lr']:g}, with {momentum}, for the matrices of the blocks; for the rest {adamw}"
    warmup = f"a warm-up over {counted(recipe['warmup_steps'], 'step')}" if recipe["warmup_steps"] else "no warm-up"
    curve = "along half a cosine" if recipe["lr_decay"] == "cosine" else "linearly"
    return (
        f"{adamw}; {counted(recipe['max_steps'], 'step')} of {counted(recipe['batch_size'], 'block')}; {warmup}, and a "
        f"rate that falls {curve} to {recipe['min_lr'] / recipe['lr']:.0%} of its height"
    )


def _steps_text(row: Row) -> str:
    return ", ".join(f"{run['steps']}" for run in row["runs"])


def _losses_text(row: Row) -> str:
    return ", ".join(loss_text(run["loss"]) for run in row["runs"])


def _seconds(row: Row) -> float | None:
    """The median over the seeds; None where a seed has not reached the loss."""
    runs = row["runs"]
    return statistics.median(run["seconds"] for run in runs) if all(run["reached"] for run in runs) else None


def _seconds_text(row: Row) -> str | None:
    seconds = _seconds(row)
    return None if seconds is None else f"{seconds:.1f}"


def _fastest(rows: list[Row]) -> Row | None:
    """The row with the fewest seconds; None where no row has reached the loss with every seed."""
    return min((row for row in rows if _seconds(row) is not None), key=lambda row: _seconds(row) or 0.0, default=None)


def _of_adamw(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["recipe"]["optimizer"] == "adamw"]


def _preset_in_words(rows: list[Row]) -> str:
    """The preset's seconds beside those of nanoGPT's recipe."""
    ours, theirs = (_seconds(find_row(rows, name=name)) for name in (OURS, NANOGPT))
    if ours is None:
        return "The preset did not reach the loss with every seed, so no recipe's seconds are compared with its."
    if theirs is None:
        return f"The preset reached the loss in {ours:.1f} seconds; nanoGPT's recipe did not with every seed."
    return f"The preset reached the loss in {ours:.1f} seconds; nanoGPT's recipe took {theirs / ours:.2f} times that."


def _adamw_in_words(rows: list[Row]) -> str:
    """The fastest recipe without Muon."""
    return _beside_the_preset(rows, _fastest(_of_adamw(rows)), "The fastest with AdamW alone", "No recipe of AdamW")


def _fastest_in_words(rows: list[Row]) -> str:
    """Whether any recipe is faster than the preset by more than its seeds differ."""
    fastest = _fastest(rows)
    if fastest is not None and fastest["name"] == OURS:
        return "No recipe tried was faster than the preset."
    text = _beside_the_preset(rows, fastest, "The fastest of all", "No recipe")
    ours = find_row(rows, name=OURS)
    if fastest is None or _seconds(ours) is None:
        return text
    # A run ends with an evaluation, so that its seconds are known to that many steps.
    seconds_between = max(run["seconds"] / run["steps"] for run in fastest["runs"]) * EVAL_INTERVAL
    slowest, quickest = max(run["seconds"] for run in fastest["runs"]), min(run["seconds"] for run in ours["runs"])
    if len(ours["runs"]) == 1 or slowest + seconds_between >= quickest:
        return f"{text[:-1]}; seeds and the {EVAL_INTERVAL} steps between evaluations do not tell the two apart."
    return text


def _beside_the_preset(rows: list[Row], row: Row | None, what: str, none: str) -> str:
    ours, seconds = _seconds(find_row(rows, name=OURS)), None if row is None else _seconds(row)
    if row is None or seconds is None:
        return f"{none} reached the loss with every seed."
    relation = "" if ours is None else f", {seconds / ours:.2f} times the preset's"
    return f"{what} ({row['name']}) took {seconds:.1f} seconds{relation}."


def _drawn(rows: list[Row]) -> list[Row]:
    """The recipes in the picture: nanoGPT's, the preset's, and the fastest with AdamW alone."""
    shown = {name: find_row(rows, name=name) for name in (NANOGPT, OURS)}
    if (adamw := _fastest(_of_adamw(rows))) is not None:
        shown[adamw["name"]] = adamw
    return list(shown.values())


def _draw(results: dict[str, Any]) -> Any:
    figure, [[axes]] = panels(4.4)
    for number, row in enumerate(_drawn(results["rows"])):
        _, seconds, losses = zip(*row["runs"][0]["curve"], strict=True)
        axes.plot(seconds, or_nan(losses), label=row["name"], **line_style(number), markevery=0.1)
    axes.axhline(results["settings"]["loss"], color=FAINT, linestyle=":", label="the loss to reach")
    axes.set(xlabel="seconds of training", ylabel="validation loss")
    figure.legend(loc="outside upper left")
    return figure
