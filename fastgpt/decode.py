"""Which models take one op for a whole token in generation, and with which tensors: see `ops/decode.py`.

The op computes what the modules of a GPT would. It is therefore taken only where each module is as the GPT was built:
of its own class, without hooks, parametrizations or a forward of its own. Users may change that between two tokens, so
it is asked at each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .modules import LINEAR, why_called, why_embedding_called, why_norm_called
from .ops.arguments import autocast_dtype
from .ops.decode import MOST_SEQUENCES, decode_, reason_against_decode
from .ops.library import Unchanged, has_address, in_forward_mode, inside_transform

# For rows of unequal lengths, of which the modules mask the longer part, so many calls of the op were not slower.
MOST_CALLS = 2

Forwards = tuple[Callable[..., Any], ...]  # `forward` of a block, its attention and its MLP, and `hidden` of a GPT


def decode(model: Any, idx: Tensor, cache: Any, forwards: Forwards) -> Tensor | None:
    """The logits (B, V) after the new tokens idx (B, 1), which join `cache`; None where the modules compute them."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or idx.shape[1] != 1 or cache.tensor is None:
        return None
    if cache.decoder is None or cache.decoder.model is not model:
        cache.decoder = Decoder(model, cache.tensor, forwards)
    return cache.decoder(idx, cache)


class Decoder:
    """A GPT's tensors, as `ops.decode` takes them, and whether its modules are still those that were found at first."""

    def __init__(self, model: Any, cache: Tensor, forwards: Forwards) -> None:
        self.model = model
        self.reason = _reason_against(model, cache, forwards)
        if self.reason is not None:
            return
        modules = [*_layers(model), *model.blocks, *(b.attn for b in model.blocks), *(b.mlp for b in model.blocks)]
        self._unchanged = Unchanged([model, model.blocks, *modules])
        none = cache.new_empty(0)
        self._weights = [model.token_embedding.weight, model.position_embedding.weight]
        for layer in _layers(model)[2:]:
            self._weights += [layer.weight, none if layer.bias is None else layer.bias]
        self._activation, self._eps = model.blocks[0].mlp.activation, model.ln_f.eps
        self._settings = list(_settings(model))
        self._kept = [attributes[name] for attributes, name in self._settings]

    def __call__(self, idx: Tensor, cache: Any) -> Tensor | None:
        if (
            self.reason is not None
            or (cache.positions is not None and cache.rows is None)
            or cache.length >= cache.tensor.shape[4]
            or idx.shape[0] != (cache.tensor.shape[2] if cache.rows is None else len(cache.rows))
            or idx.shape[0] > MOST_SEQUENCES[cache.tensor.dtype] * (1 if cache.rows is None else MOST_CALLS)
            or type(idx) is not Tensor
            or idx.dtype not in (torch.int64, torch.int32)
            or autocast_dtype(cache.tensor) is not None
            or inside_transform() is not None
            or in_forward_mode()
            or reason_against_decode() is not None
            or not self._unchanged()
            or [attributes[name] for attributes, name in self._settings] != self._kept
        ):
            return None
        try:
            logits = self._decode(idx.long(), cache)
        except RuntimeError as refused:  # before anything was computed: the .data of a parameter no longer fits the op
            self.reason = str(refused)
            return None  # the modules may take it, or say what is wrong in it
        cache.advance(1)
        return logits

    def _decode(self, idx: Tensor, cache: Any) -> Tensor:
        most = MOST_SEQUENCES[cache.tensor.dtype]
        if cache.rows is None or len(idx) <= most:
            return decode_(idx, self._weights, cache.tensor, cache.length, self._activation, self._eps, cache.rows)
        rest = self._weights, cache.tensor, cache.length, self._activation, self._eps
        calls = zip(idx.split(most), cache.rows.split(most), strict=True)
        return torch.cat([decode_(new, *rest, rows) for new, rows in calls])


def _layers(model: Any) -> list[Any]:
    """The modules that have parameters, in the order in which a token passes through them."""
    blocks = [(b.ln_1, b.attn.qkv, b.attn.proj, b.ln_2, b.mlp.up, b.mlp.down) for b in model.blocks]
    return [model.token_embedding, model.position_embedding, *sum(blocks, ()), model.ln_f, model.lm_head]


def _settings(model: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """The attributes, other than modules and tensors, that decide what is computed: where each is, and its name."""
    for block in model.blocks:
        yield from ((block.__dict__, name) for name in ("norm", "residual", "feed_forward"))
        yield block.mlp.__dict__, "activation"
        yield from ((block.attn.__dict__, name) for name in ("n_head", "layer", "is_causal"))
    for layer in _layers(model):
        if isinstance(layer, (nn.LayerNorm, nn.Embedding)):
            yield layer.__dict__, "eps" if isinstance(layer, nn.LayerNorm) else "max_norm"


def _reason_against(model: Any, cache: Tensor, forwards: Forwards) -> str | None:
    """Why the modules have to compute a token one after the other; None where the op computes what they do."""
    block_forward, attention_forward, mlp_forward, hidden = forwards
    cfg = model.cfg
    if type(model).hidden is not hidden or "hidden" in model.__dict__:
        return "it computes what its head reads in another way"
    if cfg.norm != "pre" or not cfg.residual or not cfg.feed_forward:
        return "its blocks are not those of GPT-2"
    L, H = cache.shape[1], cache.shape[3]
    if type(cache) is not Tensor or not cache.is_cpu or cache.dtype not in MOST_SEQUENCES:
        return f"the op does not serve {cache.dtype} on {cache.device}"
    if len(model.blocks) != L:
        return "it has more or fewer blocks than its configuration"
    for i, block in enumerate(model.blocks):
        reason = why_called(block, block_forward) or why_called(block.attn, attention_forward)
        reason = reason or why_called(block.mlp, mlp_forward)
        if reason is not None:
            return reason
        attn = block.attn
        settings = block.norm, block.residual, block.feed_forward, block.mlp.activation, attn.n_head, attn.layer
        if settings != ("pre", True, True, cfg.activation, H, i) or not attn.is_causal:
            return "a block has other settings than the model"
    eps = set()
    for layer in _layers(model):
        if isinstance(layer, nn.Embedding):
            reason = why_embedding_called("an embedding", layer)
        elif isinstance(layer, nn.LayerNorm):
            reason = why_norm_called(layer)
            eps.add(layer.eps)
        else:
            reason = why_called(layer, LINEAR, "weight", "bias")
        if reason is not None:
            return reason
        for tensor in layer.parameters(recurse=False):
            if (
                not has_address(tensor)
                or tensor.dtype != cache.dtype
                or not tensor.is_cpu
                or not tensor.is_contiguous()
            ):
                return "its parameters are not contiguous tensors of one dtype on the CPU"
    return None if len(eps) == 1 else "its norms have several eps"
