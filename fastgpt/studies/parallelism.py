"""Parallelism: the training of a GPT and of recurrent networks with as many parameters.

A recurrent network computes token t from its state at token t - 1, so T tokens need T steps one after the other on any
hardware. A transformer computes all T tokens at once, in a number of steps that depends only on its depth, but the work
of its attention grows with T squared. Which of them is faster depends on the hardware, on T and on the batch. The study
measures it with all models taking turns in one process, and compares their losses after as many tokens and seconds.

Sources: Vaswani et al. 2017, table 1 (sequential operations by kind of layer).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..baselines import matched
from ..config import GPTConfig
from ..data.corpus import Corpus
from ..machine import resolve_device
from ..model import GPT
from ..plots import line_style, panels
from .experiment import at_least, described, finite, load_corpus, new_gpt, numbers, training, validation_loss
from .page import Row, counted, find_row, learned_bound, loss_text, together
from .settings import ParallelismSettings

KINDS = ("gpt", "rnn", "gru", "lstm")  # in tables and sentences they are written in capitals
DIRECTIONS = ("forward", "forward and backward")
BLOCK_SIZE = 64  # of the training for the loss, and of the position table that is counted
BATCH_SIZE = 12
ROUNDS = 3


def measure(settings: ParallelismSettings) -> dict[str, Any]:
    contexts = sorted(numbers("contexts", settings.contexts, int))
    batches = sorted(numbers("batches", settings.batches, int))
    rates = sorted(numbers("rates", settings.rates, float))
    at_least(settings, width=16, steps=2, seconds=0)
    corpus = load_corpus(settings, BLOCK_SIZE)
    device = resolve_device(settings.device)
    n_head = max(1, settings.width // 32)
    width = -(-settings.width // n_head) * n_head
    cfg = GPTConfig(corpus.tokenizer.vocab_size, BLOCK_SIZE, 4, n_head, width, dropout=0.0)
    models = {kind: _build(kind, cfg, settings.seed).to(device) for kind in KINDS}
    sizes = {kind: model.num_parameters() for kind, model in models.items()}
    # For the timings the GPT's position table is as long as the longest context; its blocks are the same.
    long = dataclasses.replace(cfg, block_size=max(contexts))
    timed = models | {"gpt": new_gpt(long, settings.seed).to(device)}
    rows = []
    for context, batch, direction in itertools.product(contexts, batches, DIRECTIONS):
        rows += _timings(timed, context, batch, direction, settings)
        shown = ", ".join(f"{row['model'].upper()} {row['ms']:.2f} ms" for row in rows[-len(KINDS) :])
        print(f"{batch} x {context}, {direction}: {shown}", flush=True)
    return {
        "data": described(corpus, settings, BLOCK_SIZE),
        "device_type": device.type,
        "parameters": sizes,
        "widths": {kind: model.cfg.n_embd for kind, model in models.items()},
        "layers": cfg.n_layer,
        "rows": rows,
        "losses": [row for rate in rates for row in _losses(cfg, rate, corpus, settings)],
    }


def _build(kind: str, cfg: GPTConfig, seed: int) -> Any:
    torch.manual_seed(seed)
    return GPT(cfg) if kind == "gpt" else matched(kind, cfg)


def _timings(
    models: dict[str, Any], context: int, batch: int, direction: str, settings: ParallelismSettings
) -> list[Row]:
    """The time of each model in milliseconds. The models take turns, after one call of each to warm up."""
    generator = torch.Generator().manual_seed(settings.seed)
    V, device = models["gpt"].cfg.vocab_size, next(models["gpt"].parameters()).device
    x, y = (torch.randint(V, (batch, context), generator=generator).to(device) for _ in range(2))
    calls = {kind: _call(model, x, y, direction) for kind, model in models.items()}
    times: dict[str, list[float]] = {kind: [] for kind in calls}
    for call in calls.values():
        call()
    began = time.perf_counter()
    while len(times["gpt"]) < ROUNDS or time.perf_counter() - began < settings.seconds:
        for kind, call in calls.items():
            times[kind].append(_synchronized_seconds(call, device) * 1e3)
    rows = []
    for kind, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        row = {"model": kind, "context": context, "batch": batch, "direction": direction, "rounds": len(values)}
        row |= {"ms": round(middle, 4), "p25": round(low, 4), "p75": round(high, 4)}
        rows.append(row | {"tokens_per_s": round(batch * context / middle * 1e3, 1)})
    return rows


def _call(model: Any, x: Tensor, y: Tensor, direction: str) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            model.loss(x, y)

    def both() -> None:
        model.loss(x, y).backward()
        model.zero_grad(set_to_none=True)

    model.train()
    return forward if direction == "forward" else both


def _synchronized_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """How long `call` takes, including the work that it starts on a GPU."""

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def _losses(gpt: GPTConfig, rate: float, corpus: Corpus, settings: ParallelismSettings) -> list[Row]:
    """Train new models on the same batches, a step of each in turn; the validation loss by tokens and seconds.

    A model's seconds are the time of its own training steps, without evaluation.
    """
    device = resolve_device(settings.device)
    models = {kind: _build(kind, gpt, settings.seed).to(device) for kind in KINDS}
    steps, warmup = settings.steps, min(100, settings.steps // 10)
    runs = {
        kind: training(model, corpus, settings.seed, steps, batch_size=BATCH_SIZE, warmup_steps=warmup, lr=rate)
        for kind, model in models.items()
    }
    seconds = dict.fromkeys(KINDS, 0.0)
    at = {max(1, round(steps * part / 10)) for part in range(1, 11)}
    rows: list[Row] = []
    for step in range(1, steps + 1):
        for kind in KINDS:
            seconds[kind] += _synchronized_seconds(partial(next, runs[kind], None), device)
            if step in at:
                loss = finite(validation_loss(models[kind], corpus))
                row: Row = {"model": kind, "lr": rate, "step": step, "tokens": step * BATCH_SIZE * BLOCK_SIZE}
                rows.append(row | {"seconds": round(seconds[kind], 3), "loss": loss})
    shown = ", ".join(f"{row['model'].upper()} {row['loss']}" for row in rows[-len(KINDS) :])
    print(f"rate {rate:g}, loss after {steps} steps: {shown}", flush=True)
    return rows


# ---- what is shown ----


def sequential_steps(kind: str, n_layer: int, context: int) -> int:
    """How many steps must follow one another on unlimited hardware, where one step is a layer's work for a token.

    A recurrent layer's step t waits for its step t - 1 and for step t of the layer below: the layers can work one
    token apart. A transformer's layer waits only for the layer below, and computes all tokens at once.
    """
    return n_layer if kind == "gpt" else context + n_layer - 1


def show(results: dict[str, Any], page: Any) -> None:
    rows, rates = results["rows"], results["settings"]["rates"].split(",")
    contexts, batches = (sorted({row[key] for row in rows}) for key in ("context", "batch"))
    page.paragraph(
        f"A GPT of {results['layers']} layers and recurrent networks with as many layers and parameters took turns at "
        f"the same batches of random tokens, forward and backward, in contexts of {together(contexts)} tokens. Then "
        f"all were trained on the same {_trained_tokens(results):,} tokens of {results['data']['name']}, each at the "
        f"best of {counted(len(rates), 'learning rate')} ({together(rates)})."
    )
    page.picture("speed", "Tokens per second by context", lambda: _draw_speed(rows, contexts, batches))
    page.findings(
        _speeds_in_words(rows, contexts, batches),
        _growth(rows, contexts, batches[-1]),
        _losses_in_words(results),
    )
    with page.numbers():
        _show_times(results, page, contexts, batches)
        _show_losses(results, page)


def _show_times(results: dict[str, Any], page: Any, contexts: list[int], batches: list[int]) -> None:
    rows = results["rows"]
    sizes = ", ".join(
        f"{k.upper()} {results['parameters'][k]:,} parameters (width {results['widths'][k]})" for k in KINDS
    )
    page.paragraph(
        f"{sizes}. The GPT's parameters include a position table for {BLOCK_SIZE} tokens; in the timings, the table is "
        f"as long as the longest context. The recurrent layers are PyTorch's. All models compute in float32, without "
        f"dropout. A time is the median over several rounds, in milliseconds. Forward is the loss without gradients. "
        f"Backward is the forward and the backward pass, without the optimizer's step. The last two columns count the "
        f"steps of a layer that must follow one another on any hardware."
    )
    page.table(
        ["rows", "context"]
        + [f"{kind.upper()}, {short}" for short in ("forward", "backward") for kind in KINDS]
        + ["steps, GPT", "steps, recurrent"],
        [
            [
                batch,
                context,
                *(_time_text(row) for d in DIRECTIONS for row in _at(rows, context, batch, d)),
                *(sequential_steps(kind, results["layers"], context) for kind in ("gpt", "rnn")),
            ]
            for batch, context in itertools.product(batches, contexts)
        ],
    )
    for batch, direction in itertools.product(batches, DIRECTIONS):
        page.paragraph(_crossovers(rows, contexts, batch, direction))
    page.paragraph(_noise(rows))


def _show_losses(results: dict[str, Any], page: Any) -> None:
    ends = [row for kind in KINDS for row in _best_curve(results, kind)[-1:]]
    page.table(
        ["model", "learning rate", "tokens", "seconds", "validation loss", "tokens/s in training"],
        [
            [
                row["model"].upper(),
                f"{row['lr']:g}",
                row["tokens"],
                f"{row['seconds']:.1f}",
                loss_text(row["loss"]),
                round(row["tokens"] / row["seconds"]),
            ]
            for row in ends
        ],
    )
    page.picture(
        "loss",
        "Validation loss by training tokens and by seconds",
        lambda: _draw_training(results),
        nothing="" if ends else "no model ended with a finite loss",
    )


def _at(rows: list[Row], context: int, batch: int, direction: str) -> list[Row]:
    """The row of each model."""
    return [find_row(rows, model=kind, context=context, batch=batch, direction=direction) for kind in KINDS]


def _time_text(row: Row) -> str:
    return f"{row['ms']:,.2f}"


def _trained_tokens(results: dict[str, Any]) -> int:
    return max(row["tokens"] for row in results["losses"])


def _by_context(rows: list[Row], key: str, kind: str, contexts: list[int], batch: int, direction: str) -> list[float]:
    """A model's "ms" or "tokens_per_s" at each of `contexts`."""
    return [find_row(rows, model=kind, context=c, batch=batch, direction=direction)[key] for c in contexts]


def _best_curve(results: dict[str, Any], kind: str) -> list[Row]:
    """The curve of the learning rate at which the model ends with the lowest loss; empty where no loss is finite."""
    rows = [row for row in results["losses"] if row["model"] == kind]
    last = max(row["step"] for row in rows)
    ends = {row["lr"]: row["loss"] for row in rows if row["step"] == last and row["loss"] is not None}
    best = min(ends, key=lambda rate: ends[rate], default=None)
    return [row for row in rows if row["lr"] == best and row["loss"] is not None]


def crossings(contexts: list[int], ratios: list[float]) -> list[float]:
    """The contexts at which a ratio of times passes 1, interpolated between measured points in logarithms."""
    found = []
    for (a, x), (b, y) in itertools.pairwise(zip(contexts, ratios, strict=True)):
        if (x < 1.0) != (y < 1.0):
            part = math.log(x) / (math.log(x) - math.log(y))
            found.append(math.exp(math.log(a) + part * (math.log(b) - math.log(a))))
    return found


def _crossovers(rows: list[Row], contexts: list[int], batch: int, direction: str) -> str:
    """Which model is fastest at each context, and where the GPT becomes faster or slower than each other model."""
    times = {kind: _by_context(rows, "ms", kind, contexts, batch, direction) for kind in KINDS}
    fastest = [min(KINDS, key=lambda kind: times[kind][i]) for i in range(len(contexts))]
    spans = []
    for kind, group in itertools.groupby(zip(fastest, contexts, strict=True), key=lambda pair: pair[0]):
        span = [context for _, context in group]
        spans.append(f"{kind.upper()} at {span[0]}" + (f" to {span[-1]}" if len(span) > 1 else ""))
    parts = []
    for kind in KINDS[1:]:
        ratios = [gpt / other for gpt, other in zip(times["gpt"], times[kind], strict=True)]
        first, other = ("slower", "faster") if ratios[0] >= 1.0 else ("faster", "slower")
        at = crossings(contexts, ratios)
        places = f"{first} than the {kind.upper()} "
        places += f"up to about {at[0]:.0f} tokens, {other} from there" if at else "at every context"
        # From one crossing to the next, the GPT is the slower and the faster model by turns.
        for context, relation in zip(at[1:], itertools.cycle((first, other))):
            places += f", and {relation} again from about {context:.0f}"
        ends = f"{ratios[0]:.2f} times the {kind.upper()}'s at {contexts[0]} tokens and {ratios[-1]:.2f} times"
        parts.append(f"{places} (its time is {ends} at {contexts[-1]})")
    return (
        f"{counted(batch, 'row')}, {direction}: the fastest model, by context, is {', '.join(spans)}. The GPT is "
        f"{'; '.join(parts)}."
    )


def _speeds_in_words(rows: list[Row], contexts: list[int], batches: list[int]) -> str:
    """The time of a training pass at the longest context: the GPT's, and the others' as multiples of it."""
    parts = []
    for batch in batches:
        gpt, *others = _at(rows, contexts[-1], batch, DIRECTIONS[1])
        ratios = together(f"the {row['model'].upper()} {row['ms'] / gpt['ms']:.2f}" for row in others)
        first, second = sorted([gpt, *others], key=lambda row: row["ms"])[:2]
        # Times whose middle halves overlap are not told apart.
        fastest = f"the {first['model'].upper()} is" if first["p75"] < second["p25"] else "none is clearly"
        its_time = f"the GPT takes {gpt['ms']:,.1f} ms, {ratios} times that"
        parts.append(f"with {counted(batch, 'row')} {fastest} the fastest: {its_time}")
    return f"In a training pass over {contexts[-1]} tokens, {'; '.join(parts)}."


def _growth(rows: list[Row], contexts: list[int], batch: int) -> str:
    """How much of its speed each model keeps at the longest context, at the largest batch."""
    if len(contexts) < 2:
        return "Only one context was measured, so nothing can be said of how speed changes with it."
    kept, parts = {}, []
    for kind in KINDS:
        speeds = _by_context(rows, "tokens_per_s", kind, contexts, batch, DIRECTIONS[1])
        best = max(range(len(contexts)), key=lambda i: speeds[i])
        kept[kind] = speeds[-1] / speeds[best]
        parts.append(f"the {kind.upper()} {kept[kind]:.0%} of {speeds[best]:,.0f} at {contexts[best]}")
    if min(kept.values()) > 0.9:
        return f"No model's tokens per second fall by more than a tenth from its best context to {contexts[-1]} tokens."
    return (
        f"At {contexts[-1]} tokens, with {counted(batch, 'row')}, the models keep these parts of their most tokens per "
        f"second: {together(parts)}."
    )


def _noise(rows: list[Row]) -> str:
    """How much the rounds of one time differ: a smaller difference between two times means nothing."""
    spreads = sorted((row["p75"] - row["p25"]) / row["ms"] for row in rows)
    return (
        f"The rounds of one time differ. The middle half of them spans at most {statistics.median(spreads):.0%} of the "
        f"median for half of all {len(rows)} times, and {spreads[len(spreads) * 9 // 10]:.0%} or more for a tenth of "
        f"them. Because the models take turns, other work on the machine slows all models of a row of the table."
    )


def _losses_in_words(results: dict[str, Any]) -> str:
    """Which model has the lowest loss after as many tokens, and after as many seconds."""
    curves = {kind: _best_curve(results, kind) for kind in KINDS}
    if not all(curves.values()):
        return "A model ended without a finite loss, so losses are not compared."
    last = {kind: curve[-1] for kind, curve in curves.items()}
    at_end = {kind: row["loss"] for kind, row in last.items()}
    learned = [kind for kind in KINDS if at_end[kind] < learned_bound(results)]
    if not learned:
        return "No model learned anything from the context in these few steps, so losses are not compared."
    budget = min(row["seconds"] for row in last.values())
    at_budget = {kind: _loss_at(curve, budget) for kind, curve in curves.items()}
    best, quickest = (min(KINDS, key=lambda kind: losses[kind]) for losses in (at_end, at_budget))
    losses = together(f"{kind.upper()} {at_end[kind]:.3f}" for kind in KINDS)
    text = (
        f"After as many tokens the {best.upper()} has the lowest loss ({losses}); after {budget:.1f} seconds of "
        f"training each, the {quickest.upper()} ({at_budget[quickest]:.3f})"
    )
    if len(learned) < len(KINDS):
        slow = together(f"the {kind.upper()}" for kind in KINDS if kind not in learned)
        text += f"; {slow} did not learn more than how often each character occurs"
    return f"{text}. One seed each."


def _loss_at(curve: list[Row], seconds: float) -> float:
    """The loss after so many seconds, interpolated between evaluations."""
    for before, after in itertools.pairwise(curve):
        if before["seconds"] <= seconds <= after["seconds"]:
            part = (seconds - before["seconds"]) / max(after["seconds"] - before["seconds"], 1e-9)
            return before["loss"] + part * (after["loss"] - before["loss"])
    return curve[-1]["loss"] if seconds > curve[-1]["seconds"] else curve[0]["loss"]


def _draw_speed(rows: list[Row], contexts: list[int], batches: list[int]) -> Any:
    figure, axes = panels(3.0 * len(batches) + 0.9, rows=len(batches), sharex=True, sharey=True)
    for panel, batch in zip(axes[:, 0], batches, strict=True):
        for kind, direction in itertools.product(KINDS, DIRECTIONS):
            speeds = _by_context(rows, "tokens_per_s", kind, contexts, batch, direction)
            style = {**line_style(KINDS.index(kind)), "linestyle": "--" if direction == "forward" else "-"}
            panel.plot(contexts, speeds, label=f"{kind.upper()}, {direction}", **style)
        panel.set(xscale="log", yscale="log", ylabel="tokens per second", title=counted(batch, "row"))
        panel.set_xticks(contexts, [str(context) for context in contexts])
        panel.set_xticks([], minor=True)  # which a short axis would name, too
    panel.set_xlabel("context")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _draw_training(results: dict[str, Any]) -> Any:
    figure, [axes] = panels(3.6, columns=2, sharey=True)
    for panel, key in zip(axes, ("tokens", "seconds"), strict=True):
        for number, kind in enumerate(KINDS):
            curve = _best_curve(results, kind)
            at = [row[key] / (1000 if key == "tokens" else 1) for row in curve]
            panel.plot(at, [row["loss"] for row in curve], label=kind.upper(), **line_style(number))
        panel.set_xlabel("thousands of training tokens" if key == "tokens" else "seconds of training")
    axes[0].set_ylabel("validation loss")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(KINDS))
    return figure
