"""Learning rate: one model after another trained at rates from far too small to far too large, at several sizes.

Everything else is that of `fastgpt train`: AdamW, a warm-up, a cosine down to a tenth of the rate, clipping at 1. A run
is called diverged where its loss is not finite, or where it ends hardly better than knowing each token's frequency at a
higher rate than the best: whatever it does then, it does not train.
"""

from __future__ import annotations

import statistics
from typing import Any

from ..config import GPTConfig
from ..data.corpus import Corpus
from ..machine import resolve_device
from ..report import pyplot
from .experiment import at_least, described, finite, load_corpus, new_gpt, numbers, training, validation_loss
from .page import LEARNED, find_row, frequencies_text, learned_bound, listed, or_nan, panels
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
    # Each point the mean of the steps around it: a batch's own loss is noisy.
    points = [losses[i : i + every] for i in range(0, len(losses), every)]
    curve = [[i * every + len(part) / 2, finite(round(statistics.fmean(part), 4))] for i, part in enumerate(points)]
    return {"loss": finite(validation_loss(model, corpus)), "curve": curve}


# ---- what is shown ----


def show(results: dict[str, Any], page: Any) -> None:
    settings, rates = results["settings"], sorted({row["lr"] for row in results["rows"]})
    widths = sorted({row["width"] for row in results["rows"]})
    page.paragraph(
        f"Each size is trained at each rate for {settings['steps']} steps of {BATCH_SIZE} blocks of {BLOCK_SIZE} "
        f"characters of {results['data']['name']}; the validation loss at the end is the mean over "
        f"seeds ({settings['repeats']}). {frequencies_text(results)}. A rate above the best one is called diverged "
        f"where any seed ends less than {LEARNED} below that, or with a loss that is not finite."
    )
    page.table(
        ["learning rate", *(f"{results['parameters'][str(w)]:,} parameters" for w in widths)],
        [[f"{rate:g}", *(_mean(_runs_at(results, width, rate)) for width in widths)] for rate in rates],
    )
    page.picture("final", "Validation loss at the end against the learning rate", lambda: _draw_final(results))
    page.picture("curves", "Training loss, one panel a size", lambda: _draw_curves(results))
    for width in widths:
        page.paragraph(_findings(results, width, rates))
    page.paragraph(_across(results, widths, rates))


def _runs_at(results: dict[str, Any], width: int, rate: float) -> dict[str, Any]:
    return find_row(results["rows"], width=width, lr=rate)


def _mean(row: dict[str, Any]) -> float | None:
    """None where any of the seeds ended without a finite loss."""
    return None if None in row["losses"] else statistics.fmean(row["losses"])


def _spread(row: dict[str, Any]) -> float:
    """How far apart the seeds of one rate are."""
    return max(row["losses"]) - min(row["losses"])


def _means(results: dict[str, Any], width: int, rates: list[float]) -> dict[float, float]:
    """The mean loss by rate, of the rates that have one."""
    return {rate: mean for rate in rates if (mean := _mean(_runs_at(results, width, rate))) is not None}


def _best(results: dict[str, Any], width: int, rates: list[float]) -> float | None:
    means = _means(results, width, rates)
    return min(means, key=lambda rate: means[rate]) if means else None


def _diverged(results: dict[str, Any], width: int, rates: list[float]) -> list[float]:
    """Rates above the best one at which a seed's loss is not finite or no better than the tokens' frequencies."""
    best, bound = _best(results, width, rates), learned_bound(results)
    rows = [_runs_at(results, width, rate) for rate in rates if best is None or rate > best]
    return [row["lr"] for row in rows if any(loss is None or loss >= bound for loss in row["losses"])]


def _findings(results: dict[str, Any], width: int, rates: list[float]) -> str:
    n = results["parameters"][str(width)]
    best, diverged = _best(results, width, rates), _diverged(results, width, rates)
    if best is None:
        return f"{n:,} parameters: no rate ended with a finite loss."
    means = _means(results, width, rates)
    loss = means[best]
    apart = {rate: _spread(_runs_at(results, width, rate)) for rate in means}
    near = [rate for rate in means if rate != best and means[rate] - loss <= max(apart[rate], apart[best])]
    text = f"{n:,} parameters: the lowest loss, {loss:.3f}, is at {best:g}"
    if near:
        text += f"; the seeds differ too much to tell it from the losses at {_rates(near)}"
    ends = [rate for rate in (rates[0], rates[-1]) if rate != best and rate in means]
    text += "".join(f"; at {rate:g} it is {means[rate] - loss:+.3f}" for rate in ends)
    return f"{text}. Diverged at {_rates(diverged)}." if diverged else f"{text}. None of the rates diverged."


def _across(results: dict[str, Any], widths: list[int], rates: list[float]) -> str:
    best = {width: rate for width in widths if (rate := _best(results, width, rates)) is not None}
    if len(widths) < 2 or len(best) < len(widths):
        return "Sizes are not compared."
    small, large = widths[0], widths[-1]
    relation = "the same as" if best[large] == best[small] else "below" if best[large] < best[small] else "above"
    first = {width: _diverged(results, width, rates)[:1] for width in widths}
    limits = "; ".join(f"{results['parameters'][str(w)]:,}: {_rates(first[w])}" for w in widths)
    return (
        f"Of the rates tried, the best for the largest model, {best[large]:g}, is {relation} the best for the "
        f"smallest, {best[small]:g}. The lowest rate at which training diverged, by parameters: {limits}."
    )


def _rates(rates: list[float]) -> str:
    return listed(f"{rate:g}" for rate in rates)


def _draw_final(results: dict[str, Any]) -> Any:
    figure, [[axes]] = panels(6.5, 3.8)
    for width in sorted({row["width"] for row in results["rows"]}):
        rows = [row for row in results["rows"] if row["width"] == width]
        means = or_nan([_mean(row) for row in rows])
        (line,) = axes.plot(
            [row["lr"] for row in rows], means, "o-", ms=4, label=f"{results['parameters'][str(width)]:,} parameters"
        )
        seeds = [(row["lr"], loss) for row in rows for loss in row["losses"] if loss is not None]
        axes.plot(*zip(*seeds, strict=True), ".", color=line.get_color(), alpha=0.4)
    bound = results["data"]["frequency_loss"]
    axes.axhline(bound, color="grey", ls=":", lw=0.8, label="frequencies only")
    axes.set(xlabel="learning rate", ylabel="validation loss", xscale="log", ylim=(None, bound + 0.6))
    axes.legend(fontsize="small")
    return figure


def _draw_curves(results: dict[str, Any]) -> Any:
    widths = sorted({row["width"] for row in results["rows"]})
    figure, axes = panels(3.2 * len(widths), 3.6, columns=len(widths), sharey=True)
    colours = pyplot().get_cmap("viridis")
    rates = sorted({row["lr"] for row in results["rows"]})
    for panel, width in zip(axes[0], widths, strict=True):
        for i, rate in enumerate(rates):
            points = [(x, y) for x, y in _runs_at(results, width, rate)["curve"] if y is not None]
            if points:
                colour = colours(i / max(1, len(rates) - 1) * 0.95)
                panel.plot(*zip(*points, strict=True), color=colour, label=f"{rate:g}")
        panel.set(xlabel="step", title=f"{results['parameters'][str(width)]:,} parameters")
    axes[0][0].set_ylabel("training loss")
    axes[0][0].set_ylim(top=results["data"]["frequency_loss"] + 1.5)  # for all of them, now that all are drawn
    axes[0][-1].legend(title="learning rate", fontsize="x-small", title_fontsize="small")
    return figure
