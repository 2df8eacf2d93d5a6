"""Depth: what initialisation, normalisation and residual connections each do to a network made deep.

Every combination of the three is trained at every depth, all on the same batches. Before and after, one batch goes
through the network and back, and at the end of each block two things are read: how large the stream is (its root mean
square) and how large the gradient of the loss with respect to it. Where either shrinks or grows by a factor a block,
a deep network has nothing to work with, whatever its last layers could do.

Sources: He et al. 2015 (residual connections); Xiong et al. 2020 (where the norm goes); Glorot and Bengio 2010
(Xavier's initialisation); Radford et al. 2019 (GPT-2's).
"""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

from torch import Tensor, nn

from ..config import GPTConfig, TrainConfig
from ..data.corpus import Corpus
from ..data.layouts import random_batch
from ..machine import resolve_device
from ..model import GPT
from ..report import pyplot
from .experiment import (
    at_least,
    described,
    finite,
    load_corpus,
    new_gpt,
    numbers,
    training,
    validation_loss,
)
from .settings import DepthSettings as Settings
from .words import LEARNED

INITIALISATIONS = {
    "scaled": "GPT-2's: 0.02, and 0.02 / sqrt(2 L) where a branch ends",
    "plain": "0.02 everywhere",
    "xavier": "sqrt(2 / (in + out))",
    "large": "0.5 everywhere",
}
NORMS = ("none", "pre", "post")
USUAL = ("scaled", "pre", True)  # a GPT's


def measure(settings: Settings) -> dict[str, Any]:
    depths = sorted(numbers("depths", settings.depths, int))
    for name, least in (("steps", 1), ("width", 2), ("repeats", 2)):
        at_least(name, getattr(settings, name), least)
    corpus = load_corpus(settings, block_size=32)
    rows = []
    for depth, init, norm, residual in itertools.product(depths, INITIALISATIONS, NORMS, (True, False)):
        row: dict[str, Any] = {"depth": depth, "init": init, "norm": norm, "residual": residual}
        rows.append(row | _one(settings, corpus, depth, init, norm, residual, settings.seed))
        print(f"{depth:3} blocks, {init}, {_name(norm, residual)}: {_loss_text(rows[-1]['loss'])}", flush=True)
    seeds = range(settings.seed, settings.seed + settings.repeats)
    repeats = [_one(settings, corpus, depths[-1], *USUAL, seed)["loss"] for seed in seeds]
    return {"data": described(corpus, settings, 32), "rows": rows, "repeats": repeats}


def _one(
    settings: Settings, corpus: Corpus, depth: int, init: str, norm: str, residual: bool, seed: int
) -> dict[str, Any]:
    """Train one network; the loss it ends with, and stream and gradient at each block before and after."""
    cfg = GPTConfig(
        corpus.tokenizer.vocab_size, 32, depth, 2, settings.width, dropout=0.0, norm=norm, residual=residual
    )
    model = new_gpt(cfg, seed)
    redraw(model, init)
    model.to(resolve_device(settings.device))
    probe = random_batch(corpus.train, cfg.block_size, 16, seed, step=2**32)
    before = layers(model, *probe)
    train_cfg = TrainConfig(
        batch_size=8,
        max_steps=settings.steps,
        lr=settings.lr,
        min_lr=settings.lr / 10,
        warmup_steps=settings.steps // 10,
        seed=seed,
    )
    for _ in training(model, corpus, train_cfg):
        pass
    return {"loss": finite(validation_loss(model, corpus)), "before": before, "after": layers(model, *probe)}


def redraw(model: GPT, init: str) -> None:
    """Draw the matrices of the blocks as `init` says. Embeddings, biases and norms stay as they are."""
    if init == "scaled":
        return  # the model's own
    for weight in (p for p in model.blocks.parameters() if p.ndim == 2):
        if init == "xavier":
            nn.init.xavier_normal_(weight)
        else:
            nn.init.normal_(weight, std=0.02 if init == "plain" else 0.5)


def layers(model: GPT, idx: Tensor, targets: Tensor) -> dict[str, list[float | None]]:
    """The stream after each block: its root mean square, and the norm of the loss's gradient with respect to it."""
    device = model.token_embedding.weight.device
    streams: list[tuple[Tensor, Tensor | None]] = []

    def keep(block: nn.Module, inputs: Any, output: tuple[Tensor, Tensor | None]) -> None:
        x, branch = output
        # The stream is x + branch where the branch is still to be added, so its gradient is the branch's.
        (x if branch is None else branch).retain_grad()
        streams.append(output)

    hooks = [block.register_forward_hook(keep) for block in model.blocks]
    try:
        model.loss(idx.to(device), targets.to(device)).backward()
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    activations, gradients = [], []
    for x, branch in streams:
        grad = (x if branch is None else branch).grad
        assert grad is not None
        stream = (x if branch is None else x + branch).detach().cpu().double()  # not every GPU has float64
        activations.append(_rounded(float(stream.square().mean().sqrt())))
        gradients.append(_rounded(float(grad.cpu().double().norm())))
    return {"activation": activations, "gradient": gradients}


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


# ---- what is shown ----


def show(results: dict[str, Any], page: Any) -> None:
    rows, depths = results["rows"], sorted({row["depth"] for row in results["rows"]})
    page.paragraph(_trained(results))
    page.table(
        [
            "initialisation",
            "norm",
            "residual",
            *(f"loss, {depth} blocks" for depth in depths),
            "stream, last / first",
            "gradient, first / last",
        ],
        [_table_row(rows, depths, *kind) for kind in _kinds()],
    )
    page.picture(
        "loss",
        "Validation loss against depth, by initialisation; what is far above frequencies is outside",
        lambda: _draw_losses(results),
    )
    page.picture(
        "layers",
        f"Stream and gradient at each of {depths[-1]} blocks, before training (lines) and after it (dots)",
        lambda: _draw_layers(rows, depths[-1]),
    )
    page.paragraph(_counts(results, depths[-1]))
    page.paragraph(_one_change(results, depths[-1]))
    page.paragraph(_gradients(rows, depths[-1]))


def _kinds() -> list[tuple[str, str, bool]]:
    return list(itertools.product(INITIALISATIONS, NORMS, (True, False)))


def _find(rows: list[dict[str, Any]], depth: int, init: str, norm: str, residual: bool) -> dict[str, Any]:
    return next(
        row
        for row in rows
        if (row["depth"], row["init"], row["norm"], row["residual"]) == (depth, init, norm, residual)
    )


def _table_row(rows: list[dict[str, Any]], depths: list[int], init: str, norm: str, residual: bool) -> list[Any]:
    found = [_find(rows, depth, init, norm, residual) for depth in depths]
    before = found[-1]["before"]
    return [
        init,
        norm,
        "yes" if residual else "no",
        *(row["loss"] for row in found),
        _ratio(before["activation"][-1], before["activation"][0]),
        _ratio(before["gradient"][0], before["gradient"][-1]),
    ]


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _learned(results: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    bound = results["data"]["frequency_loss"] - LEARNED
    return [row for row in rows if row["loss"] is not None and row["loss"] < bound]


def _trained(results: dict[str, Any]) -> str:
    settings, data = results["settings"], results["data"]
    schemes = "; ".join(f"{name}: {what}" for name, what in INITIALISATIONS.items())
    return (
        f"{len(results['rows'])} networks, {settings['width']} wide, trained for {settings['steps']} steps of 8 blocks "
        f"of 32 characters of {data['name']} at a learning rate of {settings['lr']:g}. The standard deviation of the "
        f"blocks' matrices is, by initialisation, {schemes}; embeddings are always 0.02. The two last columns are of "
        f"the deepest networks before training: how much larger the stream is after the last block than after the "
        f"first, and the gradient at the first block over that at the last."
    )


def _counts(results: dict[str, Any], depth: int) -> str:
    deepest = [row for row in results["rows"] if row["depth"] == depth]
    best = min((row for row in deepest if row["loss"] is not None), key=lambda row: row["loss"], default=None)

    def share(key: str, value: Any) -> str:
        chosen = [row for row in deepest if row[key] == value]
        return f"{len(_learned(results, chosen))} of {len(chosen)}"

    text = (
        f"Knowing how often each character occurs gives {results['data']['frequency_loss']:.3f} nats. Of the "
        f"{len(deepest)} networks of {depth} blocks, {len(_learned(results, deepest))} ended more than {LEARNED} below "
        f"that: with residual connections {share('residual', True)}, without {share('residual', False)}; "
        + ", ".join(f"{'no norm' if norm == 'none' else norm + '-norm'} {share('norm', norm)}" for norm in NORMS)
        + "; "
        + ", ".join(f"{init} initialisation {share('init', init)}" for init in INITIALISATIONS)
        + "."
    )
    if best is not None:
        text += (
            f" The lowest loss, {best['loss']:.3f}, is that of the {best['init']} initialisation, "
            f"{_name(best['norm'], best['residual'])}."
        )
    return text


def _one_change(results: dict[str, Any], depth: int) -> str:
    """The usual GPT, and what changing one thing about it does, against what another seed does."""
    repeats = [loss for loss in results["repeats"] if loss is not None]
    usual = _find(results["rows"], depth, *USUAL)["loss"]
    if usual is None or len(repeats) < 2:
        return f"The usual GPT of {depth} blocks did not end with a finite loss, so nothing is compared with it."
    spread = max(repeats) - min(repeats)
    init, norm, residual = USUAL
    changes = [(f"{other} initialisation", (other, norm, residual)) for other in INITIALISATIONS if other != init]
    changes += [("no norm" if n == "none" else f"{n}-norm", (init, n, residual)) for n in NORMS if n != norm]
    changes += [("no residual connections", (init, norm, False))]
    said, within = [], []
    for what, kind in changes:
        loss = _find(results["rows"], depth, *kind)["loss"]
        if loss is None:
            said.append(f"{what}: not finite")
            continue
        said.append(f"{what} {loss - usual:+.3f}")
        if abs(loss - usual) <= spread:
            within.append(what)
    verdict = (
        f"Within that, and so not told apart from chance: {', '.join(within)}."
        if within
        else "Each of these is more than that."
    )
    shallow = min(row["depth"] for row in results["rows"])
    shallow_loss = _find(results["rows"], shallow, *USUAL)["loss"]
    deeper = (
        f" From {shallow} to {depth} blocks its loss went from {shallow_loss:.3f} to {usual:.3f} in the same steps."
        if shallow != depth and shallow_loss is not None
        else ""
    )
    return (
        f"A GPT as usual ({init} initialisation, {norm}-norm, residual connections) of {depth} blocks ends at "
        f"{usual:.3f}. One thing changed: {'; '.join(said)}. {len(repeats)} seeds of the usual one lie "
        f"{spread:.3f} apart (mean {statistics.mean(repeats):.3f}). {verdict}{deeper}"
    )


def _gradients(rows: list[dict[str, Any]], depth: int) -> str:
    """The ends of the range of what reaches the first block before training, and how the stream grows."""

    def ends(ratio: dict[tuple[str, str, bool], float]) -> str:
        low, high = min(ratio, key=lambda k: ratio[k]), max(ratio, key=lambda k: ratio[k])
        return (
            f"from {ratio[low]:.2g} ({low[0]}, {_name(low[1], low[2])}) "
            f"to {ratio[high]:.2g} ({high[0]}, {_name(high[1], high[2])})"
        )

    gradient: dict[tuple[str, str, bool], float] = {}
    stream: dict[tuple[str, str, bool], float] = {}
    for kind in _kinds():
        before = _find(rows, depth, *kind)["before"]
        for ratios, key, (above, below) in ((gradient, "gradient", (0, -1)), (stream, "activation", (-1, 0))):
            value = _ratio(before[key][above], before[key][below])
            if value is not None:
                ratios[kind] = value
    if USUAL not in gradient or USUAL not in stream:
        return f"The usual GPT of {depth} blocks had no finite gradient before training."
    return (
        f"Before training, the gradient at the first of {depth} blocks is {ends(gradient)} times that at the "
        f"last; in the usual GPT {gradient[USUAL]:.2g} times. The stream after the last block is {ends(stream)} times "
        f"that after the first; in the usual GPT {stream[USUAL]:.2g} times."
    )


def _name(norm: str, residual: bool) -> str:
    return f"{'no norm' if norm == 'none' else norm + '-norm'}, {'residual' if residual else 'no residual'}"


def _loss_text(loss: float | None) -> str:
    return "not finite" if loss is None else f"loss {loss:.3f}"


COLOURS = {"none": "tab:red", "pre": "tab:blue", "post": "tab:green"}


def _panels(rows: int, height: float, **shared: Any) -> tuple[Any, Any]:
    return pyplot().subplots(
        rows, len(INITIALISATIONS), figsize=(9, height), constrained_layout=True, squeeze=False, **shared
    )


def _draw_losses(results: dict[str, Any]) -> Any:
    figure, axes = _panels(1, 3.2, sharey=True)
    depths = sorted({row["depth"] for row in results["rows"]})
    for panel, init in zip(axes[0], INITIALISATIONS, strict=True):
        panel.axhline(results["data"]["frequency_loss"], color="grey", lw=0.8, ls=":", label="frequencies only")
        for norm, residual in itertools.product(NORMS, (True, False)):
            losses = [_find(results["rows"], depth, init, norm, residual)["loss"] for depth in depths]
            style = {"color": COLOURS[norm], "ls": "-" if residual else "--", "marker": "o", "ms": 3}
            panel.plot(
                range(len(depths)), [math.nan if v is None else v for v in losses], label=_name(norm, residual), **style
            )
        panel.set(title=init, xlabel="blocks")
        panel.set_xticks(range(len(depths)), [str(depth) for depth in depths])
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("validation loss")
    # A network with a huge loss must not press the others into a line: it is left out.
    highest = results["data"]["frequency_loss"] + 0.2
    losses = [row["loss"] for row in results["rows"] if row["loss"] is not None]
    axes[0][0].set_ylim(min([*losses, highest]) - 0.1, highest)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return figure


def _draw_layers(rows: list[dict[str, Any]], depth: int) -> Any:
    figure, axes = _panels(2, 5.2, sharex=True, sharey="row")
    for column, init in enumerate(INITIALISATIONS):
        for norm, residual in itertools.product(NORMS, (True, False)):
            row = _find(rows, depth, init, norm, residual)
            style = {"color": COLOURS[norm], "ls": "-" if residual else "--"}
            for panel, key in zip(axes[:, column], ("activation", "gradient"), strict=True):
                blocks = range(1, depth + 1)
                panel.plot(blocks, _positive(row["before"][key]), label=_name(norm, residual), **style)
                panel.plot(blocks, _positive(row["after"][key]), ".", color=style["color"], ms=3, alpha=0.6)
                panel.set(yscale="log", ylim=(1e-12, 1e6))
                panel.grid(alpha=0.3)
        axes[0, column].set_title(init)
        axes[1, column].set_xlabel("block")
    axes[0, 0].set_ylabel("root mean square of the stream")
    axes[1, 0].set_ylabel("norm of the gradient")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    return figure


def _positive(values: list[float | None]) -> list[float]:
    """A logarithmic axis has no place for zero, nor for what is not finite."""
    return [value if value else math.nan for value in values]
