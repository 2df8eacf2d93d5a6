"""Text in, text out: samples that continue a prompt, in pieces that can be shown while they are drawn.

generate.py knows token ids alone. Here are the tokenizer, the text at which a sample stops, and what the layout of the
data that a model was trained on asks for: a model of names starts at a boundary, and one of completions ends by itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .config import as_int_argument
from .data.completions import end_token
from .data.layouts import NAME_BOUNDARY, boundary_token
from .draw import Generators, checked_generators, checked_settings
from .generate import Model, generators_of_rows, stream, stream_names
from .generate_batch import Batch
from .tokenizer import StreamDecoder, Tokenizer

SIDE_BY_SIDE = 8  # samples of several prompts: as many as one op computes at once on a CPU, see ops/decode.py


def stream_text(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str | Sequence[str],
    max_new_tokens: int,
    *,
    layout: str = "blocks",
    device: torch.device | str = "cpu",
    num_samples: int = 1,
    stop: str | Sequence[str] | None = None,
    **options: Any,
) -> Iterator[tuple[int, str]]:
    """Yield (sample, text): what comes next in the sample with that number, as it is drawn.

    A list of prompts has `num_samples` samples of each, in their order: sample i continues prompt i // num_samples. A
    piece is whole characters. A sample ends after `max_new_tokens` tokens, or before the text `stop`, wherever its
    tokens begin and end: a piece that may be the beginning of `stop` is held back. Of several texts the one that is
    complete first ends the sample, of those that end with the same character the longest.

    The samples of one prompt are drawn as one batch. Those of several prompts, of which SIDE_BY_SIDE are drawn side by
    side, each have a generator of their own, which `generator` seeds; a sample that has ended is no longer computed.
    Samples of names are drawn one after the other. `layout` is that of the data that the model was trained on, `device`
    where the model is, and `options` are those of `generate.stream` but for attention_mask and return_logprobs.

    Raises ValueError naming the argument, at the call: an empty text, or one with a character that is unknown to the
    tokenizer; and while sampling as `generate.stream` does.
    """
    n = as_int_argument("num_samples", num_samples, 1)
    stops = _texts("stop", [] if stop is None else stop)
    for text in stops:
        _encode(tokenizer, "stop", text)  # a text that the tokenizer cannot write would never come
    prompts = [prompt_tokens(tokenizer, text, layout).to(device) for text in _texts("prompt", prompt)]
    if not prompts:
        raise ValueError("prompt: there is none; give at least one text")
    for name in ("attention_mask", "return_logprobs"):
        if name in options:
            raise ValueError(f"{name}: belongs to token ids, not to texts; see model.generate")
    end = end_token(tokenizer) if layout == "completions" else None
    samples = [Sample(number, tokenizer, stops, end) for number in range(len(prompts) * n)]
    each = [idx for idx in prompts for _ in range(n)]
    if layout == "names":
        return _names(model, each, max_new_tokens, boundary_token(tokenizer), samples, options)
    if len(prompts) == 1:
        return _pieces(stream(model, prompts[0].repeat(n, 1), max_new_tokens, **options), samples)
    if options.pop("cuda_graph", False):
        raise ValueError("cuda_graph: a graph belongs to texts of one length, and prompts have several; leave it out")
    return _pieces_of_prompts(model, each, max_new_tokens, samples, **options)


def _texts(name: str, given: Any) -> list[str]:
    """A text, or several, as a list. Raises ValueError for anything else."""
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, (list, tuple)):
        raise ValueError(f"{name}: expected a text or a list of texts, got {type(given).__name__}")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name}: expected texts, got {type(text).__name__}")
    return list(texts)


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


def _names(
    model: Model,
    each: list[Tensor],
    max_new_tokens: int,
    boundary: int,
    samples: list[Sample],
    options: dict[str, Any],
) -> Iterator[tuple[int, str]]:
    """The texts of samples of a model of names, one after the other."""
    if options.pop("cuda_graph", False):
        raise ValueError("cuda_graph: a graph belongs to one text, and each name is a text of its own; leave it out")
    streams = [stream_names(model, idx, max_new_tokens, boundary, **options) for idx in each]
    return (piece for tokens, sample in zip(streams, samples, strict=True) for piece in _pieces(tokens, [sample]))


def _pieces(tokens: Iterator[Tensor], samples: list[Sample]) -> Iterator[tuple[int, str]]:
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


def _pieces_of_prompts(
    model: Model,
    each: list[Tensor],
    max_new_tokens: int,
    samples: list[Sample],
    *,
    generator: Generators = None,
    stride: int | None = None,
    use_cache: bool = True,
    **settings: Any,
) -> Iterator[tuple[int, str]]:
    """The texts of samples that begin with prompts (1, T) of their own. What is wrong is said at the call."""
    n = as_int_argument("max_new_tokens", max_new_tokens, 0)
    checked_settings(**settings)
    generators = generators_of_rows(checked_generators(generator, len(each)), len(each), each[0].device)
    batch = Batch(model, min(SIDE_BY_SIDE, len(each)), stride=stride, use_cache=use_cache)
    waiting = deque(zip(samples, each, generators, strict=True)) if n > 0 else deque()
    return _side_by_side(batch, waiting, n, settings)


def _side_by_side(
    batch: Batch, waiting: deque[tuple[Sample, Tensor, Any]], max_new_tokens: int, settings: dict[str, Any]
) -> Iterator[tuple[int, str]]:
    """Continue what is waiting: where a sample ends, the next one takes its place."""
    present: dict[int, tuple[Sample, int]] = {}  # in each slot a sample, and how many tokens it may still have
    while waiting or present:
        while waiting and batch.free:
            sample, idx, generator = waiting.popleft()
            present[batch.add(idx[0], generator=generator, **settings)] = sample, max_new_tokens
        for slot, drawn in batch.step().items():
            sample, left = present[slot]
            text = sample.push(drawn.token)
            if left == 1:
                text += sample.finish()
            present[slot] = sample, left - 1
            if sample.ended:
                batch.remove(slot)
                del present[slot]
            if text:
                yield sample.number, text


class Sample:
    """The text of one sample, as its tokens come: nothing of the stop text or after it, nor of the end token.

    `ended` once no text comes any more, `stopped` where a stop text or the end token was the reason.
    """

    def __init__(self, number: int, tokenizer: Tokenizer, stop: str | Sequence[str] | None, end: int | None) -> None:
        self.number, self.ended, self.stopped = number, False, False
        self._decoder, self._vocab_size, self._end = StreamDecoder(tokenizer), tokenizer.vocab_size, end
        self._stops = [_as_data(text) for text in ([stop] if isinstance(stop, str) else stop or [])]
        self._held = ""  # perhaps the beginning of a stop text

    def push(self, token_id: int) -> str:
        """The text that is certain with this token."""
        if self.ended:
            return ""
        if token_id == self._end:
            text, self.stopped = self.finish(), True
            return text
        if token_id >= self._vocab_size:  # some models have more tokens than their tokenizer, for the sake of alignment
            return self._certain(self._decoder.flush() + "\ufffd")
        return self._certain(self._decoder.push(token_id))

    @property
    def n_held(self) -> int:
        """How many characters are held back."""
        return len(self._held)

    def finish(self) -> str:
        """The text that was held back; no token follows."""
        if self.ended:
            return ""
        text = self._certain(self._decoder.flush())
        self.ended = True
        return text + self._held

    def _certain(self, text: str) -> str:
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:  # what is held never has a whole stop text, so the first to be complete is one of these
            self.ended, self.stopped, self._held = True, True, ""
            return text[: min(found)[1]]
        certain = len(text) - max((_beginning(text, stop) for stop in self._stops), default=0)
        self._held = text[certain:]
        return text[:certain]


def _beginning(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
