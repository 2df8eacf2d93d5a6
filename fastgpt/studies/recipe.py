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
from .experiment import at_least, described, finite, load_corpus, new_gpt, training_steps, validation_loss
from .page import Row, counted, find_row, loss_text, or_nan
from .settings import RecipeSettings

PRESET = "shakespeare-char-cpu"
OURS, NANOGPT = "the preset", "nanoGPT's recipe"
EVAL_INTERVAL = 25

Changes = dict[str, Any]
OF_NANOGPT: list[Changes] = [
    {"lr": 2e-3, "min_lr": 2e-4, "max_steps": 1500},
    {"lr": 4e-3, "min_lr": 4e-4, "max_steps": 1250},
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


def recipes() -> list[tuple[str, TrainConfig]]:
    """What is compared, by name: nanoGPT's recipe, the preset's, and each of them with some settings changed."""
    found = []
    nanogpt, ours = TrainConfig(batch_size=12, max_steps=2000), TrainConfig(**preset(PRESET)[1])
    for name, recipe, changed in ((NANOGPT, nanogpt, OF_NANOGPT), (OURS, ours, OF_PRESET)):
        found.append((name, recipe))
        found += [(_name(name, changes), dataclasses.replace(recipe, **changes)) for changes in changed]
    return found


def _name(recipe: str, changes: Changes) -> str:
    return f"{recipe}, " + ", ".join(f"{name} {value}" for name, value in changes.items())


def measure(settings: RecipeSettings) -> dict[str, Any]:
    at_least(settings, repeats=1, most_steps=1, eval_blocks=1)
    shape = GPTConfig.preset(PRESET)
    corpus = load_corpus(settings, shape.block_size)
    shape = dataclasses.replace(shape, vocab_size=corpus.tokenizer.vocab_size)
    rows = []
    for name, recipe in recipes():
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
        f"The model of the preset {PRESET} is trained on {results['data']['name']} until its validation loss is at "
        f"most {settings['loss']:g} nats. It is measured every {EVAL_INTERVAL} steps, on "
        f"{counted(settings['eval_blocks'], 'block')}. Each recipe is tried with "
        f"{counted(settings['repeats'], 'seed')}. The seconds are the median over the seeds, and are left out where a "
        f"seed ended above that loss."
    )
    page.paragraph(f"nanoGPT's recipe: {_recipe_text(find_row(rows, name=NANOGPT)['recipe'])}.")
    page.paragraph(f"The preset: {_recipe_text(find_row(rows, name=OURS)['recipe'])}.")
    page.table(
        ["recipe", "steps of each seed", "loss of each seed", "seconds to the loss"],
        [[row["name"], _steps_text(row), _losses_text(row), _seconds(row)] for row in rows],
    )
    page.picture("curves", "Validation loss against seconds of training, of the first seed", lambda: _draw(results))
    page.paragraph(_findings(rows))


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


def _fastest(rows: list[Row]) -> Row | None:
    """The row with the fewest seconds; None where no row has reached the loss with every seed."""
    return min((row for row in rows if _seconds(row) is not None), key=lambda row: _seconds(row) or 0.0, default=None)


def _of_adamw(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["recipe"]["optimizer"] == "adamw"]


def _findings(rows: list[Row]) -> str:
    ours = _seconds(find_row(rows, name=OURS))
    if ours is None:
        return "The preset has not reached the loss with every seed, so the others are not compared with it."
    text = f"The preset takes {ours:.1f} seconds."
    for what, row in (
        ("nanoGPT's recipe", find_row(rows, name=NANOGPT)),
        ("the fastest with AdamW alone", _fastest(_of_adamw(rows))),
        ("the fastest of all", _fastest(rows)),
    ):
        seconds = None if row is None else _seconds(row)
        if row is None or seconds is None:
            text += f" No seconds can be given for {what}."
        else:
            text += f" For {what} ({row['name']}) it is {seconds:.1f}, which is {seconds / ours:.2f} times as long."
    return text


def _draw(results: dict[str, Any]) -> Any:
    figure, [[axes]] = panels(4.4)
    shown = {name: find_row(results["rows"], name=name) for name in (NANOGPT, OURS)}
    if (adamw := _fastest(_of_adamw(results["rows"]))) is not None:
        shown[adamw["name"]] = adamw
    for number, row in enumerate(shown.values()):
        _, seconds, losses = zip(*row["runs"][0]["curve"], strict=True)
        axes.plot(seconds, or_nan(losses), label=row["name"], **line_style(number), markevery=0.1)
    axes.axhline(results["settings"]["loss"], color=FAINT, linestyle=":", label="the loss to reach")
    axes.set(xlabel="seconds of training", ylabel="validation loss")
    figure.legend(loc="outside upper left")
    return figure
