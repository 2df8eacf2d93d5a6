"""Sampling, one token at a time, with a cache of keys and values.

While the sequence fits `block_size`, a step computes one new token against the cache. Beyond that the context is the
last `block_size` tokens, as in the lecture: each step moves every token one position down, which changes its learned
position embedding and all that was computed from it, so each step computes the whole window again. With a `stride` the
window moves by that many tokens at once instead, and the cache serves the steps between. A recurrent model's cache is
its state, which has the same size for a text of any length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import GPTConfig, as_int_argument
from .draw import Draw, DrawSettings, Generators, check_finite, checked_generators, checked_settings, next_token
from .generate_batch import Batch, checked_stride

__all__ = ["Model", "next_token", "pad_left", "stream", "stream_names"]


class Model(Protocol):
    """What sampling asks of a model. `language_model.LanguageModel` has it, and so may a model of your own."""

    training: bool  # whether dropout is on; `eval` and `train` switch it, as in torch.nn.Module

    @property
    def cfg(self) -> GPTConfig:
        """Its settings. Read: is_causal, without which a model cannot continue a text."""

    @property
    def context_size(self) -> int | None:
        """How many tokens back the model sees; None for one without a limit."""

    def eval(self) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...

    def new_cache(self, batch_size: int) -> Any:
        """An empty cache for `batch_size` sequences, whose `length` counts the tokens in it; None where there is none.

        With the methods of `generate_graph.GraphedCache`, a CUDA graph can use it. Asked once, before the first token,
        and only while the sequence is shorter than `context_size`, or with a stride, which sets `length` to 0 where the
        cache shall be filled anew.
        """

    def next_logits(self, idx: Tensor, cache: Any = None) -> Tensor:
        """idx (B, T) int64 or int32 -> (B, V) floating point: the logits of the token after idx.

        With a cache, idx are the tokens after those in it, and are added to it.
        """


CachedStep = Callable[[Tensor, Any], tuple[Tensor, ...]]  # (tokens after those in the cache, cache) -> as `Draw`


def _checked(model: Model, idx: Tensor, max_new_tokens: Any, **settings: Any) -> tuple[int, DrawSettings]:
    """max_new_tokens and the settings of the draw as Python's numbers. Raises ValueError naming the wrong argument."""
    if not isinstance(idx, Tensor) or idx.ndim != 2 or idx.dtype not in (torch.int64, torch.int32):
        raise ValueError("idx: expected token ids of shape (B, T), int64")
    if idx.shape[1] == 0:
        raise ValueError("idx: the prompt is empty; give at least one token")
    n = as_int_argument("max_new_tokens", max_new_tokens, 0)
    checked = checked_settings(**settings)
    if not model.cfg.is_causal:
        raise ValueError("model: generation needs is_causal=True")
    return n, checked


def stream(
    model: Model,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: Generators = None,
    use_cache: bool = True,
    cuda_graph: bool = False,
    stride: int | None = None,
    *,
    repetition_penalty: float = 1.0,
    attention_mask: Tensor | None = None,
    return_logprobs: bool = False,
) -> Iterator[Any]:
    """Yield each next token (B, 1) that continues idx (B, T), int64 or int32, in the dtype of idx.

    temperature: divides the logits; 0, or anything below 2**-126, takes the likeliest token. top_k: sample among the k
    likeliest tokens. top_p: sample among the fewest whose probabilities sum to p (Holtzman et al. 2020). Of equally
    likely tokens all three take those with the lowest ids. use_cache=False computes the whole context at each step, to
    compare with. cuda_graph: while the cache serves a token, launch its kernels at once (see generate_graph.py); the
    model's tensors must then stay where they are until the last token.

    repetition_penalty: before all that, the logits of the tokens that occurred are divided by it where they are
    positive, and multiplied by it where they are negative (Keskar et al. 2019, arXiv:1909.05858); 1 is off. All tokens
    of a row count, of its prompt and new ones, those that have left the context included, and no padding.

    generator: a random generator on the device of idx, which makes the sample repeatable, or a list of one for each
    row. From one generator all rows are drawn together, so a row's tokens depend on how many rows there are; with one
    of its own, a row gets the tokens that it would get alone.

    attention_mask (B, T), of bools or of 0 and 1, for prompts of unequal lengths: False for the padding, which is on
    the left, see `pad_left`. Each row goes on as its prompt would alone, up to the last bits of its logits. Where a row
    is padded, one generator seeds one for each row.

    return_logprobs: yield pairs of the token and its log-probability (B, 1), float32, in nats: that of the model's own
    distribution, before temperature, top_k, top_p and penalty.

    stride: how many of the oldest tokens leave a full context at once, 1 to `block_size`. The keys and values of those
    that stay are computed anew, once, and the cache serves the next tokens until it is full again. By default one token
    leaves at each step, and nothing is cached. A stride changes the text after `block_size` tokens: a new token sees
    the last `block_size - stride + 1` to `block_size` tokens, by default always `block_size`. Positions count from the
    first token that it sees, in both cases, so a stride of 1 gives the text of the default.

    The model is in evaluation mode while a token is computed, and in its own mode again when it is yielded.

    Raises ValueError naming the argument at the call, and, while sampling, for logits of which one is nan or inf or
    all of a row are -inf. On a GPU that error comes one token late, so that the next step need not wait for the check.
    """
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty}
    n, checked = _checked(model, idx, max_new_tokens, **settings)
    generator = checked_generators(generator, idx.shape[0])
    stride = checked_stride(model, stride)
    if cuda_graph:
        _check_graph(checked, generator)
    if attention_mask is not None:
        lengths = _checked_mask(attention_mask, idx)
        if min(lengths, default=idx.shape[1]) < idx.shape[1]:
            if cuda_graph:
                raise ValueError("cuda_graph: a graph belongs to rows of one length, and attention_mask pads some")
            return _stream_rows(model, idx, lengths, n, checked, generator, use_cache, stride, return_logprobs)
    draw = Draw(checked, generator, idx, return_logprobs)
    if not cuda_graph:
        return _stream(model, idx, n, draw, use_cache, stride)
    from .cuda_graph import recorder
    from .generate_graph import GraphedTokens

    return _stream(model, idx, n, draw, use_cache, stride, GraphedTokens(model, draw, generator, recorder(idx.device)))


def _check_graph(settings: DrawSettings, generator: Generators) -> None:
    """Refuse what a graph, which does the same for every token, cannot do."""
    if settings.repetition_penalty != 1.0:
        raise ValueError("repetition_penalty: a CUDA graph does not keep the tokens so far; leave cuda_graph out")
    if isinstance(generator, list):
        raise ValueError("generator: a CUDA graph draws from one generator; give one, or leave cuda_graph out")


def pad_left(prompts: Sequence[Any], pad: int = 0, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Prompts, lists of ids or tensors (T_i,) -> (idx (B, T), int64, attention_mask (B, T), bool), T the longest.

    `pad` is the id in the places of the padding, on the left; it has no effect. Raises ValueError for an empty prompt.

    >>> idx, attention_mask = pad_left([[5, 6, 7], [8]])
    >>> model.generate(idx, 20, attention_mask=attention_mask)
    """
    rows = [torch.as_tensor(prompt) for prompt in prompts]
    for number, row in enumerate(rows):
        if row.ndim != 1 or row.numel() == 0 or row.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"prompts: expected lists of at least one id, or tensors (T,), got another at {number}")
    if not rows:
        raise ValueError("prompts: there are none; give at least one")
    longest = max(map(len, rows))
    idx = torch.full((len(rows), longest), pad, dtype=torch.int64)
    for number, row in enumerate(rows):
        idx[number, longest - len(row) :] = row
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(longest) >= longest - lengths[:, None]
    return idx.to(device), mask.to(device)


def _checked_mask(mask: Any, idx: Tensor) -> list[int]:
    """How many tokens of each row are no padding. Raises ValueError unless all padding is on the left."""
    if not isinstance(mask, Tensor) or mask.shape != idx.shape:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: expected the shape of idx {tuple(idx.shape)}, got {got}")
    kept = mask.cpu()
    if kept.is_floating_point() or kept.is_complex() or not bool(((kept == 0) | (kept == 1)).all()):
        raise ValueError("attention_mask: expected bools, or the integers 0 and 1")
    lengths: list[int] = []
    for number, row in enumerate(kept.bool().tolist()):
        lengths.append(sum(row))
        if not row[-1]:
            what = "is padding alone" if lengths[-1] == 0 else "is padded on the right"
            raise ValueError(
                f"attention_mask: row {number} {what}; every row ends with a token, and is padded on the left"
            )
        if not all(row[len(row) - lengths[-1] :]):
            raise ValueError(f"attention_mask: row {number} has padding between its tokens; pad on the left alone")
    return lengths


def generators_of_rows(generator: Generators, n_rows: int, device: torch.device) -> list[torch.Generator | None]:
    """A generator for each row. One for all, or PyTorch's, seeds them; so no row's draws depend on another's length."""
    if isinstance(generator, Sequence):
        return list(generator)
    if n_rows == 1:
        return [generator]
    where = device if generator is None else generator.device
    seeds = torch.randint(2**63 - 1, (n_rows,), generator=generator, device=where).tolist()
    return [torch.Generator(where).manual_seed(seed) for seed in seeds]


def _stream_rows(
    model: Model,
    idx: Tensor,
    lengths: list[int],
    max_new_tokens: int,
    settings: DrawSettings,
    generator: Generators,
    use_cache: bool,
    stride: int | None,
    return_logprobs: bool,
) -> Iterator[Any]:
    """`stream` for the last lengths[i] tokens of each row."""
    generators = generators_of_rows(generator, len(lengths), idx.device)
    batch = Batch(model, len(lengths), stride=stride, use_cache=use_cache)
    logprobs = 0 if return_logprobs else None
    for row, length, own in zip(idx, lengths, generators, strict=True):
        batch.add(row[-length:], generator=own, logprobs=logprobs, **settings._asdict())
    for _ in range(max_new_tokens):
        drawn = batch.step().values()
        tokens = idx.new_tensor([[result.token] for result in drawn])
        if return_logprobs:
            yield tokens, torch.tensor([[result.logprob] for result in drawn], device=idx.device)
        else:
            yield tokens


def stream_names(model: Model, idx: Tensor, max_new_tokens: int, boundary: int, **options: Any) -> Iterator[Tensor]:
    """`stream` for a model of names. idx (1, T) begins with the token `boundary`, which starts and ends every name.

    After each end the context is that token alone, so that no name is context of the next, as in training; nor do its
    tokens count for the repetition penalty. options: temperature, top_k, top_p, repetition_penalty, generator and
    stride of `stream`.
    """
    generator, stride = options.pop("generator", None), checked_stride(model, options.pop("stride", None))
    n, settings = _checked(model, idx, max_new_tokens, **options)
    return _stream_names(model, idx, n, boundary, settings, checked_generators(generator, 1), stride)


def _stream_names(
    model: Model,
    idx: Tensor,
    max_new_tokens: int,
    boundary: int,
    settings: DrawSettings,
    generator: Generators,
    stride: int | None,
) -> Iterator[Tensor]:
    while max_new_tokens > 0:
        for token in _stream(model, idx, max_new_tokens, Draw(settings, generator, idx), True, stride):
            max_new_tokens -= 1
            yield token
            if int(token) == boundary:
                idx = token
                break


def _stream(
    model: Model,
    idx: Tensor,
    max_new_tokens: int,
    draw: Callable[[Tensor], tuple[Tensor, ...]],
    use_cache: bool,
    stride: int | None,
    by_graph: CachedStep | None = None,
) -> Iterator[Any]:
    was_training = model.training
    limit = model.context_size
    cached_up_to = math.inf if limit is None or stride is not None else limit
    step = by_graph or (lambda new, cache: draw(model.next_logits(new, cache)))
    new = idx if limit is None else idx[:, -limit:]  # the tokens that are not in the cache
    context = [new]  # in pieces, which are joined where all of it is computed at once
    n_context = new.shape[1]
    cache = None
    late = 0 if idx.is_cpu else 1  # on a GPU a token is checked once the next one's kernels have been launched
    unread: list[tuple[Tensor, str]] = []
    try:
        for position in range(idx.shape[1], idx.shape[1] + max_new_tokens):
            if model.training:  # asked at each token: the caller may train the model between two of them
                model.eval()
            with torch.no_grad():
                if limit is not None and stride is not None and n_context > limit:
                    new = _joined(context, limit + 1 - stride)
                    context, n_context = [new], new.shape[1]
                    if cache is not None:
                        cache.length = 0
                if use_cache and cache is None and position < cached_up_to:
                    cache = model.new_cache(idx.shape[0])
                    new = new if cache is None else _joined(context, limit)
                if cache is not None and cache.length < cached_up_to:
                    token, largest, *logprob = step(new, cache)
                else:
                    context = [_joined(context, limit)]
                    token, largest, *logprob = draw(model.next_logits(context[0]))
            unread.append((largest, f"model: its logits for position {position}"))
            if len(unread) > late:
                check_finite(*unread.pop(0))
            new = token.to(idx.dtype)
            if cache is not None and limit is None:
                context = []  # it is never computed again
            context.append(new)
            n_context += 1
            if was_training:
                model.train()
            yield (new, *logprob) if logprob else new
        for check in unread:
            check_finite(*check)
    finally:
        if model.training != was_training:
            model.train(was_training)


def _joined(context: list[Tensor], limit: int | None) -> Tensor:
    """Pieces (B, T_i) of a context as one tensor, of the last `limit` tokens."""
    whole = context[0] if len(context) == 1 else torch.cat(context, dim=1)
    return whole if limit is None else whole[:, -limit:]
