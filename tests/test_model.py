"""The model against an independent one written on the oracle's formulas, its options, its counts, and its learning."""

from __future__ import annotations

import dataclasses
import math
import sys

import pytest
import torch

from fastgpt import GPT, GPTConfig
from fastgpt.config import PRESETS, ConfigError
from fastgpt.ops import reference

TINY = {"vocab_size": 13, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 12, "dropout": 0.0}


def tiny(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**TINY, **changes})).double()
    with torch.no_grad():  # away from the initial values: zero biases and unit gains hide mistakes
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def batch(cfg: GPTConfig, B: int = 3, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    idx = torch.randint(cfg.vocab_size, (B, cfg.block_size), generator=g)
    return idx, torch.randint(cfg.vocab_size, (B, cfg.block_size), generator=g)


def activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "gelu":
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))
    if kind == "gelu_tanh":
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    return x.clamp_min(0.0) ** (2 if kind == "relu2" else 1)


def oracle_logits(cfg: GPTConfig, w: dict[str, torch.Tensor], idx: torch.Tensor) -> torch.Tensor:
    """The GPT as the papers write it, one formula after the other."""

    def linear(x, name):
        y = x @ w[f"{name}.weight"].t()
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def norm(x, name):
        return reference.layer_norm(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def attend(x, name):
        B, T, C = x.shape
        q, k, v = linear(x, f"{name}.qkv").split(C, dim=-1)
        q, k, v = (t.reshape(B, T, cfg.n_head, -1).transpose(1, 2) for t in (q, k, v))
        return linear(
            reference.attention(q, k, v, is_causal=cfg.is_causal).transpose(1, 2).reshape(B, T, C), f"{name}.proj"
        )

    def feed_forward(x, name):
        return linear(activation(linear(x, f"{name}.up"), cfg.activation), f"{name}.down")

    x = reference.embedding(idx, w["token_embedding.weight"], w["position_embedding.weight"])
    for layer in range(cfg.n_layer):
        for ln, branch, f in (("ln_1", "attn", attend), ("ln_2", "mlp", feed_forward))[: 1 + cfg.feed_forward]:
            prefix = f"blocks.{layer}."
            out = f(norm(x, prefix + ln) if cfg.norm == "pre" else x, prefix + branch)
            x = x + out if cfg.residual else out
            x = norm(x, prefix + ln) if cfg.norm == "post" else x
    x = norm(x, "ln_f") if cfg.norm == "pre" else x
    head = w["token_embedding.weight"] if cfg.tie_weights else w["lm_head.weight"]
    return x @ head.t()


OPTIONS = [
    {"norm": norm, "residual": residual, "is_causal": causal}
    for norm in ("pre", "post", "none")
    for residual in (True, False)
    for causal in (True, False)
]
OPTIONS += [{"feed_forward": False, "norm": n, "residual": r} for n in ("pre", "post", "none") for r in (True, False)]
OPTIONS += [{"activation": a} for a in ("gelu", "gelu_tanh", "relu", "relu2")]
OPTIONS += [{"bias": False}, {"tie_weights": False}, {"bias": False, "norm": "post"}, {"n_head": 1}, {"n_layer": 1}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_and_gradients_equal_the_oracles(options):
    model = tiny(**options)
    idx, targets = batch(model.cfg)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = oracle_logits(model.cfg, weights, idx)
    expected_loss = reference.cross_entropy(expected.flatten(0, 1), targets.flatten())
    expected_loss.backward()

    logits, loss = model(idx, targets)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    for path in (loss, model.loss(idx, targets)):
        torch.testing.assert_close(path, expected_loss, rtol=1e-10, atol=1e-12)
        model.zero_grad()
        path.backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, weights[name].grad, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: n + m)


def test_causal_model_does_not_see_the_future_and_the_other_does():
    for is_causal in (True, False):
        model = tiny(is_causal=is_causal)
        idx, _ = batch(model.cfg)
        changed = idx.clone()
        changed[:, 5] = (changed[:, 5] + 1) % model.cfg.vocab_size
        before = (model(idx)[0] - model(changed)[0])[:, :5].abs().max()
        assert (before == 0.0) == is_causal


@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_dropout_acts_in_training_only_and_everywhere(norm, monkeypatch):
    """In training two passes differ, in eval they do not; and every one of the four places drops."""
    model = tiny(dropout=0.5, norm=norm)
    idx, _ = batch(model.cfg)
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])
    # Embedding and branches: with p near 1 almost all of the stream is 0 before the head.
    model = tiny(dropout=0.999, norm="none", bias=False)
    assert (model.hidden(idx) == 0.0).double().mean() > 0.9
    seen = []
    ops_attention = sys.modules["fastgpt.ops.attention"]  # `fastgpt.ops.attention` is the function in it
    real = ops_attention.attention
    monkeypatch.setattr(ops_attention, "attention", lambda *a, **k: seen.append(k["dropout_p"]) or real(*a, **k))
    tiny(dropout=0.25).train()(idx)
    tiny(dropout=0.25).eval()(idx)
    assert seen == [0.25, 0.25, 0.0, 0.0]


def test_dropout_repeats_with_the_seed():
    model = tiny(dropout=0.3).train()
    idx, targets = batch(model.cfg)
    losses = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        losses.append(model.loss(idx, targets).item())
    assert losses[0] == losses[1] != losses[2]


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    cfg = GPTConfig(vocab_size=500, block_size=128, n_layer=8, n_head=4, n_embd=256)
    for name, p in GPT(cfg).named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.ndim == 1:
            assert (p == 1.0).all(), name
        else:
            scaled = name.endswith(("attn.proj.weight", "mlp.down.weight"))
            expected = 0.02 / math.sqrt(2 * cfg.n_layer) if scaled else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(p.mean().item()) < expected / 50, name


def test_tied_weights_are_one_tensor():
    tied, untied = tiny(), tiny(tie_weights=False)
    assert tied.lm_head.weight is tied.token_embedding.weight
    assert untied.lm_head.weight is not untied.token_embedding.weight
    assert untied.num_parameters() - tied.num_parameters() == tied.token_embedding.weight.numel()


# nanoGPT's `get_num_params()` leaves the position table out; these are its counts for the same shapes.
COUNTS = {"gpt2": 123_653_376, "gpt2-medium": 353_774_592, "gpt2-large": 772_719_360, "gpt2-xl": 1_555_972_800}


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_parameter_counts_equal_nanogpts(name):
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(name))
    assert model.num_parameters(non_embedding=True) == COUNTS[name]
    assert model.num_parameters() == COUNTS[name] + 1024 * model.cfg.n_embd


def test_parameter_counts_of_the_character_models_equal_nanogpts():
    for name, expected in (("shakespeare-char-cpu", 795_904), ("shakespeare-char", 10_646_784)):
        model = GPT(GPTConfig.preset(name, vocab_size=65))
        assert model.num_parameters(non_embedding=True) == expected


def test_presets_have_the_shapes_of_their_names():
    char = GPTConfig.preset("shakespeare-char")
    assert (char.n_layer, char.n_head, char.n_embd, char.block_size, char.dropout) == (6, 6, 384, 256, 0.2)
    cpu = GPTConfig.preset("shakespeare-char-cpu")
    assert (cpu.n_layer, cpu.n_head, cpu.n_embd, cpu.block_size, cpu.dropout) == (4, 4, 128, 64, 0.0)
    assert set(PRESETS) == {"shakespeare-char", "shakespeare-char-cpu", *COUNTS}
    assert GPTConfig.preset("gpt2", dropout=0.1).dropout == 0.1


def test_overfits_a_single_batch():
    torch.manual_seed(0)
    cfg = GPTConfig(vocab_size=65, block_size=32, n_layer=2, n_head=2, n_embd=64, dropout=0.0)
    model = GPT(cfg)
    idx, targets = batch(cfg, B=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model.loss(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model(idx, targets)[1].item() < 0.05


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"n_embd": 13}, "n_embd"),
        ({"n_head": 0}, "n_head"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"block_size": -1}, "block_size"),
        ({"n_layer": 1.5}, "n_layer"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"bias": 1}, "bias"),
        ({"activation": "swish"}, "activation"),
        ({"norm": True}, "norm"),
        ({"n_head": 1, "n_embd": 512}, "n_embd"),
    ],
    ids=str,
)
def test_bad_configurations_name_the_setting(changes, name):
    with pytest.raises(ConfigError, match=f"^{name}: expected"):
        GPTConfig(**{**TINY, **changes})


def test_unknown_preset_and_setting():
    with pytest.raises(ConfigError, match="preset: expected one of"):
        GPTConfig.preset("gpt3")
    with pytest.raises(ConfigError, match="n_heads"):
        GPTConfig.preset("gpt2", n_heads=3)
    with pytest.raises(TypeError, match="cfg"):
        GPT(dataclasses.asdict(GPTConfig()))


def test_bad_calls_name_the_argument():
    model = tiny()
    idx, targets = batch(model.cfg)
    T, V = model.cfg.block_size, model.cfg.vocab_size
    with pytest.raises(ValueError, match=r"idx: .*block_size=8"):
        model(torch.zeros(1, T + 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="idx: expected shape"):
        model(idx[0])
    with pytest.raises(TypeError, match="tokens: expected int64"):
        model(idx.float())
    with pytest.raises(IndexError, match=rf"tokens: value {V} at position \(1, 2\)"):
        wrong = idx.clone()
        wrong[1, 2] = V
        model(wrong)
    for call in (model, model.loss):
        with pytest.raises(ValueError, match="targets: expected the shape of idx"):
            call(idx, targets[:, :-1])
        with pytest.raises(IndexError, match=r"targets: value -1"):
            call(idx, torch.full_like(targets, -1))


def test_ignored_targets_do_not_count():
    model = tiny()
    idx, targets = batch(model.cfg)
    targets[:, 3:] = -100
    expected = model(idx[:, :3].contiguous(), targets[:, :3].contiguous())[1]
    torch.testing.assert_close(model.loss(idx, targets), expected)


def test_compiles_without_graph_breaks():
    model = tiny()
    idx, targets = batch(model.cfg)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(idx, targets), model.loss(idx, targets))


def test_autocast_keeps_the_loss_in_float32():
    model = tiny().float()
    idx, targets = batch(model.cfg)
    expected = model.loss(idx, targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(idx, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("held", ["token_embedding.weight", "lm_head.weight"])
def test_tied_weight_that_is_loaded_under_one_of_its_names(held: str) -> None:
    """Files of safetensors hold a shared tensor once: whichever name they have it by, it is the weight of both."""
    saved = tiny().state_dict()
    (other,) = {"token_embedding.weight", "lm_head.weight"} - {held}
    expected = saved.pop(other)
    with torch.device("meta"):
        model = GPT(GPTConfig(**TINY))
    assert model.load_state_dict(saved, strict=False, assign=True).missing_keys == [other]
    assert model.lm_head.weight is model.token_embedding.weight
    assert torch.equal(model.lm_head.weight, expected)
