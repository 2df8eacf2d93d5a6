"""Activation checkpointing: blocks are computed again in backward, with the same bits, and less is kept until then."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastgpt import GPT, GPTConfig
from fastgpt.baselines import MODELS
from fastgpt.config import ConfigError, TrainConfig
from fastgpt.training.graph import is_graphed
from fastgpt.training.step import check_checkpointing

CFG = GPTConfig(vocab_size=13, block_size=16, n_layer=4, n_head=2, n_embd=16, dropout=0.1)
IDX = torch.randint(13, (3, 16), generator=torch.Generator().manual_seed(1))


def model_of(cfg: GPTConfig, checkpointed: bool) -> GPT:
    torch.manual_seed(0)
    model = GPT(cfg)
    model.activation_checkpointing = checkpointed
    return model


def kept_bytes(loss_of) -> tuple[torch.Tensor, int]:
    """The loss, and the bytes of the tensors that autograd keeps for its backward pass, each once."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of()
    return loss, sum(kept.values())


@pytest.mark.parametrize("changes", [{}, {"norm": "post"}, {"feed_forward": False}, {"dropout": 0.0}], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_the_bits_are_the_same_and_less_is_kept(changes: dict, dtype: torch.dtype | None) -> None:
    found = []
    for checkpointed in (False, True):
        model = model_of(dataclasses.replace(CFG, **changes), checkpointed)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss, n_bytes = kept_bytes(lambda model=model: model.loss(IDX, IDX))
        loss.backward()
        found.append((loss, [p.grad for p in model.parameters()], torch.rand(3), n_bytes))
    (loss, grads, drawn, n_bytes), (loss_again, grads_again, drawn_again, fewer) = found
    assert torch.equal(loss, loss_again) and torch.equal(drawn, drawn_again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
    assert 0 < fewer < 0.6 * n_bytes


def test_blocks_run_once_where_there_is_no_backward() -> None:
    model, calls = model_of(CFG, True), []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model.loss(IDX, IDX)
    model.eval().loss(IDX, IDX).backward()
    assert len(calls) == 2
    model.train().loss(IDX, IDX).backward()
    assert len(calls) == 4


def test_the_setting_is_of_training_alone(tmp_path) -> None:
    model_of(CFG, True).save_pretrained(tmp_path)
    assert not GPT.from_pretrained(tmp_path).activation_checkpointing


def test_models_without_blocks_and_graphs_refuse_it() -> None:
    cfg = TrainConfig(activation_checkpointing=True)
    for kind, model in MODELS.items():
        if kind == "gpt":
            check_checkpointing(model, cfg)
            continue
        with pytest.raises(ConfigError, match=rf"^activation_checkpointing: .*model {kind} has none; switch it off$"):
            check_checkpointing(model, cfg)
        check_checkpointing(model, TrainConfig())
    assert not is_graphed(cfg, "cuda") and is_graphed(TrainConfig(), "cuda")
    with pytest.raises(ConfigError, match=r"^cuda_graph: expected false with activation_checkpointing, got True"):
        TrainConfig(activation_checkpointing=True, cuda_graph=True)
