"""Parallelism: a GPT and recurrent networks with as many parameters, in training.

A recurrent network computes token t from what it computed for token t - 1: however wide the hardware, T tokens are T
steps one after the other. A transformer computes all T at once in a number of steps that depends on its depth only,
and pays with attention, whose work grows with T squared. Which of the two is faster is a matter of the hardware, of T
and of the batch: it is measured here, with all models taking turns in one process. So is what the time buys: the loss
after as many tokens, and after as many seconds.

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
from .experiment import at_least, described, finite, load_corpus, new_gpt, numbers, training, validation_loss
from .page import LEARNED, counted, find_row, frequencies_text, learned_bound, listed, panels
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
        rows += _timings(timed, context, batch, direction, settings, device)
        shown = ", ".join(f"{row['model'].upper()} {row['ms']:.2f} ms" for row in rows[-len(KINDS) :])
        print(f"{batch} x {context}, {direction}: {shown}", flush=True)
    return {
        "data": described(corpus, settings, BLOCK_SIZE),
        "device_type": device.type,
        "parameters": sizes,
        "widths": {kind: model.cfg.n_embd for kind, model in models.items()},
        "layers": cfg.n_layer,
        "rows": rows,
        "losses": [row for rate in rates for row in _losses(cfg, rate, corpus, settings, device)],
    }


def _build(kind: str, cfg: GPTConfig, seed: int) -> Any:
    torch.manual_seed(seed)
    return GPT(cfg) if kind == "gpt" else matched(kind, cfg)


def _timings(
    models: dict[str, Any],
    context: int,
    batch: int,
    direction: str,
    settings: ParallelismSettings,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Milliseconds of each model, in turn: A B C D, A B C D, ..., after one warm-up each."""
    generator = torch.Generator().manual_seed(settings.seed)
    V = models["gpt"].cfg.vocab_size
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


def _losses(
    gpt: GPTConfig, rate: float, corpus: Corpus, settings: ParallelismSettings, device: torch.device
) -> list[dict[str, Any]]:
    """Train new models on the same batches, a step of each in turn; the validation loss by tokens and seconds.

    A model's seconds are those of its own steps, evaluation left out.
    """
    models = {kind: _build(kind, gpt, settings.seed).to(device) for kind in KINDS}
    options = {"batch_size": BATCH_SIZE, "warmup_steps": min(100, settings.steps // 10)}
    runs = {
        kind: training(model, corpus, settings.seed, settings.steps, lr=rate, **options)
        for kind, model in models.items()
    }
    seconds = dict.fromkeys(KINDS, 0.0)
    at = {max(1, round(settings.steps * part / 10)) for part in range(1, 11)}
    rows: list[dict[str, Any]] = []
    for step in range(1, settings.steps + 1):
        for kind in KINDS:
            seconds[kind] += _synchronized_seconds(partial(next, runs[kind], None), device)
            if step in at:
                loss = finite(validation_loss(models[kind], corpus))
                row: dict[str, Any] = {
                    "model": kind,
                    "lr": rate,
                    "step": step,
                    "tokens": step * BATCH_SIZE * BLOCK_SIZE,
                }
                rows.append(row | {"seconds": round(seconds[kind], 3), "loss": loss})
    shown = ", ".join(f"{row['model'].upper()} {row['loss']}" for row in rows[-len(KINDS) :])
    print(f"rate {rate:g}, loss after {settings.steps} steps: {shown}", flush=True)
    return rows


# ---- what is shown ----


def sequential_steps(kind: str, n_layer: int, context: int) -> int:
    """Steps that must follow one another, a layer's step being one, with unlimited hardware.

    A recurrent layer's step t waits for its step t - 1 and for step t of the layer below: the layers can work one
    token apart. A transformer's layer waits for the layer below, for all tokens at once.
    """
    return n_layer if kind == "gpt" else context + n_layer - 1


def show(results: dict[str, Any], page: Any) -> None:
    rows = results["rows"]
    contexts, batches = (sorted({row[key] for row in rows}) for key in ("context", "batch"))
    sizes = ", ".join(f"{k.upper()} {results['parameters'][k]:,} (width {results['widths'][k]})" for k in KINDS)
    page.paragraph(
        f"Parameters: {sizes}; each has {results['layers']} layers. The GPT's position table is counted for "
        f"{BLOCK_SIZE} positions; in the timings it has one for each token of the longest context. The recurrent "
        f"layers are PyTorch's own. Float32, no dropout; medians over rounds in which the models take turns, in "
        f"milliseconds. Forward is the loss without gradients; backward includes forward, without the optimizer. The "
        f"last columns count the layer steps that must follow one another, however parallel the hardware."
    )
    page.table(
        ["rows", "context"]
        + [f"{kind.upper()}, {short}" for short in ("forward", "backward") for kind in KINDS]
        + ["steps, GPT", "steps, recurrent"],
        [
            [
                batch,
                context,
                *(_timing(rows, kind, context, batch, d)["ms"] for d in DIRECTIONS for kind in KINDS),
                *(sequential_steps(kind, results["layers"], context) for kind in ("gpt", "rnn")),
            ]
            for batch, context in itertools.product(batches, contexts)
        ],
    )
    page.picture("speed", "Tokens per second against context", lambda: _draw_speed(rows, contexts, batches))
    for batch, direction in itertools.product(batches, DIRECTIONS):
        page.paragraph(_crossovers(rows, contexts, batch, direction))
    page.paragraph(_growth(rows, contexts, batches[-1]))
    page.paragraph(_noise(rows))
    page.table(
        ["model", "learning rate", "tokens", "seconds", "validation loss", "tokens/s in training"],
        [
            [r["model"].upper(), f"{r['lr']:g}", r["tokens"], r["seconds"], r["loss"], r["tokens"] / r["seconds"]]
            for r in (row for kind in KINDS for row in _best_curve(results, kind)[-1:])
        ],
    )
    page.picture("loss", "Validation loss against tokens and against seconds", lambda: _draw_training(results))
    page.paragraph(_losses_in_words(results))


def _timing(rows: list[dict[str, Any]], kind: str, context: int, batch: int, direction: str) -> dict[str, Any]:
    return find_row(rows, model=kind, context=context, batch=batch, direction=direction)


def _best_curve(results: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Loss by tokens and seconds at the rate with which the model ends lowest; empty where it never ends finite."""
    rows = [row for row in results["losses"] if row["model"] == kind]
    last = max(row["step"] for row in rows)
    ends = {row["lr"]: row["loss"] for row in rows if row["step"] == last and row["loss"] is not None}
    best = min(ends, key=lambda rate: ends[rate], default=None)
    return [row for row in rows if row["lr"] == best and row["loss"] is not None]


def crossings(contexts: list[int], ratios: list[float]) -> list[float]:
    """Contexts at which a ratio of times passes 1, a straight line between two measured points in logarithms."""
    found = []
    for (a, x), (b, y) in itertools.pairwise(zip(contexts, ratios, strict=True)):
        if (x < 1.0) != (y < 1.0):
            part = math.log(x) / (math.log(x) - math.log(y))
            found.append(math.exp(math.log(a) + part * (math.log(b) - math.log(a))))
    return found


def _crossovers(rows: list[dict[str, Any]], contexts: list[int], batch: int, direction: str) -> str:
    """Who is fastest at each context, and where the GPT and each other model change places."""
    fastest = [
        min(KINDS, key=lambda kind: _timing(rows, kind, context, batch, direction)["ms"]) for context in contexts
    ]
    spans = []
    for name, group in itertools.groupby(zip(fastest, contexts, strict=True), key=lambda pair: pair[0]):
        span = [context for _, context in group]
        spans.append(f"{name.upper()} at {span[0]}" + (f" to {span[-1]}" if len(span) > 1 else ""))
    parts = []
    for kind in KINDS[1:]:
        times = [[_timing(rows, k, context, batch, direction)["ms"] for context in contexts] for k in ("gpt", kind)]
        ratios = [gpt / other for gpt, other in zip(*times, strict=True)]
        at = crossings(contexts, ratios)
        if at:
            first = "slower" if ratios[0] >= 1.0 else "faster"
            last = "faster" if first == "slower" else "slower"
            places = f"{first} than the {kind.upper()} up to about {at[0]:.0f} tokens, {last} from there"
            places += "".join(f", and again the other way round from about {context:.0f}" for context in at[1:])
        else:
            places = f"{'slower' if ratios[0] >= 1.0 else 'faster'} than the {kind.upper()} at every context"
        parts.append(f"{places} (times of the GPT over it: {ratios[0]:.2f} to {ratios[-1]:.2f})")
    return f"{counted(batch, 'row')}, {direction}. Fastest: {', '.join(spans)}. The GPT is {'; '.join(parts)}."


def _growth(rows: list[dict[str, Any]], contexts: list[int], batch: int) -> str:
    """What becomes of tokens per second as the context grows, at the largest batch."""
    if len(contexts) < 2:
        return "One context was measured, so nothing is said about growth."
    parts = []
    for kind in KINDS:
        speeds = [_timing(rows, kind, context, batch, DIRECTIONS[1])["tokens_per_s"] for context in contexts]
        best = max(range(len(contexts)), key=lambda i: speeds[i])
        parts.append(
            f"{kind.upper()} {speeds[0]:,.0f} at {contexts[0]} and {speeds[-1]:,.0f} at {contexts[-1]}, its most "
            f"{speeds[best]:,.0f} at {contexts[best]}"
        )
    return f"Tokens per second, forward and backward, {batch} rows: {'; '.join(parts)}."


def _noise(rows: list[dict[str, Any]]) -> str:
    """How much the rounds of one time differ: what a small difference between two times has to be held against."""
    spreads = sorted((row["p75"] - row["p25"]) / row["ms"] for row in rows)
    return (
        f"The middle half of a time's rounds spans {statistics.median(spreads):.0%} of its median, in the median of "
        f"all {len(rows)} times, and {spreads[len(spreads) * 9 // 10]:.0%} or more in a tenth of them. Other work on "
        f"the machine slows a row of the table as a whole: its models take turns."
    )


def _losses_in_words(results: dict[str, Any]) -> str:
    curves = {kind: _best_curve(results, kind) for kind in KINDS}
    if not all(curves.values()):
        return "A model ended without a finite loss, so losses are not compared."
    last = {kind: curve[-1] for kind, curve in curves.items()}
    by_tokens = min(KINDS, key=lambda kind: last[kind]["loss"])
    budget = min(row["seconds"] for row in last.values())
    at_budget = {kind: _loss_at(curve, budget) for kind, curve in curves.items()}
    by_seconds = min(KINDS, key=lambda kind: at_budget[kind])
    tokens = ", ".join(f"{kind.upper()} {last[kind]['loss']:.3f}" for kind in KINDS)
    seconds = ", ".join(f"{kind.upper()} {at_budget[kind]:.3f}" for kind in KINDS)
    slow = [kind.upper() for kind in KINDS if last[kind]["loss"] > learned_bound(results)]
    behind = f" {frequencies_text(results)}; less than {LEARNED} below that ended: {listed(slow)}." if slow else ""
    return (
        f"Trained on the same {last['gpt']['tokens']:,} tokens ({BATCH_SIZE} blocks of {BLOCK_SIZE} characters of "
        f"{results['data']['name']} a step, one seed, each model at the best of the rates "
        f"{results['settings']['rates'].replace(',', ', ')}), the losses are {tokens}: lowest the "
        f"{by_tokens.upper()}'s. After the {budget:.1f} seconds that the quickest of them needed for that, they are "
        f"{seconds}: lowest the {by_seconds.upper()}'s.{behind}"
    )


def _loss_at(curve: list[dict[str, Any]], seconds: float) -> float:
    """The loss after so many seconds, a straight line between evaluations."""
    for before, after in itertools.pairwise(curve):
        if before["seconds"] <= seconds <= after["seconds"]:
            part = (seconds - before["seconds"]) / max(after["seconds"] - before["seconds"], 1e-9)
            return before["loss"] + part * (after["loss"] - before["loss"])
    return curve[-1]["loss"] if seconds > curve[-1]["seconds"] else curve[0]["loss"]


COLOURS = {"gpt": "tab:blue", "rnn": "tab:orange", "gru": "tab:green", "lstm": "tab:red"}


def _draw_speed(rows: list[dict[str, Any]], contexts: list[int], batches: list[int]) -> Any:
    figure, axes = panels(4.2 * len(batches), 3.8, columns=len(batches), sharey=True)
    for panel, batch in zip(axes[0], batches, strict=True):
        for kind, direction in itertools.product(KINDS, DIRECTIONS):
            speeds = [_timing(rows, kind, context, batch, direction)["tokens_per_s"] for context in contexts]
            forward = direction == "forward"
            style = {"color": COLOURS[kind], "ls": "--" if forward else "-", "marker": "o", "ms": 3}
            panel.plot(contexts, speeds, label=f"{kind.upper()}, {direction}", **style)
        panel.set(xscale="log", yscale="log", xlabel="context", title=counted(batch, "row"))
        panel.set_xticks(contexts, [str(context) for context in contexts], fontsize=7)
        panel.minorticks_off()
    axes[0][0].set_ylabel("tokens per second")
    lines = axes[0][0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=4, fontsize="x-small", handlelength=4)  # room for dashes
    return figure


def _draw_training(results: dict[str, Any]) -> Any:
    figure, [axes] = panels(8, 3.5, columns=2, sharey=True)
    for panel, key in zip(axes, ("tokens", "seconds"), strict=True):
        for kind in KINDS:
            curve = _best_curve(results, kind)
            at = [row[key] / (1000 if key == "tokens" else 1) for row in curve]
            panel.plot(at, [row["loss"] for row in curve], "o-", ms=3, color=COLOURS[kind], label=kind.upper())
        panel.set_xlabel("thousands of training tokens" if key == "tokens" else "seconds of training")
    axes[0].set_ylabel("validation loss")
    axes[1].legend()
    return figure
