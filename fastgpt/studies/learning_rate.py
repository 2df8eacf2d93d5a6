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
from ..plots import FAINT, label_ends, line_style, name_above, ordered_colours, panels, plot_up_to
from .experiment import at_least, described, finite, load_corpus, new_gpt, numbers, training, validation_loss
from .page import LEARNED, Row, counted, frequencies_text, learned_bound, listed, or_nan, together
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
    settings, sizes, bound = results["settings"], _sizes(results), learned_bound(results)
    is_any_finite = any(loss is not None for row in results["rows"] for loss in row["losses"])
    nothing = "" if is_any_finite else "no run ended with a finite loss"
    page.paragraph(
        f"GPTs of {together(sizes)} were trained at {counted(len(next(iter(sizes.values()))), 'rate')} for "
        f"{counted(settings['steps'], 'step')} of {BATCH_SIZE} blocks of {BLOCK_SIZE} characters of "
        f"{results['data']['name']}, with {counted(settings['repeats'], 'seed')} each. {frequencies_text(results)}. A "
        f"rate above the best one has diverged where any seed ends less than {LEARNED} below that, or not finite."
    )
    page.picture("final", "Validation loss at the end, by learning rate", lambda: _draw_final(results), nothing=nothing)
    page.findings(_best_in_words(results), _sizes_in_words(results), _divergence_in_words(results))
    with page.numbers():
        page.table(
            ["learning rate", *sizes],
            [[f"{row[0]['lr']:g}", *map(_mean_text, row)] for row in zip(*sizes.values(), strict=True)],
        )
        page.paragraph("The losses are means over the seeds; a dash is a rate at which a seed has no finite loss.")
        for size, rows in sizes.items():
            page.paragraph(f"{size}: {_findings(rows, bound)}")
        page.picture("curves", _caption_of_curves(results), lambda: _draw_curves(results), nothing=nothing)


def _sizes(results: dict[str, Any]) -> dict[str, list[Row]]:
    """The rows of each size, from the smallest and by rising rate, with the size in words."""
    sizes: dict[str, list[Row]] = {}
    for row in results["rows"]:
        sizes.setdefault(f"{results['parameters'][str(row['width'])]:,} parameters", []).append(row)
    return sizes


def _mean(row: Row) -> float | None:
    """None where any of the seeds ended without a finite loss."""
    return None if None in row["losses"] else statistics.fmean(row["losses"])


def _mean_text(row: Row) -> str | None:
    mean = _mean(row)
    return None if mean is None else f"{mean:.3f}"


def _best(rows: list[Row]) -> Row | None:
    """The row with the lowest mean loss; None where no row has a finite one."""
    return min((row for row in rows if None not in row["losses"]), key=lambda row: sum(row["losses"]), default=None)


def _near(rows: list[Row], best: Row) -> list[float]:
    """The other rates whose mean loss is no further from the best one's than the seeds of either lie apart."""

    def spread(row: Row) -> float:
        return max(row["losses"]) - min(row["losses"])

    others = [(row, mean) for row in rows if row is not best and (mean := _mean(row)) is not None]
    return [row["lr"] for row, mean in others if mean - (_mean(best) or 0.0) <= max(spread(row), spread(best))]


def _diverged(rows: list[Row], bound: float) -> list[float]:
    """The rates above the best one at which the loss of any seed is not finite, or not below `bound`."""
    best = _best(rows)
    above = [row for row in rows if best is None or row["lr"] > best["lr"]]
    return [row["lr"] for row in above if any(loss is None or loss >= bound for loss in row["losses"])]


def _findings(rows: list[Row], bound: float) -> str:
    best = _best(rows)
    if best is None:
        return "no rate ended with a finite loss."

    loss = statistics.fmean(best["losses"])
    others = [(row, mean - loss) for row in rows if row is not best and (mean := _mean(row)) is not None]
    near = _near(rows, best)
    text = f"the lowest loss, {loss:.3f}, is at {best['lr']:g}"
    if near:
        text += f"; the seeds differ too much to tell it from the losses at {_rates(near)}"
    text += "".join(f"; at {row['lr']:g} it is {more:+.3f}" for row, more in others if row in (rows[0], rows[-1]))
    diverged = _diverged(rows, bound)
    return f"{text}. Diverged at {_rates(diverged)}." if diverged else f"{text}. None of the rates diverged."


def _learned_best(results: dict[str, Any]) -> dict[str, Row | None]:
    """The best row of each size; None for a size that learned nothing from the context at any rate."""
    found = {size: _best(rows) for size, rows in _sizes(results).items()}
    bound = learned_bound(results)
    return {size: row if row and statistics.fmean(row["losses"]) < bound else None for size, row in found.items()}


def _best_in_words(results: dict[str, Any]) -> str:
    """The best rate of each size, and whether the seeds tell it from the others."""
    parts, sizes = [], _sizes(results)
    for size, best in _learned_best(results).items():
        if best is None:
            parts.append(f"none for {size}, which learned nothing from the context")
            continue
        near = _near(sizes[size], best)
        parts.append(
            f"{best['lr']:g} for {size} (loss {statistics.fmean(best['losses']):.3f})"
            + (f", not told apart from {_rates(near)}" if near else "")
        )
    seeds = "" if results["settings"]["repeats"] > 1 else "; with one seed, chance is not known"
    return f"The best rate tried is {'; '.join(parts)}{seeds}."


def _sizes_in_words(results: dict[str, Any]) -> str:
    """Whether the best rate of the largest model differs from that of the smallest."""
    sizes, best = list(_sizes(results).values()), list(_learned_best(results).values())
    if len(sizes) < 2:
        return "One size was trained, so nothing can be said of others."
    small, large = best[0], best[-1]
    if small is None or large is None:
        return "The largest and the smallest model are not compared, as one of them learned nothing."
    if small["lr"] == large["lr"]:
        return f"The largest and the smallest model have the same best rate, {small['lr']:g}."
    if {small["lr"], *_near(sizes[0], small)} & {large["lr"], *_near(sizes[-1], large)}:
        return "The largest and the smallest model may share their best rate: the seeds do not tell them apart."
    relation = "below" if large["lr"] < small["lr"] else "above"
    return f"The best rate of the largest model, {large['lr']:g}, is {relation} that of the smallest, {small['lr']:g}."


def _divergence_in_words(results: dict[str, Any]) -> str:
    """Where training diverges, by size."""
    if not any(_learned_best(results).values()):
        return "As no model learned anything, nothing can be said of where training diverges."
    bound = learned_bound(results)
    first = {size: _diverged(rows, bound)[:1] for size, rows in _sizes(results).items()}
    if not any(first.values()):
        return "None of the rates tried diverged, so where training diverges is not seen."
    parts = [f"{rates[0]:g} for {size}" if rates else f"none for {size}" for size, rates in first.items()]
    return f"The lowest rate at which training diverged is {together(parts)}."


def _rates(rates: list[float]) -> str:
    return listed(f"{rate:g}" for rate in rates)


def _draw_final(results: dict[str, Any]) -> Any:
    figure, [[axes]] = panels(3.8)
    bound = results["data"]["frequency_loss"]
    losses = [loss for row in results["rows"] for loss in row["losses"] if loss is not None]
    highest = min(max(losses), bound + 1.0) + 0.1  # a huge loss would press all other curves flat
    any_above = False
    for number, (size, rows) in enumerate(_sizes(results).items()):
        style = line_style(number)
        rates, means = [row["lr"] for row in rows], or_nan(map(_mean, rows))
        any_above |= plot_up_to(axes, highest, rates, means, label=size, **style)
        seeds = [(row["lr"], loss) for row in rows for loss in row["losses"] if loss is not None]
        axes.plot([rate for rate, _ in seeds], [loss for _, loss in seeds], ".", color=style["color"], alpha=0.5)
    axes.axhline(bound, color=FAINT, linestyle=":", label="frequencies only")
    axes.set(xlabel="learning rate", ylabel="validation loss", xscale="log", ylim=(min(losses) - 0.1, highest))
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.set_xticks([], minor=True)  # which a short axis would name, too
    if any_above:
        name_above(axes)
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def _draw_curves(results: dict[str, Any]) -> Any:
    sizes = _sizes(results)
    figure, axes = panels(2.4 * len(sizes), rows=len(sizes), sharex=True, sharey=True)
    lowest = min((loss for row in results["rows"] for _, loss in row["curve"] if loss is not None), default=0.0)
    axes[0][0].set_ylim(lowest - 0.1, _highest_of_curves(results))
    for panel, (size, rows) in zip(axes[:, 0], sizes.items(), strict=True):
        for colour, row in zip(ordered_colours(len(rows)), rows, strict=True):
            steps, losses = zip(*row["curve"], strict=True)
            panel.plot(steps, or_nan(losses), color=colour, label=f"{row['lr']:g}")
        panel.set(title=f"{size}, by learning rate", ylabel="training loss")
        label_ends(panel)
    axes[-1][0].set_xlabel("step")
    return figure


def _highest_of_curves(results: dict[str, Any]) -> float:
    """Where the axis of the training losses ends. Losses that shoot up in the first steps may lie above it."""
    losses = [loss for row in results["rows"] for _, loss in row["curve"] if loss is not None]
    return min(max(losses, default=0.0) + 0.1, results["data"]["frequency_loss"] + 1.5)


def _caption_of_curves(results: dict[str, Any]) -> str:
    highest = _highest_of_curves(results)
    is_cut = any(loss is None or loss > highest for row in results["rows"] for _, loss in row["curve"])
    return "Training loss by step" + (f"; above {highest:.1f} nats the curves leave the picture" if is_cut else "")
