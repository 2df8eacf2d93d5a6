"""Modules that users wrap, hook, parametrise, prune, replace or shard: the model computes what its modules would."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from fastgpt import GPT, GPTConfig, modules
from fastgpt.baselines import MODELS
from fastgpt.generate import stream
from fastgpt.ops.backend import unavailable

CFG = GPTConfig(vocab_size=13, block_size=8, n_layer=2, n_head=2, n_embd=12, dropout=0.0)
IDX = torch.randint(13, (3, 8), generator=torch.Generator().manual_seed(1))
TARGETS = torch.randint(13, (3, 8), generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(modules, "_said", set())


def built(alter=None, kind: str = "gpt", cfg: GPTConfig = CFG):
    """A model in float64, away from its initial weights, altered; the same bits at every call."""
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
    """From `loss` and from `forward`, of one model built twice: what some modules do changes them."""
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


# ---- what users do to a module ----


class LoRA(nn.Module):
    """Low-rank adaptation of a linear, which it keeps."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        like = {"dtype": base.weight.dtype}
        self.a = nn.Parameter(torch.randn(rank, base.in_features, **like))
        self.b = nn.Parameter(torch.randn(base.out_features, rank, **like))

    @property
    def weight(self) -> torch.Tensor:  # as many wrappers have it: the base's alone
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.t() @ self.b.t()


class LoRASubclass(nn.Linear):
    """The other way to write it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2.0


class Quantised(nn.Module):
    """Integers and a scale; `weight` is a method, as in torch.ao."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.scale = float(base.weight.detach().abs().max()) / 127
        self.register_buffer("integers", (base.weight.detach() / self.scale).round().to(torch.int8))

    def weight(self) -> torch.Tensor:
        return self.integers.double() * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight())


class NoWeight(nn.Module):
    """An embedding or a linear behind a wrapper that has no `weight`, and does something of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.gain = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.gain


class Scaled(nn.Module):
    """A parametrisation."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 1.5 * weight


class Doubling(torch.Tensor):
    """A tensor with products of its own."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func not in (F.linear, F.embedding, F.layer_norm):
            return super().__torch_function__(func, types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return 2.0 * func(*args, **(kwargs or {}))


def doubling(module: nn.Module) -> None:
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Doubling))


def forward_of_its_own(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: 1.5 * forward(*args, **kwargs)


def call_of_its_own(module: nn.Module) -> None:
    cls = type(module)
    own = {"__call__": lambda self, *args, **kwargs: 1.5 * cls.__call__(self, *args, **kwargs)}
    module.__class__ = type("CallOfItsOwn", (cls,), own)


# Alterations of any module with a weight, in its place.
IN_PLACE = {
    "forward hook": lambda m: m.register_forward_hook(lambda m, args, out: 1.5 * out),
    "forward hook, always called": lambda m: m.register_forward_hook(lambda m, args, out: 1.5 * out, always_call=True),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda m, grads: (3.0 * grads[0],)),
    "own forward": forward_of_its_own,
    "own call": call_of_its_own,
    "parametrisation": lambda m: parametrize.register_parametrization(m, "weight", Scaled()),
    "pruning": lambda m: prune.random_unstructured(m, "weight", 0.5),
    "tensor subclass": doubling,
}
MATRICES = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "the former weight norm": nn.utils.weight_norm,
    "the former spectral norm": nn.utils.spectral_norm,
}
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
    for place, path in PLACES.items():
        kinds = dict(IN_PLACE)
        if not place.startswith("ln"):
            kinds |= MATRICES
        if "embedding" not in place:
            kinds |= LINEARS
        for name, alter in kinds.items():
            yield pytest.param(lambda model, a=alter, p=path: a(model.get_submodule(p)) and None, id=f"{place}, {name}")


def replaced(path: str, by):
    def alter(model: nn.Module) -> None:
        model.set_submodule(path, by(model.get_submodule(path)).double())

    return alter


def embedding(**options):
    """An embedding with options that are seldom used, with the weights of the one before it."""

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


@pytest.mark.filterwarnings("ignore:fastgpt", "ignore:.*weight_norm", "ignore:.*spectral_norm")
@pytest.mark.parametrize("alter", [*alterations(), *(pytest.param(a, id=name) for name, a in REPLACED.items())])
def test_loss_and_forward_are_what_the_modules_compute(alter) -> None:
    of_loss, of_forward = losses_and_gradients(alter)
    assert_same(of_loss, of_forward)
    model = built(alter)
    loss = F.cross_entropy(by_calls(model, IDX).flatten(0, 1), TARGETS.flatten())
    assert_same(of_loss, (loss.detach(), gradients(model, loss)))
    plain = built()
    assert not torch.equal(of_loss[0], plain.loss(IDX, TARGETS)) or any(
        not torch.allclose(grad, of_loss[1].get(name, torch.zeros(()).double()))
        for name, grad in gradients(plain, plain.loss(IDX, TARGETS)).items()
    ), "the alteration must be one that can be missed"


@pytest.mark.filterwarnings("ignore:fastgpt")
@pytest.mark.parametrize("place", ["token_embedding", "position_embedding"])
def test_sparse_gradients_of_an_embedding_stay_sparse(place: str) -> None:
    model = built(replaced(place, embedding(sparse=True)), cfg=dataclasses.replace(CFG, tie_weights=False))
    model.loss(IDX, TARGETS).backward()
    plain = built(cfg=dataclasses.replace(CFG, tie_weights=False))
    plain.loss(IDX, TARGETS).backward()
    sparse = model.get_submodule(place).weight.grad
    assert sparse.is_sparse
    torch.testing.assert_close(sparse.to_dense(), plain.get_submodule(place).weight.grad)


@pytest.mark.filterwarnings("ignore:fastgpt")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["forward hook", "own forward", "parametrisation", "tensor subclass"])
def test_both_entrances_of_every_model_agree(kind: str, name: str) -> None:
    embedding = "table" if kind == "bigram" else "token_embedding"
    for place in (embedding, "lm_head") if kind != "bigram" else (embedding,):
        alter = IN_PLACE[name]
        of_loss, of_forward = losses_and_gradients(lambda m, p=place, a=alter: a(m.get_submodule(p)) and None, kind)
        assert_same(of_loss, of_forward)
        assert not torch.equal(of_loss[0], built(kind=kind).loss(IDX, TARGETS).detach())


@pytest.mark.filterwarnings("ignore:fastgpt")
def test_a_wrapper_round_a_bigrams_head_counts() -> None:
    alter = replaced("lm_head", NoWeight)
    of_loss, of_forward = losses_and_gradients(alter, "bigram")
    assert_same(of_loss, of_forward)
    assert "lm_head.gain" in of_loss[1]


# ---- the model itself ----


class SoftCapped(GPT):
    """A forward of its own, as some give a GPT."""

    def forward(self, idx, targets=None):
        logits = 2.0 * torch.tanh(self.lm_head(self.hidden(idx)) / 2.0)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


class Reversed(GPT):
    """What a call gives is changed by the call itself."""

    def __call__(self, *args, **kwargs):
        return reversed_logits(self, args, super().__call__(*args, **kwargs))


class Backwards(GPT):
    """A `hidden` of its own: the model reads the block from right to left."""

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


@pytest.mark.filterwarnings("ignore:fastgpt")
@pytest.mark.parametrize("name", OF_THE_MODEL)
def test_a_model_that_was_changed_is_called_for_its_loss_and_its_text(name: str) -> None:
    alter = OF_THE_MODEL[name]
    of_loss, of_forward = losses_and_gradients(alter)
    assert_same(of_loss, of_forward)
    assert not torch.equal(of_loss[0], built().loss(IDX, TARGETS).detach())
    if name != "another hidden":  # with a cache, idx is not all there is to turn round
        assert torch.equal(built(alter).generate(IDX[:, :3], 9, temperature=0.0), by_recomputation(built(alter), 3, 9))


def by_recomputation(model, prompt_tokens: int, new: int) -> torch.Tensor:
    """Greedy generation with nothing but calls of the model."""
    model.eval()
    idx = IDX[:, :prompt_tokens]
    with torch.no_grad():
        for _ in range(new):
            logits, _ = model(idx[:, -CFG.block_size :])
            idx = torch.cat([idx, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return idx


@pytest.mark.filterwarnings("ignore:fastgpt")
@pytest.mark.parametrize("kind", MODELS)
def test_a_hook_on_any_model_reaches_its_text(kind: str) -> None:
    plain = built(kind=kind).generate(IDX[:, :3], 5, temperature=0.0)
    model = built(OF_THE_MODEL["forward hook"], kind)
    assert torch.equal(model.generate(IDX[:, :3], 5, temperature=0.0), by_recomputation(model, 3, 5))
    assert not torch.equal(model.generate(IDX[:, :3], 5, temperature=0.0), plain)


@pytest.mark.filterwarnings("ignore:fastgpt")
@pytest.mark.parametrize("name", [*(name for name in REPLACED if "over time" not in name), "all hooked"])
def test_generation_with_the_cache_runs_the_modules(name: str) -> None:
    alter = REPLACED.get(name, lambda model: [m.register_forward_hook(scaled_output) for m in parts(model)] and None)
    text = built(alter).generate(IDX[:, :3], 5, temperature=0.0)
    assert torch.equal(text, by_recomputation(built(alter), 3, 5))


def scaled_output(module, args, output):
    return 1.5 * output


def parts(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding, nn.LayerNorm))]


def test_a_hook_on_every_module_sees_every_module() -> None:
    seen: list[nn.Module] = []
    model = built()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        with pytest.warns(UserWarning, match="there are hooks on every module"):
            model.loss(IDX, TARGETS)
        of_loss = seen.copy()
        seen.clear()
        model(IDX, TARGETS)
        of_forward = seen.copy()
        seen.clear()
        model.generate(IDX[:, :2], 1)
    finally:
        handle.remove()
    for found in (of_loss, of_forward, seen):
        assert {id(m) for m in parts(model)} <= {id(m) for m in found}
        assert len(found) == len({id(m) for m in found}), "each once"


def test_the_flops_of_both_entrances_are_equal() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for of in (lambda m: m.loss(IDX, TARGETS), lambda m: m(IDX, TARGETS)[1]):
        with FlopCounterMode(display=False) as counter, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            of(built()).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# ---- what is said ----


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (REPLACED["lm_head, LoRA"], r"lm_head is called .* logits .*: its forward is .*test_modules\.LoRA\.forward"),
        (lambda m: m.lm_head.register_forward_hook(scaled_output) and None, "lm_head is called .*: it has hooks"),
        (lambda m: doubling(m.lm_head), "lm_head is called .*: its weight is a Doubling"),
        (
            lambda m: parametrize.register_parametrization(m.lm_head, "weight", Scaled()) and None,
            "lm_head is called .*: its weight is computed from something else",
        ),
        (REPLACED["token_embedding, {'max_norm': 0.5}"], "embeddings are .*: token_embedding: it has max_norm=0.5"),
        (REPLACED["position_embedding, no weight"], "embeddings are .*: position_embedding: its forward is .*NoWeight"),
        (REPLACED["ln_1, RMSNorm"], r"a norm \(RMSNorm\) is called .*: its forward is torch.*RMSNorm\.forward"),
        (OF_THE_MODEL["forward hook"], "the model is called for its loss, and the logits .*: it has hooks"),
    ],
    ids=["LoRA", "hook", "subclass", "parametrisation", "max_norm", "wrapper", "RMSNorm", "model"],
)
def test_what_is_not_fused_is_said_once(alter, said: str) -> None:
    model = built(alter).float()
    with pytest.warns(UserWarning, match=f"^fastgpt: .*{said}"):
        model.loss(IDX, TARGETS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.loss(IDX, TARGETS)
        built(alter).float().loss(IDX, TARGETS)


def test_nothing_is_said_of_a_plain_model_or_of_linears_that_fuse_with_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for alter in (None, REPLACED["lm_head, with a bias"], REPLACED["qkv, LoRA"]):
            built(alter).float().loss(IDX, TARGETS)
        built(REPLACED["lm_head, LoRA"]).float()(IDX, TARGETS)
        built(REPLACED["lm_head, LoRA"]).float().generate(IDX[:, :2], 2)


# ---- torch.compile, torch.export, torch.func ----


COMPILED = {
    "plain": None,
    "LoRA": REPLACED["lm_head, LoRA"],
    "RMSNorm": REPLACED["ln_1, RMSNorm"],
    "wrapped embedding": REPLACED["token_embedding, no weight"],
    "hooks": lambda m: [part.register_forward_hook(scaled_output) for part in parts(m)] and None,
    "parametrisation": lambda m: parametrize.register_parametrization(m.lm_head, "weight", Scaled()) and None,
    "partial": lambda m: setattr(m.lm_head, "forward", functools.partial(type(m.lm_head).forward, m.lm_head)),
    "model": OF_THE_MODEL["another forward"],
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_graph_breaks_and_silently(name: str) -> None:
    torch._dynamo.reset()
    model = built(COMPILED[name]).float()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastgpt")
        loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager")(IDX, TARGETS)
    found = gradients(model, loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = built(COMPILED[name]).float()
        expected = model(IDX, TARGETS)[1]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, gradients(model, expected))


class Loss(nn.Module):
    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx, targets):
        return self.model.loss(idx, targets)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_loss_is_the_fused_one(strict: bool) -> None:
    model = built().float()
    program = torch.export.export(Loss(model), (IDX, TARGETS), strict=strict)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert fused_ops() <= called
    torch.testing.assert_close(program.module()(IDX, TARGETS), model.loss(IDX, TARGETS))


def test_a_compiled_loss_is_the_fused_one() -> None:
    torch._dynamo.reset()
    called: set[str] = set()

    def look(graph, inputs):
        called.update(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(built().float().loss, fullgraph=True, backend=look)(IDX, TARGETS)
    assert fused_ops() <= called


def fused_ops() -> set[str]:
    if unavailable("native", "cpu"):
        pytest.skip("the ops of PyTorch's backend leave no mark in a graph")
    return {"fastgpt.embedding_native.default", "fastgpt.linear_cross_entropy_native.default"}


def test_other_weights_by_functional_call() -> None:
    """Tied ones are given once, and reach both places."""
    model, other = built(), built()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    params = {name: p.detach() for name, p in other.named_parameters()}

    def loss(params):
        return torch.func.functional_call(model, params, (IDX, TARGETS))[1]

    expected = other.loss(IDX, TARGETS)
    torch.testing.assert_close(loss(params), expected.detach())
    torch.testing.assert_close(torch.func.grad(loss)(params), gradients(other, expected))


def test_checkpointed_blocks() -> None:
    from torch.utils.checkpoint import checkpoint

    def alter(model) -> None:
        for block in model.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    plain, _ = losses_and_gradients(None)
    for found in losses_and_gradients(alter):
        assert_same(found, plain)


def test_blocks_compiled_one_by_one() -> None:
    torch._dynamo.reset()
    plain = built()
    expected = plain.loss(IDX, TARGETS)
    model = built()
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    model.lm_head.compile(backend="aot_eager", fullgraph=True)
    loss = model.loss(IDX, TARGETS)
    assert_same((loss.detach(), gradients(model, loss)), (expected.detach(), gradients(plain, expected)))


# ---- copies, files and dtypes ----


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_the_model_again(copied) -> None:
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
def test_a_folder_is_refused_what_it_cannot_tell_of(alter, said: str, tmp_path) -> None:
    cfg = dataclasses.replace(CFG, bias="RMSNorm" not in said)  # without biases, an RMSNorm has the same tensors
    with pytest.raises(ValueError, match=f"^model: .*{said}"):
        built(alter, cfg=cfg).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    hooked = built(lambda m: m.lm_head.register_forward_hook(lambda *args: None) and None)
    hooked.save_pretrained(tmp_path)
    assert torch.equal(GPT.from_pretrained(tmp_path).lm_head.weight, built().lm_head.weight.float())


# ---- tools that look for types ----


def test_the_parts_are_pytorchs_own_modules() -> None:
    kinds = {type(m) for m in built().modules() if not list(m.children())}
    assert kinds == {nn.Linear, nn.Embedding, nn.LayerNorm}


class ByType(nn.Module):
    """What a tool puts into the place of each nn.Linear."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x):
        return -self.base(x)


def put_in_place(model: nn.Module, kind: type, by) -> int:
    """What such tools do."""
    found = [(p, n, m) for p in model.modules() for n, m in p.named_children() if type(m) is kind]
    for parent, name, module in found:
        setattr(parent, name, by(module))
    return len(found)


@pytest.mark.filterwarnings("ignore:fastgpt")
@pytest.mark.parametrize("by", [ByType, LoRA], ids=["by type", "LoRA"])
def test_a_tool_that_replaces_linears_finds_all(by) -> None:
    def alter(model) -> None:
        assert put_in_place(model, nn.Linear, by) == 4 * CFG.n_layer + 1

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


# ---- several processes ----


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


def test_distributed_data_parallel(mesh) -> None:
    plain = built()
    expected = plain.loss(IDX, TARGETS)
    model = nn.parallel.DistributedDataParallel(built())
    loss = model(IDX, TARGETS)[1]
    found = gradients(model.module, loss)
    assert_same((loss.detach(), found), (expected.detach(), gradients(plain, expected)))


# ---- the cache ----


def test_the_cache_takes_its_dtype_from_the_keys() -> None:
    model = built().float().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = model.new_cache(3)
        pieces = [model.hidden(part, cache) for part in IDX.split([3, 1, 4], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model.hidden(IDX), rtol=0.1, atol=0.1)
    assert cache.tensor.dtype == torch.bfloat16 and cache.length == 8
    with torch.no_grad():
        cache = model.half().new_cache(3)
        model.hidden(IDX[:, :2], cache)
    assert cache.tensor.dtype == torch.float16
    with torch.no_grad(), torch.device("meta"):
        cache = GPT(CFG).new_cache(3)
        assert GPT(CFG).hidden(IDX.to("meta"), cache).device == cache.tensor.device == torch.device("meta")


def test_the_cache_says_what_it_is_not_for() -> None:
    model = built()
    with pytest.raises(RuntimeError, match=r"^cache: keeps no gradients; use it under torch\.no_grad\(\)"):
        model.hidden(IDX, model.new_cache(3))
    frozen = built().requires_grad_(False)
    torch.testing.assert_close(frozen.hidden(IDX, frozen.new_cache(3)), model.hidden(IDX))
    with torch.no_grad(), pytest.raises(ValueError, match=r"^cache: made for 2 sequences, got 3"):
        model.hidden(IDX, model.new_cache(2))
    with torch.inference_mode():
        cache = model.new_cache(3)
        pieces = [model.hidden(part, cache) for part in IDX.split([7, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model.hidden(IDX).detach())
