"""Tools that copy, convert, save, quantise or shard modules, or find them by their types, work on the model."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations, prune

from altered_models import (
    CFG,
    IDX,
    REPLACED,
    TARGETS,
    LoRA,
    assert_same,
    built,
    by_recomputation,
    gradients,
    losses_and_gradients,
)
from fastgpt import GPT
from fastgpt.generate import stream

pytestmark = pytest.mark.usefixtures("nothing_said_yet")


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_keep_the_weights_and_the_tied_head(copied) -> None:
    model = built()
    other = copied(model)
    assert other.lm_head.weight is other.token_embedding.weight
    assert torch.equal(other.loss(IDX, TARGETS), model.loss(IDX, TARGETS))
    other.load_state_dict(model.state_dict())
    assert {"lm_head.weight", "token_embedding.weight"} <= model.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = built().to(dtype)
    assert model.lm_head.weight is model.token_embedding.weight
    torch.testing.assert_close(model.loss(IDX, TARGETS), model(IDX, TARGETS)[1])
    text = model.generate(IDX[:, :3], 8, temperature=0.0)
    without = torch.cat([IDX[:, :3], *stream(model, IDX[:, :3], 8, temperature=0.0, use_cache=False)], dim=1)
    assert torch.equal(text, without)


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (REPLACED["lm_head, LoRA"], "parameter lm_head.a is not part of a GPT"),
        (REPLACED["lm_head, with a bias"], "parameter lm_head.bias is not part of a GPT"),
        (REPLACED["ln_2, LayerNorm with another eps"], r"blocks\.0\.ln_2 is .*eps=0\.5"),
        (REPLACED["token_embedding, {'max_norm': 0.5}"], r"token_embedding is .*max_norm=0\.5"),
        (lambda m: prune.random_unstructured(m.lm_head, "weight", 0.5) and None, "lm_head.weight is missing"),
        (
            lambda m: parametrizations.weight_norm(m.lm_head) and None,
            "parameter lm_head.parametrizations.* is not part",
        ),
        (
            lambda m: setattr(m.lm_head, "weight", nn.Parameter(m.lm_head.weight.detach().clone())),
            "parameter lm_head.weight is not part of a GPT",
        ),
        (lambda m: m.blocks.append(nn.Identity()) and None, r"blocks\.2 is Identity\(\), and .* nothing;"),
        (REPLACED["ln_f, RMSNorm"], r"ln_f is RMSNorm\(.*, and .* LayerNorm\("),
    ],
    ids=["LoRA", "bias", "eps", "max_norm", "pruned", "parametrised", "untied", "more blocks", "RMSNorm"],
)
def test_an_altered_model_that_a_folder_could_not_restore_is_not_saved(alter, said: str, tmp_path) -> None:
    cfg = dataclasses.replace(CFG, bias="RMSNorm" not in said)  # without biases, an RMSNorm has the same tensors
    with pytest.raises(ValueError, match=f"^model: .*{said}"):
        built(alter, cfg=cfg).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    hooked = built(lambda m: m.lm_head.register_forward_hook(lambda *args: None) and None)
    hooked.save_pretrained(tmp_path)
    assert torch.equal(GPT.from_pretrained(tmp_path).lm_head.weight, built().lm_head.weight.float())


def test_the_parts_are_pytorchs_own_modules() -> None:
    kinds = {type(m) for m in built().modules() if not list(m.children())}
    assert kinds == {nn.Linear, nn.Embedding, nn.LayerNorm}


class ByType(nn.Module):
    """The module that a tool puts in the place of each nn.Linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x):
        return -self.base(x)


def replace_all(model: nn.Module, kind: type, by) -> int:
    """Replace every module of this type, as such tools do; return how many there were."""
    found = [(p, n, m) for p in model.modules() for n, m in p.named_children() if type(m) is kind]
    for parent, name, module in found:
        setattr(parent, name, by(module))
    return len(found)


@pytest.mark.filterwarnings("ignore:fastgpt")
@pytest.mark.parametrize("by", [ByType, LoRA], ids=["by type", "LoRA"])
def test_a_tool_that_replaces_linears_finds_all(by) -> None:
    def alter(model) -> None:
        assert replace_all(model, nn.Linear, by) == 4 * CFG.n_layer + 1

    of_loss, of_forward = losses_and_gradients(alter)
    assert_same(of_loss, of_forward)
    added = [name for name, _ in built(alter).named_parameters() if name.endswith((".a", ".b"))]
    assert set(added) <= of_loss[1].keys()
    assert torch.equal(built(alter).generate(IDX[:, :3], 5, temperature=0.0), by_recomputation(built(alter), 3, 5))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantisation_converts_all_linears() -> None:
    model = built().float().eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    kinds = [type(m) for m in quantised.modules()]
    assert kinds.count(torch.ao.nn.quantized.dynamic.Linear) == 4 * CFG.n_layer + 1 and nn.Linear not in kinds
    loss, (logits, of_forward) = quantised.loss(IDX, TARGETS), quantised(IDX, TARGETS)
    assert torch.equal(loss, of_forward) and logits.shape == (3, 8, 13)
    assert 0.0 < abs(float(loss - model.loss(IDX, TARGETS))) < 0.2
    assert quantised.generate(IDX[:, :3], 8).shape == (3, 11)


@pytest.fixture
def mesh():
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:fastgpt", "ignore:FSDP2")
@pytest.mark.parametrize("sharded", ["blocks", "model", "both", "lm_head"])
def test_fully_sharded(sharded: str, mesh) -> None:
    from torch.distributed.fsdp import fully_shard

    def alter(model) -> None:
        for block in model.blocks if sharded in ("blocks", "both") else []:
            fully_shard(block, mesh=mesh)
        if sharded == "lm_head":
            fully_shard(model.lm_head, mesh=mesh)
        if sharded in ("model", "both"):
            fully_shard(model, mesh=mesh)

    cfg = dataclasses.replace(CFG, tie_weights=False)
    plain = built(cfg=cfg)
    expected = plain.loss(IDX, TARGETS)
    expected_gradients = gradients(plain, expected)
    for of in (lambda m: m.loss(IDX, TARGETS), lambda m: m(IDX, TARGETS)[1]):
        model = built(alter, cfg=cfg)
        loss = of(model)
        found = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients(model, loss).items()}
        assert_same((loss.detach(), found), (expected.detach(), expected_gradients))
    text = model.generate(IDX[:, :3], 8, temperature=0.0)
    assert torch.equal(text, plain.generate(IDX[:, :3], 8, temperature=0.0))


@pytest.mark.filterwarnings("ignore:fastgpt", "ignore:FSDP2")
def test_a_hook_beside_those_of_fully_shard_sees_the_loss(mesh) -> None:
    from torch.distributed.fsdp import fully_shard

    model, seen = fully_shard(built(), mesh=mesh), []
    model.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    assert model.loss(IDX, TARGETS) is seen[0]
    assert "_fused_loss" not in vars(model)


def test_distributed_data_parallel(mesh) -> None:
    plain = built()
    expected = plain.loss(IDX, TARGETS)
    model = nn.parallel.DistributedDataParallel(built())
    loss = model(IDX, TARGETS)[1]
    found = gradients(model.module, loss)
    assert_same((loss.detach(), found), (expected.detach(), gradients(plain, expected)))
