"""A tokenized text, split into a part for training and a part for validation.

corpus = Corpus.load("shakespeare", "char", block_size=256)
x, y = corpus.examples("train", 256).batch(64, seed=1, step=0)       # (64, 256) each, int64
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..config import as_int_argument
from ..tokenizer import CharTokenizer, Tokenizer
from . import layouts
from .cache import cached_bpe, cached_tokens
from .completions import Pair, encoded, load_pairs
from .layouts import Completions, Examples, Names
from .shards import Tokens, pieces
from .sources import DataError, load_text
from .stored import check_is_text, open_stored


@dataclass(frozen=True)
class Corpus:
    """A tokenized text: its first 90 % of tokens to train on, the rest to validate.

    Of a folder of tokens, the splits are those of its files, and `digest` is a hash of them: the tokens then lie in
    memory maps, and are not read to know whether they are the same.

    With the layout "names" it is 90 % of the names, and both splits are lines between newline tokens. With
    "completions" it is 90 % of the prompts with their completions, and `lengths` has those of each (see
    `layouts.Completions`), by split.
    """

    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    layout: str = "blocks"
    lengths: Mapping[str, np.ndarray] = field(default_factory=dict)
    digest: str | None = None

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        tokenizer: str | Tokenizer = "char",
        *,
        vocab_size: int | None = None,
        block_size: int = 1,
        layout: str = "blocks",
    ) -> Corpus:
        """`tokenizer` is "char", "bpe" (then `vocab_size` is needed) or a tokenizer; the first two are trained here.

        `block_size` is the block that will be cut: a split that is too short for one is refused now, not at step 250.
        So is a name that does not fit one, where the layout is "names", and a prompt with its completion in
        "completions".
        """
        block_size = as_int_argument("block_size", block_size, least=1)
        layouts.layout_class(layout)
        _check_tokenizer(tokenizer, vocab_size)
        shown = repr(os.fspath(source))
        if layout in ("names", "completions"):
            check_is_text(source, layout)
        elif (stored := open_stored(source, tokenizer, vocab_size)) is not None:
            for split in ("train", "val"):
                layouts.check_block(f"the {split} split of {shown}", getattr(stored, split), block_size)
            return cls(stored.tokenizer, stored.train, stored.val, layout, digest=stored.digest)
        if layout == "completions":
            return cls._load_completions(load_pairs(source), shown, tokenizer, vocab_size, block_size)
        text = load_text(source)
        layouts.check_varied(text, shown)
        if layout == "names":
            return cls._load_names(layouts.names_of(text, shown), shown, tokenizer, vocab_size, block_size)
        made = _make_tokenizer(tokenizer, text, vocab_size)
        tokens = _tokens(text, made, shown)
        n_train = len(tokens) * 9 // 10
        train, val = tokens[:n_train], tokens[n_train:]
        layouts.check_block(shown, tokens, block_size)
        layouts.check_block(f"the train split of {shown}", train, block_size)
        layouts.check_block(f"the val split of {shown}", val, block_size)
        return cls(made, train, val, layout)

    @classmethod
    def _load_names(
        cls, names: list[str], shown: str, tokenizer: str | Tokenizer, vocab_size: int | None, block_size: int
    ) -> Corpus:
        if len(names) < 2:
            raise DataError(f"{shown} has one name, and needs one to train on and one to validate: give more lines")
        text = layouts.join_names(names)
        made = _make_tokenizer(tokenizer, text, vocab_size)
        tokens = _tokens(text, made, shown)
        layouts.check_names_fit(names, tokens, layouts.boundary_token(made), block_size, shown)
        (boundaries,) = np.nonzero(tokens == layouts.boundary_token(made))
        middle = boundaries[len(names) * 9 // 10]  # the end of the last name to train on, the start of the first other
        return cls(made, tokens[: middle + 1], tokens[middle:], "names")

    @classmethod
    def _load_completions(
        cls, pairs: list[Pair], shown: str, tokenizer: str | Tokenizer, vocab_size: int | None, block_size: int
    ) -> Corpus:
        if len(pairs) < 2:
            raise DataError(f"{shown} has one example, and needs one to train on and one to validate: give more lines")
        text = "\n".join(pair.prompt + pair.completion for pair in pairs)
        made = _make_tokenizer(tokenizer, text, vocab_size, with_end=True)
        tokens, lengths = encoded(pairs, made, block_size)
        n_train = len(pairs) * 9 // 10
        middle = int(lengths[:n_train].sum())
        by_split = {"train": lengths[:n_train], "val": lengths[n_train:]}
        return cls(made, tokens[:middle], tokens[middle:], "completions", by_split)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A sha256 that follows from all that is learned from, by which a resumed run knows its data."""
        if self.digest is not None:
            return hashlib.sha256(f"{self.layout} {self.digest}".encode()).hexdigest()
        return self._hash_of_tokens()

    def has_fingerprint(self, fingerprint: str) -> bool:
        """Whether a run whose data had this fingerprint has learned from this corpus.

        The run may have read the tokens from elsewhere. Then they have to be hashed, all of them, to know.
        """
        return fingerprint == self.fingerprint or (self.digest is not None and fingerprint == self._hash_of_tokens())

    def _hash_of_tokens(self) -> str:
        digest = hashlib.sha256(self.layout.encode())
        for numbers in (self.train, self.val, *(self.lengths[split].ravel() for split in sorted(self.lengths))):
            digest.update(f" {len(numbers)} ".encode())
            for piece in pieces(numbers):
                digest.update(piece.astype("<u4").tobytes())
        return digest.hexdigest()

    def examples(self, split: str, block_size: int) -> Examples:
        """The examples of "train" or "val", in this corpus's layout."""
        tokens = {"train": self.train, "val": self.val}[split]
        if self.layout == "names":
            return Names(tokens, block_size, layouts.boundary_token(self.tokenizer))
        if self.layout == "completions":
            return Completions(tokens, block_size, self.lengths[split])
        return layouts.layout_class(self.layout)(tokens, block_size)


def _tokens(text: str, tokenizer: Tokenizer, shown: str) -> np.ndarray:
    """The tokens of the text; `shown` names it where it has a character that the tokenizer of another run lacks."""
    try:
        return cached_tokens(text, tokenizer)
    except ValueError as error:
        raise DataError(f"{shown}: {error}") from None


def _check_tokenizer(tokenizer: str | Tokenizer, vocab_size: int | None) -> None:
    if tokenizer == "bpe" and vocab_size is None:
        raise ValueError("vocab_size: tokenizer 'bpe' needs it, 512 for example")
    if isinstance(tokenizer, str) and tokenizer not in ("char", "bpe"):
        raise ValueError(f"tokenizer: expected 'char', 'bpe' or a tokenizer, got {tokenizer!r}")


def _make_tokenizer(tokenizer: str | Tokenizer, text: str, vocab_size: int | None, with_end: bool = False) -> Tokenizer:
    """The tokenizer, trained on `text` where it is a name; then `with_end` gives it an end of text."""
    if not isinstance(tokenizer, str):
        return tokenizer
    if tokenizer == "char":
        return CharTokenizer.train(text, with_end)
    trained = cached_bpe(text, vocab_size)
    return trained.with_end() if with_end else trained
