"""Attention: which tokens each head of each layer attends to, for one prompt.

No attention kernel stores the probabilities, so they are computed here a second time, from the q and k of the running
model. As a check, the probabilities times v are compared with the output of the attention op.
"""

from __future__ import annotations

import functools
import math
import statistics
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..config import GPTConfig
from ..loading import load
from ..machine import resolve_device
from ..model import GPT, CausalSelfAttention
from ..ops.reference import causal_mask
from ..plots import FONT_SIZE, panels
from ..tokenizer import Tokenizer
from .experiment import StudyError, at_least, label, trained_model
from .settings import AttentionSettings

LEGIBLE = 32  # names of tokens on an axis
SMALL = GPTConfig(block_size=64, n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=False)  # shakespeare-char-cpu


def measure(settings: AttentionSettings) -> dict[str, Any]:
    if not settings.prompt:
        raise StudyError("--prompt: is empty; give at least one token")
    at_least(settings, steps=1)
    loss = None
    if settings.checkpoint is not None:
        model, tokenizer = _load(settings.checkpoint)
    else:
        model, tokenizer, loss = trained_model(settings, SMALL, settings.steps)
    layers = _chosen("layer", settings.layer, model.cfg.n_layer)
    heads = _chosen("head", settings.head, model.cfg.n_head)
    tokens = encode(model, tokenizer, settings.prompt)
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
        ids = tokenizer.encode(prompt.replace("\r\n", "\n"))
    except ValueError as error:
        raise StudyError(f"--prompt: {error}") from None
    if len(ids) > model.cfg.block_size:
        raise StudyError(
            f"--prompt: {len(ids)} tokens do not fit the model's context of {model.cfg.block_size}; shorten it"
        )
    return torch.tensor([ids])


@torch.no_grad()
def capture(model: GPT, idx: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each layer: probabilities (1, H, T, T), v (1, H, T, D), and the attention op's output (1, H, T, D)."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(qkv: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        B, T, width = output.shape
        D = width // 3 // model.cfg.n_head
        q, k, v = output.view(B, T, 3, model.cfg.n_head, D).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        out = ops.attention(q, k, v, is_causal=model.cfg.is_causal)
        found.append((probabilities(q, k, model.cfg.is_causal), v, out))

    attentions = [module for module in model.modules() if isinstance(module, CausalSelfAttention)]
    hooks = [attention.qkv.register_forward_hook(keep) for attention in attentions]
    was_training = model.training
    try:
        model.eval()
        model.hidden(idx.to(model.token_embedding.weight.device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return found


def probabilities(q: Tensor, k: Tensor, is_causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask): (B, H, T, D) twice -> (B, H, T, T)."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if is_causal:
        scores = scores.masked_fill(~causal_mask(q.shape[2], k.shape[2], q.device), -math.inf)
    return torch.softmax(scores, dim=-1)


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


def show(results: dict[str, Any], page: Any) -> None:
    model, tokens = results["model"], results["tokens"]
    origin = (
        f"trained here for {results['settings']['steps']} steps (validation loss {results['loss']:.3f})"
        if results["loss"] is not None
        else f"of {results['settings']['checkpoint']}"
    )
    page.paragraph(
        f"A model of {model['n_layer']} layers with {model['n_head']} heads each and {model['parameters']:,} "
        f"parameters, {origin}, reads {len(tokens)} tokens: {' '.join(tokens)}. In the map of a head, each row is a "
        f"token and shows how it distributes its attention over the tokens in the columns; the shares of a row add up "
        f"to one. The table gives means over the rows: the distance of the attention in tokens, the entropy in nats, "
        f"and the shares that go to the token itself, to the token before it, and to the first token. The last column "
        f"names the two tokens whose share is furthest above an even distribution."
    )
    numeric = ("layer", "head", "distance", "entropy", "itself", "previous", "first")
    page.table(
        [*numeric, "strongest"],
        [[*(row[name] for name in numeric), _pair(row, tokens)] for row in results["rows"]],
    )
    page.picture("maps", "Attention maps by layer (down) and head (across)", lambda: _draw_maps(results))
    for name, row in zip(("near", "far"), _telling(results["rows"]), strict=False):
        caption = f"The map of layer {row['layer']} head {row['head']}, which looks {row['distance']:.1f} tokens away"
        page.picture(name, caption, functools.partial(_draw_head, row, tokens))
    page.paragraph(_findings(results))


def _telling(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The heads that are drawn large: those that look nearest and farthest, on average, if there are two."""
    near, far = (choose(rows, key=lambda row: row["distance"]) for choose in (min, max))
    return [near] if near is far else [near, far]


def _pair(row: dict[str, Any], tokens: list[str]) -> str:
    query, key = row["strongest"]
    return f"{tokens[query]} ({query + 1}) to {tokens[key]} ({key + 1})"


def _findings(results: dict[str, Any]) -> str:
    rows, n = results["rows"], len(results["tokens"])

    def name(row: dict[str, Any]) -> str:
        return f"layer {row['layer']} head {row['head']}"

    def extreme(key: str, largest: bool) -> str:
        row = (max if largest else min)(rows, key=lambda row: row[key])
        return f"{name(row)} ({row[key]:.2f})"

    # The entropy of a head that gives every visible token the same share.
    seen = range(1, n + 1) if results["is_causal"] else [n] * n
    even = sum(math.log(count) for count in seen) / n
    text = (
        f"The mean distance, in tokens, is shortest in {extreme('distance', False)} and longest in "
        f"{extreme('distance', True)}. The entropy, in nats, is lowest in {extreme('entropy', False)} and highest in "
        f"{extreme('entropy', True)}; it is {even:.2f} for a head that gives all visible tokens the same share. "
    )
    for key, what in (("previous", "the token before"), ("itself", "the token itself"), ("first", "the first token")):
        most = [row for row in rows if row[key] > 0.5]
        text += f"Heads with more than half of their attention on {what}: {len(most)} of {len(rows)}"
        text += f" ({', '.join(name(row) for row in most[:4])}{', ...' if len(most) > 4 else ''}). " if most else ". "
    layers = sorted({row["layer"] for row in rows})
    if len(layers) > 1:
        means = [statistics.fmean(row["distance"] for row in rows if row["layer"] == layer) for layer in layers]
        text += f"Mean distance by layer: {', '.join(f'{mean:.1f}' for mean in means)}. "
    return f"{text}The maps times v differ from the output of the attention op by at most {results['error']:.1g}."


def _draw_maps(results: dict[str, Any]) -> Any:
    """All maps in small: a glance tells which heads look near, far, or everywhere."""
    rows = results["rows"]
    layers, heads = (sorted({row[name] for row in rows}) for name in ("layer", "head"))
    side = 5.0 / len(heads)
    figure, axes = panels(1.0 + side * len(layers), len(layers), len(heads), sharex=True, sharey=True)
    for row in rows:
        panel = axes[layers.index(row["layer"])][heads.index(row["head"])]
        shown = _show_map(panel, row, len(results["tokens"]), _strongest(results))
        panel.set(xticks=[], yticks=[])
    for panel, layer in zip(axes[:, 0], layers, strict=True):
        panel.set_ylabel(f"layer {layer}" if len(layers) < 7 else layer)
    for panel, head in zip(axes[0], heads, strict=True):
        panel.set_title(f"head {head}" if len(heads) < 7 else head, loc="center", fontsize=FONT_SIZE)
    figure.colorbar(shown, ax=axes, orientation="horizontal", aspect=40, fraction=0.04, label="share of the attention")
    return figure


def _draw_head(row: dict[str, Any], tokens: list[str]) -> Any:
    """The map of one head, with its tokens; of a long prompt, as many of them are named as can be read."""
    figure, [[axes]] = panels(5.8)
    shown = _show_map(axes, row, len(tokens), max(map(max, row["map"])))
    every = -(-len(tokens) // LEGIBLE)
    at = range(0, len(tokens), every)
    names = [token if len(token) <= 10 else f"{token[:9]}…" for token in tokens[::every]]
    rotation = 0 if all(len(name) == 1 for name in names) else 90
    axes.set_xticks(at, names, parse_math=False, family="monospace", rotation=rotation)
    axes.set_yticks(at, names, parse_math=False, family="monospace")
    which = {1: ""}.get(every, f" (one in {every} is named)")
    axes.set(xlabel=f"token that is attended to{which}", ylabel="token that attends")
    figure.colorbar(shown, shrink=0.7, label="share of the attention")
    return figure


def _show_map(axes: Any, row: dict[str, Any], n: int, largest: float) -> Any:
    image = [values + [0.0] * (n - len(values)) for values in row["map"]]
    axes.grid(False)
    axes.tick_params(length=0)
    return axes.imshow(image, cmap="Blues", vmin=0.0, vmax=largest, interpolation="nearest")


def _strongest(results: dict[str, Any]) -> float:
    """The largest share in any of the maps."""
    return max(max(map(max, row["map"])) for row in results["rows"])
