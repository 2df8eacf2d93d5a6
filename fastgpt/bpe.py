"""Byte-level BPE by the `tokenizers` library: how bytes are spelled, where text is cut, how merges are trained.

Text of any size is cut into small pieces, in which it is encoded. Training holds each distinct word of its text in
memory, so of a large text it is given a sample, which has a bounded number of them.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.2.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

# In training each merge runs through every pre-token it occurs in, so the time is quadratic in the length of a
# pre-token, and a text without blanks is a single one. Longer ones are therefore trained on in parts. No word of a
# language with blanks is that long, and no token of use: GPT-2's longest has 128 bytes.
LONGEST_PRE_TOKEN = 256  # bytes

# The library reads 256 pieces at once.
_PIECE_CHARS = 1 << 14
_LONGEST_PIECE_CHARS = 1 << 16
# By GPT-2's pattern a pre-token ends in front of a blank that follows something else, and in front of a punctuation
# mark that follows a letter or a digit. No pre-token depends on what is before it, so a cut there changes no token.
_SAFE_CUT = re.compile(r"(?<=\S)(?=[ \n])|(?<=[^\W_])(?=[^\w\s])")

_SAMPLE_BYTES = 1 << 25
# The library takes about 80 bytes for each byte of each distinct pre-token.
_SAMPLE_WORD_BYTES = 3 << 20
_WORD = re.compile(rb" ?[A-Za-z\x80-\xff]+| ?\d+| ?[^\sA-Za-z\d\x80-\xff]+|\s+")  # GPT-2's pattern, nearly


def _byte_spelling() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_spelling()


def spelled_bytes(token: str) -> bytes:
    """The bytes that a token spells. Raises ValueError for a character that spells none."""
    try:
        return bytes([BYTE_OF[character] for character in token])
    except KeyError as error:
        raise ValueError(f"not a byte-level vocabulary: {error} in token {token!r} spells no byte") from None


def encoder_of(vocab: list[str], merges: list[tuple[str, str]]) -> Any:
    """The library's tokenizer of this vocabulary. Raises ValueError where the merges do not fit it."""
    try:
        from tokenizers import Tokenizer as Encoder
        from tokenizers import models, pre_tokenizers
    except ImportError:
        raise ImportError("byte-level BPE needs the tokenizers library: pip install tokenizers") from None
    try:
        model = models.BPE(vocab={token: i for i, token in enumerate(vocab)}, merges=merges)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"vocabulary and merges do not fit together: {error}") from None
    encoder = Encoder(model)
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return encoder


# ---- text in pieces ----


def cut(texts: Iterable[str]) -> Iterator[str]:
    """The text that `texts` make together, in pieces of about 16 thousand characters.

    Where they begin and end follows from the whole text alone. A cut changes no token, unless 48 thousand characters
    hold no other place for it: they are letters alone, or digits.
    """
    rest = ""
    for text in texts:
        rest += text
        start = 0
        while end := _end_of_piece(rest, start):
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def _end_of_piece(text: str, start: int) -> int:
    """Where the piece ends that begins at `start`; 0 where more of the text has to be known."""
    longest = start + _LONGEST_PIECE_CHARS
    found = _SAFE_CUT.search(text, start + _PIECE_CHARS, longest + 1)  # with the character behind the cut
    if found:
        return found.start()
    return longest if len(text) > longest else 0


# ---- training ----


def train(texts: Iterable[str], vocab_size: int) -> tuple[dict[str, int], list[Any]]:
    """The vocabulary and the merges that the library learns from the text that `texts` make together.

    A text of at most 32 MiB, whose distinct words have at most 3 MiB, is trained on as a whole. Of a larger one pieces
    are taken that are spread evenly over it, so that memory does not grow with the text.
    """
    from tokenizers import trainers

    encoder = encoder_of(sorted(BYTE_OF), [])
    encoder.pre_tokenizer = training_pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=sorted(BYTE_OF),
    )
    encoder.train_from_iterator((piece.decode() for piece in sample(cut(texts))), trainer)
    model = json.loads(encoder.to_str())["model"]
    del encoder, trainer
    _give_memory_back()
    return model["vocab"], model["merges"]


def _give_memory_back() -> None:
    """The C library of Linux keeps what training has freed, hundreds of megabytes, unless it is asked for it."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # as it is elsewhere
        ctypes.CDLL(None).malloc_trim(0)


def training_pre_tokenizer() -> Any:
    """GPT-2's pre-tokens, in parts where they are long. Encoding does not need the parts: there each merge is local."""
    from tokenizers import Regex, pre_tokenizers

    parts = Regex(f"(?m).{{1,{LONGEST_PRE_TOKEN}}}")  # Oniguruma's (?m): a dot is any character
    return pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Split(parts, "isolated")]
    )


def sample(pieces: Iterable[str]) -> list[bytes]:
    """All the pieces as UTF-8, or every second, fourth, eighth ... of them: the most that the bounds allow."""
    kept: list[bytes] = []
    words: set[bytes] = set()
    step, n_bytes, n_word_bytes = 1, 0, 0
    for i, piece in enumerate(pieces):
        if i % step:
            continue
        kept.append(piece.encode())
        new = set(_WORD.findall(kept[-1])) - words
        words |= new
        n_bytes += len(kept[-1])
        n_word_bytes += sum(map(len, new))
        while len(kept) > 1 and (n_bytes > _SAMPLE_BYTES or n_word_bytes > _SAMPLE_WORD_BYTES):
            del kept[1::2]
            words = set(itertools.chain.from_iterable(map(_WORD.findall, kept)))
            step, n_bytes, n_word_bytes = 2 * step, sum(map(len, kept)), sum(map(len, words))
    return kept
