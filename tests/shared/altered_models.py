"""Small models, altered as users alter them: modules that are wrapped, hooked, parametrised, pruned or replaced.

`IN_PLACE`, `MATRICES` and `LINEARS` alter one module, `REPLACED` puts another module in its place, and `OF_THE_MODEL`
alters the model's own methods. `built` makes the model; `by_calls` and `by_recomputation` say what it should compute.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from fastgpt import GPT, GPTConfig
from fastgpt.baselines import MODELS

CFG = GPTConfig(vocab_size=13, block_size=8, n_layer=2, n_head=2, n_embd=12, dropout=0.0)
IDX = torch.randint(13, (3, 8), generator=torch.Generator().manual_seed(1))
TARGETS = torch.randint(13, (3, 8), generator=torch.Generator().manual_seed(2))


def built(alter=None, kind: str = "gpt", cfg: GPTConfig = CFG):
    """A model in float64 with random weights, altered by `alter`. Every call gives the same weights, bit by bit."""
    torch.manual_seed(0)
    model = MODELS[kind](cfg).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    if alter is not None:
        model = alter(model) or model
    return model


def by_calls(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """The logits of a pre-norm GPT, every module called and nothing fused."""
    x = model.token_embedding(idx) + model.position_embedding(torch.arange(idx.shape[1]))
    for block in model.blocks:
        x = x + block.attn(block.ln_1(x))
        x = x + block.mlp(block.ln_2(x))
    return model.lm_head(model.ln_f(x))


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.to_dense() if grad.is_sparse else grad for name, grad in found.items()}


def losses_and_gradients(alter, kind: str = "gpt") -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """The loss and its gradients by `loss` and by `forward`, each on a new model: some modules change when used."""
    found = []
    for of in (lambda m: m.loss(IDX, TARGETS), lambda m: m(IDX, TARGETS)[1]):
        model = built(alter, kind)
        loss = of(model)
        found.append((loss.detach(), gradients(model, loss)))
    return found


def assert_same(a, b) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=1e-10, atol=1e-12)
    assert a[1].keys() == b[1].keys() and len(a[1]) > 0
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


class LoRA(nn.Module):
    """Low-rank adaptation: the linear it wraps, plus a product of two narrow matrices."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        like = {"dtype": base.weight.dtype}
        self.a = nn.Parameter(torch.randn(rank, base.in_features, **like))
        self.b = nn.Parameter(torch.randn(base.out_features, rank, **like))

    @property
    def weight(self) -> torch.Tensor:  # as in many wrappers, it is the weight of the base alone
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.t() @ self.b.t()


class LoRASubclass(nn.Linear):
    """An adaptation that is a subclass of Linear, not a wrapper around one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2.0


class Quantised(nn.Module):
    """A linear whose weight is kept as integers and a scale. Its `weight` is a method, as in torch.ao."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.scale = float(base.weight.detach().abs().max()) / 127
        self.register_buffer("integers", (base.weight.detach() / self.scale).round().to(torch.int8))

    def weight(self) -> torch.Tensor:
        return self.integers.double() * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight())


class NoWeight(nn.Module):
    """A wrapper around an embedding or a linear. It has no `weight`, and multiplies the result."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.gain = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.gain


class Scaled(nn.Module):
    """A parametrisation that multiplies the weight."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 1.5 * weight


class Doubling(torch.Tensor):
    """A tensor subclass that doubles what is computed with it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func not in (F.linear, F.embedding, F.layer_norm):
            return super().__torch_function__(func, types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return 2.0 * func(*args, **(kwargs or {}))


def doubling(module: nn.Module) -> None:
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Doubling))


def replace_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: 1.5 * forward(*args, **kwargs)


def replace_call(module: nn.Module) -> None:
    cls = type(module)
    own = {"__call__": lambda self, *args, **kwargs: 1.5 * cls.__call__(self, *args, **kwargs)}
    module.__class__ = type("CallOfItsOwn", (cls,), own)


# For any module that has a weight.
IN_PLACE = {
    "forward hook": lambda m: m.register_forward_hook(lambda m, args, out: 1.5 * out),
    "forward hook, always called": lambda m: m.register_forward_hook(lambda m, args, out: 1.5 * out, always_call=True),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda m, grads: (3.0 * grads[0],)),
    "own forward": replace_forward,
    "own call": replace_call,
    "parametrisation": lambda m: parametrize.register_parametrization(m, "weight", Scaled()),
    "pruning": lambda m: prune.random_unstructured(m, "weight", 0.5),
    "tensor subclass": doubling,
}
# For linears and embeddings, whose weights are matrices.
MATRICES = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "the former weight norm": nn.utils.weight_norm,
    "the former spectral norm": nn.utils.spectral_norm,
}
# For modules whose input is differentiable: linears and norms.
LINEARS = {
    "pre-hook": lambda m: m.register_forward_pre_hook(lambda m, args: (0.5 * args[0],)),
    "backward hook": lambda m: m.register_full_backward_hook(lambda m, grads, out: (3.0 * grads[0],)),
}
PLACES = {
    "lm_head": "lm_head",
    "token_embedding": "token_embedding",
    "position_embedding": "position_embedding",
    "ln_1": "blocks.1.ln_1",
    "ln_2": "blocks.0.ln_2",
    "ln_f": "ln_f",
    "qkv": "blocks.0.attn.qkv",
    "proj": "blocks.1.attn.proj",
    "up": "blocks.0.mlp.up",
    "down": "blocks.1.mlp.down",
}


def alterations():
    """Each alteration at each place that allows it, as pytest's parameters."""
    for place, path in PLACES.items():
        kinds = dict(IN_PLACE)
        if not place.startswith("ln"):
            kinds |= MATRICES
        if "embedding" not in place:
            kinds |= LINEARS
        for name, alter in kinds.items():
            yield pytest.param(lambda model, a=alter, p=path: a(model.get_submodule(p)) and None, id=f"{place}, {name}")


def replaced(path: str, by):
    """An alteration that replaces the module at `path` by `by` of that module."""

    def alter(model: nn.Module) -> None:
        model.set_submodule(path, by(model.get_submodule(path)).double())

    return alter


def embedding(**options):
    """For `replaced`: an embedding with these options and the weights of the embedding that it replaces."""

    def by(old: nn.Embedding) -> nn.Embedding:
        new = nn.Embedding(old.num_embeddings, old.embedding_dim, **options).double()
        new.weight = old.weight
        return new

    return by


def with_bias(old: nn.Linear) -> nn.Linear:
    new = nn.Linear(old.in_features, old.out_features).double()
    new.weight = old.weight
    return new


def to_own_class(old: nn.Linear) -> nn.Linear:
    old.__class__ = LoRASubclass
    return old


REPLACED = {
    "lm_head, LoRA": replaced("lm_head", LoRA),
    "lm_head, a subclass": replaced("lm_head", to_own_class),
    "lm_head, two layers": replaced("lm_head", lambda old: nn.Sequential(nn.Tanh(), old)),
    "lm_head, with a bias": replaced("lm_head", with_bias),
    "lm_head, quantised": replaced("lm_head", Quantised),
    "lm_head, no weight": replaced("lm_head", NoWeight),
    "token_embedding, no weight": replaced("token_embedding", NoWeight),
    "position_embedding, no weight": replaced("position_embedding", NoWeight),
    "qkv, LoRA": replaced("blocks.0.attn.qkv", LoRA),
    "ln_1, RMSNorm": replaced("blocks.1.ln_1", lambda old: nn.RMSNorm(12)),
    "ln_f, RMSNorm": replaced("ln_f", lambda old: nn.RMSNorm(12)),
    "ln_2, LayerNorm with another eps": replaced("blocks.0.ln_2", lambda old: nn.LayerNorm(12, eps=0.5)),
    "ln_f, LayerNorm without weight": replaced("ln_f", lambda old: nn.LayerNorm(12, elementwise_affine=False)),
    "ln_f, over time and features": replaced("ln_f", lambda old: nn.LayerNorm((8, 12))),
    "ln_f, nothing": replaced("ln_f", lambda old: nn.Identity()),
}
for options in ({"padding_idx": 3}, {"max_norm": 0.5}, {"scale_grad_by_freq": True}):
    REPLACED[f"token_embedding, {options}"] = replaced("token_embedding", embedding(**options))
for options in ({"padding_idx": 3}, {"max_norm": 0.5}):
    REPLACED[f"position_embedding, {options}"] = replaced("position_embedding", embedding(**options))


class SoftCapped(GPT):
    """A GPT with another forward: its logits are bounded."""

    def forward(self, idx, targets=None):
        logits = 2.0 * torch.tanh(self.lm_head(self.hidden(idx)) / 2.0)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


class Reversed(GPT):
    """A GPT with another `__call__`, which changes the result of forward."""

    def __call__(self, *args, **kwargs):
        return reversed_logits(self, args, super().__call__(*args, **kwargs))


class Backwards(GPT):
    """A GPT with another `hidden`: it reads the block from right to left."""

    def hidden(self, idx, cache=None):
        return super().hidden(idx.flip(1), cache)


def to_class(cls):
    def alter(model):
        model.__class__ = cls

    return alter


def reversed_logits(module, args, result):
    return (result[0].flip(-1), *(None if loss is None else 2.0 * loss for loss in result[1:]))


OF_THE_MODEL = {
    "another forward": to_class(SoftCapped),
    "another hidden": to_class(Backwards),
    "another call": to_class(Reversed),
    "forward hook": lambda m: m.register_forward_hook(reversed_logits) and None,
    "own forward": lambda m, f=reversed_logits: setattr(
        m, "forward", lambda *args: f(m, args, type(m).forward(m, *args))
    ),
}


def by_recomputation(model, prompt_tokens: int, new: int) -> torch.Tensor:
    """The prompt and `new` greedy tokens, each from a call of the whole model: what generation should give."""
    model.eval()
    idx = IDX[:, :prompt_tokens]
    with torch.no_grad():
        for _ in range(new):
            logits, _ = model(idx[:, -CFG.block_size :])
            idx = torch.cat([idx, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return idx


def scaled_output(module, args, output):
    return 1.5 * output


def parts(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding, nn.LayerNorm))]
