"""fastgpt eval: every token once, from the context that is promised, against a direct computation; bytes; errors."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgpt import GPT, GPTConfig
from fastgpt.baselines import LSTM
from fastgpt.cli import main
from fastgpt.config import ConfigError
from fastgpt.data.completions import end_token
from fastgpt.data.sources import DataError
from fastgpt.evaluate import Evaluation, Strided, evaluate, examples_of
from fastgpt.tokenizer import BPETokenizer, CharTokenizer
from fastgpt.training.step import Precision

TEXT = "to be, or not to be: naïve 日本語 🎉\n" * 4 + "that is the question.\n"
T = 12
CPU = Precision(torch.device("cpu"), "float32")


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "text.txt")


def model_of(tokenizer, layout: str = "blocks", kind: type = GPT, **changes):
    torch.manual_seed(0)
    config = {"block_size": T, "n_layer": 1, "n_head": 2, "n_embd": 16, **changes}
    model = kind(GPTConfig(vocab_size=tokenizer.vocab_size + 3, **config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)  # so that the context matters
    model.tokenizer, model.layout = tokenizer, layout
    return model


def nats_of(model, context: list[int], token: int) -> float:
    with torch.no_grad():
        return -float(torch.log_softmax(model(torch.tensor([context]))[0][0, -1], -1)[token])


def measured(model, data: str, stride: int | None = None) -> Evaluation:
    return evaluate(model, model.tokenizer, examples_of(model, model.tokenizer, data, stride), CPU)


TOKENIZERS = [CharTokenizer.train(TEXT), BPETokenizer.train(TEXT, 280)]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["char", "bpe"])
@pytest.mark.parametrize("kind", [GPT, LSTM])
@pytest.mark.parametrize("stride", [None, 1, 5, T])
def test_a_text_against_a_direct_computation(tokenizer, kind, stride, text_file, monkeypatch):
    monkeypatch.setattr("fastgpt.evaluate._TOKENS_AT_ONCE", 5 * T)  # several batches
    model, step = model_of(tokenizer, kind=kind), T // 2 if stride is None else stride
    ids = tokenizer.encode(TEXT)
    nats = 0.0
    for place in range(1, len(ids)):
        begin = max(0, math.ceil((place - T) / step)) * step  # of the first window that holds the token
        assert place - begin in range(T - step + 1, T + 1) or begin == 0, "the promised context"
        nats += nats_of(model, ids[begin:place], ids[place])
    found = measured(model, text_file, stride)
    assert found.tokens == len(ids) - 1
    assert found.bytes == len(TEXT.encode()) - len(tokenizer.token_bytes(ids[0]))
    assert found.loss == pytest.approx(nats / found.tokens, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / found.bytes, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / found.tokens), rel=1e-4)


@given(n=st.integers(2, 60), block_size=st.integers(1, 20), data=st.data())
def test_every_token_counts_once(n, block_size, data):
    stride = data.draw(st.integers(1, block_size))
    examples = Strided(np.arange(n), block_size, stride)
    x, y = examples.cut(np.arange(len(examples)))
    assert sorted(y[y >= 0].tolist()) == list(range(1, n))
    rows, columns = (y >= 0).nonzero(as_tuple=True)
    assert torch.equal(x[rows, columns] + 1, y[rows, columns])


def test_names_and_windows_and_completions_against_a_direct_computation(tmp_path):
    tokenizer = CharTokenizer.train("abcdeé=\n", with_end=True)
    (tmp_path / "names").write_text("abé\ncad\nbead\n", encoding="utf-8")
    (tmp_path / "pairs.jsonl").write_text(
        '{"prompt": "a=", "completion": "é"}\n{"prompt": "ab=", "completion": "de"}\n', encoding="utf-8"
    )

    def rows(text: str, first: int = 1) -> float:
        ids = tokenizer.encode(text)
        return sum(nats_of(model, ids[:place], ids[place]) for place in range(first, len(ids)))

    model = model_of(tokenizer, "names")
    found = measured(model, str(tmp_path / "names"))
    assert (found.tokens, found.bytes) == (13, 14)  # with the ends of three names, and two bytes in é
    assert found.nats == pytest.approx(sum(rows(f"\n{name}\n") for name in ("abé", "cad", "bead")), rel=1e-5)

    model.layout = "completions"
    end = tokenizer.decode([end_token(tokenizer)])
    found = measured(model, str(tmp_path / "pairs.jsonl"))
    assert (found.tokens, found.bytes) == (5, 4), "an end costs nats, and is no text"
    assert found.nats == pytest.approx(rows(f"a=é{end}", 2) + rows(f"ab=de{end}", 3), rel=1e-5)

    (tmp_path / "one.jsonl").write_text('{"prompt": "a=", "completion": "é"}', encoding="utf-8")
    assert measured(model, str(tmp_path / "one.jsonl")).nats == pytest.approx(rows(f"a=é{end}", 2), rel=1e-5)

    model = model_of(tokenizer, "windows", block_size=4)
    found = measured(model, str(tmp_path / "names"))
    ids = tokenizer.encode("abé\ncad\nbead\n")
    assert (found.tokens, found.bytes) == (9, 9)
    assert found.nats == pytest.approx(sum(nats_of(model, ids[i - 4 : i], ids[i]) for i in range(4, 13)), rel=1e-5)


def test_a_loss_that_no_number_holds():
    assert Evaluation(nats=2000.0, tokens=2, bytes=2).perplexity == math.inf
    model = model_of(TOKENIZERS[0])
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(RuntimeError, match="the model's loss is nan: its weights are not finite"):
        evaluate(model, model.tokenizer, Strided(np.arange(20), T, 6), CPU)


def test_what_cannot_be_measured_is_named(tmp_path, text_file):
    model = model_of(TOKENIZERS[0])
    for text, message in (("", "is empty"), ("t", "has one token, and the first token is only context"), ("tö", "'ö'")):
        (tmp_path / "short").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=f"short.*{message}"):
            measured(model, str(tmp_path / "short"))
    for stride in (0, T + 1):
        with pytest.raises(
            ConfigError, match=f"stride: expected 1 to 12, the tokens of the model's context, got {stride}"
        ):
            measured(model, text_file, stride)
    model.layout = "windows"
    with pytest.raises(DataError, match=r"short.* has 2 tokens, and a block of 12 needs 13"):
        (tmp_path / "short").write_text("to")
        measured(model, str(tmp_path / "short"))
    with pytest.raises(ConfigError, match="stride: is for windows over a text, and this model's layout is windows"):
        measured(model, text_file, 3)
    model = model_of(TOKENIZERS[0], is_causal=False)
    with pytest.raises(ConfigError, match="checkpoint: this model has is_causal=False"):
        measured(model, text_file)


def test_the_command(tmp_path, text_file, capsys):
    model = model_of(TOKENIZERS[1])
    model.save_pretrained(tmp_path / "model", format="huggingface")
    found = measured(model, text_file, 4)
    command = ["eval", str(tmp_path / "model"), "--data", text_file, "--stride", "4", "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["loss"] == pytest.approx(found.loss) and said["bits_per_byte"] == pytest.approx(found.bits_per_byte)
    assert (said["tokens"], said["bytes"], said["stride"]) == (found.tokens, found.bytes, 4)
    assert main(command) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[:4] != "bits")
    assert lines["loss"] == f"{found.loss:.4f} nats per token"
    assert lines["context"].startswith("9 to 12 tokens before each, as windows of 12 move by 4")
    for options, code, message in (
        (["--stride", "13"], 2, "--stride: expected 1 to 12"),
        (["--stride", "0"], 2, "--stride: expected 1 to 12"),
        (["--dtype", "int8"], 2, "--dtype: expected one of auto, float32"),
        (["--data", str(tmp_path / "gone")], 1, "does not exist"),
    ):
        assert main([*command, *options]) == code
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1
