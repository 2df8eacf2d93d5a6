"""A tiny model trained for ten steps: losses and weights are the same on the Triton and the torch backend."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import GPT, GPTConfig, model, ops, use_backend
from fastgpt.ops import backend

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON_OPS = ("attention", "layer_norm", "add_layer_norm")


@pytest.fixture
def prefer_triton(monkeypatch):
    """Let "auto" take Triton on this device, as it does on CUDA: on a CPU it is otherwise taken only when named."""
    for op in TRITON_OPS:
        monkeypatch.setitem(backend.PREFERENCE[op], DEVICE, ("triton", "torch"))
    float32_too = dataclasses.replace(backend._registry["attention", "triton"], unproved=backend._always)
    monkeypatch.setitem(backend._registry, ("attention", "triton"), float32_too)


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


class OpsCalled(TorchDispatchMode):
    """The names of the ops that are called, of those below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "joined"), [("triton", 0), ("torch", 2)])
def test_the_gradient_of_qkv_is_written_in_place_not_joined_from_three(prefer_triton, name, joined):
    """In each of the two blocks, autograd would copy the gradients of q, k and v into one tensor."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=13, block_size=10, n_layer=2, n_head=2, n_embd=12, dropout=0.0)).to(DEVICE)
    tokens = torch.randint(13, (2, 11), device=DEVICE)
    with use_backend(name if name == "torch" else "auto"), OpsCalled() as called:
        gpt.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    assert called.names.count("aten::cat") == joined
    assert called.names.count("fastgpt::attention_packed_backward") == 2 - joined
    if name == "triton":
        assert not {"aten::clone", "aten::copy_", "aten::stack"} & set(called.names)


class Casts(TorchDispatchMode):
    """Counts the casts of activations, which have three dimensions; the gradients of matrices have two."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default and args[0].ndim == 3
        return func(*args, **(kwargs or {}))


def autocast_step(gpt, dtype):
    tokens = torch.arange(20, device=DEVICE).view(2, 10) % 13
    gpt.zero_grad()
    torch.manual_seed(5)
    with Casts() as casts:
        with torch.autocast(DEVICE, dtype):
            loss = gpt.loss(tokens, tokens)
        loss.backward()
    return casts.count, [loss.detach(), *(p.grad for p in gpt.parameters())]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norms_write_what_their_linear_reads_under_autocast(prefer_triton, monkeypatch, dtype, dropout):
    """Each of the 2 L + 1 norms saves a cast forward and one backward, and no bit of a result changes."""
    torch.manual_seed(0)
    cfg = GPTConfig(vocab_size=13, block_size=10, n_layer=2, n_head=2, n_embd=12, dropout=dropout)
    gpt = GPT(cfg).to(DEVICE)
    casts, results = autocast_step(gpt, dtype)
    monkeypatch.setattr(model, "read_dtype", lambda *args: None)  # every norm gives what F.layer_norm would
    casts_before, results_before = autocast_step(gpt, dtype)
    assert casts_before - casts == 2 * (2 * cfg.n_layer + 1)
    assert all(torch.equal(a, b) for a, b in zip(results, results_before, strict=True))


def test_a_reader_with_hooks_gets_what_the_norm_gives(prefer_triton):
    gpt = GPT(GPTConfig(vocab_size=13, block_size=10, n_layer=1, n_head=2, n_embd=12)).to(DEVICE)
    seen = {}
    see = lambda name: lambda module, args: seen.update({name: args[0].dtype})  # noqa: E731
    with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad():
        gpt(torch.zeros(1, 4, dtype=torch.long, device=DEVICE))
        for name in ("blocks.0.attn", "blocks.0.mlp.up", "lm_head"):
            gpt.get_submodule(name).register_forward_pre_hook(see(name))
        gpt(torch.zeros(1, 4, dtype=torch.long, device=DEVICE))
    assert set(seen.values()) == {torch.float32} and len(seen) == 3
