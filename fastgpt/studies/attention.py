"""Attention: which tokens each head of each layer attends to, for one prompt.

`attention_maps` computes the probabilities a second time, because no attention kernel keeps them. As a check, the
probabilities times v are compared with the output of the attention op.
"""

from __future__ import annotations

import functools
import math
import statistics
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attention_maps import capture
from ..generate_text import prompt_tokens
from ..loading import load
from ..machine import resolve_device
from ..model import GPT
from ..plots import GRID, panels
from ..tokenizer import Tokenizer, label
from .experiment import StudyError, at_least, small_gpt, train_small_gpt
from .page import counted, listed, together
from .settings import AttentionSettings

LEGIBLE = {True: 36, False: 28}  # names of tokens on an axis: where they are single characters, and where not


def measure(settings: AttentionSettings) -> dict[str, Any]:
    at_least(settings, steps=1)
    corpus, loss = None, None
    if settings.checkpoint is not None:
        model, tokenizer = _load(settings.checkpoint)
    else:
        model, corpus = small_gpt(settings)
        tokenizer = corpus.tokenizer
    layers = _chosen("layer", settings.layer, model.cfg.n_layer)
    heads = _chosen("head", settings.head, model.cfg.n_head)
    tokens = encode(model, tokenizer, settings.prompt)
    if corpus is not None:  # after the checks, so that a mistake costs no training
        loss = train_small_gpt(model, corpus, settings)
    model.to(resolve_device(settings.device))
    captured = capture(model, tokens)
    error = max(float((maps @ v - out).abs().max()) for maps, v, out in captured)
    rows = []
    for layer in layers:
        for head in heads:
            maps = captured[layer - 1][0][0, head - 1].cpu()  # (T, T)
            rows.append({"layer": layer, "head": head, **summary(maps), "map": _packed(maps)})
    return {
        "model": {"parameters": model.num_parameters(), "n_layer": model.cfg.n_layer, "n_head": model.cfg.n_head},
        "is_causal": model.cfg.is_causal,
        "loss": loss,
        "tokens": [label(tokenizer, int(token)) for token in tokens[0]],
        "error": float(f"{error:.2g}"),
        "rows": rows,
    }


def _load(checkpoint: str) -> tuple[GPT, Tokenizer]:
    model, tokenizer = load(checkpoint, dropout=0.0)
    if not isinstance(model, GPT):
        raise StudyError(f"--checkpoint {checkpoint}: holds a model of kind {model.kind!r}, which has no attention")
    return model, tokenizer


def _chosen(name: str, asked: int | None, n: int) -> list[int]:
    if asked is None:
        return list(range(1, n + 1))
    if not 1 <= asked <= n:
        raise StudyError(f"--{name} {asked}: the model has {name}s 1 to {n}")
    return [asked]


def encode(model: GPT, tokenizer: Tokenizer, prompt: str) -> Tensor:
    """The prompt's tokens (1, T), which must fit the model's context."""
    try:
        idx = prompt_tokens(tokenizer, prompt)
    except ValueError as error:
        raise StudyError(f"--{error}") from None
    if idx.shape[1] > model.cfg.block_size:
        raise StudyError(
            f"--prompt: {idx.shape[1]} tokens do not fit the model's context of {model.cfg.block_size}; shorten it"
        )
    return idx


def summary(maps: Tensor) -> dict[str, Any]:
    """Means over the queries of one head's map (T, T): distance in tokens, entropy in nats, shares of attention."""
    T = len(maps)
    i, j = torch.arange(T)[:, None], torch.arange(T)[None, :]
    entropy = -(maps * maps.clamp_min(torch.finfo(maps.dtype).tiny).log()).sum(-1)
    even = (maps > 0.0) / (maps > 0.0).sum(-1, keepdim=True)  # the same share for every visible token
    query, key = divmod(int((maps - even).argmax()), T)
    values = {
        "distance": float((maps * (i - j).abs()).sum(-1).mean()),
        "entropy": float(entropy.mean()),
        "itself": float(maps.diagonal().mean()),
        "previous": float(maps.diagonal(-1).mean()) if T > 1 else 0.0,
        "first": float(maps[1:, 0].mean()) if T > 1 else 1.0,
    }
    return {name: round(value, 4) for name, value in values.items()} | {"strongest": [query, key]}


def _packed(maps: Tensor) -> list[list[float]]:
    """The map with three decimals, without the zeros at the end of a row: half of a causal map is zeros."""
    rows = [[round(value, 3) for value in row] for row in maps.tolist()]
    for row in rows:
        while len(row) > 1 and row[-1] == 0.0:
            row.pop()
    return rows


# ---- what is shown ----


EVEN = 0.9  # a head whose entropy is above this part of the largest possible one looks at everything alike


def show(results: dict[str, Any], page: Any) -> None:
    model, tokens = results["model"], results["tokens"]
    origin = (
        f"trained here for {counted(results['settings']['steps'], 'step')} (validation loss {results['loss']:.3f})"
        if results["loss"] is not None
        else f"from {results['settings']['checkpoint']}"
    )
    page.paragraph(
        f"A model of {counted(model['n_layer'], 'layer')} with {counted(model['n_head'], 'head')} each and "
        f"{model['parameters']:,} parameters, {origin}, read {counted(len(tokens), 'token')}: {' '.join(tokens)}. In "
        f"the map of a head, each row is a token, and shows which shares of its attention go to the tokens in the "
        f"columns."
    )
    large = [
        (f"The map of {_name(row)}, which looks {row['distance']:.1f} tokens away", row)
        for row in _telling(results["rows"])
    ]
    why_not = _why_no_maps(results)
    if len(results["rows"]) > 1:
        all_maps = "Attention maps by layer (down) and head (across)"
        page.picture("maps", all_maps, lambda: _draw_maps(results), nothing=why_not)
    else:
        caption, row = large.pop()
        page.picture("near", caption, lambda: _draw_head(row, tokens), nothing=why_not)
    page.findings(_distances_in_words(results), _entropies_in_words(results), _habits_in_words(results))
    with page.numbers():
        page.paragraph(
            f"Means over the rows of a map: the distance of the attention in tokens, its entropy in nats, and the "
            f"shares that go to the token itself, to the token before it, and to the first token. The last column "
            f"names the two tokens whose share is furthest above an even distribution. The maps times v differ from "
            f"the output of the attention op by at most {results['error']:.1g}."
        )
        page.table(
            ["layer", "head", "distance", "entropy", "itself", "previous", "first", "strongest"],
            [
                [row["layer"], row["head"], f"{row['distance']:.2f}", f"{row['entropy']:.2f}"]
                + [f"{row[name]:.3f}" for name in ("itself", "previous", "first")]
                + [_pair(row, tokens)]
                for row in results["rows"]
            ],
        )
        if not why_not:
            for name, (caption, row) in zip(("near", "far"), large, strict=False):
                page.picture(name, caption, functools.partial(_draw_head, row, tokens))


def _telling(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The heads that are drawn large: those that look nearest and farthest, on average, if there are two."""
    near, far = (choose(rows, key=lambda row: row["distance"]) for choose in (min, max))
    return [near] if near is far else [near, far]


def _pair(row: dict[str, Any], tokens: list[str]) -> str:
    query, key = row["strongest"]
    return f"{tokens[query]} ({query + 1}) to {tokens[key]} ({key + 1})"


def _name(row: dict[str, Any]) -> str:
    return f"layer {row['layer']} head {row['head']}"


def _even_entropy(results: dict[str, Any]) -> float:
    """The entropy, in nats, of a head that gives every visible token the same share."""
    n = len(results["tokens"])
    return sum(math.log(count) for count in (range(1, n + 1) if results["is_causal"] else [n] * n)) / n


def _is_even(results: dict[str, Any]) -> bool:
    """Whether each head spreads its attention almost evenly."""
    return all(row["entropy"] > EVEN * _even_entropy(results) for row in results["rows"])


def _why_no_maps(results: dict[str, Any]) -> str:
    if len(results["tokens"]) == 1:
        return "a single token can attend to nothing but itself"
    if _is_even(results):
        return "every head gives all tokens that it sees almost the same share, so that each map is one colour"
    return ""


def _distances_in_words(results: dict[str, Any]) -> str:
    """Which heads look near and far, and by layer."""
    rows = results["rows"]
    near, far = min(rows, key=lambda row: row["distance"]), max(rows, key=lambda row: row["distance"])
    if near is far:
        return f"One head is shown, {_name(near)}: it looks {near['distance']:.1f} tokens back on average."
    if f"{near['distance']:.1f}" == f"{far['distance']:.1f}":
        return f"All heads look {near['distance']:.1f} tokens away on average."
    text = f"On average {_name(near)} looks {near['distance']:.1f} tokens away and {_name(far)} {far['distance']:.1f}"
    layers = sorted({row["layer"] for row in rows})
    if len(layers) == 1:
        return f"{text}."
    means = [statistics.fmean(row["distance"] for row in rows if row["layer"] == layer) for layer in layers]
    return f"{text}; the means of the layers, from the first on, are {together(f'{mean:.1f}' for mean in means)}."


def _entropies_in_words(results: dict[str, Any]) -> str:
    """How concentrated the attention is, beside attention that is spread evenly."""
    even = _even_entropy(results)
    if even == 0.0:
        return "With one visible token there is nothing to choose."
    if _is_even(results):
        return (
            f"Every head spreads its attention almost evenly: no entropy is below {EVEN:.0%} of the {even:.2f} nats of "
            f"an even distribution, so the maps say nothing of what a head looks for."
        )
    low = min(results["rows"], key=lambda row: row["entropy"])
    evenly = sum(row["entropy"] > EVEN * even for row in results["rows"])
    return (
        f"The most selective is {_name(low)}, with an entropy of {low['entropy']:.2f} nats where an even distribution "
        f"has {even:.2f}; {evenly or 'none'} of {counted(len(results['rows']), 'head')} spread attention almost evenly."
    )


def _habits_in_words(results: dict[str, Any]) -> str:
    """Heads that give more than half of their attention to one place."""
    rows, places = results["rows"], {"previous": "the token before", "itself": "the token itself", "first": "the first"}
    if len(results["tokens"]) == 1:
        return "The prompt has no second token, so no head has a choice of places."
    habits = []
    for key, place in places.items():
        if most := [_name(row) for row in rows if row[key] > 0.5]:
            habits.append(f"{place} in {counted(len(most), 'head')} ({listed(most[:4])}{', ...' * (len(most) > 4)})")
    if habits:
        return f"More than half of the attention goes to {together(habits)}."
    row, key = max(((row, key) for row in rows for key in places), key=lambda pair: pair[0][pair[1]])
    return (
        f"No head gives more than half of its attention to the token before, to the token itself or to the first; the "
        f"largest such share is {row[key]:.0%}, to {places[key]}, in {_name(row)}."
    )


def _draw_maps(results: dict[str, Any]) -> Any:
    """All maps in small, in one image: a glance tells which heads look near, far, or everywhere."""
    rows, n = results["rows"], len(results["tokens"])
    layers, heads = (sorted({row[name] for row in rows}) for name in ("layer", "head"))
    gap = max(1, n // 16)
    step = n + gap
    image = np.full((step * len(layers) - gap, step * len(heads) - gap), math.nan)
    for row in rows:
        top, left = step * layers.index(row["layer"]), step * heads.index(row["head"])
        image[top : top + n, left : left + n] = _full(row["map"], n)
    figure, [[axes]] = panels(1.3 + 5.2 * len(layers) / len(heads))
    _show(figure, axes, image)
    axes.xaxis.tick_top()
    axes.set_xticks([step * i + n / 2 for i in range(len(heads))], heads)
    axes.set_yticks([step * i + n / 2 for i in range(len(layers))], layers)
    axes.set(title="head", ylabel="layer")
    return figure


def _draw_head(row: dict[str, Any], tokens: list[str]) -> Any:
    """The map of one head, with its tokens; of a long prompt, as many of them are named as can be read."""
    figure, [[axes]] = panels(6.7)
    _show(figure, axes, _full(row["map"], len(tokens)))
    are_characters = all(len(token) == 1 for token in tokens)
    every = -(-len(tokens) // LEGIBLE[are_characters])
    at = range(0, len(tokens), every)
    names = [token if len(token) <= 10 else f"{token[:9]}…" for token in tokens[::every]]
    rotation = 0 if are_characters else 90
    axes.set_xticks(at, names, parse_math=False, family="monospace", rotation=rotation)
    axes.set_yticks(at, names, parse_math=False, family="monospace")
    which = {1: ""}.get(every, f" (one in {every} is named)")
    axes.set(xlabel=f"token that is attended to{which}", ylabel="token that attends")
    return figure


def _full(packed: list[list[float]], n: int) -> np.ndarray:
    """The map (n, n) with the zeros that `_packed` left out."""
    return np.array([values + [0.0] * (n - len(values)) for values in packed])


def _show(figure: Any, axes: Any, image: np.ndarray) -> None:
    """Shares as colours, with their scale; what is not a number is grey."""
    from matplotlib import colormaps

    blues = colormaps["Blues"].with_extremes(bad=GRID)
    shown = axes.imshow(image, cmap=blues, vmin=0.0, interpolation="nearest")
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(shown, orientation="horizontal", aspect=40, fraction=0.04, label="share of the attention")
