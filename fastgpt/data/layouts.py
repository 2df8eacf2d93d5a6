"""Layouts: how examples are cut out of tokens, and a batch out of examples.

There are four, each a class below. In `Blocks` of a text the model predicts every token from those before it. In
`Windows` over a text it predicts the last one alone. In `Names` each line of the data is a row of its own, between a
start and an end token. In `Completions` each row is a prompt, which is only context, and the completion to predict.

A batch is a pure function of (seed, step): Philox is keyed by the two, so a resumed run draws the batches that an
uninterrupted one would have drawn, and a checkpoint holds no state of a random generator. So is a batch of the order
"epochs", which takes every example once before any comes again (see `order.py`).

Blocks and windows are cut out of tokens that may be memory-mapped from files of any size. Names and completions keep an
array of where each example lies in memory, and their text is read whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import LAYOUTS, ORDERS, as_int_argument
from ..tokenizer import Tokenizer
from .order import epoch_size, of_epochs, philox
from .shards import Tokens, windows
from .sources import DataError, by_hash

ALL_ROWS = slice(None)  # of a batch

# One token is both start and end: at the start it is never a target, and at the end never context. It is the newline,
# which every tokenizer has and no line contains; so sampled names are printed one a line.
NAME_BOUNDARY = "\n"


def boundary_token(tokenizer: Tokenizer) -> int:
    """The id of the token that starts and ends a name."""
    (token,) = tokenizer.encode(NAME_BOUNDARY)
    return token


def names_of(text: str, shown: str) -> list[str]:
    """The lines of `text` without blanks around them, in the order of their hashes.

    Lists of names are sorted, by alphabet or by frequency: the last tenth, which is the validation split, would be
    unlike the rest.
    """
    names = [line.strip() for line in text.removesuffix("\n").split("\n")]
    for number, name in enumerate(names, 1):
        if not name:
            raise DataError(f"{shown}: line {number} is a name of length 0: remove the empty line")
    return by_hash(names)


def join_names(names: Iterable[str]) -> str:
    """The text that the names layout tokenizes: every name between two boundaries, neighbours sharing one."""
    return NAME_BOUNDARY + "".join(name + NAME_BOUNDARY for name in names)


def name_lengths(tokens: np.ndarray, boundary: int) -> np.ndarray:
    """Tokens of each name, its start token included."""
    return np.diff(np.nonzero(tokens == boundary)[0])


def check_names_fit(names: list[str], tokens: np.ndarray, boundary: int, block_size: int, shown: str) -> None:
    """Raise DataError that quotes the longest of `names` where it does not fit a block."""
    lengths = name_lengths(tokens, boundary)
    longest = int(lengths.argmax())
    _check_name(f"name {names[longest]!r} of {shown}", int(lengths[longest]), block_size)


def check_varied(text: str, shown: str) -> None:
    if len(set(text)) == 1:
        raise DataError(f"{shown} has one distinct character, {text[0]!r}: give a text with something to predict")


def check_block(name: str, tokens: Tokens, block_size: int) -> None:
    block_size = as_int_argument("block_size", block_size, least=1)
    if len(tokens) <= block_size:
        raise DataError(
            f"{name} has {len(tokens)} tokens, and a block of {block_size} needs {block_size + 1} "
            f"(each token's target is the next one): give a longer text or a smaller block_size"
        )


def _check_name(name: str, n_tokens: int, block_size: int) -> None:
    if n_tokens > block_size:
        raise DataError(
            f"{name} is longer than the block: with its start token it has {n_tokens} tokens, and block_size is "
            f"{block_size}; set block_size to {n_tokens} or more, or remove the name"
        )


# ---- layouts ----


class Examples:
    """Numbered examples of T tokens: x (T,), and y (T,) the token after each, or -100 to leave it out.

    A subclass says how many there are and cuts them. T, the `row_size`, is the block's size, or less where no example
    needs all of it.
    """

    equal_targets = True  # whether all examples have the same number of targets that count
    epoch_stride = 1  # from one example to the next that has no target in common with it

    def __init__(self, tokens: Tokens, block_size: int) -> None:
        self.tokens, self.block_size = tokens, as_int_argument("block_size", block_size, least=1)
        self.row_size = self.block_size  # T

    def __len__(self) -> int:
        raise NotImplementedError

    def cut(self, which: np.ndarray) -> tuple[Tensor, Tensor]:
        """The examples numbered `which` (B,): x (B, T) and y (B, T), int64."""
        raise NotImplementedError

    @property
    def epoch_size(self) -> int:
        """Examples in an epoch of the order "epochs"."""
        return epoch_size(len(self), self.epoch_stride)

    def batch(
        self, batch_size: int, seed: int, step: int, order: str = "random", rows: slice = ALL_ROWS
    ) -> tuple[Tensor, Tensor]:
        """Examples at random, or the next of an epoch's with the order "epochs".

        They follow from the arguments alone, so step 1000 needs none of the steps before it. `rows` are those of the
        batch that are cut, where several processes share it.
        """
        batch_size = as_int_argument("batch_size", batch_size, least=1)
        seed, step = as_int_argument("seed", seed), as_int_argument("step", step)
        if order not in ORDERS:
            raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
        if order == "epochs":
            places = step * batch_size + np.arange(batch_size)
            return self.cut(of_epochs(places[rows], len(self), self.epoch_stride, seed))
        return self.cut(philox(seed, step).integers(0, len(self), size=batch_size)[rows])

    def evenly_spaced(self, n: int, rows: slice = ALL_ROWS) -> tuple[Tensor, Tensor]:
        """The same n examples every time, first and last included; `rows` are those of them that are cut.

        A loss over these changes with the model only, so two runs, or two steps, can be compared.
        """
        n = as_int_argument("n_blocks", n, least=1)
        return self.cut((np.arange(n) * (len(self) - 1) // max(n - 1, 1))[rows])


class Blocks(Examples):
    """Blocks of a text at any place. Each prefix is an example, so a block has T contexts, of 1 to T tokens."""

    def __init__(self, tokens: Tokens, block_size: int) -> None:
        check_block("tokens", tokens, block_size)
        super().__init__(tokens, block_size)
        self.epoch_stride = self.block_size  # blocks that touch, each token once a target

    def __len__(self) -> int:
        return len(self.tokens) - self.block_size

    def cut(self, which: np.ndarray) -> tuple[Tensor, Tensor]:
        rows = windows(self.tokens, which, self.block_size + 1).astype(np.int64)  # (B, T + 1)
        return _tensors(rows[:, :-1], rows[:, 1:])


class Windows(Blocks):
    """A window of T tokens slid over the text, one place at a time: one example each, the whole window its context."""

    def __init__(self, tokens: Tokens, block_size: int) -> None:
        super().__init__(tokens, block_size)
        self.epoch_stride = 1  # a window has one target

    def cut(self, which: np.ndarray) -> tuple[Tensor, Tensor]:
        x, after = super().cut(which)
        y = torch.full_like(after, IGNORED)
        y[:, -1] = after[:, -1]
        return x, y


class Names(Examples):
    """One name a row: start token, name, and start tokens up to T; the targets are the name, the end token, and -100.

    Contexts grow inside the name, from the start token alone to the whole name, and never reach another one. `tokens`
    are names between boundary tokens, one of them at either end.
    """

    equal_targets = False

    def __init__(self, tokens: Tokens, block_size: int, boundary: int) -> None:
        tokens = np.asarray(tokens)
        super().__init__(tokens, block_size)
        (ends,) = np.nonzero(tokens == boundary)
        if len(ends) < 2 or ends[0] != 0 or ends[-1] != len(tokens) - 1:
            raise DataError("tokens: expected names between boundary tokens, one of them at either end")
        self.boundary, self.starts, self.lengths = boundary, ends[:-1], np.diff(ends)  # of start token and name
        if self.lengths.min() < 2:
            raise DataError(f"tokens: name {int(self.lengths.argmin())} has length 0: remove it")
        longest = int(self.lengths.argmax())
        _check_name(f"name {longest}", int(self.lengths[longest]), block_size)

    def __len__(self) -> int:
        return len(self.starts)

    def cut(self, which: np.ndarray) -> tuple[Tensor, Tensor]:
        at = np.arange(self.block_size + 1)
        places = np.minimum(self.starts[which, None] + at, len(self.tokens) - 1)
        rows = self.tokens[places].astype(np.int64)  # (B, T + 1)
        inside = at[:-1] < self.lengths[which, None]  # (B, T)
        return _tensors(np.where(inside, rows[:, :-1], self.boundary), np.where(inside, rows[:, 1:], IGNORED))


class Completions(Examples):
    """One prompt and its completion a row; the targets are the completion and its end token.

    Rows are padded to the longest example, not packed: with other examples before it in its row, a prompt would have
    them as context, and other positions, which it never has when the model is sampled. `tokens` are the examples one
    after the other, each a prompt, a completion and the end token; `lengths` (N, 2) are the tokens of each prompt, and
    of each completion with its end.
    """

    equal_targets = False

    def __init__(self, tokens: Tokens, block_size: int, lengths: np.ndarray) -> None:
        super().__init__(tokens, block_size)
        self.prompts, totals = lengths[:, 0], lengths.sum(axis=1)
        self.starts, self.inputs = totals.cumsum() - totals, totals - 1  # the end token is a target, never context
        self.row_size = int(self.inputs.max())
        if self.row_size > self.block_size:
            raise DataError(f"tokens: example {int(self.inputs.argmax())} is longer than block_size {self.block_size}")

    def __len__(self) -> int:
        return len(self.starts)

    def cut(self, which: np.ndarray) -> tuple[Tensor, Tensor]:
        at = np.arange(self.row_size + 1)
        places = self.starts[which, None] + np.minimum(at, self.inputs[which, None])  # the padding is the end token
        rows = self.tokens[places].astype(np.int64)  # (B, T + 1)
        counted = (at[1:] >= self.prompts[which, None]) & (at[1:] <= self.inputs[which, None])  # (B, T)
        return _tensors(rows[:, :-1], np.where(counted, rows[:, 1:], IGNORED))


IGNORED = -100  # the cross-entropy's ignore_index
_CLASS_OF: dict[str, type[Examples]] = dict(zip(LAYOUTS, (Blocks, Windows, Names, Completions), strict=True))


def layout_class(layout: str) -> Any:
    if layout not in _CLASS_OF:
        raise ValueError(f"layout: expected one of {', '.join(_CLASS_OF)}, got {layout!r}")
    return _CLASS_OF[layout]


def _tensors(x: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(np.ascontiguousarray(y))


# ---- batches ----


def random_batch(tokens: Tokens, block_size: int, batch_size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Blocks at random places: x (B, T) and y (B, T), int64, where y[b, t] is the token after x[b, t]."""
    return Blocks(tokens, block_size).batch(batch_size, seed, step)


def evaluation_blocks(tokens: Tokens, block_size: int, n_blocks: int) -> tuple[Tensor, Tensor]:
    """The same evenly spaced blocks every time, first and last included: x (n, T) and y (n, T), int64."""
    return Blocks(tokens, block_size).evenly_spaced(n_blocks)
