"""Text to token ids and back: one id a character, or byte-level BPE as GPT-2 has it.

Both tokenizers are lossless, and both are plain data: `to_json` writes a tokenizer, `tokenizer_from_json` reads it
back, and `fingerprint` identifies it, by which a token cache knows whether its tokens are of the same tokenizer.

    tokenizer = CharTokenizer.train("hello world")
    tokenizer.decode(tokenizer.encode("hold"))          # 'hold'

The `tokenizers` library trains and encodes BPE; it is imported when a BPE tokenizer is made. Decoding is done here,
from a table of each id's bytes: a BPE token may end in the middle of a character, and `StreamDecoder` holds these bytes
back until the rest of the character has come, so that text can be printed while it is sampled.

Source of byte-level BPE: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.2.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from . import bpe
from .config import as_int
from .files import expand_path

_END_OF_TEXT = "<|endoftext|>"
_END_CHARACTER = "\x03"  # ASCII's "end of text"
# How blanks are drawn where a text is shown.
VISIBLE = {ord(" "): "␣", ord("\n"): "⏎", ord("\t"): "⇥", ord(_END_CHARACTER): "␃"}  # for str.translate
_NO_ID = 255  # a byte that stands for no id, or for one that no byte holds
_PIECES_PER_CALL = 256


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer."""

    kind: str

    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_text(self) -> int | None: ...  # the id of the token that ends a text, where there is one
    def encode_array(self, text: str) -> np.ndarray: ...
    def decode(self, ids: Any) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def to_json(self) -> str: ...

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def fingerprint(self) -> str:
        """sha256 of `to_json()`: equal fingerprints give equal tokens."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


class CharTokenizer(Tokenizer):
    """One id a character; the ids of `train` follow the characters' sorted order, as in the lecture."""

    kind = "char"

    def __init__(self, chars: str) -> None:
        if not isinstance(chars, str):
            raise ValueError(f"chars: expected a text of all characters, got {type(chars).__name__}")
        if not chars:
            raise ValueError("chars: a character tokenizer needs at least one character, got an empty text")
        if len(set(chars)) != len(chars):
            raise ValueError("chars: every character may occur only once; CharTokenizer.train(text) takes any text")
        self.chars = chars
        self._codepoints = _codepoints(chars)
        if ((self._codepoints >= 0xD800) & (self._codepoints < 0xE000)).any():
            raise ValueError("chars: half a surrogate pair is not a character; read the text as UTF-8")
        # Codepoint -> id: one gather encodes a whole corpus, where a dict would take a Python step a character.
        self._id_of = np.full(int(self._codepoints.max()) + 1, -1, dtype=np.int32)
        self._id_of[self._codepoints] = np.arange(len(chars), dtype=np.int32)
        # Most text is ASCII. Where its ids fit into a byte, a table of bytes encodes it, many times faster.
        ascii_ids = [self._id_of[i] if i < len(self._id_of) else -1 for i in range(128)]
        self._byte_of = bytes(i if 0 <= i < _NO_ID else _NO_ID for i in [*ascii_ids, *([-1] * 128)])

    @classmethod
    def train(cls, text: str | Iterable[str], with_end: bool = False) -> CharTokenizer:
        """The vocabulary is the set of characters in `text`, and "\\x03" where it shall have an `end_of_text`.

        A text that does not fit into the memory is given in pieces.
        """
        occurs = np.zeros(sys.maxunicode + 1, dtype=bool)
        for piece in [text] if isinstance(text, str) else text:
            occurs[_codepoints(piece)] = True
        occurs[ord(_END_CHARACTER)] |= with_end
        return cls("".join(map(chr, np.flatnonzero(occurs))))

    @property
    def vocab_size(self) -> int:
        return len(self.chars)

    @property
    def end_of_text(self) -> int | None:
        """The id of "\\x03", which ASCII calls "end of text", where it is among the characters."""
        return self.chars.index(_END_CHARACTER) if _END_CHARACTER in self.chars else None

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of `text`, int32 (len(text),)."""
        if text.isascii():
            ids = text.encode().translate(self._byte_of)
            if _NO_ID not in ids:
                return np.frombuffer(ids, np.uint8).astype(np.int32)
        codepoints = _codepoints(text)
        ids = self._id_of[np.minimum(codepoints, len(self._id_of) - 1)]
        unknown = (ids < 0) | (codepoints >= len(self._id_of))
        if unknown.any():
            position = int(unknown.argmax())
            raise ValueError(
                f"character {text[position]!r} at position {position} is not among the tokenizer's {self.vocab_size} "
                f"characters: remove it, or train the tokenizer on text that contains it"
            )
        return ids

    def decode(self, ids: Any) -> str:
        codepoints = self._codepoints[_checked_ids(ids, self.vocab_size)]
        return codepoints.astype("<u4").tobytes().decode("utf-32-le")

    def token_bytes(self, token_id: int) -> bytes:
        """The token's text in UTF-8."""
        return self.decode([token_id]).encode()

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind, "chars": self.chars})


class BPETokenizer(Tokenizer):
    """Byte-level BPE: any text can be encoded, because each of the 256 bytes is a token.

    `encode` never yields a special token, even where the text spells "<|endoftext|>"; `special_tokens` has their ids.
    """

    kind = "bpe"
    # Part of the name of a cached tokenizer. It is raised when a change makes `train` learn other tokens.
    training_version = 3

    def __init__(self, vocab: list[str], merges: list[tuple[str, str]], special_tokens: dict[str, int] | None = None):
        """`vocab` lists the tokens by id, in GPT-2's spelling of bytes; `merges` are in order of priority."""
        self.vocab, self.merges, self.special_tokens = vocab, merges, dict(special_tokens or {})
        if not isinstance(vocab, list) or not all(isinstance(token, str) for token in vocab):
            raise ValueError("vocab: expected a list of texts, the tokens by their ids")
        if len(set(vocab)) != len(vocab):
            raise ValueError("vocab: every token may occur only once")
        for token, i in self.special_tokens.items():
            if not _is_id(i) or i >= len(vocab) or vocab[i] != token:
                raise ValueError(
                    f"special_tokens: {token!r} has the id {i!r}, which is not its place in the vocabulary"
                )
        missing = set(bpe.BYTE_OF) - set(vocab)
        if missing:
            raise ValueError(
                f"not a byte-level vocabulary: {len(missing)} of the 256 byte tokens are missing, e.g. {min(missing)!r}"
            )
        special_ids = set(self.special_tokens.values())
        self._bytes = [t.encode() if i in special_ids else bpe.spelled_bytes(t) for i, t in enumerate(vocab)]
        self._encoder = bpe.encoder_of(vocab, merges)

    @classmethod
    def train(cls, text: str | Iterable[str], vocab_size: int) -> BPETokenizer:
        """Learns merges until there are `vocab_size` tokens, or until no pair occurs twice: small texts give fewer.

        A text that does not fit into the memory is given in pieces; how it is cut makes no difference. Of more than 32
        MiB of text, or of more than 3 MiB of distinct words, evenly spread pieces are trained on, in bounded memory.
        """
        size = bpe_size(vocab_size)
        if not text:
            raise ValueError("text: cannot train a tokenizer on an empty text")
        if isinstance(text, str):
            _refuse_surrogates(text)
            text = [text]
        vocab, merges = bpe.train(text, size)
        return cls(tokens_by_id(vocab), _merge_pairs(merges))

    @classmethod
    def from_gpt2_files(cls, folder: str | Path) -> BPETokenizer:
        """Reads vocab.json and merges.txt, or else tokenizer.json, as Hugging Face's GPT-2 folders have them."""
        folder = expand_path(folder)
        vocab_file, merges_file, single_file = (folder / n for n in ("vocab.json", "merges.txt", "tokenizer.json"))
        if vocab_file.is_file() and merges_file.is_file():
            return cls._from_vocab_and_merges(vocab_file, merges_file)
        if single_file.is_file():
            return cls._from_single_file(single_file)
        if not folder.is_dir():
            raise ValueError(
                f"{str(folder)!r}: no such folder; give one with vocab.json and merges.txt, or tokenizer.json"
            )
        missing = [f.name for f in (vocab_file, merges_file) if not f.is_file()]
        raise ValueError(
            f"{str(folder)!r}: {' and '.join(missing)} not found, nor tokenizer.json; "
            f"copy vocab.json and merges.txt, or tokenizer.json, from the model's repository into this folder"
        )

    @classmethod
    def _from_vocab_and_merges(cls, vocab_file: Path, merges_file: Path) -> BPETokenizer:
        added_file = vocab_file.with_name("added_tokens.json")  # of models that were tuned with more special tokens
        added = read_json(added_file) if added_file.is_file() else {}
        with naming(vocab_file):
            vocab = tokens_by_id(read_json(vocab_file), added)
        lines = _read_text(merges_file).split("\n")
        # Only the first line is a comment: "# #" further down is a merge like any other.
        lines = lines[1:] if lines[0].startswith("#version") else lines
        if _END_OF_TEXT in vocab:
            added[_END_OF_TEXT] = vocab.index(_END_OF_TEXT)
        with naming(merges_file):
            merges = _merge_pairs([line.rstrip("\r") for line in lines if line.strip()])
        with naming(vocab_file):
            return cls(vocab, merges, added)

    @classmethod
    def _from_single_file(cls, file: Path) -> BPETokenizer:
        data = read_json(file)
        model, splitter = json_object(data, "model"), json_object(data, "pre_tokenizer")
        is_gpt2 = (
            model.get("type", "BPE") == "BPE"
            and splitter.get("type") == "ByteLevel"
            and splitter.get("use_regex", True)
            and not splitter.get("add_prefix_space")
            and data.get("normalizer") is None
        )
        if not is_gpt2 or not {"vocab", "merges"} <= model.keys():
            raise ValueError(
                f"{str(file)!r}: not a GPT-2 tokenizer; only byte-level BPE split by GPT-2's pattern is read"
            )
        with naming(file):
            added = _added_tokens(data.get("added_tokens", []))
            return cls(tokens_by_id(model["vocab"], added), _merge_pairs(model["merges"]), added)

    def with_end(self) -> BPETokenizer:
        """This tokenizer with one token more where it has no `end_of_text`."""
        if self.end_of_text is not None:
            return self
        special = {**self.special_tokens, _END_OF_TEXT: len(self.vocab)}
        return BPETokenizer([*self.vocab, _END_OF_TEXT], self.merges, special)

    @property
    def vocab_size(self) -> int:
        return len(self.vocab)

    @property
    def end_of_text(self) -> int | None:
        """The id of the special token "<|endoftext|>", where there is one."""
        return self.special_tokens.get(_END_OF_TEXT)

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of `text`, int32; long texts go through the library piece by piece, on all cores."""
        _refuse_surrogates(text)
        parts = [np.empty(0, dtype=np.int32)]
        pieces = list(bpe.cut([text]))
        for first in range(0, len(pieces), _PIECES_PER_CALL):
            encodings = self._encoder.encode_batch_fast(pieces[first : first + _PIECES_PER_CALL])
            parts += [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        return np.concatenate(parts)

    def decode(self, ids: Any) -> str:
        """Exact for encoded text; bytes that are no UTF-8, which a model may well sample, become U+FFFD."""
        ids = _checked_ids(ids, self.vocab_size)
        return b"".join([self._bytes[i] for i in ids.tolist()]).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The token's bytes: perhaps only a part of a character."""
        return self._bytes[int(_checked_ids([token_id], self.vocab_size)[0])]

    def to_json(self) -> str:
        merges = [list(pair) for pair in self.merges]
        special = dict(sorted(self.special_tokens.items()))
        return json.dumps({"kind": self.kind, "vocab": self.vocab, "merges": merges, "special_tokens": special})


class StreamDecoder:
    """Decodes ids as they come, giving out whole characters only.

    The texts of all `push` calls and of `flush`, joined, are `tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: Any) -> str:
        """The text that this id completes: often its own, sometimes none yet."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """Ends the text: U+FFFD if a character was left incomplete. The decoder is then as new."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def tokenizer_from_json(text: str) -> CharTokenizer | BPETokenizer:
    """The tokenizer that `to_json` wrote."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tokenizer: not JSON ({error}); expected what to_json() wrote") from None
    kind = data.get("kind") if isinstance(data, dict) else None
    try:
        if kind == CharTokenizer.kind:
            return CharTokenizer(data["chars"])
        if kind == BPETokenizer.kind:
            return BPETokenizer(data["vocab"], _merge_pairs(data["merges"]), data["special_tokens"])
    except TypeError:
        raise ValueError("tokenizer: a field has another type than to_json() gives it") from None
    except KeyError as error:
        raise ValueError(f"tokenizer: the field {error} is missing; expected what to_json() wrote") from None
    raise ValueError(f"tokenizer: kind is {kind!r}; expected 'char' or 'bpe'")


def label(tokenizer: Tokenizer, token: int) -> str:
    """A token as visible text: a blank or line break as a sign, and bytes that are no whole character as numbers."""
    raw = tokenizer.token_bytes(token)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return "".join(f"<{byte:02x}>" for byte in raw)
    return "".join(c if c.isprintable() else f"<{ord(c):x}>" for c in text.translate(VISIBLE))


def bpe_size(vocab_size: Any) -> int:
    """`vocab_size` as an int, where a byte-level BPE can have it."""
    try:
        size = as_int(vocab_size)
    except TypeError:
        size = 0
    if size < 256:
        raise ValueError(f"vocab_size: byte-level BPE starts from 256 byte tokens, so at least 256, got {vocab_size}")
    return size


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0  # a bool is an int, too


def tokens_by_id(ids: Any, added: dict[str, int] | None = None) -> list[str]:
    """The tokens in the order of their ids, as files have them: {token: id}."""
    if not isinstance(ids, dict):
        raise ValueError(f"a vocabulary is an object of tokens with their ids, got {type(ids).__name__}")
    ids = {**ids, **(added or {})}
    if not all(map(_is_id, ids.values())) or sorted(ids.values()) != list(range(len(ids))):
        raise ValueError("the ids of a vocabulary must be 0, 1, 2, ... without a gap")
    return sorted(ids, key=ids.__getitem__)


def _added_tokens(tokens: Any) -> dict[str, int]:
    """The added tokens of a tokenizer.json, which are tokens of their own, with their ids."""
    try:
        found = [(token["content"], token["id"]) for token in tokens or []]
    except (TypeError, KeyError):
        found = [(None, None)]
    if not all(isinstance(token, str) and _is_id(i) for token, i in found):
        raise ValueError("added_tokens: expected a list of objects with a text as 'content' and a number as 'id'")
    return dict(found)


def _merge_pairs(merges: Any) -> list[tuple[str, str]]:
    """Merges as pairs; files have them as "a b" or as ["a", "b"]."""
    if not isinstance(merges, list):
        raise ValueError(f"merges: expected a list, got {type(merges).__name__}")
    pairs = []
    for number, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"merge {number}: expected two tokens, got {merge!r}")
        pairs.append((parts[0], parts[1]))
    return pairs


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Say in which file of a tokenizer something is wrong."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(repr(str(file))):
            raise
        raise ValueError(f"{str(file)!r}: {error}") from None


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")  # without the byte order mark that some editors write
    except OSError as error:
        raise ValueError(f"{str(file)!r}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r}: not UTF-8 at byte {error.start}; download it again") from None


def read_json(file: Path) -> dict[str, Any]:
    text = _read_text(file)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, a number of thousands of digits, thousands of brackets
        raise ValueError(f"{str(file)!r}: not JSON ({error}); download it again") from None
    if not isinstance(data, dict):
        raise ValueError(f"{str(file)!r}: expected a JSON object, got {type(data).__name__}")
    return data


def json_object(data: dict[str, Any], name: str) -> dict[str, Any]:
    """The object called `name` in `data`; an empty one where there is none, or something else."""
    found = data.get(name)
    return found if isinstance(found, dict) else {}


def _codepoints(text: str) -> np.ndarray:
    # surrogatepass: half a pair is then reported like any unknown character, with its position.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {text[error.start]!r} at position {error.start} is half a surrogate pair: "
            "read the text as UTF-8"
        ) from None


def _checked_ids(ids: Any, vocab_size: int) -> np.ndarray:
    """Ids from a list, an array or a tensor on any device, as one int64 row, all of them within the vocabulary."""
    if isinstance(ids, (list, tuple)):
        ids = [x.cpu() if hasattr(x, "cpu") else x for x in ids]
    row = np.asarray(ids.cpu() if hasattr(ids, "cpu") else ids)
    if row.size == 0:
        return np.empty(0, dtype=np.int64)
    if row.ndim != 1:
        raise ValueError(f"ids: expected one row of token ids, got shape {row.shape}; decode one row at a time")
    if row.dtype.kind == "f" and isinstance(ids, list):
        row = np.asarray(ids, dtype=object)  # numpy rounds a list with 2**63 in it; the error must name the id
    if row.dtype.kind not in "iu" and not all(type(x) is int for x in row.tolist()):
        raise ValueError(f"ids: expected integers, got {row.dtype}")
    outside = (row < 0) | (row >= vocab_size)
    if outside.any():
        position = int(outside.argmax())
        raise ValueError(f"token id {row[position]} at position {position} is outside the vocabulary of {vocab_size}")
    return row.astype(np.int64)
