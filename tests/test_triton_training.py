"""A tiny model trained for ten steps: losses and weights are the same on the Triton and the torch backend."""

import pytest
import torch

from fastgpt import GPT, GPTConfig, ops, use_backend
from fastgpt.ops import backend

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON_OPS = ("attention", "layer_norm", "add_layer_norm")


@pytest.fixture
def prefer_triton(monkeypatch):
    """Let "auto" take Triton on this device, as it does on CUDA: on a CPU it is otherwise taken only when named."""
    for op in TRITON_OPS:
        monkeypatch.setitem(backend.PREFERENCE[op], DEVICE, ("triton", "torch"))


def train(steps: int = 10, **model_changes) -> tuple[list[float], list[torch.Tensor]]:
    torch.manual_seed(0)
    cfg = {"vocab_size": 13, "block_size": 10, "n_layer": 2, "n_head": 2, "n_embd": 12, "dropout": 0.0}
    model = GPT(GPTConfig(**(cfg | model_changes))).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(13, (2, 11), generator=generator).to(DEVICE)
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(
    "changes", [{}, {"n_layer": 1, "norm": "post", "bias": False, "is_causal": False}], ids=["pre", "post"]
)
def test_ten_steps_are_the_torch_backends(prefer_triton, changes):
    ours = train(**changes)
    with use_backend("torch"):
        torchs = train(**changes)
    torch.testing.assert_close(ours[0], torchs[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(ours[1], torchs[1], atol=1e-4, rtol=0)


def test_a_model_with_dropout_trains_and_repeats_with_its_seed(prefer_triton):
    first, second = (train(steps=3, n_layer=1, dropout=0.2) for _ in range(2))
    assert first[0] == second[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_generation_with_a_cache_is_the_torch_backends(prefer_triton):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=13, block_size=150, n_layer=1, n_head=2, n_embd=16)).to(DEVICE).eval()
    prompt = torch.randint(13, (1, 140), device=DEVICE)  # long enough for the decoding kernel
    ours = model.generate(prompt, 5, temperature=0.0)
    with use_backend("torch"):
        assert torch.equal(ours, model.generate(prompt, 5, temperature=0.0))


def test_auto_takes_triton_for_the_models_ops(prefer_triton):
    x = torch.ones(3, 8, device=DEVICE)
    assert ops.explain("layer_norm", x, x[0]).backend == "triton"
    assert ops.explain("add_layer_norm", x, x, x[0]).backend == "triton"
    assert ops.explain("attention", x[None, None], x[None, None], x[None, None]).backend == "triton"
