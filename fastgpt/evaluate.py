"""fastgpt eval: how well a model predicts a text, over all of it, in nats per token, bits per byte and perplexity.

A model reads `block_size` tokens at most, so a text is read in windows. Windows that only touch would leave the first
tokens of each next to no context. So windows overlap: each begins `stride` tokens after the one before it, and of each
only the last `stride` tokens count. Every token is then predicted once, from more than `block_size - stride` tokens
before it; at the beginning of the text, from all there are. A smaller stride gives more context and takes longer.

Nats per token depend on how long the tokens are. Bits per byte do not, so they compare models with different
tokenizers: the nats of all tokens, divided by ln 2 and by the bytes of these tokens' text in UTF-8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .config import ConfigError
from .data.completions import encoded, end_token, load_pairs
from .data.layouts import (
    IGNORED,
    Completions,
    Examples,
    Names,
    Windows,
    boundary_token,
    check_block,
    check_names_fit,
    join_names,
    names_of,
)
from .data.shards import Tokens
from .data.sources import DataError, load_text
from .data.stored import check_is_text, is_stored, open_stored
from .language_model import LanguageModel
from .tokenizer import Tokenizer
from .training.step import Precision, mean_loss

_TOKENS_AT_ONCE = 8192  # of a batch: enough to keep a GPU busy, and few enough for a large model on a small one


class Strided(Examples):
    """Windows of T = block_size tokens over a text, each `stride` tokens after the one before it.

    Of the first window all T targets count, of each other one the last `stride`: together every token but the first.
    """

    def __init__(self, tokens: Tokens, block_size: int, stride: int) -> None:
        super().__init__(tokens, block_size)
        self.stride = stride
        if not 1 <= stride <= block_size:
            raise ConfigError(f"stride: expected 1 to {block_size}, the tokens of the model's context, got {stride}")

    def __len__(self) -> int:
        after_the_first = len(self.tokens) - 1 - self.block_size  # targets
        return 1 + max(0, math.ceil(after_the_first / self.stride))

    def cut(self, which: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        width = min(self.block_size, len(self.tokens) - 1)  # a short text is one window
        places = which[:, None] * self.stride + np.arange(width + 1)  # (B, T + 1)
        rows = self.tokens[np.minimum(places, len(self.tokens) - 1)].astype(np.int64)
        is_new = (which[:, None] == 0) | (np.arange(width) >= self.block_size - self.stride)
        counted = is_new & (places[:, 1:] < len(self.tokens))
        return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(np.where(counted, rows[:, 1:], IGNORED))


@dataclass(frozen=True)
class Evaluation:
    """The sum of the losses of `tokens` tokens, which are `bytes` bytes of text."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """In nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        """exp(loss): between as many equally likely tokens a model has to choose that has this loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def examples_of(model: LanguageModel, tokenizer: Tokenizer, data: str, stride: int | None = None) -> Examples:
    """All that is to be predicted of `data`, in the layout that the model was trained on; of a folder of tokens, which
    has two splits, the val split.

    stride: of the windows over a text; half of the model's context if None. In the other layouts the context of a token
    is given: the whole window before it, the name, or the prompt and the completion up to there.

    Raises DataError naming what is wrong with the data, and ConfigError for a stride or a model that do not fit.
    """
    block_size = model.cfg.block_size
    if not model.cfg.is_causal:
        raise ConfigError("checkpoint: this model has is_causal=False: it sees the tokens that it should predict")
    if stride is not None and model.layout != "blocks":
        raise ConfigError(
            f"stride: is for windows over a text, and this model's layout is {model.layout}; leave it out"
        )
    if model.layout in ("names", "completions"):
        check_is_text(data, model.layout)
    elif (stored := open_stored(data, tokenizer)) is not None:
        if is_stored(data):
            return _over_a_text(stored.val, model, f"the val split of {data!r}", stride)
        return _over_a_text(stored.all, model, repr(data), stride)
    if model.layout == "completions":
        tokens, lengths = encoded(load_pairs(data), tokenizer, block_size)
        return Completions(tokens, block_size, lengths)
    text = load_text(data)
    if model.layout == "names":
        names = names_of(text, repr(data))
        tokens = _encode(tokenizer, join_names(names), data)
        check_names_fit(names, tokens, boundary_token(tokenizer), block_size, repr(data))
        return Names(tokens, block_size, boundary_token(tokenizer))
    return _over_a_text(_encode(tokenizer, text, data), model, repr(data), stride)


def _over_a_text(tokens: Tokens, model: LanguageModel, shown: str, stride: int | None) -> Examples:
    block_size = model.cfg.block_size
    if model.layout == "windows":
        check_block(shown, tokens, block_size)
        return Windows(tokens, block_size)
    if len(tokens) < 2:
        raise DataError(f"{shown} has one token, and the first token is only context: give a longer text")
    return Strided(tokens, block_size, max(1, block_size // 2) if stride is None else stride)


def _encode(tokenizer: Tokenizer, text: str, data: str) -> np.ndarray:
    try:
        return tokenizer.encode_array(text)
    except ValueError as error:  # a character that the tokenizer does not know
        raise DataError(f"{data!r}: {error}") from None


def evaluate(model: LanguageModel, tokenizer: Tokenizer, examples: Examples, precision: Precision) -> Evaluation:
    """The loss of the model, which is on the precision's device, over all examples."""
    from tqdm import tqdm

    model.eval()
    n_rows = max(1, _TOKENS_AT_ONCE // examples.block_size)
    nats, counts = 0.0, np.zeros(tokenizer.vocab_size, dtype=np.int64)  # how often each token is a target
    for first in tqdm(range(0, len(examples), n_rows), unit="batch", disable=None, leave=False):
        x, y = examples.cut(np.arange(first, min(first + n_rows, len(examples))))
        targets = y[y >= 0].numpy()
        nats += mean_loss(model.loss, x, y, n_rows, precision) * len(targets)
        counts += np.bincount(targets, minlength=len(counts))
    if not math.isfinite(nats):
        raise RuntimeError(
            f"the model's loss is {nats}: its weights are not finite numbers, or its dtype cannot hold them"
        )
    n_tokens = int(counts.sum())
    if model.layout == "completions":
        counts[end_token(tokenizer)] = 0  # it is no text of the data: its loss counts, and it has no bytes
    n_bytes = sum(n * len(tokenizer.token_bytes(token)) for token, n in enumerate(counts.tolist()) if n)
    return Evaluation(nats, n_tokens, n_bytes)


def results(found: Evaluation, model: LanguageModel, examples: Examples) -> dict[str, Any]:
    """What `fastgpt eval --json` prints: the three figures, and what they are figures of."""
    return {
        "loss": found.loss,
        "bits_per_byte": found.bits_per_byte,
        "perplexity": found.perplexity if math.isfinite(found.perplexity) else None,  # JSON has no other numbers
        "tokens": found.tokens,
        "bytes": found.bytes,
        "model": model.kind,
        "parameters": model.num_parameters(),
        "layout": model.layout,
        "block_size": examples.block_size,
        "stride": examples.stride if isinstance(examples, Strided) else None,
    }


def table(found: dict[str, Any]) -> str:
    """`results` in words."""
    T, stride = found["block_size"], found["stride"]
    context = {
        "blocks": f"{T - (stride or 0) + 1} to {T} tokens before each, as windows of {T} move by {stride}; "
        f"fewer at the beginning of the text",
        "windows": f"the {T} tokens before each; the first {T} of the text are context alone",
        "names": "the name up to there",
        "completions": "the prompt, and the completion up to there",
    }
    perplexity = math.inf if found["perplexity"] is None else found["perplexity"]
    rows = {
        "loss": f"{found['loss']:.4f} nats per token",
        "bits per byte": f"{found['bits_per_byte']:.4f}",
        "perplexity": f"{perplexity:.4g} per token",
        "predicted": f"{found['tokens']:,} tokens, {found['bytes']:,} bytes of text",
        "context": context[found["layout"]],
        "model": f"{found['model']} of {found['parameters']:,} parameters, on {found['device']} in {found['dtype']}",
    }
    return "\n".join(f"{name:<14} {value}" for name, value in rows.items())
