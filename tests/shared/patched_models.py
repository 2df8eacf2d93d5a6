"""Models that others would write, to patch; and what a step of them gives, which is held to the error rule."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgpt.ops.accuracy import exact, max_error, tolerance
from helpers import integers

V = 61
IDS = integers(V, 2, 12)


def gpt2(*, dropout: float = 0.0, **settings):
    """A small GPT2LMHeadModel in training mode."""
    transformers = pytest.importorskip("transformers", minversion="5")
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    shape = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": V, "n_positions": 32}
    torch.manual_seed(0)
    config = transformers.GPT2Config(**(shape | dropouts | {"bos_token_id": 0, "eos_token_id": 0} | settings))
    return transformers.GPT2LMHeadModel(config).train()


def step(model: nn.Module, ids: Tensor = IDS, **kwargs) -> dict[str, Tensor]:
    """The loss of one call with labels, and the gradient of each parameter, by name."""
    model.zero_grad(set_to_none=True)
    return _backward(model, model(input_ids=ids, labels=ids, **kwargs).loss)


def exact_step(
    model, ids: Tensor = IDS, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs
) -> dict[str, Tensor]:
    """The same in float64, also the loss, for which transformers converts the logits to float32."""
    model = in_float64(model)
    kwargs = {name: exact(x) if isinstance(x, Tensor) else x for name, x in kwargs.items()}
    logits = model(input_ids=ids, **kwargs).logits
    targets = F.pad(ids, (0, 1), value=ignore_index)[:, 1:] if shift_labels is None else shift_labels
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index, reduction="sum")
    count = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return _backward(model, loss / count)


def _backward(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_within_rule(got: dict[str, Tensor], theirs: dict[str, Tensor], oracle: dict[str, Tensor]) -> None:
    """Each value's error is at most twice that of the model that is not patched, plus the tolerance of its dtype."""
    assert got.keys() == theirs.keys() == oracle.keys()
    for name, value in got.items():
        assert value.dtype == theirs[name].dtype, name
        allowed = 2 * max_error(theirs[name], oracle[name]) + tolerance(value.dtype, oracle[name])
        assert max_error(value, oracle[name]) <= allowed, name


def in_float64(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = exact(tensor)
    return model


class OwnAttention(nn.Module):
    def __init__(self, C: int, H: int, dropout: float) -> None:
        super().__init__()
        self.qkv, self.proj, self.n_head, self.dropout = nn.Linear(C, 3 * C), nn.Linear(C, C), H, dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(2, (self.n_head, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout)
        return self.proj(y.transpose(1, 2).flatten(2))


class OwnBlock(nn.Module):
    def __init__(self, C: int, H: int, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(C), OwnAttention(C, H, dropout), nn.LayerNorm(C)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class OwnModel(nn.Module):
    """A GPT of PyTorch's layers, as anyone would write it."""

    def __init__(self, C: int = 32, H: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(V, C), nn.Embedding(32, C)
        self.blocks = nn.ModuleList(OwnBlock(C, H, dropout) for _ in range(2))
        self.norm, self.head, self.criterion = nn.LayerNorm(C), nn.Linear(C, V), nn.CrossEntropyLoss()
        self.checkpointed = False

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.criterion(self.head(self.norm(x))[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def own_step(model: nn.Module, call=None) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss = (model if call is None else call)(IDS)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}
