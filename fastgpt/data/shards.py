"""Tokens in several files as one sequence, of any size: memory maps, of which only what is asked for is read."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..tokenizer import Tokenizer

_TOKENS_AT_ONCE = 1 << 20


class ShardedTokens:
    """Arrays of tokens (n,) of one dtype, one after the other, read as one array of one dimension.

    A slice is such a sequence again, of views. An array of integers, of any shape, gathers an array of that shape.
    `numpy.asarray` copies all tokens into memory.
    """

    ndim = 1

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self.shards = [shard for shard in shards if len(shard)] or list(shards[:1])
        if not self.shards or len({shard.dtype for shard in self.shards}) > 1:
            raise ValueError("shards: expected arrays of one dtype, at least one")
        self.dtype = self.shards[0].dtype
        self._ends = np.cumsum([len(shard) for shard in self.shards])
        self._end_list = self._ends.tolist()
        self._plain = [np.asarray(shard) for shard in self.shards]  # a slice of a numpy.memmap takes ten times as long

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, slice):
            return self._slice(*which.indices(len(self)))
        places = np.asarray(which)
        if places.dtype.kind not in "iu":
            raise IndexError(f"tokens: expected integers or a slice as the index, got {places.dtype}")
        lowest, highest = (int(places.min()), int(places.max())) if places.size else (0, 0)
        if lowest < 0:
            places = np.where(places < 0, places + len(self), places)
        if lowest < -len(self) or highest > max(len(self) - 1, 0):
            raise IndexError(f"tokens: an index is outside of the {len(self)} tokens")
        if len(self.shards) == 1:
            return self.shards[0][places]
        return self._gather(places)

    def _slice(self, start: int, stop: int, step: int) -> ShardedTokens:
        if step != 1:
            raise IndexError(f"tokens: expected a slice of step 1, got {step}; numpy.asarray(tokens) has any")
        starts = self._ends - [len(shard) for shard in self.shards]
        parts = zip(self.shards, starts.tolist(), strict=True)
        return ShardedTokens([shard[max(start - first, 0) : max(stop - first, 0)] for shard, first in parts])

    def _gather(self, places: np.ndarray) -> np.ndarray:
        of = np.searchsorted(self._ends, places, side="right")
        found = np.empty(places.shape, self.dtype)
        for number in np.unique(of).tolist():
            here, shard = of == number, self.shards[number]
            found[here] = shard[places[here] - (int(self._ends[number]) - len(shard))]
        return found[()]

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The `length` tokens from each of the places `starts` (B,) on: (B, length).

        Neighbours are copied together, which takes less time than to look each token's place up.
        """
        if starts.size and not 0 <= starts.min() <= starts.max() <= len(self) - length:
            raise IndexError(f"tokens: {length} tokens from a place on are outside of the {len(self)} tokens")
        found = np.empty((len(starts), length), self.dtype)
        for row, start in zip(found, starts.tolist(), strict=True):
            number, done = bisect.bisect_right(self._end_list, start), 0
            while done < length:
                shard, left = self._plain[number], self._end_list[number] - start - done
                part = shard[len(shard) - left : len(shard) - left + length - done]
                row[done : done + len(part)] = part
                number, done = number + 1, done + len(part)
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("copy: tokens in several files cannot be one array without a copy")
        return np.concatenate(self.shards).astype(dtype or self.dtype, copy=False)


Tokens = np.ndarray | ShardedTokens


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """That in which tokens are kept in files: little-endian, uint16 where the vocabulary allows it, else uint32."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def windows(tokens: Tokens, starts: np.ndarray, length: int) -> np.ndarray:
    """The `length` tokens from each of the places `starts` (B,) on: (B, length)."""
    if isinstance(tokens, ShardedTokens):
        return tokens.windows(starts, length)
    return tokens[starts[:, None] + np.arange(length)]


def pieces(tokens: Tokens) -> Iterator[np.ndarray]:
    """The tokens in their order, about a million at a time: they may not fit into the memory."""
    for first in range(0, len(tokens), _TOKENS_AT_ONCE):
        yield np.asarray(tokens[first : first + _TOKENS_AT_ONCE])
