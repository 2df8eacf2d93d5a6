"""The baselines: the GPT's interface, what each can see, matched sizes, and the mask that makes a decoder."""

from __future__ import annotations

import dataclasses
import math
import sys

import pytest
import torch
import torch.nn.functional as F

from fastgpt import GPT, GPTConfig
from fastgpt.baselines import GRU, LSTM, MODELS, RNN, Bigram, PositionalBigram, matched, matched_config
from fastgpt.checkpoint import Checkpoint
from fastgpt.cli import main
from fastgpt.config import ConfigError
from fastgpt.generate import stream
from fastgpt.ops.dropout import rows_from

CFG = GPTConfig(vocab_size=13, block_size=8, n_layer=2, n_head=2, n_embd=12, dropout=0.0)
RECURRENT = {"rnn": RNN, "gru": GRU, "lstm": LSTM}


def made(kind: str, **changes):
    """A model away from its initial weights, in float64."""
    torch.manual_seed(0)
    model = MODELS[kind](dataclasses.replace(CFG, **changes)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def batch(B: int = 3, T: int = 8, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    idx = torch.randint(CFG.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    return idx[:, :-1].contiguous(), idx[:, 1:].contiguous()


@pytest.mark.parametrize("kind", MODELS)
def test_logits_and_loss(kind):
    model = made(kind)
    idx, targets = batch()
    logits, loss = model(idx, targets)
    assert logits.shape == (3, 8, 13) and model(idx)[1] is None
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.loss(idx, targets), expected)
    targets[:, 2:] = -100
    expected = F.cross_entropy(logits[:, :2].flatten(0, 1), targets[:, :2].flatten())
    torch.testing.assert_close(model.loss(idx, targets), expected)
    model.loss(idx, targets).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model(idx[:, :0])[0].shape == (3, 0, 13)


@pytest.mark.parametrize("kind", MODELS)
def test_an_untrained_model_knows_nothing(kind):
    torch.manual_seed(0)
    model = MODELS[kind](GPTConfig(vocab_size=65, block_size=32, n_layer=2, n_head=4, n_embd=128, dropout=0.0))
    idx = torch.randint(65, (8, 33))
    assert model.loss(idx[:, :-1], idx[:, 1:]).item() == pytest.approx(math.log(65), abs=0.2)


def test_the_bigram_is_its_table():
    model = made("bigram")
    idx, _ = batch()
    assert model.num_parameters() == 13 * 13
    assert torch.equal(model(idx)[0], model.table.weight[idx])


def changed_at(idx: torch.Tensor, t: int) -> torch.Tensor:
    other = idx.clone()
    other[:, t] = (other[:, t] + 1) % CFG.vocab_size
    return other


@pytest.mark.parametrize(("kind", "sees_the_past"), [(k, k not in ("bigram", "positional-bigram")) for k in MODELS])
def test_what_a_model_sees(kind, sees_the_past):
    """Change token 3: the logits there change, those before never do, those after only if the model has a context."""
    model = made(kind)
    idx, _ = batch()
    difference = (model(idx)[0] - model(changed_at(idx, 3))[0]).abs().amax(dim=(0, 2))
    assert (difference[:3] == 0.0).all() and difference[3] > 0.0
    assert (difference[4:] > 0.0).all() if sees_the_past else (difference[4:] == 0.0).all()


def test_the_positional_bigram_knows_its_position_and_the_bigram_does_not():
    same = torch.full((1, 8), 5)
    logits = made("positional-bigram")(same)[0][0]
    assert all(not torch.allclose(logits[0], row) for row in logits[1:])
    logits = made("bigram")(same)[0][0]
    assert all(torch.equal(logits[0], row) for row in logits[1:])


def test_the_positional_bigram_can_tell_ab_from_ba():
    """With a head tied to the embedding "b follows a" and "a follows b" would have one score."""
    model = made("positional-bigram", tie_weights=True)
    with torch.no_grad():
        model.position_embedding.weight.zero_()
    scores = model(torch.arange(8)[None])[0][0, :, :8]
    assert not torch.allclose(scores, scores.T)


def triangular(n: int) -> torch.Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def test_the_triangular_mask_and_nothing_else_makes_the_decoder(monkeypatch):
    """Encoder and decoder have the same weights; an encoder whose attention is given the triangle is the decoder."""
    decoder, encoder = made("gpt"), made("gpt", is_causal=False)
    assert all(torch.equal(p, q) for p, q in zip(decoder.parameters(), encoder.parameters(), strict=True))
    idx, _ = batch()
    for model, sees_the_future in ((decoder, False), (encoder, True)):
        difference = (model(idx)[0] - model(changed_at(idx, 5))[0]).abs().amax(dim=(0, 2))
        assert ((difference[:5] > 0.0) == sees_the_future).all() and (difference[5:] > 0.0).all()
    one_layer = [made("gpt", n_layer=1, is_causal=causal)(idx)[0] for causal in (True, False)]
    torch.testing.assert_close(one_layer[0][:, -1], one_layer[1][:, -1])  # the last token sees all either way
    assert not torch.allclose(one_layer[0][:, :-1], one_layer[1][:, :-1])

    def masked(q, k, v, *, is_causal, **options):
        assert not is_causal
        return F.scaled_dot_product_attention(q, k, v, attn_mask=triangular(q.shape[2]))

    monkeypatch.setattr(sys.modules["fastgpt.ops.attention"], "attention", masked)
    with_mask = encoder(idx)[0]
    monkeypatch.undo()
    torch.testing.assert_close(with_mask, decoder(idx)[0])


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_recurrent_model_is_torchs_layers(kind):
    model = made(kind, tie_weights=True)
    assert isinstance(model, RECURRENT[kind]) and model.lm_head.weight is model.token_embedding.weight
    idx, _ = batch()
    x, _ = model.rnn(F.embedding(idx, model.token_embedding.weight))
    torch.testing.assert_close(model(idx)[0], x @ model.token_embedding.weight.T)


@pytest.mark.parametrize("kind", [k for k in MODELS if k != "gpt"])
@pytest.mark.parametrize("prompt_tokens", [1, 3, 8, 20])
def test_generation_step_by_step_equals_recomputing_the_window(kind, prompt_tokens):
    model = made(kind)
    prompt = torch.randint(13, (2, prompt_tokens), generator=torch.Generator().manual_seed(4))
    out = model.generate(prompt, 25, temperature=0.0)
    expected = prompt
    for _ in range(25):
        window = expected if kind in RECURRENT else expected[:, -CFG.block_size :]
        expected = torch.cat([expected, model(window)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(out, expected)
    without = list(stream(model, prompt, 25, temperature=0.0, use_cache=False))
    assert torch.equal(torch.cat([prompt, *without], dim=1), expected)


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_recurrent_model_reads_each_token_once(kind):
    model = made(kind)
    read = []
    real = model.hidden
    model.hidden = lambda idx, cache=None: (read.append(idx.shape[1]), real(idx, cache))[1]
    model.generate(torch.zeros(1, 5, dtype=torch.int64), 20)
    assert read == [5] + [1] * 19


@pytest.mark.parametrize("kind", RECURRENT)
def test_state_carried_in_pieces_equals_one_pass(kind):
    model = made(kind)
    idx, _ = batch(T=12)
    cache = model.new_cache(3)
    pieces = [model.hidden(part, cache) for part in idx.split([4, 1, 5, 2], dim=1)]
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(pieces, dim=1), model.hidden(idx))


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize(
    "cfg",
    [
        GPTConfig.preset("shakespeare-char-cpu"),
        GPTConfig(),
        GPTConfig(n_embd=64, n_head=4, n_layer=3),
        GPTConfig.preset("gpt2"),
    ],
    ids=["cpu", "char", "small", "gpt2"],
)
def test_matched_models_have_the_parameters_of_the_gpt(kind, cfg):
    with torch.device("meta"):
        wanted = GPT(cfg).num_parameters()
        for n_layer in (None, 1):
            model = matched(kind, cfg, n_layer)
            assert isinstance(model, RECURRENT[kind])
            assert model.cfg.n_layer == (n_layer or cfg.n_layer) and model.cfg.block_size == cfg.block_size
            assert abs(model.num_parameters() / wanted - 1.0) < 0.02


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", RECURRENT)
def test_parts_of_a_batch_of_a_recurrent_model_drop_what_the_whole_batch_drops(kind, bias):
    model = made(kind, dropout=0.5, n_layer=3, bias=bias).train()
    idx = torch.randint(13, (6, 8), generator=torch.Generator().manual_seed(1))

    def hidden(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(2)
        return model.hidden(idx[rows]), torch.get_rng_state()

    whole, state = hidden(slice(0, 6))
    for first in (0, 3):
        with rows_from(first, 6):
            part, its_state = hidden(slice(first, first + 3))
        torch.testing.assert_close(part, whole[first : first + 3])
        assert torch.equal(its_state, state)


@pytest.mark.parametrize("kind", RECURRENT)
def test_dropout_of_a_recurrent_model(kind):
    model = made(kind, dropout=0.5)
    idx, _ = batch()
    assert not torch.equal(model.train()(idx)[0], model(idx)[0])
    assert torch.equal(model.eval()(idx)[0], model(idx)[0])


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match="kind: expected rnn, gru or lstm, got 'bigram'"):
        matched_config("bigram", CFG)
    with pytest.raises(ConfigError, match="model: expected one of gpt, bigram"):
        matched_config("mamba", CFG)
    with pytest.raises(ConfigError, match="is_causal: a gru reads from left to right"):
        GRU(dataclasses.replace(CFG, is_causal=False))
    with pytest.raises(TypeError, match="cfg: expected a GPTConfig"):
        Bigram({"vocab_size": 3})
    idx, targets = batch()
    with pytest.raises(ValueError, match=r"idx: 9 tokens do not fit block_size=8"):
        PositionalBigram(CFG)(torch.zeros(1, 9, dtype=torch.int64))
    for kind in MODELS:
        with pytest.raises(ValueError, match="targets: expected the shape of idx"):
            made(kind).loss(idx, targets[:, 1:])
        with pytest.raises(ValueError, match="idx: expected shape"):
            made(kind)(idx[0])
        with pytest.raises(IndexError, match="tokens: value 13"):
            made(kind)(torch.full((1, 2), 13))


# ---- through the command line ----

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" * 20
SMALL = "--block-size 16 --n-layer 2 --n-head 2 --n-embd 16 --batch-size 4 --max-steps 6 --eval-interval 3"
SMALL += " --eval-batches 1 --log-interval 3 --device cpu --dropout 0.1 --warmup-steps 0 --min-lr 0.001"


@pytest.mark.parametrize("kind", MODELS)
def test_every_model_trains_resumes_to_the_same_bits_and_samples(kind, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    train = ["train", "--data", str(tmp_path / "text.txt"), "--model", kind, *SMALL.split(), "--warmup-steps", "9"]
    assert main([*train, "--out", str(tmp_path / "whole")]) == 0
    assert main([*train, "--out", str(tmp_path / "parts"), "--max-steps", "3"]) == 0
    assert main(["train", "--out", str(tmp_path / "parts"), "--resume", "--max-steps", "6"]) == 0
    whole, parts = (Checkpoint.load(tmp_path / run / "checkpoint/latest.safetensors") for run in ("whole", "parts"))
    assert whole.model == kind and whole.tensors.keys() == parts.tensors.keys()
    assert all(torch.equal(tensor, parts.tensors[name]) for name, tensor in whole.tensors.items())
    capsys.readouterr()
    assert main(["sample", "--checkpoint", str(tmp_path / "whole"), "--max-new-tokens", "30", "--seed", "1"]) == 0
    assert len(capsys.readouterr().out) == 1 + 30 + 1
    other = "bigram" if kind == "gpt" else "gpt"
    assert main(["train", "--out", str(tmp_path / "parts"), "--resume", "--model", other]) == 1
    assert f"field 'model' is '{kind}', not '{other}'" in capsys.readouterr().err
    if kind != "gpt":
        from fastgpt.checkpoint import CheckpointError

        with pytest.raises(CheckpointError, match=f"field 'model' is '{kind}', not 'gpt'"):
            GPT.from_pretrained(tmp_path / "whole")


def test_a_checkpoint_without_the_new_fields_is_a_gpt(tmp_path, capsys):
    """Runs of before: no model and no layout in the header and the settings, no feed_forward in the configuration."""
    from fastgpt.checkpoint import read_tensors, write_tensors

    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "run"
    assert main(["train", "--data", str(tmp_path / "text.txt"), "--out", str(out), *SMALL.split()]) == 0
    for name in ("latest", "best"):
        path = out / "checkpoint" / f"{name}.safetensors"
        tensors, metadata = read_tensors(path)
        del metadata["model"]
        metadata["model_config"] = metadata["model_config"].replace(', "feed_forward": true', "")
        metadata["train_config"] = metadata["train_config"].replace(', "layout": "blocks"', "")
        assert "feed_forward" not in str(metadata) and "layout" not in str(metadata)
        write_tensors(path, tensors, metadata)
    settings = (out / "config.toml").read_text().splitlines()
    kept = [line for line in settings if not line.startswith(("model =", "layout =", "feed_forward ="))]
    assert len(kept) == len(settings) - 3
    (out / "config.toml").write_text("\n".join(kept) + "\n")
    assert main(["sample", "--checkpoint", str(out), "--max-new-tokens", "3"]) == 0
    assert main(["train", "--out", str(out), "--resume", "--max-steps", "8"]) == 0
    assert isinstance(GPT.from_pretrained(out), GPT)
    assert main(["train", "--data", "x", "--out", str(tmp_path / "new"), "--model", "mamba"]) == 2
    assert "model: expected one of gpt, bigram" in capsys.readouterr().err
