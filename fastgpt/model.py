"""The GPT: embedding -> blocks -> norm -> head, after GPT-2 (Radford et al. 2019) and nanoGPT, on `fastgpt.ops`.

Each branch (attention, feed-forward) reads the residual stream and adds its output to it. In a pre-norm model "apply
dropout to the branch's output, add it, normalise" is one op, `add_layer_norm`. So a block returns two tensors, the
stream `x` and the output `branch` of its last branch, which the next norm adds.

B sequences of T tokens, C channels in H heads of D, V tokens in the vocabulary, L blocks.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import ops, pretrained
from .cache import KVCache, RowCache
from .checkpoint import load_parameters, model_tensors
from .config import GPTConfig
from .decode import decode
from .language_model import LanguageModel
from .modules import add_norm, check_unchanged, embed, linear, norm, read_dtype
from .ops.attention import self_attention, split_heads
from .ops.dropout import dropout


class CausalSelfAttention(nn.Module):
    def __init__(self, cfg: GPTConfig, layer: int) -> None:
        super().__init__()
        self.n_head, self.is_causal, self.dropout, self.layer = cfg.n_head, cfg.is_causal, cfg.dropout, layer
        self.qkv = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=cfg.bias)
        self.proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)

    def forward(self, x: Tensor, cache: KVCache | RowCache | None = None) -> Tensor:
        qkv = linear(self.qkv, x)  # (B, T, 3C)
        p = self.dropout if self.training else 0.0
        if cache is None:
            return linear(self.proj, self_attention(qkv, self.n_head, is_causal=self.is_causal, dropout_p=p))
        q, k, v = split_heads(qkv, self.n_head)  # (B, H, T, D)
        if isinstance(cache, RowCache) or cache.positions is not None:
            y = cache.attend(self.layer, q, k, v)
        else:
            k, v = cache.append(self.layer, k, v)
            y = ops.attention(q, k, v, is_causal=self.is_causal, dropout_p=p)
        return linear(self.proj, y.transpose(1, 2).flatten(2))  # heads side by side again


class MLP(nn.Module):
    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.activation = cfg.activation
        self.up = nn.Linear(cfg.n_embd, 4 * cfg.n_embd, bias=cfg.bias)
        self.down = nn.Linear(4 * cfg.n_embd, cfg.n_embd, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = ops.activation(linear(self.up, x), kind=self.activation)  # (B, T, 4C)
        return linear(self.down, x)  # (B, T, C)


class Block(nn.Module):
    """One attention branch and one feed-forward branch, or attention alone."""

    def __init__(self, cfg: GPTConfig, layer: int) -> None:
        super().__init__()
        self.norm, self.residual, self.dropout = cfg.norm, cfg.residual, cfg.dropout
        self.feed_forward = cfg.feed_forward
        if cfg.norm != "none":
            self.ln_1 = nn.LayerNorm(cfg.n_embd, bias=cfg.bias)
            if cfg.feed_forward:
                self.ln_2 = nn.LayerNorm(cfg.n_embd, bias=cfg.bias)
        self.attn = CausalSelfAttention(cfg, layer)
        if cfg.feed_forward:
            self.mlp = MLP(cfg)

    def forward(
        self, x: Tensor, branch: Tensor | None, cache: KVCache | RowCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(x, branch) -> (x, branch): the stream (B, T, C), and the last branch's output, None where it was added."""
        p = self.dropout if self.training else 0.0
        if self.norm == "pre" and self.residual:
            dtype = read_dtype(x, self.attn, CausalSelfAttention.forward, "qkv")
            normed, x = (norm(self.ln_1, x, dtype), x) if branch is None else add_norm(self.ln_1, x, branch, p, dtype)
            branch = self.attn(normed, cache)
            if not self.feed_forward:
                return x, branch
            normed, x = add_norm(self.ln_2, x, branch, p, read_dtype(x, self.mlp, MLP.forward, "up"))
            return x, self.mlp(normed)
        x = self._finish("ln_1", x, self.attn(norm(self.ln_1, x) if self.norm == "pre" else x, cache), p)
        if self.feed_forward:
            x = self._finish("ln_2", x, self.mlp(norm(self.ln_2, x) if self.norm == "pre" else x), p)
        return x, None

    def _finish(self, ln: str, x: Tensor, branch: Tensor, dropout_p: float) -> Tensor:
        """Add a branch where the next norm does not do so: dropout, residual connection, post-norm."""
        if self.norm == "post" and self.residual:
            return add_norm(getattr(self, ln), x, branch, dropout_p)[0]
        branch = dropout(branch, dropout_p)
        x = x + branch if self.residual else branch
        return norm(getattr(self, ln), x) if self.norm == "post" else x


class GPT(LanguageModel):
    """A decoder-only transformer (an encoder with `is_causal=False`). `forward` and `loss` are LanguageModel's.

    >>> model = GPT(GPTConfig.preset("shakespeare-char-cpu"))
    >>> logits, loss = model(idx, targets)      # idx, targets (B, T) int64; logits (B, T, V)
    """

    kind = "gpt"
    activation_checkpointing = False  # set it to train in less memory and more time, see `_run`; no file keeps it

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__(cfg)
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.position_embedding = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(cfg.n_embd, bias=cfg.bias) if cfg.norm == "pre" else None
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        if cfg.tie_weights:
            self.lm_head.weight = self.token_embedding.weight
        self._initialise()

    def _initialise(self) -> None:
        """As GPT-2: normal(0, 0.02), zero biases, and projections into the residual stream smaller by sqrt(2 L)."""
        for name, p in self.named_parameters():
            if name.endswith(("attn.proj.weight", "mlp.down.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.cfg.n_layer))
            elif p.ndim == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def num_parameters(self, non_embedding: bool = False) -> int:
        """Number of parameters, shared ones once; `non_embedding` leaves the position table out, as nanoGPT counts."""
        n = super().num_parameters()
        return n - sum(p.numel() for p in self.position_embedding.parameters()) if non_embedding else n

    def hidden(self, idx: Tensor, cache: KVCache | RowCache | None = None) -> Tensor:
        """idx (B, T) -> (B, T, C): what the head reads. With a cache, idx are the tokens after those in it."""
        self._check_idx(idx)
        start = 0 if cache is None else cache.length
        self._check_fits(start + idx.shape[1])
        p = self.cfg.dropout if self.training else 0.0
        if cache is not None and cache.positions is not None:  # of one token
            x = embed(idx, self.token_embedding) + self.position_embedding(cache.positions)
        else:
            x = embed(idx, self.token_embedding, self.position_embedding, start)
        x, branch = dropout(x, p), None
        for block in self.blocks:
            x, branch = self._run(block, x, branch, cache)
        if cache is not None:
            cache.advance(idx.shape[1])
        if self.ln_f is None:
            return x
        dtype = read_dtype(x, self, LanguageModel.forward, "lm_head")
        return norm(self.ln_f, x, dtype) if branch is None else add_norm(self.ln_f, x, branch, p, dtype)[0]

    def _run(self, block: nn.Module, x: Tensor, branch: Tensor | None, cache: KVCache | RowCache | None) -> Any:
        """block(x, branch, cache). With activation checkpointing (Chen et al. 2016, arXiv:1604.06174) the block's input
        alone is kept for backward, which computes the block again, with the same dropout.
        """
        if self.activation_checkpointing and self.training and torch.is_grad_enabled() and cache is None:
            return checkpoint(block, x, branch, use_reentrant=False)
        return block(x, branch, cache)

    def next_logits(self, idx: Tensor, cache: KVCache | RowCache | None = None) -> Tensor:
        """That of LanguageModel. On a CPU one new token of a few sequences takes one op, see decode.py."""
        logits = None if cache is None else decode(self, idx, cache, _BUILT)
        if logits is not None:
            return logits
        if isinstance(cache, RowCache) and not self._reads_rows():
            return torch.cat(
                [self._alone(new, cache, row) for new, row in zip(idx.split(1), cache.chosen, strict=True)]
            )
        return super().next_logits(idx, cache)

    def _reads_rows(self) -> bool:
        """Whether `hidden` and the blocks are those above, which read a RowCache; others know of a KVCache alone."""
        block_forward, attention_forward, _, hidden = _BUILT
        if type(self).hidden is not hidden or "hidden" in self.__dict__:
            return False
        return all(_has(b, block_forward) and _has(cast(Block, b).attn, attention_forward) for b in self.blocks)

    def _alone(self, new: Tensor, cache: RowCache, row: int) -> Tensor:
        alone = cache.only(row)
        logits = super().next_logits(new, alone)
        cache.keep(row, alone)
        return logits

    def _empty_cache(self, batch_size: int) -> KVCache:
        return KVCache(self.cfg, batch_size)

    def _empty_rows(self, n_rows: int) -> RowCache:
        return RowCache(self.cfg, n_rows)

    def save_pretrained(self, directory: str | Path, format: str = "fastgpt") -> None:
        """Write config.json, model.safetensors and, where the model has a tokenizer, the tokenizer's files.

        format="huggingface" writes what GPT2LMHeadModel reads; AutoTokenizer reads the tokenizer of either format.

        Raises ValueError for a model whose modules were wrapped, parametrised or replaced, which the files cannot hold,
        for settings that GPT-2 does not have, and CheckpointError where the folder cannot be written.
        """
        check_unchanged(self, _without_memory(self.cfg))
        pretrained.write(self.cfg, dict(self.named_parameters()), directory, format, self.tokenizer, self.layout)

    @classmethod
    def from_pretrained(cls, directory: str | Path, **changes: Any) -> GPT:
        """Read what `save_pretrained` wrote, in either format, a Hugging Face GPT-2 folder, or a run's folder.

        It reads the model alone; `fastgpt.load` reads its tokenizer, too, and models of every kind. `changes` override
        settings: dropout=0.1. The model is in evaluation mode, as Hugging Face's from_pretrained leaves it: no dropout
        before model.train(). Raises CheckpointError naming the file and the field or tensor.
        """
        found = pretrained.read(directory, changes, lambda cfg: model_tensors(_without_memory(cfg)))
        model = GPT(found.cfg)
        model.layout = found.layout
        load_parameters(model, found.tensors, found.source)
        return model.eval()


def _has(module: nn.Module, forward: Any) -> bool:
    return type(module).forward is forward and "forward" not in module.__dict__


_BUILT = Block.forward, CausalSelfAttention.forward, MLP.forward, GPT.hidden  # kept: some tools replace them


def _without_memory(cfg: GPTConfig) -> GPT:
    """A GPT on the meta device, which has names, shapes and modules, but no numbers."""
    with torch.device("meta"):
        return GPT(cfg)
