"""What the processes of tests/ops/test_dtensor.py and tests/test_modules_sharded.py do."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastgpt import GPT, GPTConfig, ops
from fastgpt.ops.linear import linear

C, V, ROWS = 6, 5, 8  # 2 processes have 3 and 2 rows of a (V, C) weight


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (ROWS, 3, C), "weight": (V, C), "bias": (V,), "positions": (4, C), "gain": (C,), "shift": (C,)}
    made = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    targets = torch.randint(0, V, (ROWS, 3), generator=generator)
    return made | {"targets": targets}


def loss_of(op: str, t: dict[str, Any]) -> Any:
    """A scalar that depends on all of the op's parameters: the mean over the rows."""
    match op:
        case "linear_cross_entropy":
            return ops.linear_cross_entropy(t["x"], t["weight"], t["targets"], bias=t["bias"])
        case "linear":
            return linear(t["x"], t["weight"], t["bias"]).sin().mean()
        case "embedding":
            return ops.embedding(t["targets"], t["weight"], t["positions"]).sin().mean()
        case "layer_norm":
            return ops.layer_norm(t["x"], t["gain"], t["shift"]).sin().mean()
        case "add_layer_norm":
            return ops.add_layer_norm(t["x"], t["x"].cos(), t["gain"], t["shift"])[0].sin().mean()
    raise ValueError(op)


PARAMETERS = ("weight", "bias", "positions", "gain", "shift")
OPS = ("linear_cross_entropy", "linear", "embedding", "layer_norm", "add_layer_norm")


def of_one_process(op: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of all rows, and its gradients."""
    t = {n: v.requires_grad_() if v.is_floating_point() else v for n, v in tensors().items()}
    loss = loss_of(op, t)
    loss.backward()
    return loss.detach(), gradients(t)


def assert_close(found: Any, expected: Any, *where: Any) -> None:
    torch.testing.assert_close(found, expected, msg=lambda said: f"{where}: {said}")


def gradients(t: dict[str, Any]) -> dict[str, Tensor]:
    return {name: t[name].grad for name in PARAMETERS if t[name].grad is not None}


def assert_own_rows_give_the_mean(rank: int, n: int) -> None:
    """Every op, with sharded and with replicated parameters: the mean of the losses, and the gradients, of all rows."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (n,))
    for placement, op in itertools.product((Shard(0), Replicate()), OPS):
        t: dict[str, Any] = tensors()
        for name in PARAMETERS:
            t[name] = distribute_tensor(t[name], mesh, [placement]).requires_grad_()
        for name in ("x", "targets"):
            t[name] = t[name].chunk(n)[rank]
        loss = loss_of(op, t)
        loss.backward()
        assert type(loss) is Tensor
        mean = loss.detach() / n
        dist.all_reduce(mean)
        assert_same(op, mean, gradients(t), placement)


def assert_same(op: str, loss: Tensor, found: dict[str, Any], placement: Any) -> None:
    expected, expected_gradients = of_one_process(op)
    assert_close(loss, expected, op)
    assert {grad.placements for grad in found.values()} == {(placement,)}
    whole = {name: grad.full_tensor() for name, grad in found.items()}
    assert_close(whole, expected_gradients, op, placement)


def losses(t: dict[str, Any], reduction: str) -> tuple[list[Any], list[Any]]:
    """Losses and accuracies by both ops, for targets of which a process has more than another one."""
    head = t["x"], t["weight"], t["targets"]
    fused = ops.linear_cross_entropy(*head, bias=t["bias"], reduction=reduction)
    rows = t["targets"], t["sizes"]
    plain = ops.cross_entropy(t["logits"].sin(), rows[0], weight=rows[1], reduction=reduction, label_smoothing=0.1)
    options: dict[str, Any] = {"reduction": reduction, "z_loss": 0.1, "softcap": 2.0, "token_weight": t["importance"]}
    more = (
        ops.linear_cross_entropy(*head, bias=t["bias"], return_accuracy=True, **options),
        ops.cross_entropy(t["logits"].cos(), rows[0], weight=rows[1], return_accuracy=True, **options),
    )
    log_probs = ops.linear_log_probs(*head[:2], t["targets"].clamp(min=0), bias=t["bias"], softcap=3.0)
    return [fused, plain, log_probs, *(loss for loss, _ in more)], [accuracy for _, accuracy in more]


def assert_losses_of_all_rows(rank: int, n: int) -> None:
    """Rows that are DTensors, in parts or whole: the losses of all rows, and the gradients of parameters and rows."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (n,))
    plain = tensors()
    plain["targets"][:2] = -100
    plain["x"], plain["targets"] = plain["x"].flatten(0, 1), plain["targets"].flatten()
    plain["logits"], plain["sizes"] = plain["x"][:, :V].clone(), torch.arange(1.0, V + 1, dtype=torch.float64)
    plain["importance"] = torch.arange(1.0, len(plain["targets"]) + 1, dtype=torch.float64)
    of_rows, names = ("x", "logits", "targets", "importance"), ("x", "logits", "weight", "bias")
    for rows, of_weights, reduction in itertools.product(
        (Shard(0), Replicate()), (Shard(0), Replicate()), ("mean", "sum", "none")
    ):
        t: dict[str, Any] = {}
        for name, tensor in plain.items():
            placement = rows if name in of_rows else of_weights
            t[name] = distribute_tensor(tensor, mesh, [placement]).requires_grad_(name in names)
        expected_of = {n: v.clone().requires_grad_(n in names) for n, v in plain.items()}
        found_all, accuracies = losses(t, reduction)
        expected_all, expected_accuracies = losses(expected_of, reduction)
        for accuracy, expected in zip(accuracies, expected_accuracies, strict=True):
            assert_close(accuracy.full_tensor(), expected, rows, reduction)
        for found, expected in zip(found_all, expected_all, strict=True):
            assert isinstance(found, DTensor)
            assert_close(found.full_tensor(), expected, rows, reduction)
            found.sum().backward()
            expected.sum().backward()
        for name in names:
            grad = t[name].grad
            assert grad.placements == t[name].placements
            assert_close(grad.full_tensor(), expected_of[name].grad, name, rows, of_weights, reduction)


def assert_wrong_rows_are_refused(rank: int, n: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (n,))
    t = tensors()
    plain = {"x": t["x"].flatten(0, 1), "weight": t["weight"], "targets": t["targets"].flatten()}
    importance = torch.ones(len(plain["targets"]))
    by_rows, whole = (
        {name: distribute_tensor(tensor, mesh, [placement]) for name, tensor in plain.items()}
        for placement in (Shard(0), Replicate())
    )
    for wrong, error, said in (
        ({"weight": plain["weight"]}, TypeError, "^weight: expected a DTensor on .*, got a plain tensor"),
        ({"targets": plain["targets"]}, TypeError, "^targets: expected a DTensor, as x is one"),
        ({"x": plain["x"]}, TypeError, "^x: expected a DTensor, as targets is one"),
        ({"targets": whole["targets"]}, ValueError, "^targets: expected the placements of x"),
        ({"token_weight": importance}, TypeError, "^token_weight: expected a DTensor, as x is one"),
        (
            {"token_weight": distribute_tensor(importance, mesh, [Replicate()])},
            ValueError,
            "^token_weight: expected the placements of x",
        ),
        (
            {"x": by_rows["x"].redistribute(placements=[Shard(1)]), "targets": whole["targets"]},
            ValueError,
            "^x: expected a DTensor that is replicated or sharded along its rows, got .*Shard",
        ),
    ):
        with pytest.raises(error, match=said):
            ops.linear_cross_entropy(**{**by_rows, **wrong})


CONFIG = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=8, dropout=0.0)


def build(tie_weights: bool) -> GPT:
    torch.manual_seed(0)
    return GPT(dataclasses.replace(CONFIG, tie_weights=tie_weights))


def by_fsdp(model: GPT) -> GPT:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def by_fsdp_with_its_loss_registered(model: GPT) -> GPT:
    from torch.distributed.fsdp import register_fsdp_forward_method

    model = by_fsdp(model)
    register_fsdp_forward_method(model, "loss")
    return model


def by_hand(model: GPT) -> GPT:
    """Without FSDP: each parameter becomes a DTensor, a tied one stays one."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh, made = init_device_mesh("cpu", (dist.get_world_size(),)), {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:
                made[parameter] = torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]))
            setattr(module, name, made[parameter])
    return model


def assert_sharded_models_agree(rank: int, n: int) -> None:
    """Both entrances of a sharded model: the loss and the gradients of the whole one, twice, and never all logits."""
    idx = torch.randint(0, 11, (4, 8), generator=torch.Generator().manual_seed(1))
    targets = idx.roll(-1, dims=1)
    own, own_targets = idx.chunk(n)[rank], targets.chunk(n)[rank]
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "FSDP2|.*_get_pg_default_device")
    for tie, shard in itertools.product((True, False), (by_fsdp, by_fsdp_with_its_loss_registered, by_hand)):
        whole = build(tie)
        expected = whole.loss(idx, targets)
        expected.backward()
        for entrance in ("loss", "forward"):
            model = shard(build(tie))
            for _ in range(2):
                model.zero_grad()
                with torch.no_grad():
                    model(own)
                loss = model.loss(own, own_targets) if entrance == "loss" else model(own, own_targets)[1]
                loss.backward()
                mean = loss.detach() / n
                dist.all_reduce(mean)
                where = shard.__name__, entrance, tie
                assert_close(mean, expected.detach(), *where)
                found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
                gradients = {name: p.grad for name, p in whole.named_parameters()}
                assert_close(found, gradients, *where)
