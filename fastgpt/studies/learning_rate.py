"""Learning rate: models of several sizes, each trained at rates from far too small to far too large.

Everything else is as in `fastgpt train`: AdamW, a warm-up, a cosine down to a tenth of the rate, clipping at 1. A rate
above the best one is called diverged where the loss is not finite, or ends hardly below the loss of a model that knows
only each token's frequency: such a run does not train.
"""

from __future__ import annotations

import statistics
from typing import Any

from ..config import GPTConfig
from ..data.corpus import Corpus
from ..machine import resolve_device
from ..plots import FAINT, label_ends, line_style, ordered_colours, panels
from .experiment import at_least, described, finite, load_corpus, new_gpt, numbers, training, validation_loss
from .page import LEARNED, Row, counted, frequencies_text, learned_bound, listed, or_nan
from .settings import LearningRateSettings

BLOCK_SIZE = 64
BATCH_SIZE = 12


def measure(settings: LearningRateSettings) -> dict[str, Any]:
    rates = sorted(numbers("rates", settings.rates, float))
    widths = sorted(numbers("widths", settings.widths, int))
    at_least(settings, steps=2, repeats=1)
    corpus = load_corpus(settings, BLOCK_SIZE)
    models = [_config(corpus, width) for width in widths]
    rows = []
    for cfg in models:
        for rate in rates:
            runs = [_train_at(settings, corpus, cfg, rate, settings.seed + i) for i in range(settings.repeats)]
            losses = [run["loss"] for run in runs]
            rows.append({"width": cfg.n_embd, "lr": rate, "losses": losses, "curve": runs[0]["curve"]})
            print(f"width {cfg.n_embd}, rate {rate:g}: {losses}", flush=True)
    sizes = {str(cfg.n_embd): new_gpt(cfg, settings.seed).num_parameters() for cfg in models}
    return {"data": described(corpus, settings, BLOCK_SIZE), "parameters": sizes, "rows": rows}


def _config(corpus: Corpus, width: int) -> GPTConfig:
    n_head = max(1, width // 32)
    width_per_head = -(-width // n_head)
    return GPTConfig(
        corpus.tokenizer.vocab_size, BLOCK_SIZE, max(1, width // 32), n_head, width_per_head * n_head, dropout=0.0
    )


def _train_at(settings: LearningRateSettings, corpus: Corpus, cfg: GPTConfig, rate: float, seed: int) -> dict[str, Any]:
    model = new_gpt(cfg, seed).to(resolve_device(settings.device))
    warmup = settings.steps // 20
    losses = list(training(model, corpus, seed, settings.steps, batch_size=BATCH_SIZE, warmup_steps=warmup, lr=rate))
    every = max(1, len(losses) // 40)
    # Each point is the mean of several steps, because the loss of a single batch is noisy.
    points = [losses[i : i + every] for i in range(0, len(losses), every)]
    curve = [[i * every + len(part) / 2, finite(round(statistics.fmean(part), 4))] for i, part in enumerate(points)]
    return {"loss": finite(validation_loss(model, corpus)), "curve": curve}


# ---- what is shown ----


def show(results: dict[str, Any], page: Any) -> None:
    settings, sizes = results["settings"], _sizes(results)
    page.paragraph(
        f"Each size is trained at each rate for {settings['steps']} steps of {BATCH_SIZE} blocks of {BLOCK_SIZE} "
        f"characters of {results['data']['name']}. The validation loss at the end is the mean over "
        f"{counted(settings['repeats'], 'seed')}. {frequencies_text(results)}. A rate above the best one is called "
        f"diverged where any seed ends less than {LEARNED} below that, or with a loss that is not finite."
    )
    page.table(
        ["learning rate", *sizes],
        [[f"{row[0]['lr']:g}", *map(_mean, row)] for row in zip(*sizes.values(), strict=True)],
    )
    page.picture("final", "Validation loss at the end against the learning rate", lambda: _draw_final(results))
    page.picture("curves", "Training loss, one panel a size", lambda: _draw_curves(results))
    for size, rows in sizes.items():
        page.paragraph(f"{size}: {_findings(rows, learned_bound(results))}")
    page.paragraph(_across(results))


def _sizes(results: dict[str, Any]) -> dict[str, list[Row]]:
    """The rows of each size, from the smallest and by rising rate, with the size in words."""
    sizes: dict[str, list[Row]] = {}
    for row in results["rows"]:
        sizes.setdefault(f"{results['parameters'][str(row['width'])]:,} parameters", []).append(row)
    return sizes


def _mean(row: Row) -> float | None:
    """None where any of the seeds ended without a finite loss."""
    return None if None in row["losses"] else statistics.fmean(row["losses"])


def _best(rows: list[Row]) -> Row | None:
    """The row with the lowest mean loss; None where no row has a finite one."""
    return min((row for row in rows if None not in row["losses"]), key=lambda row: sum(row["losses"]), default=None)


def _diverged(rows: list[Row], bound: float) -> list[float]:
    """The rates above the best one at which the loss of any seed is not finite, or not below `bound`."""
    best = _best(rows)
    above = [row for row in rows if best is None or row["lr"] > best["lr"]]
    return [row["lr"] for row in above if any(loss is None or loss >= bound for loss in row["losses"])]


def _findings(rows: list[Row], bound: float) -> str:
    best = _best(rows)
    if best is None:
        return "no rate ended with a finite loss."

    def spread(row: Row) -> float:
        return max(row["losses"]) - min(row["losses"])

    loss = statistics.fmean(best["losses"])
    others = [(row, mean - loss) for row in rows if row is not best and (mean := _mean(row)) is not None]
    near = [row["lr"] for row, more in others if more <= max(spread(row), spread(best))]
    text = f"the lowest loss, {loss:.3f}, is at {best['lr']:g}"
    if near:
        text += f"; the seeds differ too much to tell it from the losses at {_rates(near)}"
    text += "".join(f"; at {row['lr']:g} it is {more:+.3f}" for row, more in others if row in (rows[0], rows[-1]))
    diverged = _diverged(rows, bound)
    return f"{text}. Diverged at {_rates(diverged)}." if diverged else f"{text}. None of the rates diverged."


def _across(results: dict[str, Any]) -> str:
    sizes = _sizes(results)
    best = [row["lr"] for rows in sizes.values() if (row := _best(rows)) is not None]
    if len(sizes) < 2 or len(best) < len(sizes):
        return "Sizes are not compared."
    small, large = best[0], best[-1]
    relation = "the same as" if large == small else "below" if large < small else "above"
    bound = learned_bound(results)
    limits = "; ".join(f"{size}: {_rates(_diverged(rows, bound)[:1])}" for size, rows in sizes.items())
    return (
        f"Of the rates tried, the best for the largest model, {large:g}, is {relation} the best for the smallest, "
        f"{small:g}. The lowest rate at which training diverged is, for {limits}."
    )


def _rates(rates: list[float]) -> str:
    return listed(f"{rate:g}" for rate in rates)


def _draw_final(results: dict[str, Any]) -> Any:
    figure, [[axes]] = panels(3.8)
    for number, (size, rows) in enumerate(_sizes(results).items()):
        style = line_style(number)
        axes.plot([row["lr"] for row in rows], or_nan(map(_mean, rows)), label=size, **style)
        seeds = [(row["lr"], loss) for row in rows for loss in row["losses"] if loss is not None]
        axes.plot([rate for rate, _ in seeds], [loss for _, loss in seeds], ".", color=style["color"], alpha=0.5)
    bound = results["data"]["frequency_loss"]
    axes.axhline(bound, color=FAINT, linestyle=":", label="frequencies only")
    axes.set(xlabel="learning rate", ylabel="validation loss", xscale="log", ylim=(None, bound + 0.6))
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def _draw_curves(results: dict[str, Any]) -> Any:
    sizes = _sizes(results)
    figure, axes = panels(2.4 * len(sizes), rows=len(sizes), sharex=True, sharey=True)
    lowest = min((loss for row in results["rows"] for _, loss in row["curve"] if loss is not None), default=0.0)
    axes[0][0].set_ylim(lowest - 0.1, results["data"]["frequency_loss"] + 1.5)
    for panel, (size, rows) in zip(axes[:, 0], sizes.items(), strict=True):
        for colour, row in zip(ordered_colours(len(rows)), rows, strict=True):
            steps, losses = zip(*row["curve"], strict=True)
            panel.plot(steps, or_nan(losses), color=colour, label=f"{row['lr']:g}")
        panel.set(title=f"{size}, by learning rate", ylabel="training loss")
        label_ends(panel)
    axes[-1][0].set_xlabel("step")
    return figure
