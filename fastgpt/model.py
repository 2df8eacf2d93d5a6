"""The GPT: embedding -> blocks -> norm -> head, after GPT-2 (Radford et al. 2019) and nanoGPT, on `fastgpt.ops`.

The residual stream is written once per branch. In a pre-norm model every "add the branch's output, then normalise"
is one op, `add_layer_norm`, which also applies the branch's dropout; so a block hands on two tensors, the stream `x`
before its last branch was added and that `branch`, and the next norm adds them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .config import GPTConfig
from .modules import add_norm, embed, head_loss, linear, norm, say_once, why_called
from .ops.dropout import dropout


class KVCache:
    """Keys and values of the tokens seen so far: one (2, L, B, H, T, D) tensor, filled up to `length`.

    It is made at the first `append`, in the dtype and on the device of the keys that come: autocast and wrapped modules
    have their say in both. It is for inference: use it under `torch.no_grad()`.
    """

    def __init__(self, cfg: GPTConfig, batch_size: int) -> None:
        self.shape = (2, cfg.n_layer, batch_size, cfg.n_head, cfg.block_size, cfg.n_embd // cfg.n_head)
        self.tensor: Tensor | None = None
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, H, T, D) of the newest tokens; return those of all tokens. `length` moves on by `advance`."""
        if k.requires_grad or v.requires_grad:
            raise RuntimeError("cache: keeps no gradients; use it under torch.no_grad(), or train without a cache")
        if self.tensor is None:
            self.tensor = k.new_empty(self.shape)
        if k.shape[0] != self.shape[2]:
            raise ValueError(f"cache: made for {self.shape[2]} sequences, got {k.shape[0]}")
        end = self.length + k.shape[2]
        keys, values = self.tensor[:, layer, :, :, :end]
        keys[:, :, self.length :] = k
        values[:, :, self.length :] = v
        return keys, values

    def advance(self, n_tokens: int) -> None:
        self.length += n_tokens


class CausalSelfAttention(nn.Module):
    def __init__(self, cfg: GPTConfig, layer: int) -> None:
        super().__init__()
        self.n_head, self.is_causal, self.dropout, self.layer = cfg.n_head, cfg.is_causal, cfg.dropout, layer
        self.qkv = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=cfg.bias)
        self.proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        D = C // self.n_head
        qkv = linear(self.qkv, x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, D).transpose(1, 2) for t in qkv)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = ops.attention(q, k, v, is_causal=self.is_causal, dropout_p=self.dropout if self.training else 0.0)
        return linear(self.proj, y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        self.activation = cfg.activation
        self.up = nn.Linear(cfg.n_embd, 4 * cfg.n_embd, bias=cfg.bias)
        self.down = nn.Linear(4 * cfg.n_embd, cfg.n_embd, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = linear(self.up, x)
        if self.activation == "gelu":
            x = F.gelu(x)
        elif self.activation == "gelu_tanh":
            x = F.gelu(x, approximate="tanh")
        elif self.activation == "relu":
            x = F.relu(x)
        else:  # "relu2" (So et al. 2021, Primer)
            x = F.relu(x).square()
        return linear(self.down, x)


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

    def forward(self, x: Tensor, branch: Tensor | None, cache: KVCache | None = None) -> tuple[Tensor, Tensor | None]:
        """Take and give (x, branch): the stream, and the last branch's output where it is still to be added."""
        p = self.dropout if self.training else 0.0
        if self.norm == "pre" and self.residual:
            normed, x = (norm(self.ln_1, x), x) if branch is None else add_norm(self.ln_1, x, branch, p)
            branch = self.attn(normed, cache)
            if not self.feed_forward:
                return x, branch
            normed, x = add_norm(self.ln_2, x, branch, p)
            return x, self.mlp(normed)
        x = self._finish("ln_1", x, self.attn(norm(self.ln_1, x) if self.norm == "pre" else x, cache), p)
        if self.feed_forward:
            x = self._finish("ln_2", x, self.mlp(norm(self.ln_2, x) if self.norm == "pre" else x), p)
        return x, None

    def _finish(self, ln: str, x: Tensor, branch: Tensor, dropout_p: float) -> Tensor:
        """The end of a branch, where it is not fused with the next norm: dropout, residual, post-norm."""
        if self.norm == "post" and self.residual:
            return add_norm(getattr(self, ln), x, branch, dropout_p)[0]
        branch = dropout(branch, dropout_p)
        x = x + branch if self.residual else branch
        return norm(getattr(self, ln), x) if self.norm == "post" else x


class LanguageModel(nn.Module):
    """What the trainer, the sampler and a checkpoint ask of a model; a subclass gives `hidden` and `lm_head`.

    `context_size`: how many tokens back the model sees, None for one without a limit.
    """

    kind: ClassVar[str]
    cfg: GPTConfig
    lm_head: Any  # a linear; in a bigram nothing

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        if not isinstance(cfg, GPTConfig):
            raise TypeError(f"cfg: expected a GPTConfig, got {type(cfg).__name__}")
        self.cfg = cfg

    @property
    def context_size(self) -> int | None:
        return self.cfg.block_size

    def hidden(self, idx: Tensor, cache: Any = None) -> Tensor:
        """(B, T) token ids -> (B, T, C): what the head reads. With a cache, idx are the tokens after those in it."""
        raise NotImplementedError

    def new_cache(self, batch_size: int) -> Any:
        """What generation carries from token to token: an object with a `length`, or None where there is nothing.

        None, too, for a model that has to be called whole (see `loss`): a call takes no cache.
        """
        cache, reason = self._empty_cache(batch_size), why_called(self, LanguageModel.forward)
        if cache is None or reason is None:
            return cache
        say_once("the model is called for each new token on all the tokens before it, without a cache", reason)
        return None

    def _empty_cache(self, batch_size: int) -> Any:
        return None

    def next_logits(self, idx: Tensor, cache: Any = None) -> Tensor:
        """(B, T) -> (B, V): what follows idx. With a cache, idx are the tokens after those in it."""
        if cache is None and why_called(self, LanguageModel.forward):
            return self(idx)[0][:, -1]
        return linear(self.lm_head, self.hidden(idx, cache)[:, -1])

    @contextlib.contextmanager
    def _kept_tied(self) -> Iterator[None]:
        """A head that shares its weight with the token embedding still does so after parameters have been replaced.

        One of the two may have been left as it was, for a file holds a shared tensor once: then the other one is new.
        """
        head, embedding = self.lm_head, getattr(self, "token_embedding", None)
        weight = getattr(head, "weight", None)
        tied = weight is not None and weight is getattr(embedding, "weight", None)
        yield
        if tied:
            new, old = (embedding, head) if head.weight is weight else (head, embedding)
            cast(Any, old).weight = cast(Any, new).weight

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """As of torch.nn.Module; with assign=True, too, tied weights stay one parameter."""
        with self._kept_tied():
            return super().load_state_dict(*args, **options)

    def to_empty(self, **options: Any) -> Any:
        """As of torch.nn.Module; tied weights stay one parameter."""
        with self._kept_tied():
            return super().to_empty(**options)

    def num_parameters(self) -> int:
        """Number of parameters, shared ones once."""
        return sum(p.numel() for p in self.parameters())

    def _check_idx(self, idx: Tensor) -> None:
        if not isinstance(idx, Tensor):
            raise TypeError(f"idx: expected a tensor, got {type(idx).__name__}")
        if idx.ndim != 2:
            raise ValueError(f"idx: expected shape (B, T), got {tuple(idx.shape)}")

    def _check_fits(self, n_tokens: int) -> None:
        if n_tokens > self.cfg.block_size:
            raise ValueError(f"idx: {n_tokens} tokens do not fit block_size={self.cfg.block_size}; crop the context")

    def _check_targets(self, idx: Tensor, targets: Tensor) -> None:
        if not isinstance(targets, Tensor) or targets.shape != idx.shape:
            got = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise ValueError(f"targets: expected the shape of idx {tuple(idx.shape)}, got {got}")

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """idx (B, T) -> logits (B, T, V), and the mean cross-entropy in nats per token where targets (B, T) are given.

        Targets of -100 do not count. Raises ValueError/TypeError/IndexError naming the argument.
        """
        if targets is not None:
            self._check_targets(idx, targets)
        logits = linear(self.lm_head, self.hidden(idx))
        if targets is None:
            return logits, None
        return logits, ops.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """The loss of `forward`, without ever holding the (B * T, V) logits.

        A model with hooks, or with another forward, is called, and the loss is the second of its results.
        """
        reason = why_called(self, LanguageModel.forward)
        if reason is not None:
            say_once("the model is called for its loss, and the logits of all tokens are held at once", reason)
            return self(idx, targets)[1]
        self._check_targets(idx, targets)
        return head_loss(self.lm_head, self.hidden(idx), targets)

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue idx (B, T) by `max_new_tokens` tokens: (B, T + max_new_tokens). See `fastgpt.generate.stream`."""
        from .generate import stream

        return torch.cat([idx, *stream(self, idx, max_new_tokens, temperature, top_k, top_p, generator)], dim=1)


class GPT(LanguageModel):
    """A decoder-only transformer (an encoder with `is_causal=False`).

    >>> model = GPT(GPTConfig.preset("shakespeare-char-cpu"))
    >>> logits, loss = model(idx, targets)      # idx, targets (B, T) int64; logits (B, T, V)
    """

    kind = "gpt"

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
        """GPT-2's: normal(0, 0.02), biases zero, projections into the residual stream smaller by sqrt(2 L)."""
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

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) token ids -> (B, T, C): what the head reads."""
        self._check_idx(idx)
        start = 0 if cache is None else cache.length
        self._check_fits(start + idx.shape[1])
        p = self.cfg.dropout if self.training else 0.0
        x = embed(idx, self.token_embedding, self.position_embedding, start)
        x, branch = dropout(x, p), None
        for block in self.blocks:
            x, branch = block(x, branch, cache)
        if cache is not None:
            cache.advance(idx.shape[1])
        if self.ln_f is None:
            return x
        return norm(self.ln_f, x) if branch is None else add_norm(self.ln_f, x, branch, p)[0]

    def _empty_cache(self, batch_size: int) -> KVCache:
        return KVCache(self.cfg, batch_size)

    def save_pretrained(self, directory: str | Path, format: str = "fastgpt") -> None:
        """Write config.json and model.safetensors; format="huggingface" writes what GPT2LMHeadModel reads.

        ValueError for a model with modules that these files cannot tell of: wrapped, parametrised or replaced ones.
        """
        from .huggingface import save_pretrained

        save_pretrained(self, directory, format)

    @classmethod
    def from_pretrained(cls, directory: str | Path, **changes: Any) -> GPT:
        """Read what `save_pretrained` wrote, in either format, a Hugging Face GPT-2 folder, or a run's folder.

        The model is in evaluation mode; model.train() turns dropout on. `changes` override settings: dropout=0.1.
        """
        from .huggingface import from_pretrained

        return from_pretrained(directory, **changes)
