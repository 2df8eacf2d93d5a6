"""Normalisation: the GPT of this package with its layer norm, and the same GPT with batch norm instead.

Layer norm takes the mean and variance over one token's features. Batch norm takes the mean and variance of one feature
over all tokens of the batch, so its output for a token depends on the other rows and on later tokens of the same row.
At inference there may be no batch, so batch norm uses running averages from training. Three things follow, and each is
measured here: the loss differs between training and inference; the output for a row depends on the other rows; and in a
causal model the output for a token depends on later tokens, which the model has to predict.

Sources: Ioffe and Szegedy 2015 (batch norm); Ba et al. 2016 (layer norm).
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ConfigError, GPTConfig, TrainConfig
from ..data.corpus import Corpus
from ..data.layouts import evaluation_blocks
from ..machine import resolve_device
from ..model import GPT
from ..plots import BLUE, FAINT, VERMILION, line_style, panels
from ..training.step import Precision, make_optimizer, mean_loss, training_step
from .experiment import VALIDATION_BLOCKS, at_least, described, finite, load_corpus, new_gpt, numbers, training
from .page import find_row, listed, loss_text, or_nan, together
from .settings import NormalisationSettings

KINDS = ("layer norm", "batch norm")
MODES = ("train", "eval")
BATCHES = (1, 2, 4, 8, 16, 32)  # rows an evaluation takes at a time
SMALL_GAP = 0.01  # nats between two losses, which are not worth a sentence


class BatchNorm(nn.Module):
    """Batch norm over the batch and over time, in the place of the model's layer norm.

    Training updates several running averages of mean and variance, one for each of `momenta`. In eval mode, the one
    with the number `which` is used. `measuring` sets `which`, and switches the updates off.
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
    """A GPT with the norm `kind`. For one seed, its other weights are the same with either norm."""
    model = new_gpt(cfg, seed)
    if kind == "batch norm":
        for block in model.blocks:
            block.ln_1, block.ln_2 = BatchNorm(cfg.n_embd, momenta), BatchNorm(cfg.n_embd, momenta)
        model.ln_f = BatchNorm(cfg.n_embd, momenta)  # type: ignore[assignment]
    return model


@contextlib.contextmanager
def measuring(model: GPT, *, train_mode: bool, which: int = 0) -> Iterator[None]:
    """The model in either mode; in eval mode with running average number `which`. The averages are not updated."""
    was_training, norms = model.training, [module for module in model.modules() if isinstance(module, BatchNorm)]
    model.train(train_mode)
    for norm in norms:
        norm.updates, norm.which = False, which
    try:
        yield
    finally:
        for norm in norms:
            norm.updates, norm.which = True, 0
        model.train(was_training)


def loss_in_mode(
    model: GPT, x: Tensor, y: Tensor, batch_size: int, *, train_mode: bool, which: int = 0
) -> float | None:
    """Mean loss of x, y taken `batch_size` rows at a time; None where it is not finite."""
    precision = Precision(model.token_embedding.weight.device, "float32")
    with measuring(model, train_mode=train_mode, which=which):
        return finite(mean_loss(model.loss, x, y, batch_size, precision))


def measure(settings: NormalisationSettings) -> dict[str, Any]:
    momenta = numbers("momenta", settings.momenta, float)
    if max(momenta) > 1.0:
        raise ConfigError(f"momenta: expected numbers above 0 and at most 1, got {settings.momenta!r}")
    at_least(settings, steps=2, points=2, coin_steps=2)
    corpus = load_corpus(settings, block_size=64)
    cfg = GPTConfig(corpus.tokenizer.vocab_size, 64, n_layer=3, n_head=4, n_embd=64, dropout=0.0)
    rows, batches, dependence = [], [], []
    warnings.filterwarnings("ignore", message="fastgpt: a norm")  # batch norm is not fused with the sum before it
    for kind in KINDS:
        model = build(kind, cfg, settings.seed, momenta).to(resolve_device(settings.device))
        rows += _train_and_evaluate(kind, model, corpus, settings, momenta)
        print(f"{kind}: loss in eval mode {loss_text(rows[-1]['eval'][0])}", flush=True)
        x, y = evaluation_blocks(corpus.val, cfg.block_size, VALIDATION_BLOCKS)
        for size in BATCHES:
            losses = {mode: loss_in_mode(model, x, y, size, train_mode=mode == "train") for mode in MODES}
            batches.append({"norm": kind, "batch_size": size, **losses})
        for mode in MODES:
            dependence.append({"norm": kind, "mode": mode, **dependence_of(model, x[:8], train_mode=mode == "train")})
    coins = [_train_on_coin_flips(kind, settings, momenta) for kind in KINDS]
    return {
        "data": described(corpus, settings, cfg.block_size),
        "rows": rows,
        "batches": batches,
        "dependence": dependence,
        "coins": coins,
    }


def _train_and_evaluate(
    kind: str, model: GPT, corpus: Corpus, settings: NormalisationSettings, momenta: list[float]
) -> list[dict[str, Any]]:
    """Train, and on the way measure the validation loss in train mode, and in eval mode with each running average."""
    x, y = evaluation_blocks(corpus.val, model.cfg.block_size, 32)
    # Steps that grow by a factor: a running average is furthest behind at the start.
    at = {round(settings.steps ** (i / (settings.points - 1))) for i in range(settings.points)}
    rows = []
    warmup = min(50, settings.steps // 10)
    losses = training(model, corpus, settings.seed, settings.steps, batch_size=16, warmup_steps=warmup)
    for step, _ in enumerate(losses, 1):
        if step in at:
            averages = [loss_in_mode(model, x, y, 16, train_mode=False, which=i) for i in range(len(momenta))]
            row = {"norm": kind, "step": step, "train": loss_in_mode(model, x, y, 16, train_mode=True)}
            rows.append(row | {"eval": averages if kind == "batch norm" else averages[:1]})
    return rows


@torch.no_grad()
def dependence_of(model: GPT, x: Tensor, *, train_mode: bool) -> dict[str, float]:
    """How far the first row's logits move when the other rows change, and when the row's own second half changes.

    The second distance is measured on the first half of the row: in a causal model, later tokens do not change it.
    """
    x = x.to(model.token_embedding.weight.device)
    half = x.shape[1] // 2
    others, future = x.clone(), x.clone()
    others[1:] = x[1:].flip(1).roll(1, 0)
    future[0, half:] = (x[0, half:] + 1) % model.cfg.vocab_size
    with measuring(model, train_mode=train_mode):
        first, with_others, with_future = (model(rows)[0][0] for rows in (x, others, future))
    return {
        "other_rows": float((first - with_others).abs().max()),
        "future": float((first - with_future)[:half].abs().max()),
    }


# ---- coin flips: a loss below ln 2 means that the model has seen the tokens that it has to predict ----

COIN_TOKENS = 8


def _flips(seed: int, step: int, rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 % 2**63 + step)
    flips = torch.randint(2, (rows, COIN_TOKENS + 1), generator=generator)
    return flips[:, :-1], flips[:, 1:]


def _train_on_coin_flips(kind: str, settings: NormalisationSettings, momenta: list[float]) -> dict[str, Any]:
    """Train on rows of fresh coin flips, one row a step, and measure the loss on new ones.

    The mean over a row depends on how many of its flips are heads, later ones included: a norm that takes this mean
    gives every position information about the flips that come after it.
    """
    cfg = GPTConfig(2, COIN_TOKENS, n_layer=2, n_head=2, n_embd=32, dropout=0.0)
    model = build(kind, cfg, settings.seed, momenta).to(resolve_device(settings.device))
    optimizer = make_optimizer(model, TrainConfig(lr=1e-3))
    precision = Precision(model.token_embedding.weight.device, "float32")
    for step in range(settings.coin_steps):
        x, y = (t.to(precision.device) for t in _flips(settings.seed, step, 1))
        training_step(model, model.loss, optimizer, [(x, y)], precision, grad_clip=1.0)
    x, y = _flips(settings.seed, settings.coin_steps, 512)
    return {
        "norm": kind,
        "train": loss_in_mode(model, x, y, 1, train_mode=True),
        "eval": loss_in_mode(model, x, y, 1, train_mode=False),
        "by_position": _loss_by_position(model, x, y),
        "rows": len(x),
    }


@torch.no_grad()
def _loss_by_position(model: GPT, x: Tensor, y: Tensor) -> list[float]:
    """The mean loss at each position in train mode, one row at a time."""
    device = model.token_embedding.weight.device
    pairs = zip(x.to(device), y.to(device), strict=True)
    with measuring(model, train_mode=True):
        losses = [F.cross_entropy(model(a[None])[0][0], b, reduction="none") for a, b in pairs]
    return [round(float(value), 4) for value in torch.stack(losses).mean(0)]


# ---- what is shown ----


def show(results: dict[str, Any], page: Any) -> None:
    settings, momenta = results["settings"], results["settings"]["momenta"].split(",")
    layer, batch = ([row for row in results["rows"] if row["norm"] == kind] for kind in KINDS)
    page.paragraph(
        f"Two GPTs of 3 blocks, 64 wide, which differ in their norm alone, were trained on the same "
        f"{settings['steps']} batches of 16 blocks of 64 characters of {results['data']['name']}. In training, batch "
        f"norm takes its mean and variance from the batch; at inference it takes running averages, of which each step "
        f"of the training replaced a part. Two more were trained on rows of {COIN_TOKENS} coin flips, which nothing "
        f"but the future predicts."
    )
    page.picture(
        "lag",
        "Validation loss with the batch's statistics and with running averages, by training step",
        lambda: _draw_lag(results),
        nothing="" if any(row["train"] is not None for row in batch) else "no loss with batch norm is finite",
    )
    page.findings(
        _gap_between_modes(layer, batch, momenta), _dependence_on_neighbours(results), _coin_flips_in_words(results)
    )
    with page.numbers():
        page.paragraph(
            "In train mode a norm uses the batch, in eval mode a running average. A heading names the average by the "
            "part of it that a step replaces. The loss is that of 32 validation blocks, taken 16 at a time."
        )
        page.table(
            ["step", "layer norm, train", "layer norm, eval", "batch norm, train"]
            + [f"batch norm, eval, {momentum}" for momentum in momenta],
            [
                [a["step"], *(loss_text(loss) for loss in (a["train"], *a["eval"], b["train"], *b["eval"]))]
                for a, b in zip(layer, batch, strict=False)
            ],
        )
        page.paragraph("The trained models on 64 validation blocks, taken a few rows at a time:")
        page.table(
            ["rows at a time", *(f"{kind}, {mode}" for kind in KINDS for mode in MODES)],
            [
                [
                    size,
                    *(
                        loss_text(find_row(results["batches"], norm=kind, batch_size=size)[mode])
                        for kind in KINDS
                        for mode in MODES
                    ),
                ]
                for size in BATCHES
            ],
        )
        page.paragraph(
            "How far the logits of the first of eight rows move when the other seven rows change, and those of its "
            "first half when its second half changes; 0 means that all bits stay as they were:"
        )
        page.table(
            ["norm", "mode", "other rows changed", "later tokens changed"],
            [
                [row["norm"], row["mode"], f"{row['other_rows']:.2g}", f"{row['future']:.2g}"]
                for row in results["dependence"]
            ],
        )
        coins = results["coins"]
        page.paragraph(
            f"Coin flips: two blocks, 32 wide, trained for {settings['coin_steps']} steps of one row each; losses on "
            f"{coins[0]['rows']} new rows, one at a time. A causal model reaches ln 2 = {math.log(2):.3f} at best. The "
            f'target of the last position is no input, so nothing can give it away. The columns from "at 1" on are '
            f"the losses in train mode at each position."
        )
        page.table(
            ["norm", "train", "eval", *(f"at {i}" for i in range(1, COIN_TOKENS + 1))],
            [
                [row["norm"], loss_text(row["train"]), loss_text(row["eval"]), *map(loss_text, row["by_position"])]
                for row in coins
            ],
        )
        page.picture(
            "future", "Coin flips: loss by position, with the batch's statistics", lambda: _draw_coins(results)
        )


def _gaps(rows: list[dict[str, Any]], which: int) -> list[tuple[float, int]]:
    """(eval minus train mode, step) at each step where both losses are finite."""
    return [
        (row["eval"][which] - row["train"], row["step"])
        for row in rows
        if row["eval"][which] is not None and row["train"] is not None
    ]


def _gap_between_modes(layer: list[dict[str, Any]], batch: list[dict[str, Any]], momenta: list[str]) -> str:
    """How far the losses of training and inference lie apart, for layer norm and for each running average."""
    same = max((abs(gap) for gap, _ in _gaps(layer, 0)), default=None)
    if same is None:
        return "No loss with layer norm is finite, so training and inference are not compared."
    alike = "the same loss in training and at inference" if same == 0 else f"losses {same:.1g} apart"
    found = {momentum: gaps for which, momentum in enumerate(momenta) if (gaps := _gaps(batch, which))}
    if not found:
        return f"Layer norm has {alike}; no loss with batch norm is finite."
    if all(abs(gap) < SMALL_GAP for gaps in found.values() for gap, _ in gaps):
        return f"Layer norm has {alike}, and batch norm's losses are never {SMALL_GAP} apart."
    gap, step, momentum = max(
        ((gap, step, momentum) for momentum, gaps in found.items() for gap, step in gaps), key=lambda item: abs(item[0])
    )
    ends = together(f"{gaps[-1][0]:+.3f} with {momentum}" for momentum, gaps in found.items())
    return (
        f"Layer norm has {alike}; batch norm's loss at inference differs by up to {gap:+.3f}, at step {step} with an "
        f"average of which a step replaces {momentum}, and at the end by {ends}."
    )


def _dependence_on_neighbours(results: dict[str, Any]) -> str:
    """Which norms make a row's output depend on other rows of the batch, or on later tokens."""

    def moved(key: str) -> list[str]:
        return [f"{r['norm']} in {r['mode']} mode by {r[key]:.2g}" for r in results["dependence"] if r[key] > 0]

    others, future = moved("other_rows"), moved("future")
    if not others and not future:
        return "Neither other rows of the batch nor later tokens change a single bit of a row's logits with any norm."
    return (
        f"Changing the other rows of a batch moves a row's logits with {listed(others, 'no norm')}; changing later "
        f"tokens moves those of earlier ones with {listed(future, 'no norm')}; all others keep their bits."
    )


def _coin_flips_in_words(results: dict[str, Any]) -> str:
    """Whether a model saw the flips that it had to predict."""
    coins, chance = results["coins"], math.log(2)
    # A generous bound on how far the mean of so many losses falls below ln 2 by chance in a model that knows nothing.
    slack = 3 / math.sqrt(coins[0]["rows"] * COIN_TOKENS)
    losses = together(f"{loss_text(row['train'])} with {row['norm']}" for row in coins)
    below = [row["norm"] for row in coins if row["train"] is not None and row["train"] < chance - slack]
    if not below:
        return (
            f"On coin flips the loss in training is {losses}; none is below ln 2 = {chance:.3f} by more than the "
            f"{slack:.3f} that chance allows, so no model is seen to look ahead."
        )
    return (
        f"On coin flips, where a causal model has ln 2 = {chance:.3f} at best, the loss in training is {losses}: "
        f"{together(below)} tells a model through the batch's statistics what comes next."
    )


# ---- pictures ----


def _draw_lag(results: dict[str, Any]) -> Any:
    figure, [[axes]] = panels(4.6)
    momenta = results["settings"]["momenta"].split(",")
    for kind, colour in zip(KINDS, (BLUE, VERMILION), strict=True):
        rows = [row for row in results["rows"] if row["norm"] == kind]
        steps = [row["step"] for row in rows]
        axes.plot(steps, or_nan([row["train"] for row in rows]), color=colour, label=f"{kind}, train mode")
        if kind == "layer norm":
            losses = or_nan([row["eval"][0] for row in rows])
            axes.plot(steps, losses, "o", color=colour, label=f"{kind}, eval mode")
            continue
        for which, momentum in enumerate(momenta):
            losses = or_nan([row["eval"][which] for row in rows])
            style = line_style(which + 3)  # unlike those of train mode
            axes.plot(steps, losses, label=f"{kind}, eval mode, average of {momentum}", **style)
    axes.set(xlabel="training step", ylabel="validation loss", xscale="log")
    figure.legend(loc="outside lower center")
    return figure


def _draw_coins(results: dict[str, Any]) -> Any:
    figure, [[axes]] = panels(3.4)
    for number, row in enumerate(results["coins"]):
        axes.plot(range(1, COIN_TOKENS + 1), row["by_position"], label=row["norm"], **line_style(number))
    axes.axhline(math.log(2), color=FAINT, linestyle=":", label="ln 2, the best of a causal model")
    axes.set(xlabel="position in the row", ylabel="loss", ylim=(0, None))
    figure.legend(loc="outside upper left", ncols=2)
    return figure
