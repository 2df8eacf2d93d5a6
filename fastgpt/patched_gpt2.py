"""What `fastgpt.patch` puts into transformers' GPT-2 besides its layers: the sum before a norm, and the loss.

A class here is a base that is put before transformers' own class. Its forward computes what theirs does, and falls back
to theirs where anything is unusual. What theirs does is known by the names that its code uses: a version of
transformers whose code uses a name that is not listed here is left alone.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .modules import LINEAR, why_called
from .nn import LayerNorm, takes_head

_LAYER_NORM = LayerNorm.forward

# The names in the code of their forward. All of the first set must be there, and none but those of both.
_OF_BLOCK = {"ln_1", "attn", "ln_2", "mlp"}, {"hasattr", "ValueError", "ln_cross_attn", "crossattention"}
_OF_HEAD = (
    {"transformer", "lm_head", "loss_function", "config", "vocab_size", "CausalLMOutputWithCrossAttentions"},
    {"last_hidden_state", "slice_logits_to_keep", "isinstance", "int", "slice", "cache", "past_key_values"}
    | {"hidden_states", "attentions", "cross_attentions"},
)
_ARGUMENTS_OF_BLOCK = ["self", "hidden_states", "cache", "attention_mask", "encoder_hidden_states"]


def why_unknown(cls: type[nn.Module], known: tuple[set[str], set[str]]) -> str | None:
    """Why the forward of `cls` is not the one that is computed here, or None."""
    names = set(inspect.unwrap(cls.forward).__code__.co_names)
    strange = sorted(names - known[0] - known[1]) + sorted(known[0] - names)
    if strange:
        return f"the code of this version's {cls.__name__} is not known (it differs in {', '.join(strange)})"
    return None


def why_block_unknown(cls: type[nn.Module]) -> str | None:
    """Why transformers' GPT2Block, `cls`, is left alone, or None."""
    arguments = list(inspect.signature(cls.forward).parameters)
    if arguments[:5] != _ARGUMENTS_OF_BLOCK or arguments[-1] != "kwargs":
        return f"this version's {cls.__name__} takes other arguments"
    return why_unknown(cls, _OF_BLOCK)


def why_head_unknown(cls: type[nn.Module]) -> str | None:
    """Why transformers' GPT2LMHeadModel, `cls`, is left alone, or None."""
    return why_unknown(cls, _OF_HEAD)


class FusedBlock(nn.Module):
    """Before GPT2Block: the sum of the stream and the attention's output, and the norm after it, are one op."""

    ln_1: Any
    ln_2: Any
    attn: Any
    mlp: Any

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        encoder = args[2] if len(args) > 2 else kwargs.get("encoder_hidden_states")
        norm = self.ln_2
        if encoder is not None or why_called(norm, _LAYER_NORM, "weight", "bias"):
            return super().forward(hidden_states, *args, **kwargs)
        named = dict(
            zip(("cache", "attention_mask", "encoder_hidden_states", "encoder_attention_mask"), args, strict=False)
        )
        named |= kwargs
        for unused in ("encoder_hidden_states", "encoder_attention_mask"):
            named.pop(unused, None)
        attended = self.attn(self.ln_1(hidden_states), **named)[0]  # (B, T, C)
        normed, hidden_states = ops.add_layer_norm(attended, hidden_states, norm.weight, norm.bias, norm.eps)
        return hidden_states + self.mlp(normed)


class FusedLoss(nn.Module):
    """Before GPT2LMHeadModel: a training step's loss is computed without ever holding all the logits.

    Where the model is in training mode and gets labels, `logits` of its output is None. In evaluation mode, without
    labels, with `logits_to_keep`, `return_dict=False`, a loss function or a head that is not the usual one, everything
    is as without FastGPT.
    """

    transformer: Any
    lm_head: Any
    config: Any
    loss_function: Any
    _theirs: tuple[list[str], Any, Any]  # the arguments of their forward, the class of its output, their usual loss

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        from transformers.loss.loss_utils import ForCausalLMLoss
        from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

        cls._theirs = (
            list(inspect.signature(cls.forward).parameters)[1:],
            CausalLMOutputWithCrossAttentions,
            ForCausalLMLoss,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments, make_output, _ = self._theirs
        given = dict(zip(arguments, args, strict=False)) | kwargs
        labels = given.pop("labels", None)
        if labels is None or not self._is_usual(given):
            return super().forward(*args, **kwargs)
        given = {name: value for name, value in given.items() if name not in ("logits_to_keep", "return_dict")}
        outputs = self.transformer(**given)
        hidden, head = outputs.last_hidden_state, self.lm_head  # (B, T, C)
        if takes_head(head, hidden):
            logits, loss = None, causal_loss(hidden, head, labels, **given)
        else:
            logits = head(hidden)
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **given)
        kept = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return make_output(loss=loss, logits=logits, **kept)

    def _is_usual(self, given: dict[str, Any]) -> bool:
        """Whether `causal_loss` computes the loss of a call with labels, whose logits nobody asked for."""
        keeps_all = isinstance(given.get("logits_to_keep", 0), int) and given.get("logits_to_keep", 0) == 0
        return_dict = given.get("return_dict")
        makes_output = self.config.return_dict and (return_dict is None or return_dict)
        return bool(
            self.training
            and keeps_all
            and makes_output
            and self.loss_function is self._theirs[2]
            and why_called(self.lm_head, LINEAR, "weight", "bias") is None
        )


def causal_loss(
    hidden: Tensor,
    head: nn.Linear,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **unused: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss of head(hidden): hidden (B, T, C), labels (B, T) -> a scalar, float32.

    Each token's target is the label after it. With `num_items_in_batch`, the number of targets in all micro batches of
    a step, the sum of the losses is divided by it; otherwise the loss is the mean over the targets.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.to(hidden.device).reshape(hidden.shape[:-1])
    reduction = "mean" if num_items_in_batch is None else "sum"
    with _float32_loss(hidden):
        options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction}
        loss = ops.linear_cross_entropy(hidden, head.weight, targets, bias=head.bias, **options).float()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def _float32_loss(hidden: Tensor) -> Any:
    """Theirs converts the logits of a model in 16 bits to float32. Under autocast the op's loss is float32, too."""
    if hidden.dtype in (torch.float16, torch.bfloat16):
        return torch.autocast(hidden.device.type, dtype=hidden.dtype)
    return contextlib.nullcontext()
