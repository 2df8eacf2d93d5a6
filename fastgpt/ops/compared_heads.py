"""What the self-test of attention compares: a few heads of a call, by the formula, a part of their queries at a time.

The kernels run on all heads of the call, since how many there are decides which kernel is taken. The formula keeps
several tensors of one number for each score, in float64, which for all heads of a long call would be gigabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .accuracy import outputs_and_gradients
from .variants import Attention

MOST_SCORES = 2**20  # that the formula makes at one time: 8 MB in float64, and it keeps about six such tensors


def chosen(call: Attention) -> list[tuple[int, int]]:
    """(batch, key head) of the first, a middle and the last key head. Those that share one key head belong together."""
    n = call.B * call.Hkv
    return [divmod(number, call.Hkv) for number in sorted({0, n // 2, n - 1})]


def separate(call: Attention, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a call and their gradients as (B, H, T, D), by name; those of qkv are three.

    k and v are all that q sees: of a cache, what it holds, and behind this the new ones, which are appended twice.
    """
    if "keys" in values:
        caches = {"k": values["keys"], "v": values["values"]}
        for name, cache in caches.items():
            caches[name] = torch.cat([cache[:, :, : int(values["length"])], values[name], values[name]], dim=2)
        return {name: values[name] for name in ("q", "out")} | caches
    if not call.packed:
        return values
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        if name.endswith("qkv"):
            parts = value.unflatten(2, (3, call.H, call.D)).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
            found |= {name.replace("qkv", x): part for x, part in zip("qkv", parts, strict=True)}
        else:
            found[name] = value.unflatten(2, (call.H, call.D)).transpose(1, 2)
    return found


def heads_of(call: Attention, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The chosen heads of the values, by name: (number of key heads chosen, heads of each, T, D)."""
    batches, heads = zip(*chosen(call), strict=True)
    return {
        name: value.unflatten(1, (call.Hkv, -1))[list(batches), list(heads)]
        for name, value in separate(call, values).items()
    }


def pieces(call: Attention) -> Iterator[tuple[int, int, int, int, int]]:
    """(which of the chosen, which head of it, first query, the query behind the last, number of keys that they see)."""
    n_queries = max(1, MOST_SCORES // call.Tk)
    for index in range(len(chosen(call))):
        for member in range(call.H // call.Hkv):
            for first in range(0, call.Tq, n_queries):
                stop = min(call.Tq, first + n_queries)
                n_keys = min(call.Tk, stop + call.Tk - call.Tq) if call.is_causal else call.Tk
                if n_keys > 0:  # else the results and the gradients are zero
                    yield index, member, first, stop, n_keys


def results_of_heads(
    function: Callable[..., Tensor],
    call: Attention,
    arguments: dict[str, Tensor],
    options: dict[str, Any],
    upstream: Tensor,
    convert: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """`heads_of` the output of function(q, k, v, **options) and of the gradients that are asked for, in float64.

    `upstream` is the gradient of the call's output. The function gets each of its inputs through `convert`.
    """
    inputs = heads_of(call, arguments | {"out": upstream})
    call = call._replace(Tk=inputs["k"].shape[2])  # of a cache, as many as it holds
    asked = [name for name in "qkv" if call.packed or name in call.asked_for()]
    wanted = {"out": inputs["out"]} | {f"d {name}": inputs[name] for name in asked}
    results = {name: torch.zeros_like(like, dtype=torch.float64) for name, like in wanted.items()}
    options = {name: value for name, value in options.items() if name in ("is_causal", "dropout_p", "seed")}
    for index, member, first, stop, n_keys in pieces(call):
        queries, keys = (index, member, slice(first, stop)), (index, 0, slice(n_keys))
        place = {"q": queries, "k": keys, "v": keys, "out": queries}
        piece = {name: convert(inputs[name][at])[None, None] for name, at in place.items()}
        grad = piece.pop("out")
        if call.dropout:
            batch, key_head = chosen(call)[index]
            head = batch * call.H + key_head * (call.H // call.Hkv) + member
            options["first_row"] = head * call.Tq + first

        def upstream_of(out: Tensor, grad: Tensor = grad) -> Tensor:
            return grad.to(out.dtype)

        found = outputs_and_gradients(function, piece, options, asked, upstream_of)
        for name, value in found.items():
            results[name][place[name.removeprefix("d ")]] += value[0, 0]
    return results
