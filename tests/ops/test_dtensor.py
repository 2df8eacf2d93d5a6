"""Ops whose parameters, or rows, are DTensors of two processes: the values and gradients of one process."""

from __future__ import annotations

import torch
import torch.distributed.tensor
import torch.nn.functional as F

import dtensor_processes as processes
from fastgpt.ops import dtensor, layer_norm
from fastgpt.ops.linear import linear


def test_parameters_are_gathered_and_get_the_mean_gradient(gloo) -> None:
    gloo(2, processes.assert_own_rows_give_the_mean)


def test_losses_of_rows_that_are_dtensors(gloo) -> None:
    gloo(2, processes.assert_losses_of_all_rows)


def test_wrong_rows_are_refused_by_name(gloo) -> None:
    gloo(1, processes.assert_wrong_rows_are_refused)


def test_a_compiled_op_does_not_look_at_the_modules_that_are_loaded(monkeypatch) -> None:
    """Dynamo would copy their table while threads of DDP import: "dictionary changed size during iteration"."""
    monkeypatch.setattr(dtensor, "sys", None)
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    compiled = torch.compile(lambda: (linear(x, weight), layer_norm(x, x[0])), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled()[0], F.linear(x, weight))
    torch._dynamo.reset()
