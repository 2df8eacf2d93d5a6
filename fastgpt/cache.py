"""The keys and values of earlier tokens, so that a new token costs one step: of rows of one length, or each of its own.

A cache keeps no gradients: use it under `torch.no_grad()`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .config import GPTConfig
from .ops.attention_cached import attention_cached_, attention_of_rows_


def _shape(cfg: GPTConfig, rows: int) -> tuple[int, ...]:
    """Of all keys and values: (2, L, B, H, block_size, D)."""
    return 2, cfg.n_layer, rows, cfg.n_head, cfg.block_size, cfg.n_embd // cfg.n_head


def _check_no_gradient(k: Tensor, v: Tensor) -> None:
    if k.requires_grad or v.requires_grad:
        raise RuntimeError("cache: keeps no gradients; use it under torch.no_grad(), or train without a cache")


class KVCache:
    """Keys and values of the tokens seen so far: one (2, L, B, H, block_size, D) tensor, filled up to `length`.

    It is made at the first `append`, in the dtype and on the device of those keys, which autocast or a wrapped module
    may have changed.
    """

    rows: Tensor | None = None  # all of them, in their order

    def __init__(self, cfg: GPTConfig, batch_size: int) -> None:
        self.shape = _shape(cfg, batch_size)
        self.tensor: Tensor | None = None
        self.length = 0
        self.decoder: Any = None  # made at the first token that is computed by one op, see decode.py
        self.positions: Tensor | None = None  # in a CUDA graph: (1,), the length, on the device

    def __getstate__(self) -> dict[str, Any]:
        """What copy and pickle keep: not the decoder, which has the model's weights."""
        return {**self.__dict__, "decoder": None}

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, H, T, D) of the newest tokens; return those of all `length + T` tokens."""
        _check_no_gradient(k, v)
        if self.tensor is None:
            self.tensor = k.new_empty(self.shape)
        if k.shape[0] != self.shape[2]:
            raise ValueError(f"cache: made for {self.shape[2]} sequences, got {k.shape[0]}")
        end = self.length + k.shape[2]
        keys, values = self.tensor[:, layer, :, :, :end]  # (B, H, length + T, D) each
        keys[:, :, self.length :] = k
        values[:, :, self.length :] = v
        return keys, values

    def advance(self, n_tokens: int) -> None:
        """Count the newest tokens, once every layer has stored theirs."""
        if self.positions is None:
            self.length += n_tokens

    @contextlib.contextmanager
    def length_on_device(self, position: Tensor) -> Iterator[None]:
        """For a CUDA graph: read the length from `position`, 0-dim int64, on the device. Nothing is counted here."""
        self.positions = position.view(1)
        try:
            yield
        finally:
            self.positions = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v of the newest tokens and attend to all, where the length is on the device, in one kernel."""
        assert self.tensor is not None and self.positions is not None
        keys, values = self.tensor[:, layer]  # (B, H, block_size, D) each
        return attention_cached_(q, k, v, keys, values, self.positions[0])

    def entry(self, index: int) -> Tensor:
        """Keys and values of one token: (2, L, B, H, D)."""
        assert self.tensor is not None
        return self.tensor[..., index, :]


class RowCache:
    """As KVCache, with a length of its own for each row: sequences that came at different times.

    Every sequence begins at position 0 of its row, so there is no padding, and a position embedding is that of the
    token's place in its text. A sequence of several new tokens is computed alone, by `only(row)`. One new token of
    each of several rows is computed at once, after `choose(rows)`.
    """

    def __init__(self, cfg: GPTConfig, n_rows: int) -> None:
        self._cfg = cfg
        self.shape = _shape(cfg, n_rows)
        self.tensor: Tensor | None = None
        self.lengths = [0] * n_rows
        self.decoder: Any = None  # as in KVCache
        self.chosen: list[int] = []
        self.rows: Tensor | None = None  # (n, 2), int64, on the CPU: each chosen row and its length
        self._rows_on_device: Tensor  # (n,): the rows
        self.positions: Tensor | None = None  # (n, 1): the lengths, on the device

    @property
    def length(self) -> int:
        """The largest of the chosen rows."""
        return max((self.lengths[row] for row in self.chosen), default=0)

    def choose(self, rows: Sequence[int], device: torch.device) -> RowCache:
        """The next tokens (n, 1) are those of these rows, in this order."""
        self.chosen = list(rows)
        self.rows = torch.tensor([[row, self.lengths[row]] for row in rows])
        on_device = self.rows.to(device)
        self._rows_on_device, self.positions = on_device[:, 0], on_device[:, 1:]
        return self

    def only(self, row: int) -> KVCache:
        """The cache of one row. What is appended to it is in this cache too, once `lengths` says so."""
        cache = KVCache(self._cfg, 1)
        cache.length = self.lengths[row]
        if self.tensor is not None:
            cache.tensor = self.tensor[:, :, row : row + 1]
        return cache

    def keep(self, row: int, cache: KVCache) -> None:
        """Take over what was appended to `cache`, which is that of `only(row)`."""
        assert cache.tensor is not None
        if self.tensor is None:
            self._make(cache.tensor)
            assert self.tensor is not None
            self.tensor[:, :, row : row + 1, :, : cache.length] = cache.tensor[:, :, :, :, : cache.length]
        self.lengths[row] = cache.length

    def clear(self, row: int) -> None:
        """Forget a sequence. Zeros, because a NaN that is masked is a NaN still."""
        self.lengths[row] = 0
        if self.tensor is not None:
            self.tensor[:, :, row].zero_()

    def _make(self, like: Tensor) -> None:
        self.tensor = like.new_zeros(self.shape)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v (n, H, 1, D) of the newest tokens of the chosen rows; each attends to all of its own row."""
        _check_no_gradient(k, v)
        if self.tensor is None:
            self._make(k)
        assert self.tensor is not None and self.positions is not None
        keys, values = self.tensor[:, layer]  # (n_rows, H, block_size, D) each
        rows = None if self.chosen == list(range(self.shape[2])) else self._rows_on_device
        return attention_of_rows_(q, k, v, keys, values, rows, self.positions, self.length)

    def advance(self, n_tokens: int) -> None:
        for row in self.chosen:
            self.lengths[row] += n_tokens
