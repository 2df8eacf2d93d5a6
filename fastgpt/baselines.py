"""The models before the GPT, and beside it: bigrams, and recurrent networks of torch's own layers.

They take a GPTConfig and have the interface of `GPT`, so the trainer, a checkpoint and the sampler serve all of them;
`MODELS` is the table of their names. What a model has no use for in its configuration, it leaves alone: a bigram has
no layers.

    model = Bigram(GPTConfig(vocab_size=65))                    # 65 x 65 numbers
    model = matched("lstm", GPTConfig.preset("shakespeare-char-cpu"))     # as many parameters as the GPT, within 2 %
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .config import MAX_HEAD_SIZE, ConfigError, GPTConfig
from .language_model import LanguageModel
from .model import GPT
from .modules import embed
from .ops.dropout import dropout, dropout_between_layers, within_rows


class Bigram(LanguageModel):
    """One table: row i holds the logits of what follows token i. Uses vocab_size; block_size is the trainer's block."""

    kind = "bigram"

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__(cfg)
        self.table = nn.Embedding(cfg.vocab_size, cfg.vocab_size)
        nn.init.normal_(self.table.weight, std=0.02)
        self.lm_head = nn.Identity()  # a row of the table is the logits already

    @property
    def context_size(self) -> int:
        return 1

    def hidden(self, idx: Tensor, cache: None = None) -> Tensor:
        self._check_idx(idx)
        return embed(idx, self.table)  # (B, T, V)

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        return self(idx, targets)[1]  # there is no head to fuse it with


class PositionalBigram(LanguageModel):
    """Token plus position embedding through a head: it knows where it is, and of the context the last token only.

    Uses vocab_size, block_size and n_embd. The head is never tied to the token embedding: e_i . e_j would give "j
    follows i" and "i follows j" the same score.
    """

    kind = "positional-bigram"

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__(cfg)
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.position_embedding = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        for p in self.parameters():
            nn.init.normal_(p, std=0.02)

    def hidden(self, idx: Tensor, cache: None = None) -> Tensor:
        self._check_idx(idx)
        self._check_fits(idx.shape[1])
        return embed(idx, self.token_embedding, self.position_embedding)  # (B, T, C)


@dataclass
class RecurrentState:
    """All that a recurrent model knows of the `length` tokens so far: h of every layer, for an LSTM h and c."""

    value: Tensor | tuple[Tensor, Tensor] | None = None
    length: int = 0


class Recurrent(LanguageModel):
    """Token embedding -> n_layer recurrent layers of width n_embd -> head.

    Uses vocab_size, n_layer, n_embd, dropout (on the embedding, between layers and before the head), bias and
    tie_weights. There is no position embedding and no limit to the context: the order of the tokens is the order in
    which they are read, one after the other.
    """

    layers: ClassVar[Callable[..., nn.RNNBase]]
    layer: ClassVar[Callable[..., Any]]  # one of them, as a function

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__(cfg)
        if not cfg.is_causal:
            raise ConfigError(f"is_causal: a {self.kind} reads from left to right; expected true, got False")
        C = cfg.n_embd
        self.token_embedding = nn.Embedding(cfg.vocab_size, C)
        between = cfg.dropout if cfg.n_layer > 1 else 0.0
        self.rnn = self.layers(C, C, cfg.n_layer, bias=cfg.bias, batch_first=True, dropout=between)
        self.lm_head = nn.Linear(C, cfg.vocab_size, bias=False)
        if cfg.tie_weights:
            self.lm_head.weight = self.token_embedding.weight
        for p in (self.token_embedding.weight, self.lm_head.weight):  # the recurrent layers keep torch's own
            nn.init.normal_(p, std=1.0 / math.sqrt(C))

    @property
    def context_size(self) -> None:
        return None

    def _empty_cache(self, batch_size: int) -> RecurrentState:
        return RecurrentState()

    def hidden(self, idx: Tensor, cache: RecurrentState | None = None) -> Tensor:
        self._check_idx(idx)
        p = self.cfg.dropout if self.training else 0.0
        x = dropout(embed(idx, self.token_embedding), p)  # (B, T, C)
        if idx.numel() == 0:  # torch's layers refuse a sequence without steps
            return x
        if self.training and self.rnn.dropout > 0.0 and within_rows():
            return dropout(self._layer_by_layer(x), p)
        x, state = self.rnn(x, None if cache is None else cache.value)
        if cache is not None:
            cache.value, cache.length = state, cache.length + idx.shape[1]
        return dropout(x, p)

    def _layer_by_layer(self, x: Tensor) -> Tensor:
        """self.rnn(x), x (B, T, C), with the dropout of this process's rows: PyTorch's layers know of no other rows."""
        h = x.new_zeros(1, x.shape[0], x.shape[2])
        before = (h, h) if self.kind == "lstm" else h
        for number, weights in enumerate(self.rnn.all_weights):
            if number > 0:
                x = dropout_between_layers(x, self.rnn.dropout)
            x = type(self).layer(x, before, weights, self.rnn.bias, 1, 0.0, True, False, True)[0]
        return x


class RNN(Recurrent):
    """Elman's network (1990): h_t = tanh(W x_t + U h_{t-1})."""

    kind, layers, layer = "rnn", nn.RNN, torch.rnn_tanh


class GRU(Recurrent):
    """Gated recurrent units (Cho et al. 2014)."""

    kind, layers, layer = "gru", nn.GRU, torch.gru


class LSTM(Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber 1997)."""

    kind, layers, layer = "lstm", nn.LSTM, torch.lstm


MODELS: dict[str, type[LanguageModel]] = {cls.kind: cls for cls in (GPT, Bigram, PositionalBigram, RNN, GRU, LSTM)}


def model_class(kind: str) -> type[LanguageModel]:
    """The class called `kind` in MODELS; ConfigError for a name that is not there."""
    if kind not in MODELS:
        raise ConfigError(f"model: expected one of {', '.join(MODELS)}, got {kind!r}")
    return MODELS[kind]


def _count(cls: type[LanguageModel], cfg: GPTConfig) -> int:
    with torch.device("meta"):  # shapes only
        return cls(cfg).num_parameters()


def matched_config(kind: str, cfg: GPTConfig, n_layer: int | None = None) -> GPTConfig:
    """`cfg` with the width that gives the recurrent model `kind` as many parameters as GPT(cfg), as near as it goes.

    All parameters count, embeddings and positions included. The depth stays cfg.n_layer unless `n_layer` is given;
    the number of heads, which a recurrent model does not have, is whatever GPTConfig accepts for the width. At widths
    of 64 and more the two counts differ by less than 2 %; below, one unit of width is worth more than that.
    """
    cls = model_class(kind)
    if not issubclass(cls, Recurrent):
        raise ConfigError(f"kind: expected rnn, gru or lstm, got {kind!r}: only those have a width to match with")
    wanted = _count(GPT, cfg)
    depth = cfg.n_layer if n_layer is None else n_layer

    def with_width(width: int) -> GPTConfig:
        n_head = next(n for n in range(math.ceil(width / MAX_HEAD_SIZE), width + 1) if width % n == 0)
        return dataclasses.replace(cfg, n_embd=width, n_head=n_head, n_layer=depth)

    low, high = 1, 2  # the count grows with the width: bisection
    while _count(cls, with_width(high)) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _count(cls, with_width(middle)) < wanted else (low, middle)
    return min((with_width(w) for w in (low, high)), key=lambda c: abs(_count(cls, c) - wanted))


def matched(kind: str, cfg: GPTConfig, n_layer: int | None = None) -> LanguageModel:
    """A recurrent model ("rnn", "gru" or "lstm") with as many parameters as GPT(cfg): see `matched_config`."""
    return model_class(kind)(matched_config(kind, cfg, n_layer))


def build_model(model_config: GPTConfig, seed: int, kind: str = "gpt") -> LanguageModel:
    """A freshly initialised model, one of `baselines.MODELS`, whose weights follow from `seed`."""
    torch.manual_seed(seed)
    return model_class(kind)(model_config)
