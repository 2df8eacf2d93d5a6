"""`fastgpt data show`: one example of each layout, line by line, context -> target.

    blocks: 8 characters from anywhere in the text, and after each the next one; every prefix is an example
        T         -> o
        To        -> ␣
        ...

What cannot be seen is drawn: ␣ is a space, ⏎ a newline, which in the names layout starts and ends every name.
"""

from __future__ import annotations

from torch import Tensor

from ..config import LAYOUTS, ConfigError, as_int_argument
from ..tokenizer import VISIBLE, CharTokenizer, Tokenizer
from ..tokenizer_files import read_tokenizer
from . import layouts
from .completions import Pair, encoded, load_pairs
from .layouts import Blocks, Completions, Examples, Names, Windows
from .shards import Tokens
from .sources import DataError, load_text
from .stored import check_is_text, is_stored, open_stored

TEXT = """To be, or not to be, that is the question:
Whether 'tis nobler in the mind to suffer
The slings and arrows of outrageous fortune,
Or to take arms against a sea of troubles
And by opposing end them.
"""
PAIRS = [Pair(f"{a}+{b}=", str(a + b), "the example text", a - 1) for a, b in ((2, 8), (3, 9), (4, 7))]
NAMES = "hamlet\nophelia\nhoratio\nlaertes\nclaudius\ngertrude\npolonius\nyorick\nosric\nbernardo\n"

_MARKS = "␣ is a space, ⏎ a newline; in names it is the start token and the end token; ␃ ends a completion"
_NO_LIMIT = 2**31 - 1  # the largest block_size
_WIDTH = 64  # characters of a context that are shown; of a longer one the end
_ABOUT = {
    "blocks": "{T} tokens from anywhere in the text, and after each the next one; every prefix is an example",
    "windows": "a window of {T} tokens, slid over the text a token at a time, and the one that follows it",
    "names": "one name a row, of up to {T} tokens; the context starts at the name and never leaves it",
    "completions": "one prompt with its completion a row, of up to {T} tokens; only the completion and its end count",
}
_COUNT = {
    "blocks": "{n:,} blocks ({tokens:,} tokens - {T}), {T} examples in each",
    "windows": "{n:,} examples ({tokens:,} tokens - {T})",
    "names": "{n:,} names, {targets:,} examples: a name has one for each of its tokens, and one for its end",
    "completions": "{n:,} prompts, {targets:,} examples: a completion has one for each token, and one for its end",
}


def show_layouts(source: str | None, layout: str | None, block_size: int | None, tokenizer: str, seed: int) -> str:
    """What `fastgpt data show` prints. A layout that was asked for and cannot be had raises DataError.

    Where none was asked for, the layouts that do not fit the data are left out, and the reason takes their place. Where
    none fits, the first reason is raised.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ConfigError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    names = [layout] if layout else LAYOUTS
    parts, errors = [], []
    for name in names:
        try:
            parts.append(_show(source, name, block_size, tokenizer, seed))
        except DataError as error:
            parts.append(f"{name}: not from this text ({error})")
            errors.append(error)
    if len(errors) == len(names):
        raise errors[0]
    return "\n\n".join([*parts, _MARKS])


def _show(source: str | None, layout: str, block_size: int | None, tokenizer: str, seed: int) -> str:
    find = _completions if layout == "completions" else _of_a_text
    examples, made, targets = find(source, layout, block_size, tokenizer)
    x, y = examples.batch(1, seed, step=0)
    T = x.shape[1]
    count = _COUNT[layout].format(n=len(examples), T=T, tokens=len(examples.tokens), targets=targets)
    return "\n".join([f"{layout}: {_ABOUT[layout].format(T=T)}", *_lines(x[0], y[0], made), f"    {count}"])


def _completions(
    source: str | None, layout: str, block_size: int | None, tokenizer: str
) -> tuple[Examples, Tokenizer, int]:
    """As `_of_a_text`, of prompts and their completions."""
    if source is not None:
        check_is_text(source, layout)
    pairs = list(PAIRS) if source is None else load_pairs(source)
    if tokenizer == "char":
        made: Tokenizer = CharTokenizer.train("".join(pair.prompt + pair.completion for pair in pairs), with_end=True)
    else:
        made = read_tokenizer(tokenizer)
    block_size = _NO_LIMIT if block_size is None else as_int_argument("block_size", block_size, least=1)
    tokens, lengths = encoded(pairs, made, block_size)
    return Completions(tokens, block_size, lengths), made, int(lengths[:, 1].sum())


def _of_a_text(
    source: str | None, layout: str, block_size: int | None, tokenizer: str
) -> tuple[Examples, Tokenizer, int]:
    """The examples of a text, or of a folder of tokens, their tokenizer, and how many targets there are."""
    if source is not None and layout == "names":
        check_is_text(source, layout)
    if source is not None and is_stored(source):
        return _of_tokens(source, layout, block_size, tokenizer)
    if source is None:
        text, shown = NAMES if layout == "names" else TEXT, "the example text"
    else:
        text, shown = load_text(source), repr(source)
    layouts.check_varied(text, shown)
    names = layouts.names_of(text, shown) if layout == "names" else []
    text = layouts.join_names(names) if names else text
    made = CharTokenizer.train(text) if tokenizer == "char" else read_tokenizer(tokenizer)
    tokens = made.encode_array(text)
    if names:
        boundary = layouts.boundary_token(made)
        block_size = int(layouts.name_lengths(tokens, boundary).max()) if block_size is None else block_size
        layouts.check_names_fit(names, tokens, boundary, block_size, shown)
        return Names(tokens, block_size, boundary), made, len(tokens) - 1
    return _over_a_text(tokens, shown, layout, block_size), made, len(tokens) - 1


def _of_tokens(source: str, layout: str, block_size: int | None, tokenizer: str) -> tuple[Examples, Tokenizer, int]:
    """As `_of_a_text`, of the train split of a folder of tokens."""
    stored = open_stored(source, tokenizer if tokenizer == "char" else read_tokenizer(tokenizer))
    assert stored is not None
    tokens = stored.train
    return _over_a_text(tokens, f"the train split of {source!r}", layout, block_size), stored.tokenizer, len(tokens) - 1


def _over_a_text(tokens: Tokens, shown: str, layout: str, block_size: int | None) -> Examples:
    block_size = 8 if block_size is None else block_size
    layouts.check_block(shown, tokens, block_size)
    return (Blocks if layout == "blocks" else Windows)(tokens, block_size)


def _lines(x: Tensor, y: Tensor, tokenizer: Tokenizer) -> list[str]:
    """A line for each position with a target: the context up to it, and the target."""
    pairs = []
    for t in range(len(x)):
        if y[t] >= 0:
            context = _visible(tokenizer, x[: t + 1])
            context = context if len(context) <= _WIDTH else "…" + context[1 - _WIDTH :]
            pairs.append((context, _visible(tokenizer, y[t : t + 1])))
    width = max(len(context) for context, _ in pairs)
    return [f"        {context:{width}} -> {target}" for context, target in pairs]


def _visible(tokenizer: Tokenizer, ids: Tensor) -> str:
    return tokenizer.decode(ids).translate(VISIBLE)
