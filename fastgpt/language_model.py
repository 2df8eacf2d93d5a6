"""What the trainer, the sampler and a checkpoint ask of a model: the interface of the GPT and of the baselines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast, overload

import torch
from torch import Tensor, nn

from . import ops
from .config import GPTConfig
from .draw import Generators
from .generate import stream
from .modules import call_sharded, head_loss, is_sharded_alone, linear, say_once, why_called

if TYPE_CHECKING:  # a model without a tokenizer does without that module
    from .tokenizer import Tokenizer


class LanguageModel(nn.Module):
    """A model of the next token: `lm_head` computes the logits from `hidden`. A subclass defines these two.

    Token ids are (B, T), int64 or int32; logits are (B, T, V) in the dtype of the parameters. A wrong argument raises a
    TypeError, ValueError or IndexError that names it: `idx` or `targets`, or `tokens` where a token id has the wrong
    dtype or is outside the vocabulary.
    """

    kind: ClassVar[str]  # its name in `baselines.MODELS`, on the command line and in a checkpoint
    cfg: GPTConfig
    tokenizer: Tokenizer | None = None  # of the text that it was trained on; `fastgpt.load` sets it
    layout: str = "blocks"  # how that text was cut, see data/layouts.py
    lm_head: Any  # a linear; in a bigram torch.nn.Identity

    def __init__(self, cfg: GPTConfig) -> None:
        super().__init__()
        if not isinstance(cfg, GPTConfig):
            raise TypeError(f"cfg: expected a GPTConfig, got {type(cfg).__name__}")
        self.cfg = cfg

    @property
    def context_size(self) -> int | None:
        """How many tokens back the model sees; None for one without a limit."""
        return self.cfg.block_size

    def hidden(self, idx: Tensor, cache: Any = None) -> Tensor:
        """idx (B, T) -> (B, T, C): what the head reads. With a cache, idx are the tokens after those in it."""
        raise NotImplementedError

    def new_cache(self, batch_size: int) -> Any:
        """An empty cache for the generation of `batch_size` sequences; its `length` counts the tokens in it.

        None for a model without one, and for a model that has to be called as a whole (see `loss`), which takes none.
        """
        cache, reason = self._empty_cache(batch_size), why_called(self, LanguageModel.forward)
        if cache is None or reason is None:
            return cache
        say_once("the model is called for each new token on all the tokens before it, without a cache", reason)
        return None

    def new_rows(self, n_rows: int) -> Any:
        """An empty cache of `n_rows` rows that have lengths of their own, see `cache.RowCache`; None as in `new_cache`.

        A model may have the one and not the other: then each sequence is continued alone.
        """
        return self._empty_rows(n_rows) if why_called(self, LanguageModel.forward) is None else None

    def _empty_cache(self, batch_size: int) -> Any:
        return None

    def _empty_rows(self, n_rows: int) -> Any:
        return None

    def next_logits(self, idx: Tensor, cache: Any = None) -> Tensor:
        """idx (B, T) -> (B, V): the logits of the next token. With a cache, idx are the tokens after those in it."""
        if cache is None and why_called(self, LanguageModel.forward):
            return self(idx)[0][:, -1]
        return linear(self.lm_head, self.hidden(idx, cache)[:, -1])

    @contextlib.contextmanager
    def _kept_tied(self) -> Iterator[None]:
        """Keep a head whose weight is the token embedding's tied to it while parameters are replaced by new ones.

        A file holds a shared tensor once, so perhaps only one of the two is replaced: the other one then takes it.
        """
        head, embedding = self.lm_head, getattr(self, "token_embedding", None)
        weight = getattr(head, "weight", None)
        tied = weight is not None and weight is getattr(embedding, "weight", None)
        yield
        if tied:
            new, old = (embedding, head) if head.weight is weight else (head, embedding)
            cast(Any, old).weight = cast(Any, new).weight

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """That of torch.nn.Module, but tied weights stay one parameter, with assign=True, too."""
        with self._kept_tied():
            return super().load_state_dict(*args, **options)

    def to_empty(self, **options: Any) -> Any:
        """That of torch.nn.Module, but tied weights stay one parameter."""
        with self._kept_tied():
            return super().to_empty(**options)

    def num_parameters(self) -> int:
        """Number of parameters, shared ones once."""
        return sum(p.numel() for p in self.parameters())

    def _check_idx(self, idx: Tensor) -> None:
        if not isinstance(idx, Tensor):
            raise TypeError(f"idx: expected a tensor, got {type(idx).__name__}")
        if idx.ndim != 2:
            raise ValueError(f"idx: expected shape (B, T), got {tuple(idx.shape)}")

    def _check_fits(self, n_tokens: int) -> None:
        if n_tokens > self.cfg.block_size:
            raise ValueError(f"idx: {n_tokens} tokens do not fit block_size={self.cfg.block_size}; crop the context")

    def _check_targets(self, idx: Tensor, targets: Tensor) -> None:
        if not isinstance(targets, Tensor) or targets.shape != idx.shape:
            got = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise ValueError(f"targets: expected the shape of idx {tuple(idx.shape)}, got {got}")

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """idx (B, T) -> (logits (B, T, V), loss). The loss is None without targets.

        With targets (B, T) it is the mean cross-entropy in nats per token; targets of -100 do not count.
        """
        if targets is not None:
            self._check_targets(idx, targets)
        logits = linear(self.lm_head, self.hidden(idx))
        if targets is None:
            return logits, None
        return logits, ops.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """The loss of `forward`, without the (B * T, V) logits in memory all at once.

        A model with hooks, or with a forward that was replaced, is called instead, and its second result is the loss.
        The hooks of `fully_shard` are no reason: they gather the parameters for this, too.
        """
        reason = why_called(self, LanguageModel.forward)
        if is_sharded_alone(self, reason):
            return call_sharded(self, "_fused_loss", idx, targets)
        if reason is not None:
            say_once("the model is called for its loss, and the logits of all tokens are held at once", reason)
            return self(idx, targets)[1]
        return self._fused_loss(idx, targets)

    def _fused_loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        self._check_targets(idx, targets)
        return head_loss(self.lm_head, self.hidden(idx), targets)

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: Generators = None,
        cuda_graph: bool = False,
        stride: int | None = None,
        *,
        repetition_penalty: float = 1.0,
        attention_mask: Tensor | None = None,
        return_logprobs: bool = False,
    ) -> Any:
        """Continue idx (B, T) by `max_new_tokens` tokens: (B, T + max_new_tokens), in the dtype of idx.

        With `return_logprobs`, the pair of that and of the log-probability (B, max_new_tokens), float32, of each new
        token. See `fastgpt.generate.stream` for what the settings do.
        """
        draw: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
        draw |= {"repetition_penalty": repetition_penalty, "return_logprobs": return_logprobs}
        draw |= {"attention_mask": attention_mask, "cuda_graph": cuda_graph, "stride": stride}
        steps = stream(self, idx, max_new_tokens, **draw)
        if not return_logprobs:
            return torch.cat([idx, *steps], dim=1)
        pairs = list(steps)
        tokens = torch.cat([idx, *(token for token, _ in pairs)], dim=1)
        nothing = torch.empty(idx.shape[0], 0, device=idx.device, dtype=torch.float32)
        return tokens, torch.cat([nothing, *(logprob for _, logprob in pairs)], dim=1)

    @overload
    def generate_text(self, prompt: str, max_new_tokens: int = 500, **options: Any) -> str: ...

    @overload
    def generate_text(self, prompt: Sequence[str], max_new_tokens: int = 500, **options: Any) -> list[str]: ...

    def generate_text(self, prompt: str | Sequence[str], max_new_tokens: int = 500, **options: Any) -> str | list[str]:
        """`prompt` and its continuation: of `max_new_tokens` tokens, or up to a stop text, which is left out.

        options: `stop`, a text or several, of which the first to come ends the text, and those of `generate`:
        temperature, top_k, top_p, repetition_penalty, generator, cuda_graph, stride. A list of prompts gives a list of
        texts, each of which ends by itself; `generator` seeds one for each. The model needs its `tokenizer`, which
        `fastgpt.load` gives it. Raises ValueError naming the argument, as for a prompt that is empty or has a character
        that the tokenizer does not know.

        >>> model, tokenizer = fastgpt.load("runs/shakespeare")
        >>> print(model.generate_text("ROMEO. ", max_new_tokens=200, temperature=0.8))
        """
        from .generate_text import stream_text

        if self.tokenizer is None:
            raise ValueError(
                "model.tokenizer: is None, and text needs one; fastgpt.load reads a model with its tokenizer"
            )
        options["device"], options["layout"] = next(self.parameters()).device, self.layout
        pieces = stream_text(self, self.tokenizer, prompt, max_new_tokens, num_samples=1, **options)
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        for number, text in pieces:
            texts[number] += text
        return texts[0] if isinstance(prompt, str) else texts
