"""Folders of tokens: trained on, evaluated and resumed as the text that they were made of."""

from __future__ import annotations

import json

import numpy as np
import pytest

from command_line import SMALL, TEXT
from fastgpt.checkpoint import Checkpoint
from fastgpt.cli import main
from fastgpt.data.corpus import Corpus
from fastgpt.data.shards import ShardedTokens
from fastgpt.data.sources import DataError
from fastgpt.tokenizer import BPETokenizer

TOKENIZER = BPETokenizer.train(TEXT, 280)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def tokenizer_folder(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    vocab = {token: i for i, token in enumerate(TOKENIZER.vocab)}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = [f"{a} {b}" for a, b in TOKENIZER.merges]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder


@pytest.fixture
def nanogpt(tmp_path):
    """The tokens of the text as nanoGPT writes them, split as a text is split here."""
    folder = tmp_path / "nanogpt"
    folder.mkdir()
    tokens = TOKENIZER.encode_array(TEXT).astype("<u2")
    middle = len(tokens) * 9 // 10
    (folder / "train.bin").write_bytes(tokens[:middle].tobytes())
    (folder / "val.bin").write_bytes(tokens[middle:].tobytes())
    return folder


def test_a_folder_of_tokens_is_a_corpus(nanogpt, text) -> None:
    stored, read = (Corpus.load(source, TOKENIZER, block_size=16) for source in (nanogpt, text))
    assert isinstance(stored.train, ShardedTokens)
    for split in ("train", "val"):
        assert np.array_equal(getattr(stored, split), getattr(read, split))
    assert stored.has_fingerprint(stored.fingerprint) and stored.has_fingerprint(read.fingerprint)
    assert not stored.has_fingerprint(Corpus.load(nanogpt, TOKENIZER, layout="windows").fingerprint)
    (nanogpt / "val.bin").write_bytes(stored.val[1:].shards[0].tobytes() + b"\0\0")
    assert not Corpus.load(nanogpt, TOKENIZER).has_fingerprint(stored.fingerprint)


def test_a_split_that_is_too_short_is_named(nanogpt) -> None:
    n = len(Corpus.load(nanogpt, TOKENIZER).val)
    with pytest.raises(DataError, match=f"the val split of .*nanogpt' has {n} tokens, and a block of {n}"):
        Corpus.load(nanogpt, TOKENIZER, block_size=n)


@pytest.mark.parametrize("layout", ["names", "completions"])
def test_layouts_of_lines_need_the_text(nanogpt, layout) -> None:
    with pytest.raises(DataError, match=f"holds tokens, and layout {layout} reads text line by line: give the text"):
        Corpus.load(nanogpt, TOKENIZER, layout=layout)


def test_the_commands(nanogpt, text, tokenizer_folder, tmp_path, capsys) -> None:
    """A run on a folder of tokens has the weights of one on the text, goes on with either, and is evaluated on both."""
    runs = [tmp_path / "of_tokens", tmp_path / "of_text"]
    common = ["--tokenizer", str(tokenizer_folder), *SMALL]
    for run, data in zip(runs, (nanogpt, text), strict=True):
        assert main(["train", "--data", str(data), "--out", str(run), *common]) == 0
    of_tokens, of_text = (Checkpoint.load(run / "checkpoint" / "latest.safetensors") for run in runs)
    assert all((tensor == of_text.tensors[name]).all() for name, tensor in of_tokens.tensors.items())
    more = ["--resume", "--max-steps", "7"]
    assert main(["train", "--out", str(runs[0]), *more]) == 0
    assert main(["train", "--out", str(runs[1]), "--data", str(nanogpt), *more]) == 0
    capsys.readouterr()
    assert main(["eval", str(runs[0]), "--data", str(nanogpt), "--device", "cpu"]) == 0
    val = len(Corpus.load(nanogpt, TOKENIZER).val)
    assert f"predicted      {val - 1} tokens" in capsys.readouterr().out
    assert main(["train", "--data", str(nanogpt), "--out", str(tmp_path / "none"), *SMALL]) == 1
    assert "--tokenizer FOLDER" in capsys.readouterr().err and not (tmp_path / "none").exists()
