"""Prompts and their completions: read from JSON lines, and encoded, each completion with a token that ends it.

    {"prompt": "2 + 2 =", "completion": " 4"}

A prompt and a completion are joined as they are: a blank between them has to be in one of the two.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..config import SOURCES
from ..tokenizer import Tokenizer
from .sources import DataError, by_hash, read_files

_NEWLINE = "\n"
_EXPECTED = '{"prompt": "...", "completion": "..."}'
_MOST_SHOWN = 5  # lines that an error about several names


class Pair(NamedTuple):
    """A prompt, its completion, and the file and line that have them."""

    prompt: str
    completion: str
    path: str
    line: int

    @property
    def place(self) -> str:
        return place(self.path, self.line)


def place(path: str, line: int) -> str:
    """How errors name a line of a file."""
    return f"{path!r}, line {line}"


def load_pairs(source: str | os.PathLike[str]) -> list[Pair]:
    """The pairs in the file `source`, or in the *.jsonl files of that folder, in the order of their hashes.

    Files are often sorted by subject: their last tenth, which is the validation split, would be unlike the rest. Other
    fields than the two are left out, and so are empty lines. Line ends become "\\n", as in a text.
    """
    if source in SOURCES:
        raise DataError(f"{source!r} is a text; layout completions takes a file of JSON lines, each {_EXPECTED}")
    pairs = [
        Pair(*_prompt_and_completion(line, place(path, number)), path, number)
        for path, text in read_files(source, "*.jsonl").items()
        for number, line in enumerate(text.split("\n"), 1)  # not splitlines: JSON may have U+2028 in a text
        if line.strip()
    ]
    if not pairs:
        raise DataError(f"{os.fspath(source)!r} has no example; expected lines of {_EXPECTED}")
    return by_hash(pairs, key=lambda pair: json.dumps(pair[:2]))


def _prompt_and_completion(line: str, place: str) -> tuple[str, str]:
    try:
        values = json.loads(line, object_pairs_hook=_without_doubles)
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at character {error.colno}"
        raise DataError(f"{place}: is not JSON ({problem}); expected {_EXPECTED}") from None
    except _TwiceError as error:
        raise DataError(f"{place}: has the field {error} twice: remove one") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        raise DataError(f"{place}: cannot be read as JSON ({error}); expected {_EXPECTED}") from None
    if not isinstance(values, dict):
        raise DataError(f"{place}: is {_kind(values)}; expected {_EXPECTED}")
    return _text(values, "prompt", place), _text(values, "completion", place)


class _TwiceError(Exception):
    """A field that an object has twice. The json module would take the last one."""


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in ("prompt", "completion"):
        if names.count(name) > 1:
            raise _TwiceError(repr(name))
    return dict(pairs)


def _text(values: dict[str, Any], name: str, place: str) -> str:
    if name not in values:
        has = ", ".join(map(repr, values)) or "no field"
        raise DataError(f"{place}: has no field {name!r}; expected {_EXPECTED}, got {has}")
    text = values[name]
    if not isinstance(text, str):
        raise DataError(f"{place}: field {name!r} is {_kind(text)}; expected a text")
    if not text:
        raise DataError(f"{place}: field {name!r} is empty; give a text, or remove the line")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell more than UTF-8
        raise DataError(
            f"{place}: field {name!r} has half of a surrogate pair, which is no character: remove it"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def end_token(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a completion: the tokenizer's end of text, or else the newline."""
    if tokenizer.end_of_text is not None:
        return tokenizer.end_of_text
    try:
        (token,) = tokenizer.encode(_NEWLINE)
    except ValueError:
        raise DataError(
            "layout completions: the tokenizer has no token to end a completion, neither an end of text nor a newline"
        ) from None
    return token


def encoded(pairs: Sequence[Pair], tokenizer: Tokenizer, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all pairs, each with its end, and the lengths (N, 2) of prompts and of completions with their ends.

    Each text is encoded by itself, as the prompt is when the model is sampled. Raises DataError that names the line,
    for what the tokenizer cannot encode, and where a pair does not fit a block: nothing is cut off.
    """
    end = end_token(tokenizer)
    parts, lengths = [], np.empty((len(pairs), 2), dtype=np.int64)
    for row, pair in enumerate(pairs):
        prompt, completion = (_encode(tokenizer, pair, name) for name in ("prompt", "completion"))
        _check_has_no_end(tokenizer, pair, completion)
        parts += [prompt, completion, np.array([end])]
        lengths[row] = len(prompt), len(completion) + 1
    _check_fits(pairs, lengths.sum(axis=1) - 1, block_size)
    return np.concatenate(parts), lengths


def _encode(tokenizer: Tokenizer, pair: Pair, name: str) -> np.ndarray:
    try:
        return tokenizer.encode_array(getattr(pair, name))
    except ValueError as error:
        raise DataError(f"{pair.place}: field {name!r}: {error}") from None


def _check_has_no_end(tokenizer: Tokenizer, pair: Pair, completion: np.ndarray) -> None:
    if tokenizer.end_of_text is None and _NEWLINE in pair.completion:
        raise DataError(
            f"{pair.place}: field 'completion' has a newline, which ends a completion here, because the tokenizer has "
            f"no other token for an end: write it in one line, or train with a new tokenizer"
        )
    if tokenizer.end_of_text is not None and (completion == tokenizer.end_of_text).any():
        raise DataError(f"{pair.place}: field 'completion' has the character that ends a completion: remove it")


def _check_fits(pairs: Sequence[Pair], sizes: np.ndarray, block_size: int) -> None:
    longest = int(sizes.argmax())
    if sizes[longest] <= block_size:
        return
    places = sorted((pairs[row].path, pairs[row].line) for row in range(len(pairs)) if sizes[row] > block_size)
    places.remove((pairs[longest].path, pairs[longest].line))
    others = [place(*where) for where in places[:_MOST_SHOWN]]
    also = f"; {len(places)} more are too long: {', '.join(others)}" if others else ""
    more = ", ..." if len(places) > _MOST_SHOWN else ""
    raise DataError(
        f"{pairs[longest].place}: prompt and completion have {sizes[longest]} tokens, and block_size is {block_size}; "
        f"set block_size to {sizes[longest]} or more, or shorten or remove what is too long{also}{more}"
    )
