"""FlopCounterMode sees the registered ops: as many operations as the unfused computation has."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastgpt import GPT, GPTConfig, ops
from fastgpt.ops.linear import linear


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("freeze", [(), ("lm_head",), ("blocks", "position_embedding", "ln_f"), ("blocks.0",)], ids=str)
def test_both_entrances_of_the_model_cost_the_same(freeze: tuple[str, ...]) -> None:
    """Forward alone, and forward with backward, whatever is frozen."""
    model = GPT(GPTConfig(vocab_size=29, block_size=16, n_layer=2, n_head=2, n_embd=16, tie_weights=False))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(freeze or ("nothing",)))
    idx, targets = torch.randint(29, (2, 3, 11))
    head = 2 * 33 * 16 * 29
    with torch.no_grad():
        assert flops(lambda: model.loss(idx, targets)) == flops(lambda: model(idx, targets)) > head
    assert flops(lambda: model.loss(idx, targets)) == flops(lambda: model(idx, targets))
    fused, unfused = (
        flops(lambda: model.loss(idx, targets).backward()),
        flops(lambda: model(idx, targets)[1].backward()),
    )
    assert fused == unfused > flops(lambda: model.loss(idx, targets)) + head


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_linear_cross_entropy(backend: str) -> None:
    x, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    targets = torch.randint(11, (2, 5))
    product = 2 * 10 * 8 * 11
    loss = ops.linear_cross_entropy(x, weight, targets, backend=backend)
    assert flops(lambda: ops.linear_cross_entropy(x, weight, targets, backend=backend)) == product
    assert flops(lambda: loss.backward(retain_graph=True)) == 2 * product
    assert flops(lambda: loss.backward()) == 3 * product, "a second pass makes the logits once more"


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_linear_log_probs(backend: str) -> None:
    x, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    targets = torch.randint(11, (2, 5))
    product = 2 * 10 * 8 * 11
    log_probs = ops.linear_log_probs(x, weight, targets, backend=backend)
    assert flops(lambda: ops.linear_log_probs(x, weight, targets, backend=backend)) == product
    assert flops(lambda: log_probs.sum().backward()) == 3 * product, "it makes the logits once more"


def test_linear() -> None:
    x, weight = torch.randn(1, 8), torch.randn(11, 8)
    with torch.no_grad():
        assert flops(lambda: linear(x, weight)) == flops(lambda: F.linear(x, weight)) == 2 * 8 * 11
    grads = torch.ops.fastgpt.linear_native_backward
    grad = torch.randn(1, 11)
    assert (
        flops(lambda: grads(grad, x, weight, True)) == 2 * flops(lambda: grads(grad, None, weight, False)) == 4 * 8 * 11
    )
    assert flops(lambda: torch.ops.fastgpt.matmul_(weight, x.t(), torch.empty(11, 1), False)) == 2 * 8 * 11


def test_attention_on_the_triton_backend() -> None:
    """As PyTorch counts it: two products, and five in backward."""
    q, k, v = (torch.randn(1, heads, 6, 16, requires_grad=True) for heads in (4, 2, 2))
    product = 2 * 4 * 6 * 6 * 16
    try:
        out = ops.attention(q, k, v, backend="triton")
    except ops.backend.BackendError as error:
        pytest.skip(str(error))
    assert flops(lambda: ops.attention(q, k, v, backend="triton")) == 2 * product
    assert flops(lambda: out.sum().backward()) == 5 * product
    for asked, products in ((q, 3), (k, 3), (v, 2)):  # the scores, the gradient of the weights but for v, its own
        inputs = [x if x is asked else x.detach() for x in (q, k, v)]
        out = ops.attention(*inputs, backend="triton")
        assert flops(lambda out=out: out.sum().backward()) == products * product


@pytest.mark.parametrize("order", ["fastgpt, torch.utils.flop_counter", "torch.utils.flop_counter, fastgpt"])
def test_whatever_is_imported_first(order: str) -> None:
    code = f"""
import sys, torch, {order}
from fastgpt import ops
from torch.utils.flop_counter import FlopCounterMode
assert [type(finder).__name__ for finder in sys.meta_path].count("_RegisterAfterImport") == 0
x, weight = torch.randn(2, 3), torch.randn(5, 3)
with FlopCounterMode(display=False) as counter:
    ops.linear_cross_entropy(x, weight, torch.tensor([0, 4]))
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "60", done.stderr
