"""Normalisation: the shipped GPT with layer norm, and the same one with batch norm in its place.

Layer norm takes the mean and variance of one token's features. Batch norm takes those of one feature over every token
of the batch, so what it computes for a token depends on the other rows, and on the tokens that come later in its own.
At inference there may be no batch: it then uses running averages of what it saw in training. Three things follow, and
each is measured here: a loss that differs between training and inference, an output that depends on its neighbours,
and, in a causal model, news from the future.

Sources: Ioffe and Szegedy 2015 (batch norm); Ba et al. 2016 (layer norm).
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ConfigError, GPTConfig, TrainConfig
from ..data.corpus import Corpus
from ..machine import resolve_device
from ..model import GPT
from ..report import pyplot
from ..training.step import Precision, make_optimizer, mean_loss, training_step
from .experiment import at_least, described, finite, load_corpus, new_gpt, numbers, training, validation_blocks
from .settings import NormalisationSettings as Settings

KINDS = ("layer norm", "batch norm")
BATCHES = (1, 2, 4, 8, 16, 32)  # rows an evaluation takes at a time


class BatchNorm(nn.Module):
    """Batch norm over the batch and over time, in the place of the model's layer norm.

    Keeps one running average of mean and variance for each of `momenta`, all fed by the same training; `which` of them
    eval mode uses is set from outside.
    """

    momenta: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, n_embd: int, momenta: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd))
        self.which = 0
        self.register_buffer("momenta", torch.tensor(momenta)[:, None])
        self.register_buffer("mean", torch.zeros(len(momenta), n_embd))
        self.register_buffer("variance", torch.ones(len(momenta), n_embd))
        self.updates = True

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # (B, T, C) -> (B T, C): a feature's mean is over all of them
        mean, variance = self.mean[self.which], self.variance[self.which]
        if self.training:
            variance, mean = torch.var_mean(rows, dim=0, correction=0)
            if self.updates:
                n = len(rows)
                unbiased = variance.detach() * (n / max(n - 1, 1))
                self.mean += self.momenta * (mean.detach() - self.mean)
                self.variance += self.momenta * (unbiased - self.variance)
        return ((rows - mean) * torch.rsqrt(variance + 1e-5) * self.weight + self.bias).view_as(x)


def build(kind: str, cfg: GPTConfig, seed: int, momenta: list[float]) -> GPT:
    """The shipped GPT, its norms replaced where `kind` says so; the same weights for the same seed."""
    model = new_gpt(cfg, seed)
    if kind == "batch norm":
        for block in model.blocks:
            block.ln_1, block.ln_2 = BatchNorm(cfg.n_embd, momenta), BatchNorm(cfg.n_embd, momenta)
        model.ln_f = BatchNorm(cfg.n_embd, momenta)  # type: ignore[assignment]
    return model


def batch_norms(model: GPT) -> list[BatchNorm]:
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def loss(model: GPT, x: Tensor, y: Tensor, batch_size: int, *, train_mode: bool, which: int = 0) -> float:
    """Mean loss of x, y taken `batch_size` rows at a time, in either mode. The running averages stay as they are."""
    was_training = model.training
    model.train(train_mode)
    for norm in batch_norms(model):
        norm.updates, norm.which = False, which
    precision = Precision(model.token_embedding.weight.device, "float32")
    value = mean_loss(model.loss, x, y, batch_size, precision)
    for norm in batch_norms(model):
        norm.updates, norm.which = True, 0
    model.train(was_training)
    return value


def measure(settings: Settings) -> dict[str, Any]:
    momenta = numbers("momenta", settings.momenta, float)
    if max(momenta) > 1.0:
        raise ConfigError(f"momenta: expected numbers above 0 and at most 1, got {settings.momenta!r}")
    for name in ("steps", "points", "coin_steps"):
        at_least(name, getattr(settings, name), 2)
    corpus = load_corpus(settings, block_size=64)
    cfg = GPTConfig(corpus.tokenizer.vocab_size, 64, n_layer=3, n_head=4, n_embd=64, dropout=0.0)
    rows, batches, dependence = [], [], []
    warnings.filterwarnings("ignore", message="fastgpt: a norm")  # that batch norm is not fused
    for kind in KINDS:
        model = build(kind, cfg, settings.seed, momenta).to(resolve_device(settings.device))
        rows += _curve(kind, model, corpus, settings, momenta)
        print(f"{kind}: eval mode {_shown(rows[-1]['eval'])}", flush=True)
        x, y = validation_blocks(corpus, cfg.block_size)
        for size in BATCHES:
            losses = {mode: finite(loss(model, x, y, size, train_mode=mode == "train")) for mode in ("train", "eval")}
            batches.append({"norm": kind, "batch_size": size, **losses})
        for mode in ("train", "eval"):
            dependence.append({"norm": kind, "mode": mode, **neighbours(model, x[:8], train_mode=mode == "train")})
    coins = [_coins(kind, settings, momenta) for kind in KINDS]
    return {
        "data": described(corpus, settings, cfg.block_size),
        "rows": rows,
        "batches": batches,
        "dependence": dependence,
        "coins": coins,
    }


def _curve(kind: str, model: GPT, corpus: Corpus, settings: Settings, momenta: list[float]) -> list[dict[str, Any]]:
    """Train, and on the way: the validation loss in train mode, and in eval mode with each running average."""
    cfg = TrainConfig(
        batch_size=16,
        max_steps=settings.steps,
        warmup_steps=min(50, settings.steps // 10),
        seed=settings.seed,
    )
    x, y = validation_blocks(corpus, model.cfg.block_size, 32)
    # Steps that grow by a factor: a running average is furthest behind at the start.
    at = {round(settings.steps ** (i / (settings.points - 1))) for i in range(settings.points)}
    rows = []
    for step, _ in enumerate(training(model, corpus, cfg), 1):
        if step in at:
            averages = [finite(loss(model, x, y, 16, train_mode=False, which=i)) for i in range(len(momenta))]
            row = {"norm": kind, "step": step, "train": finite(loss(model, x, y, 16, train_mode=True))}
            rows.append(row | {"eval": averages if kind == "batch norm" else averages[:1]})
    return rows


@torch.no_grad()
def neighbours(model: GPT, x: Tensor, *, train_mode: bool) -> dict[str, float]:
    """How far the first row's logits move when the other rows change, and when the second half of the row does.

    The second is looked at in the first half only: no causal model can know what comes later.
    """
    was_training = model.training
    model.train(train_mode)
    for norm in batch_norms(model):
        norm.updates = False
    x = x.to(model.token_embedding.weight.device)
    half = x.shape[1] // 2
    others, future = x.clone(), x.clone()
    others[1:] = x[1:].flip(1).roll(1, 0)
    future[0, half:] = (x[0, half:] + 1) % model.cfg.vocab_size
    first, with_others, with_future = (model(rows)[0][0] for rows in (x, others, future))
    for norm in batch_norms(model):
        norm.updates = True
    model.train(was_training)
    return {
        "other_rows": float((first - with_others).abs().max()),
        "future": float((first - with_future)[:half].abs().max()),
    }


# ---- coin flips: what is below ln 2 was not predicted but seen ----

COIN_TOKENS = 8


def _flips(seed: int, step: int, rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 % 2**63 + step)
    flips = torch.randint(2, (rows, COIN_TOKENS + 1), generator=generator)
    return flips[:, :-1], flips[:, 1:]


def _coins(kind: str, settings: Settings, momenta: list[float]) -> dict[str, Any]:
    """Train on rows of fresh coin flips, one row a step, and measure the loss on new ones.

    The average of a row of tokens tells how many of them are heads, and so something about those that are still to
    come: a norm that takes that average hands it to every position.
    """
    cfg = GPTConfig(2, COIN_TOKENS, n_layer=2, n_head=2, n_embd=32, dropout=0.0)
    model = build(kind, cfg, settings.seed, momenta).to(resolve_device(settings.device))
    optimizer = make_optimizer(model, TrainConfig(lr=1e-3))
    precision = Precision(model.token_embedding.weight.device, "float32")
    for step in range(settings.coin_steps):
        x, y = (t.to(precision.device) for t in _flips(settings.seed, step, 1))
        training_step(model, model.loss, optimizer, [(x, y)], precision, grad_clip=1.0)
    x, y = _flips(settings.seed, settings.coin_steps, 512)
    positions = _by_position(model, x, y)
    return {
        "norm": kind,
        "train": finite(loss(model, x, y, 1, train_mode=True)),
        "eval": finite(loss(model, x, y, 1, train_mode=False)),
        "by_position": positions,
        "rows": len(x),
    }


@torch.no_grad()
def _by_position(model: GPT, x: Tensor, y: Tensor) -> list[float]:
    """The loss at each position in train mode, one row at a time."""
    model.train()
    for norm in batch_norms(model):
        norm.updates = False
    device = model.token_embedding.weight.device
    losses = [
        F.cross_entropy(model(a[None].to(device))[0][0], b.to(device), reduction="none")
        for a, b in zip(x, y, strict=True)
    ]
    for norm in batch_norms(model):
        norm.updates = True
    return [round(float(value), 4) for value in torch.stack(losses).mean(0)]


# ---- what is shown ----


def _momenta(results: dict[str, Any]) -> list[str]:
    return results["settings"]["momenta"].split(",")


def show(results: dict[str, Any], page: Any) -> None:
    settings, momenta = results["settings"], _momenta(results)
    page.paragraph(
        f"Two GPTs of 3 blocks, 64 wide, the same but for the norm, trained on the same {settings['steps']} batches of "
        f"16 blocks of 64 characters of {results['data']['name']}. One training of the batch norm feeds several "
        f"running averages, of which each step replaces the part in the heading. The loss is that of the same 32 "
        f"validation blocks, 16 at a time: in train mode the norm uses the batch, in eval mode the running average."
    )
    layer, batch = ([row for row in results["rows"] if row["norm"] == kind] for kind in KINDS)
    page.table(
        ["step", "layer norm, train", "layer norm, eval", "batch norm, train"]
        + [f"batch norm, eval, {momentum}" for momentum in momenta],
        [[a["step"], a["train"], *a["eval"], b["train"], *b["eval"]] for a, b in zip(layer, batch, strict=False)],
    )
    page.picture("lag", "Loss in train and eval mode, as running averages follow", lambda: _draw_lag(results))
    page.paragraph(_lag(layer, batch, momenta))
    page.table(
        ["rows at a time", "layer norm, train", "layer norm, eval", "batch norm, train", "batch norm, eval"],
        [
            [size, *(row[mode] for kind in KINDS for row in _at(results, kind, size) for mode in ("train", "eval"))]
            for size in BATCHES
        ],
    )
    page.paragraph(_batch_size(results))
    page.table(
        ["norm", "mode", "logits move: other rows changed", "logits move: later tokens changed"],
        [[row["norm"], row["mode"], row["other_rows"], row["future"]] for row in results["dependence"]],
    )
    page.paragraph(_dependence(results))
    page.picture("future", "Coin flips: loss by position in train mode", lambda: _draw_coins(results))
    page.paragraph(_future(results))


def _at(results: dict[str, Any], kind: str, size: int) -> list[dict[str, Any]]:
    return [row for row in results["batches"] if row["norm"] == kind and row["batch_size"] == size]


def _gap(row: dict[str, Any], which: int) -> float | None:
    return None if row["eval"][which] is None or row["train"] is None else row["eval"][which] - row["train"]


def _lag(layer: list[dict[str, Any]], batch: list[dict[str, Any]], momenta: list[str]) -> str:
    """The gap between the modes: the largest one and the last."""
    parts = []
    for which, momentum in enumerate(momenta):
        gaps = [(gap, row["step"]) for row in batch if (gap := _gap(row, which)) is not None]
        if gaps:
            largest, step = max(gaps)
            parts.append(f"{momentum}: at most {largest:+.3f} (step {step}), {gaps[-1][0]:+.3f} at the end")
    same = max((abs(gap) for row in layer if (gap := _gap(row, 0)) is not None), default=math.nan)
    return (
        f"Layer norm computes the same in both modes: its losses differ by at most {same:.1g}. For batch norm, eval "
        f"minus train mode, by the part of the average that a step replaces, is {'; '.join(parts)}."
    )


def _batch_size(results: dict[str, Any]) -> str:
    parts = []
    for kind in KINDS:
        one, many = _at(results, kind, BATCHES[0])[0], _at(results, kind, BATCHES[-1])[0]
        parts.append(
            f"{kind} {_shown(one['train'])} with one row and {_shown(many['train'])} with {BATCHES[-1]} in train mode, "
            f"{_shown(one['eval'])} and {_shown(many['eval'])} in eval mode"
        )
    return f"The trained models on 64 validation blocks, taken a few rows at a time: {'; '.join(parts)}."


def _dependence(results: dict[str, Any]) -> str:
    def found(key: str) -> dict[bool, list[str]]:
        moved: dict[bool, list[str]] = {True: [], False: []}
        for row in results["dependence"]:
            moved[row[key] > 0.0].append(f"{row['norm']} in {row['mode']} mode ({row[key]:.2g})")
        return moved

    rows, future = found("other_rows"), found("future")
    return (
        f"The first of eight rows was computed again after the other seven were changed. Its logits moved with "
        f"{_listed(rows[True])}; they kept their bits with {_listed(rows[False])}. What needs no neighbour to be "
        f"computed needs no running average to stand in for one. Then the second half of the first row was changed: "
        f"the logits of its first half moved with {_listed(future[True])}, and kept their bits with "
        f"{_listed(future[False])}."
    )


def _listed(items: list[str]) -> str:
    return ", ".join(items) if items else "none of them"


def _future(results: dict[str, Any]) -> str:
    chance = math.log(2)
    parts = []
    for row in results["coins"]:
        best = min(range(COIN_TOKENS), key=lambda i: row["by_position"][i])
        parts.append(
            f"{row['norm']} {_shown(row['train'])} in train mode (lowest at position {best + 1} of {COIN_TOKENS}: "
            f"{row['by_position'][best]:.3f}; at the last position, whose target is no input, "
            f"{row['by_position'][-1]:.3f}) and {_shown(row['eval'])} in eval mode"
        )
    # A generous bound: the mean of this many losses of a model that knows nothing is ln 2 at best, give or take this.
    slack = 3 / math.sqrt(results["coins"][0]["rows"] * COIN_TOKENS)
    below = [row["norm"] for row in results["coins"] if row["train"] is not None and row["train"] < chance - slack]
    verdict = (
        f"Below ln 2 by more than the {slack:.3f} that chance allows, with {' and '.join(below)}: the input of "
        f"later positions, which are the targets of earlier ones, was read out of the batch's statistics."
        if below
        else f"None is below ln 2 by more than the {slack:.3f} that chance allows."
    )
    return (
        f"A small GPT trained for {results['settings']['coin_steps']} steps on single rows of {COIN_TOKENS} fresh coin "
        f"flips can at best reach ln 2 = {chance:.3f} if it is causal. Measured on {results['coins'][0]['rows']} new "
        f"rows, one at a time: {'; '.join(parts)}. {verdict}"
    )


def _shown(value: Any) -> str:
    value = value[0] if isinstance(value, list) else value
    return "not finite" if value is None else f"{value:.3f}"


def _draw_lag(results: dict[str, Any]) -> Any:
    figure, axes = pyplot().subplots(figsize=(7, 3.8), constrained_layout=True)
    for kind, colour in zip(KINDS, ("tab:blue", "tab:red"), strict=True):
        rows = [row for row in results["rows"] if row["norm"] == kind]
        steps = [row["step"] for row in rows]
        axes.plot(steps, [_number(row["train"]) for row in rows], color=colour, label=f"{kind}, train mode")
        if kind == "layer norm":
            axes.plot(steps, [_number(row["eval"][0]) for row in rows], "o", color=colour, ms=4, label=f"{kind}, eval")
            continue
        for which, momentum in enumerate(_momenta(results)):
            style = {"color": "tab:orange", "ls": ("--", "-.", ":")[which % 3], "marker": "^sD"[which % 3], "ms": 3}
            losses = [_number(row["eval"][which]) for row in rows]
            axes.plot(steps, losses, label=f"{kind}, eval, average of {momentum}", **style)
    axes.set(xlabel="training step", ylabel="validation loss", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _draw_coins(results: dict[str, Any]) -> Any:
    figure, axes = pyplot().subplots(figsize=(6, 3.2), constrained_layout=True)
    for row, colour in zip(results["coins"], ("tab:blue", "tab:red"), strict=True):
        axes.plot(range(1, COIN_TOKENS + 1), row["by_position"], "o-", color=colour, label=row["norm"])
    axes.axhline(math.log(2), color="grey", ls=":", label="ln 2, the best of a causal model")
    axes.set(xlabel="position in the row", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _number(value: float | None) -> float:
    return math.nan if value is None else value
