"""Generation by a graph, for which there is a stand-in on the CPU: the tokens without it, or those and the reason."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from fastgpt import GPT, GPTConfig, cuda_graph
from fastgpt.baselines import build_model
from fastgpt.cache import KVCache
from fastgpt.cli import main
from fastgpt.config import ConfigError
from fastgpt.draw import DrawSettings
from fastgpt.draw import draw as draw_token
from fastgpt.generate import stream
from fastgpt.generate_graph import CHECKED_TOKENS, GraphedTokens
from fastgpt.ops import backend
from stand_in_graph import DoingNothing, Failing, StandIn

CONFIG = GPTConfig(vocab_size=29, block_size=16, n_layer=2, n_head=2, n_embd=24, dropout=0.5)


def built(cfg: GPTConfig = CONFIG, kind: str = "gpt", dtype=torch.float32):
    model = build_model(cfg, 3, kind).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)  # untrained logits are too flat to tell two contexts apart
    return model


def tokens(model, prompt, n, seed=None, **options):
    if seed is not None:
        options["generator"] = torch.Generator().manual_seed(seed)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return model.generate(prompt, n, **options)


@pytest.mark.parametrize("prompt_tokens", [1, 5, 15, 16, 30])
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"seed": 1}, {"top_k": 5, "top_p": 0.9, "temperature": 1.5}],
    ids=["greedy", "seeded", "from PyTorch's generator"],
)
def test_the_tokens_are_those_without_a_graph(use_recorder, prompt_tokens, options):
    """From a prompt, past the end of the window, where all of it is computed again without a graph."""
    stand_in, model = use_recorder(StandIn()), built()
    for batch_size in (1, 3):
        stand_in.recordings = stand_in.replays = 0
        prompt = torch.randint(29, (batch_size, prompt_tokens), generator=torch.Generator().manual_seed(prompt_tokens))
        expected = tokens(model, prompt, 24, **options)
        assert torch.equal(tokens(model, prompt, 24, **options, cuda_graph=True), expected)
        in_window = max(0, 16 - prompt_tokens)  # the tokens after the prompt's own that a cache of 16 serves
        assert (stand_in.recordings, stand_in.replays) == (min(1, in_window), in_window)
    assert len(expected[:, prompt_tokens:].unique()) > 3


def test_the_logits_are_those_of_the_whole_text(use_recorder):
    """In float64, from the cache that the graph alone has written into."""
    use_recorder(StandIn())
    model, logits = built(dtype=torch.float64).eval(), []
    draw = lambda x: (logits.append(x.clone()), draw_token(x, DrawSettings(0.0)))[1]  # noqa: E731
    step = GraphedTokens(model, draw, None, cuda_graph.recorder(torch.device("cpu")))
    step._tokens_to_check = 0
    text, cache = torch.randint(29, (2, 12)), model.new_cache(2)
    with torch.no_grad():
        step(text[:, :3], cache)
        for i in range(3, 12):
            step(text[:, i : i + 1], cache)
        whole = model(text)[0]
    assert step.reason is None and cache.length == 12
    torch.testing.assert_close(torch.stack([logits[0], *logits[2:]], dim=1), whole[:, 2:], rtol=1e-10, atol=1e-10)


def test_on_triton(use_recorder, monkeypatch):
    """The kernel that reads the length from a tensor and appends, in a cache that it splits."""
    pytest.importorskip("triton")
    use_recorder(StandIn())
    monkeypatch.setitem(backend.PREFERENCE["attention"], "cpu", ("triton", "torch"))
    key = ("attention", "triton")  # of float32, too
    measured = dataclasses.replace(backend._registry[key], unproved=lambda *args, **kwargs: None)
    monkeypatch.setitem(backend._registry, key, measured)
    model = built(GPTConfig(vocab_size=13, block_size=200, n_layer=2, n_head=2, n_embd=32))
    prompt = torch.randint(13, (1, 140))
    expected = tokens(model, prompt, 9, seed=2)
    from fastgpt.triton_kernels import attention_cached

    calls, decode_ = [], attention_cached.decode_
    monkeypatch.setattr(attention_cached, "decode_", lambda *args: (calls.append(args[3].shape), decode_(*args))[1])
    assert torch.equal(tokens(model, prompt, 9, seed=2, cuda_graph=True), expected)
    assert calls and set(calls) == {torch.Size([1, 2, 200, 16])}


def recorded(run, kind):
    """The object of this kind that the recorded function works on."""
    return next(cell.cell_contents for cell in run.__closure__ if isinstance(cell.cell_contents, kind))


class StaleLength(StandIn):
    """A graph that has the length of its recording in it."""

    def again(self, run, kept):
        position = recorded(run, GraphedTokens)._position
        now = position.clone()
        position.fill_(3)
        super().again(run, kept)
        position.copy_(now)


class OtherDraw(StandIn):
    """Right logits, and a wrong token."""

    def again(self, run, kept):
        super().again(run, kept)
        kept[0][1].add_(1)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (StaleLength, "it does not do what is done without it: "),
        (OtherDraw, "it does not do what is done without it: it draws another token from the same logits"),
        (DoingNothing, "it does not do what is done without it: "),
        (Failing, "operation not permitted when stream is capturing$"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_wrong_graph_is_not_used_and_the_reason_is_said_once(use_recorder, wrong, reason, temperature):
    model, prompt = built(), torch.zeros(1, 3, dtype=torch.int64)
    expected = tokens(model, prompt, 10, seed=1, temperature=temperature)
    stand_in = use_recorder(wrong())
    with pytest.warns(UserWarning, match="fastgpt: generation goes on without a CUDA graph: " + reason) as caught:
        generator = torch.Generator().manual_seed(1)
        got = model.generate(prompt, 10, temperature, generator=generator, cuda_graph=True)
    assert torch.equal(got, expected)
    assert len(caught) == 1 and stand_in.recordings == 1 and stand_in.replays <= 2


class Forgetting(StandIn):
    """A graph whose attention does not append to the cache."""

    def again(self, run, kept):
        cache = recorded(run, KVCache)
        before = cache.tensor.clone()
        super().again(run, kept)
        cache.tensor.copy_(before)


def test_what_is_added_to_the_cache_is_checked(use_recorder):
    use_recorder(Forgetting())
    model, prompt = built(), torch.zeros(1, 3, dtype=torch.int64)
    expected = tokens(model, prompt, 10, temperature=0.0)
    with pytest.warns(UserWarning, match="what it adds to the cache"):
        assert torch.equal(model.generate(prompt, 10, temperature=0.0, cuda_graph=True), expected)


def test_a_model_whose_logits_are_nan_is_named(use_recorder):
    """As without a graph: after the tokens that are checked, and among them."""
    use_recorder(StandIn())
    for position in (5, 12):
        broken = GPT(CONFIG)
        with torch.no_grad():
            broken.position_embedding.weight[position] = torch.nan
        with pytest.raises(ValueError, match=f"^model: its logits for position {position + 1}: in row 0, one is nan"):
            broken.generate(torch.zeros(2, 3, dtype=torch.int64), 13, cuda_graph=True)


def test_tokens_are_the_callers_own(use_recorder):
    """A replay writes into the same tensors, and the tokens before must not change."""
    use_recorder(StandIn())
    prompt = torch.zeros(2, 2, dtype=torch.int64)
    model, copies = built(), []
    yielded = []
    for token in stream(model, prompt, 12, generator=torch.Generator().manual_seed(0), cuda_graph=True):
        yielded.append(token)
        copies.append(token.clone())
    assert all(torch.equal(a, b) for a, b in zip(yielded, copies, strict=True))
    assert len(yielded) > CHECKED_TOKENS + 2


def test_a_model_that_is_trained_between_two_tokens(use_recorder):
    use_recorder(StandIn())
    results = []
    for by_graph in (False, True):
        model, drawn = built(), []
        for token in stream(model, torch.zeros(1, 2, dtype=torch.int64), 12, 0.0, cuda_graph=by_graph):
            assert model.training
            drawn.append(int(token))
            with torch.no_grad():
                model.lm_head.weight.mul_(-1.0)
        results.append(drawn)
    assert results[0] == results[1] and len(set(results[0])) > 2


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda: built(kind="lstm"), "its cache, a .*, cannot keep its length on the device"),
        (lambda: hooked(built()), "blocks.0.mlp: it has hooks, which a graph would not run"),
    ],
)
def test_models_that_have_no_graph(use_recorder, prepare, reason):
    stand_in, model = use_recorder(StandIn()), prepare()
    prompt = torch.zeros(1, 3, dtype=torch.int64)
    expected = model.generate(prompt, 6, temperature=0.0)
    with pytest.warns(UserWarning, match="generation goes on without a CUDA graph: " + reason):
        assert torch.equal(model.generate(prompt, 6, temperature=0.0, cuda_graph=True), expected)
    assert stand_in.recordings == 0


def hooked(model):
    model.blocks[0].mlp.register_forward_hook(lambda *args: None)
    return model


def test_under_autocast_there_is_no_graph(use_recorder):
    use_recorder(StandIn())
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="autocast is on"):
        built().generate(torch.zeros(1, 3, dtype=torch.int64), 6, cuda_graph=True)


def test_without_a_gpu_it_is_refused(text_file, tmp_path, capsys):
    model, prompt = built(), torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"^cuda_graph: needs a CUDA device, and this is 'cpu'; switch it off"):
        stream(model, prompt, 5, cuda_graph=True)
    out = str(tmp_path / "run")
    sizes = ["--block-size", "8", "--n-layer", "1", "--n-head", "1", "--n-embd", "8", "--max-steps", "1"]
    assert main(["train", "--data", str(text_file), "--out", out, "--device", "cpu", *sizes]) == 0
    capsys.readouterr()
    assert main(["sample", "--checkpoint", out, "--device", "cpu", "--cuda-graph"]) == 2
    expected = "fastgpt sample: --cuda-graph: needs a CUDA device, and this is 'cpu'; switch it off\n"
    assert capsys.readouterr().err == expected
