"""Depth: what initialisation, normalisation and residual connections each do to a deep network.

Every combination of the three is trained at every depth, always on the same batches. Before and after training, one
batch goes forward and backward through the network, and two numbers are taken after each block: the root mean square of
the stream, and the norm of the loss's gradient with respect to the stream. Where one of them shrinks or grows by a
factor with each block, signals or gradients vanish or explode, and a deep network learns little.

Sources: He et al. 2015 (residual connections); Xiong et al. 2020 (where the norm goes); Glorot and Bengio 2010
(Xavier's initialisation); Radford et al. 2019 (GPT-2's).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from torch import Tensor, nn

from ..config import GPTConfig
from ..data.corpus import Corpus
from ..data.layouts import random_batch
from ..machine import resolve_device
from ..model import GPT
from ..plots import FAINT, line_style, name_above, panels, plot_up_to, say
from .experiment import at_least, described, finite, load_corpus, new_gpt, numbers, training, validation_loss
from .page import LEARNED, counted, find_row, frequencies_text, learned_bound, loss_text, or_nan, together
from .settings import DepthSettings

Kind = tuple[str, str, bool]  # initialisation, norm, residual

INITIALISATIONS = {
    "scaled": "0.02, and 0.02 / sqrt(2 L) where a branch ends, as in GPT-2",
    "plain": "0.02 everywhere",
    "xavier": "sqrt(2 / (in + out))",
    "large": "0.5 everywhere",
}
NORMS = ("none", "pre", "post")
KINDS: list[Kind] = list(itertools.product(INITIALISATIONS, NORMS, (True, False)))
USUAL: Kind = ("scaled", "pre", True)  # the kind of a GPT


def measure(settings: DepthSettings) -> dict[str, Any]:
    depths = sorted(numbers("depths", settings.depths, int))
    at_least(settings, steps=1, width=2, repeats=2)
    corpus = load_corpus(settings, block_size=32)
    rows = []
    for depth, (init, norm, residual) in itertools.product(depths, KINDS):
        row: dict[str, Any] = {"depth": depth, "init": init, "norm": norm, "residual": residual}
        rows.append(row | _train_network(settings, corpus, depth, init, norm, residual, settings.seed))
        network = f"{depth:3} blocks, {init}, {_norm_and_residual(norm, residual)}"
        print(f"{network}: loss {loss_text(rows[-1]['loss'])}", flush=True)
    seeds = range(settings.seed, settings.seed + settings.repeats)
    repeats = [_train_network(settings, corpus, depths[-1], *USUAL, seed)["loss"] for seed in seeds]
    return {"data": described(corpus, settings, 32), "rows": rows, "repeats": repeats}


def _train_network(
    settings: DepthSettings, corpus: Corpus, depth: int, init: str, norm: str, residual: bool, seed: int
) -> dict[str, Any]:
    """Train one network; returns its loss at the end, and stream and gradient at each block before and after."""
    cfg = GPTConfig(
        corpus.tokenizer.vocab_size, 32, depth, 2, settings.width, dropout=0.0, norm=norm, residual=residual
    )
    model = new_gpt(cfg, seed)
    redraw(model, init)
    model.to(resolve_device(settings.device))
    probe = random_batch(corpus.train, cfg.block_size, 16, seed, step=2**32)
    before = layers(model, *probe)
    warmup = settings.steps // 10
    for _ in training(model, corpus, seed, settings.steps, batch_size=8, warmup_steps=warmup, lr=settings.lr):
        pass
    return {"loss": finite(validation_loss(model, corpus)), "before": before, "after": layers(model, *probe)}


def redraw(model: GPT, init: str) -> None:
    """Draw the matrices of the blocks anew, by the scheme `init`. Embeddings, biases and norms stay as they are."""
    if init == "scaled":
        return  # the model is initialised so
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
    page.paragraph(_what_was_trained(results, depths))
    page.picture(
        "loss",
        "Validation loss by depth, one panel an initialisation",
        lambda: _draw_losses(results),
        nothing="" if any(row["loss"] is not None for row in rows) else "no network ended with a finite loss",
    )
    page.findings(
        _who_learned(results, depths[-1]), _one_change(results, depths[-1]), _signals_in_words(rows, depths[-1])
    )
    with page.numbers():
        page.paragraph(_columns_in_words(results))
        page.table(
            ["initialisation", "norm", "residual"]
            + [f"loss, {counted(depth, 'block')}" for depth in depths]
            + ["stream, last / first", "gradient, first / last"],
            [_table_row(rows, depths, kind) for kind in KINDS],
        )
        page.picture(
            "layers",
            f"Size of the stream, and of the gradient with respect to it, at each of {counted(depths[-1], 'block')}: "
            f"before training (lines) and after it (dots); sizes below {LEAST:g} or above {MOST:g} are left out",
            lambda: _draw_layers(rows, depths[-1]),
            nothing=_why_no_layers(rows, depths[-1]),
        )


def _network(rows: list[dict[str, Any]], depth: int, kind: Kind) -> dict[str, Any]:
    init, norm, residual = kind
    return find_row(rows, depth=depth, init=init, norm=norm, residual=residual)


def _table_row(rows: list[dict[str, Any]], depths: list[int], kind: Kind) -> list[Any]:
    init, norm, residual = kind
    found = [_network(rows, depth, kind) for depth in depths]
    losses = [None if row["loss"] is None else f"{row['loss']:.3f}" for row in found]
    ratios = (_stream_ratio(found[-1]), _gradient_ratio(found[-1]))
    return [init, norm, "yes" if residual else "no", *losses, *(None if r is None else f"{r:.2g}" for r in ratios)]


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _stream_ratio(row: dict[str, Any]) -> float | None:
    """The size of the stream after the last block, divided by its size after the first, before training."""
    return _ratio(row["before"]["activation"][-1], row["before"]["activation"][0])


def _gradient_ratio(row: dict[str, Any]) -> float | None:
    """The size of the gradient at the first block, divided by its size at the last, before training."""
    return _ratio(row["before"]["gradient"][0], row["before"]["gradient"][-1])


def _what_was_trained(results: dict[str, Any], depths: list[int]) -> str:
    settings = results["settings"]
    return (
        f"{len(results['rows'])} networks of {together(depths)} blocks, {settings['width']} wide, were trained: every "
        f"combination of {len(INITIALISATIONS)} initialisations with no norm, pre-norm and post-norm, and with and "
        f"without residual connections. Each took the same {counted(settings['steps'], 'step')} of 8 blocks of 32 "
        f"characters of {results['data']['name']}. {frequencies_text(results)}; a network that ends more than "
        f"{LEARNED} below that has learned something from the context."
    )


def _columns_in_words(results: dict[str, Any]) -> str:
    schemes = "; ".join(f"{name}: {what}" for name, what in INITIALISATIONS.items())
    return (
        f"An initialisation is a standard deviation with which the matrices of the blocks are drawn ({schemes}); "
        f"embeddings are always drawn with 0.02. The learning rate is {results['settings']['lr']:g}. The last two "
        f"columns describe the deepest networks before training: the size of the stream after the last block divided "
        f"by its size after the first, and the size of the loss's gradient at the first block divided by its size at "
        f"the last."
    )


def _who_learned(results: dict[str, Any], depth: int) -> str:
    """How many of the deepest networks learned, with residual connections and without."""
    deepest = [row for row in results["rows"] if row["depth"] == depth]
    learned = [row for row in deepest if row["loss"] is not None and row["loss"] < learned_bound(results)]
    blocks = counted(depth, "block")
    if not learned:
        return (
            f"None of the {len(deepest)} networks of {blocks} learned anything from the context, so their losses say "
            f"nothing about initialisation, norm or residual connections."
        )
    if len(learned) == len(deepest):
        return f"All {len(deepest)} networks of {blocks} learned something from the context."

    def share(key: str, value: Any) -> str:
        return f"{sum(row[key] == value for row in learned)} of {sum(row[key] == value for row in deepest)}"

    norms = ", ".join(f"{share('norm', norm)} with {_norm(norm)}" for norm in NORMS)
    return (
        f"Of the networks of {blocks}, {share('residual', True)} with residual connections learned something from the "
        f"context and {share('residual', False)} without them; {norms}."
    )


def _changes_of_the_usual_gpt() -> dict[str, Kind]:
    """Every kind that differs from the usual GPT in one thing, by its name in sentences."""
    init, norm, residual = USUAL
    others = [other for other in INITIALISATIONS if other != init]
    changes: dict[str, Kind] = {f"{other} initialisation": (other, norm, residual) for other in others}
    changes |= {_norm(other): (init, other, residual) for other in NORMS if other != norm}
    return changes | {"no residual connections": (init, norm, False)}


def _one_change(results: dict[str, Any], depth: int) -> str:
    """How much each change of one thing about the usual GPT moves its loss, compared with another seed."""
    rows = results["rows"]
    repeats = [loss for loss in results["repeats"] if loss is not None]
    usual = _network(rows, depth, USUAL)["loss"]
    if usual is None or len(repeats) < 2:
        return f"The usual GPT of {counted(depth, 'block')} had no finite loss, so nothing is compared with it."
    init, norm, _ = USUAL
    name = f"The usual GPT ({init} initialisation, {norm}-norm, residual connections)"
    if usual >= learned_bound(results):
        return f"{name} did not learn either: it ended at {usual:.3f}, so nothing is compared with it."
    spread = max(repeats) - min(repeats)
    losses = {what: _network(rows, depth, kind)["loss"] for what, kind in _changes_of_the_usual_gpt().items()}
    costs = {what: math.inf if loss is None else loss - usual for what, loss in losses.items()}
    within = [what for what, cost in costs.items() if abs(cost) <= spread]
    beyond = sorted((what for what in costs if what not in within), key=lambda what: -costs[what])
    name = f"{name} ended at {usual:.3f}"
    if not beyond:
        return f"{name}, and no single change moves that by more than the {spread:.3f} between seeds."
    moved = together(f"{what} ({_cost_text(costs[what])})" for what in beyond)
    text = f"{name}; one change moves that by more than the {spread:.3f} between seeds: {moved}"
    return f"{text}; not told apart from chance: {together(within)}." if within else f"{text}."


def _cost_text(cost: float) -> str:
    return f"{cost:+.3f}" if math.isfinite(cost) else "no finite loss"


def _signals_in_words(rows: list[dict[str, Any]], depth: int) -> str:
    """Where signals fade or grow most on their way through the blocks before training, beside the usual GPT."""
    if depth == 1:
        return "With one block, gradients have no way to go on which they could vanish or explode."
    ratios = {kind: _gradient_ratio(_network(rows, depth, kind)) for kind in KINDS}
    usual = ratios[USUAL]
    gradients = {kind: ratio for kind, ratio in ratios.items() if ratio is not None and kind != USUAL}
    if usual is None or not gradients:
        return "The usual GPT had no finite gradient before training, so gradients are not compared."
    low, high = min(gradients, key=lambda k: gradients[k]), max(gradients, key=lambda k: gradients[k])
    if min(gradients[low], usual) > 0.5 and max(gradients[high], usual) < 2.0:
        return (
            f"Before training, the gradient at the first of {depth} blocks is 0.5 to 2 times that at the last in all "
            f"networks: at this depth none vanishes or explodes."
        )

    def network(kind: Kind) -> str:
        return f"{times(gradients[kind])} with {kind[0]} initialisation, {_norm_and_residual(kind[1], kind[2])}"

    return (
        f"Before training, the gradient at the first of {depth} blocks is {times(usual)} that at the last in the usual "
        f"GPT; elsewhere it goes from {network(low)} to {network(high)}."
    )


def times(ratio: float) -> str:
    """ "1.3 times", "119 times", "2e-08 times"."""
    return f"{ratio:,.0f} times" if ratio >= 100 else f"{ratio:.1f} times" if ratio >= 0.1 else f"{ratio:.1g} times"


def _why_no_layers(rows: list[dict[str, Any]], depth: int) -> str:
    """Why the picture of the layers would show nothing; "" where it has something to show."""
    if depth == 1:
        return "with one block there is no way from the first block to the last"
    before = [row["before"] for row in rows if row["depth"] == depth]
    is_any_shown = any(value for values in before for value in (*values["activation"], *values["gradient"]))
    return "" if is_any_shown else "no network had finite numbers"


def _norm(norm: str) -> str:
    return "no norm" if norm == "none" else f"{norm}-norm"


def _norm_and_residual(norm: str, residual: bool) -> str:
    return f"{_norm(norm)}, {'residual' if residual else 'no residual'}"


# ---- pictures ----


def _style(norm: str, residual: bool) -> dict[str, Any]:
    """A colour and a marker for each norm; without residual connections, dashes."""
    return {**line_style(NORMS.index(norm)), "linestyle": "-" if residual else "--"}


def _draw_losses(results: dict[str, Any]) -> Any:
    figure, axes = panels(5.6, rows=2, columns=2, sharex=True, sharey=True)
    depths = sorted({row["depth"] for row in results["rows"]})
    frequencies = results["data"]["frequency_loss"]
    # A few networks end at huge losses. An axis that reached them would show all other curves as one line.
    highest = frequencies + 0.2
    any_above = False
    for panel, init in zip(axes.flat, INITIALISATIONS, strict=True):
        panel.axhline(frequencies, color=FAINT, linestyle=":", label="frequencies only")
        for norm, residual in itertools.product(NORMS, (True, False)):
            losses = [_network(results["rows"], depth, (init, norm, residual))["loss"] for depth in depths]
            style = {"label": _norm_and_residual(norm, residual), **_style(norm, residual)}
            any_above |= plot_up_to(panel, highest, range(len(depths)), or_nan(losses), **style)
        panel.set_title(init)
        panel.set_xticks(range(len(depths)), [str(depth) for depth in depths])
    shown = [row["loss"] for row in results["rows"] if row["loss"] is not None and row["loss"] <= highest]
    panel.set_ylim(min([*shown, frequencies]) - 0.1, highest)
    for panel in axes[:, 0]:
        panel.set_ylabel("validation loss")
    for panel in axes[-1]:
        panel.set_xlabel("blocks")
    if any_above:
        name_above(panel)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


LEAST, MOST = 1e-12, 1e6  # sizes beyond these have vanished or exploded, and get no place on an axis


def _draw_layers(rows: list[dict[str, Any]], depth: int) -> Any:
    blocks = range(1, depth + 1)
    figure, axes = panels(9.0, rows=len(INITIALISATIONS), columns=2, sharex=True, sharey=True)
    values: list[float] = []
    for pair, init in zip(axes, INITIALISATIONS, strict=True):
        for panel, key, title in zip(pair, ("activation", "gradient"), ("size of the stream", "gradient"), strict=True):
            missing = []
            for norm, residual in itertools.product(NORMS, (True, False)):
                row, style = _network(rows, depth, (init, norm, residual)), _style(norm, residual)
                line, dots = {**style, "marker": None}, {**style, "linestyle": "none", "markersize": 3}
                panel.plot(blocks, _positive(row["before"][key]), label=_norm_and_residual(norm, residual), **line)
                panel.plot(blocks, _positive(row["after"][key]), **dots)
                found = [value for value in (*row["before"][key], *row["after"][key]) if value]
                values += [value for value in found if LEAST <= value <= MOST]
                missing += [] if found else [_norm_and_residual(norm, residual)]
            panel.set_title(f"{init}: {title}")
            if missing:
                say(panel, "\n".join(["not finite, or 0:", *missing]))
    panel.set(yscale="log", ylim=(min(values) / 3, max(values) * 3) if values else None)
    for panel in axes[-1]:
        panel.set_xlabel("block")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _positive(values: list[float | None]) -> list[float]:
    """The values as a logarithmic axis can show them: NaN for zero and for numbers that are not finite."""
    return [value if value else math.nan for value in values]
