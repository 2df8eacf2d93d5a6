"""Text in, text out: samples that continue a prompt, in pieces that can be shown while they are drawn.

generate.py knows token ids alone. Here are the tokenizer, the text at which a sample stops, and what the layout of the
data that a model was trained on asks for: a model of names starts at a boundary, and one of completions ends by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .config import as_int_argument
from .data.completions import end_token
from .data.layouts import NAME_BOUNDARY, boundary_token
from .generate import Model, stream, stream_names
from .tokenizer import StreamDecoder, Tokenizer


def stream_text(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    layout: str = "blocks",
    device: torch.device | str = "cpu",
    num_samples: int = 1,
    stop: str | None = None,
    **options: Any,
) -> Iterator[tuple[int, str]]:
    """Yield (sample, text): what comes next in the sample with that number, 0 to `num_samples` - 1, as it is drawn.

    A piece is whole characters. A sample ends after `max_new_tokens` tokens, or before the text `stop`, wherever its
    tokens begin and end: a piece that may be the beginning of `stop` is held back. The samples are drawn as one batch,
    those of names one after the other. `layout` is that of the data that the model was trained on, `device` where the
    model is, and `options` are those of `generate.stream`.

    Raises ValueError naming the argument, at the call: an empty text, or one with a character that is unknown to the
    tokenizer; and while sampling as `generate.stream` does.
    """
    n = as_int_argument("num_samples", num_samples, 1)
    for name, text in (("prompt", prompt), ("stop", "" if stop is None else stop)):
        if not isinstance(text, str):
            raise ValueError(f"{name}: expected a text, got {type(text).__name__}")
    idx = prompt_tokens(tokenizer, prompt, layout).to(device)
    if stop is not None:
        _encode(tokenizer, "stop", stop)  # a text that the tokenizer cannot write would never come
    end = end_token(tokenizer) if layout == "completions" else None
    samples = [_Sample(number, tokenizer, stop, end) for number in range(n)]
    if layout != "names":
        return _pieces(stream(model, idx.repeat(n, 1), max_new_tokens, **options), samples)
    if options.pop("cuda_graph", False):
        raise ValueError("cuda_graph: a graph belongs to one text, and each name is a text of its own; leave it out")
    boundary = boundary_token(tokenizer)
    streams = [stream_names(model, idx, max_new_tokens, boundary, **options) for _ in samples]
    return (piece for tokens, sample in zip(streams, samples, strict=True) for piece in _pieces(tokens, [sample]))


def prompt_tokens(tokenizer: Tokenizer, prompt: str, layout: str = "blocks") -> Tensor:
    """The tokens (1, T) that a model continues, int64. A model of names goes on with the prompt's last line."""
    if layout == "names":
        prompt = NAME_BOUNDARY + prompt.rpartition(NAME_BOUNDARY)[2] if prompt else prompt
    return torch.tensor([_encode(tokenizer, "prompt", prompt)])


def _encode(tokenizer: Tokenizer, name: str, text: str) -> list[int]:
    if not text:
        raise ValueError(f"{name}: is empty; give at least one character")
    try:
        return tokenizer.encode(_as_data(text))
    except ValueError as error:  # a character that the tokenizer does not know
        raise ValueError(f"{name}: {error}") from None


def _as_data(text: str) -> str:
    """Line ends become "\\n", as in the training data."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _pieces(tokens: Iterator[Tensor], samples: list[_Sample]) -> Iterator[tuple[int, str]]:
    """The texts of a batch: tokens (B, 1) at a time, and a sample for each of the B rows."""
    for token in tokens:
        for sample, token_id in zip(samples, token.flatten().tolist(), strict=True):
            if text := sample.push(token_id):
                yield sample.number, text
        if all(sample.ended for sample in samples):
            return
    for sample in samples:
        if text := sample.finish():
            yield sample.number, text


class _Sample:
    """The text of one sample, as its tokens come: nothing of the stop text or after it, nor of the end token."""

    def __init__(self, number: int, tokenizer: Tokenizer, stop: str | None, end: int | None) -> None:
        self.number, self.ended = number, False
        self._decoder, self._vocab_size, self._end = StreamDecoder(tokenizer), tokenizer.vocab_size, end
        self._stop = "" if stop is None else _as_data(stop)
        self._held = ""  # perhaps the beginning of the stop text

    def push(self, token_id: int) -> str:
        """The text that is certain with this token."""
        if self.ended:
            return ""
        if token_id == self._end:
            return self.finish()
        if token_id >= self._vocab_size:  # some models have more tokens than their tokenizer, for the sake of alignment
            return self._certain(self._decoder.flush() + "\ufffd")
        return self._certain(self._decoder.push(token_id))

    def finish(self) -> str:
        """The text that was held back; no token follows."""
        if self.ended:
            return ""
        text = self._certain(self._decoder.flush())
        self.ended = True
        return text + self._held

    def _certain(self, text: str) -> str:
        text = self._held + text
        if self._stop and self._stop in text:
            self.ended, self._held = True, ""
            return text.partition(self._stop)[0]
        starts = (n for n in range(len(self._stop) - 1, 0, -1) if text.endswith(self._stop[:n]))
        certain = len(text) - next(starts, 0)
        self._held = text[certain:]
        return text[:certain]
