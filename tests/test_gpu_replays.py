"""Every op, forward and backward, in a CUDA graph that is replayed and on another stream: the bits of a plain call.

Both need a GPU. "again" is a plain second call, which runs everywhere, so that the tests themselves are tested.
"""

from __future__ import annotations

import pytest
import torch

from fastgpt import ops
from fastgpt.ops.backend import unavailable
from triton_checks import DEVICE

ON_GPU = DEVICE == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
B, H, T, D, V = (4, 12, 512, 64, 50257) if ON_GPU else (1, 2, 20, 16, 37)
C = H * D
NATIVE = ("embedding", "cross_entropy", "linear_cross_entropy")
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=DTYPE, device=DEVICE)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(V, shape, device=DEVICE)


def heads(length: int = T) -> torch.Tensor:
    return normal(B, length, H, D).transpose(1, 2)


# name: what makes the tensors, and the op on them; tensors of numbers get gradients
CASES = {
    "attention": (lambda: [heads(), heads(), heads()], ops.attention),
    "attention, dropout": (lambda: [heads() for _ in "qkv"], lambda *x: ops.attention(*x, dropout_p=0.2, seed=3)),
    "attention, short": (lambda: [normal(B, H, 40, 32) for _ in "qkv"], ops.attention),
    "attention, decode": (lambda: [heads(1), heads(), heads()], ops.attention),
    "layer_norm": (lambda: [normal(B * T, C), normal(C), normal(C)], ops.layer_norm),
    "add_layer_norm": (lambda: [normal(B * T, C), normal(B * T, C), normal(C), normal(C)], ops.add_layer_norm),
    "add_layer_norm, dropout": (
        lambda: [normal(B * T, C), normal(B * T, C), normal(C), normal(C)],
        lambda *x: ops.add_layer_norm(*x, dropout_p=0.2, seed=3),
    ),
    "embedding": (lambda: [tokens(B, T), normal(V, C), normal(T, C)], ops.embedding),
    "cross_entropy": (lambda: [normal(B * T, V), tokens(B * T)], ops.cross_entropy),
    "cross_entropy, characters": (lambda: [normal(B * T, 65), tokens(B * T) % 65], ops.cross_entropy),
    "linear_cross_entropy": (lambda: [normal(B * T, C), normal(V, C), tokens(B * T)], ops.linear_cross_entropy),
}


def again(run):
    return run


def replayed(run):
    """Captured once; a replay reads what the inputs hold by then."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles, and asks the device what may not be asked during a capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay():
        graph.replay()
        return results

    return replay


def on_another_stream(run):
    """Behind work that takes milliseconds there, so that a kernel on the default stream would come too early."""
    side = torch.cuda.Stream()
    slow = torch.randn(4096, 4096, device=DEVICE)

    def call():
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(4):
                slow @ slow
            results = run()
        torch.cuda.current_stream().wait_stream(side)
        return results

    return call


@pytest.mark.parametrize(
    "how", [again, pytest.param(replayed, marks=NEEDS_GPU), pytest.param(on_another_stream, marks=NEEDS_GPU)]
)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_have_the_bits_of_a_plain_call(name, how):
    if ON_GPU and name.startswith(NATIVE) and unavailable("native", "cuda"):
        pytest.skip(f"measured with the kernels of the extension: {unavailable('native', 'cuda')}")
    make, op = CASES[name]
    torch.manual_seed(0)
    first, second = make(), make()
    static = [x.clone().requires_grad_(x.is_floating_point()) for x in first]
    upstream: list[torch.Tensor] = []

    def run() -> list[torch.Tensor]:
        out = op(*static)
        out = out if isinstance(out, tuple) else (out,)
        if not upstream:
            upstream.extend(torch.randn_like(y) for y in out)
        grads = torch.autograd.grad(out, [x for x in static if x.requires_grad], upstream)
        return [*(y.detach() for y in out), *grads]

    def with_inputs(values, call) -> list[torch.Tensor]:
        with torch.no_grad():
            for x, value in zip(static, values, strict=True):
                x.copy_(value)
        return [y.clone() for y in call()]

    expected = [with_inputs(values, run) for values in (first, second)]
    assert not all(torch.equal(a, b) for a, b in zip(*expected, strict=True)), "the inputs make a difference"
    call = how(run)
    for values, wanted in zip((first, second, first), (*expected, expected[0]), strict=True):
        found = with_inputs(values, call)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
