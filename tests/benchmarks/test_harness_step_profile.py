"""The kinds of work that a step's time is divided into, on a step of our own and on made-up operations."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fastgpt import GPT, GPTConfig
from fastgpt.benchmarks.harness import step_profile


def operation(name: str, start: float = 0.0, caller=None, number: int = -1) -> SimpleNamespace:
    """As the profiler records it."""
    span = SimpleNamespace(start=start, end=start + 1)
    return SimpleNamespace(name=name, time_range=span, cpu_parent=caller, sequence_nr=number)


def kinds_of(*operations: SimpleNamespace) -> list[str]:
    kinds = step_profile._Kinds(operations)
    return [kinds.of(one) for one in operations]


@pytest.mark.parametrize(
    "name, kind",
    [
        ("aten::mm", "products"),
        ("aten::addmm", "products"),
        ("fastgpt::matmul_", "products"),
        ("fastgpt::linear_native", "products"),
        ("linear_cross_entropy_native", "loss"),
        ("aten::_log_softmax", "loss"),
        ("aten::nll_loss_forward", "loss"),
        ("aten::_softmax", "attention"),
        ("aten::bmm", "attention"),
        ("fastgpt::attention_native_backward", "attention"),
        ("aten::native_layer_norm", "norms"),
        ("fastgpt::add_layer_norm_native", "norms"),
        ("aten::gelu_backward", "activation"),
        ("fastgpt::embedding_native", "embedding"),
        ("aten::native_dropout", "dropout"),
        ("aten::copy_", "other"),
        ("aten::mul", "other"),
    ],
)
def test_a_name_has_a_kind(name, kind):
    assert kinds_of(operation(name)) == [kind]


def test_an_operation_that_says_nothing_has_the_kind_of_its_caller():
    loss = operation("linear_cross_entropy_native")
    attention = operation("aten::scaled_dot_product_attention")
    found = kinds_of(loss, operation("aten::sub", caller=loss), operation("aten::mm", caller=loss))
    assert found == ["loss", "loss", "products"]
    assert kinds_of(attention, operation("aten::matmul", caller=attention)) == ["attention", "attention"]


def test_a_gradient_has_the_kind_of_what_it_is_the_gradient_of_and_the_rest_is_the_optimizers():
    attention = operation("aten::scaled_dot_product_attention", 0.0)
    scaling = operation("aten::mul", 0.2, attention, number=7)
    engine = operation("autograd::engine::evaluate_function: MulBackward0", 5.0, number=7)
    gradient = operation("aten::mul", 5.1, engine)
    other = operation("autograd::engine::evaluate_function: AddBackward0", 7.0, number=8)
    clip, step = operation("aten::mul_", 9.0), operation("Optimizer.step#AdamW.step", 10.0)
    product = operation("aten::mm", 10.1, step)
    found = kinds_of(attention, scaling, engine, gradient, other, clip, step, product)
    assert found == [*["attention"] * 4, "other", *["optimizer"] * 3]


def test_the_kinds_of_a_step_add_up_to_the_step():
    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=16, dropout=0.1))
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(11, (2, 8))

    def step() -> None:
        model.loss(tokens, tokens).backward()
        optimizer.step()

    found = step_profile._profiled(step)
    assert sum(found[kind] for kind in step_profile.COLUMNS) >= 0.999 * found["profiled step"]
    used = {kind for kind in step_profile.COLUMNS if found[kind] > 0}
    assert used >= {"products", "attention", "norms", "dropout", "loss", "embedding", "optimizer", "python"}
    assert set(step_profile.ms_by_kind(lambda: F.gelu(torch.ones(4)), steps=2)) == set(found)
