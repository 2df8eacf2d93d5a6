"""Folders of tokens: trained on, evaluated and resumed as the text that they were made of."""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from command_line import SMALL, TEXT
from fastgpt import GPT, GPTConfig
from fastgpt.checkpoint import Checkpoint
from fastgpt.cli import main
from fastgpt.data import encoding, stored
from fastgpt.data.corpus import Corpus
from fastgpt.data.prepare import prepare, write_tokens
from fastgpt.data.prepared import INDEX
from fastgpt.data.shard_writer import PROGRESS, ShardWriter
from fastgpt.data.shards import ShardedTokens
from fastgpt.data.sources import DataError, load_text
from fastgpt.evaluate import examples_of
from fastgpt.files import FileError
from fastgpt.studies.experiment import frequency_loss
from fastgpt.studies.learn import counted_bigram
from fastgpt.tokenizer import BPETokenizer, CharTokenizer

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
    mapped, read = (Corpus.load(source, TOKENIZER, block_size=16) for source in (nanogpt, text))
    assert isinstance(mapped.train, ShardedTokens)
    for split in ("train", "val"):
        assert np.array_equal(getattr(mapped, split), getattr(read, split))
    assert mapped.has_fingerprint(mapped.fingerprint) and mapped.has_fingerprint(read.fingerprint)
    assert not mapped.has_fingerprint(Corpus.load(nanogpt, TOKENIZER, layout="windows").fingerprint)
    (nanogpt / "val.bin").write_bytes(mapped.val[1:].shards[0].tobytes() + b"\0\0")
    assert not Corpus.load(nanogpt, TOKENIZER).has_fingerprint(mapped.fingerprint)


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


# --- prepared folders -------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path, text):
    prepare([text], TOKENIZER, tmp_path / "prepared")
    return tmp_path / "prepared"


def test_a_prepared_folder_is_a_corpus_and_has_its_tokenizer(prepared, text) -> None:
    read = Corpus.load(text, TOKENIZER)
    for tokenizer in ("char", "bpe", TOKENIZER):
        corpus = Corpus.load(prepared, tokenizer, vocab_size=280)
        assert corpus.tokenizer.to_json() == TOKENIZER.to_json() and corpus.has_fingerprint(read.fingerprint)
        assert np.array_equal(corpus.train, read.train) and np.array_equal(corpus.val, read.val)


def test_a_text_beside_another_program_s_index_stays_a_text(text) -> None:
    (text.parent / INDEX).write_text('{"pages": []}')
    assert np.array_equal(Corpus.load(text.parent).train, Corpus.load(text).train)


def test_a_folder_that_is_not_prepared_to_the_end(prepared) -> None:
    (prepared / INDEX).unlink()
    with ShardWriter(prepared, TOKENIZER, {}):
        pass
    with pytest.raises(DataError, match=r"prepared' holds the beginning of prepared data: the same `fastgpt data prep"):
        Corpus.load(prepared)
    (prepared / "text.txt").write_text(TEXT)
    (prepared / PROGRESS).write_text("{}")  # of anything else
    assert Corpus.load(prepared).digest is None


def test_a_prepared_folder_of_another_tokenizer(prepared, text, tmp_path) -> None:
    with pytest.raises(DataError, match="a bpe of 280 tokens, than the bpe of 270 that is asked for: give data that"):
        Corpus.load(prepared, BPETokenizer.train(TEXT, 270))
    prepare([text], "char", tmp_path / "char")
    with pytest.raises(DataError, match=r"another tokenizer, a char of \d+ tokens, than the bpe .*: leave --tokenizer"):
        Corpus.load(tmp_path / "char", "bpe", vocab_size=280)


def test_examples_of_a_folder_of_tokens_are_shown(prepared, capsys) -> None:
    assert main(["data", "show", "--data", str(prepared), "--block-size", "3"]) == 0
    shown = capsys.readouterr().out
    n = len(Corpus.load(prepared).train)
    assert f"{n - 3:,} blocks ({n:,} tokens - 3), 3 examples in each" in shown
    assert "names: not from this text" in shown and "completions: not from this text" in shown
    (prepared / "tokens-00000.bin").unlink()
    assert main(["data", "show", "--data", str(prepared)]) == 1
    assert "prepare the data again" in capsys.readouterr().err


# --- large texts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def large(text, monkeypatch):
    """A text that is taken for a large one, and that is older than the tick of any clock."""
    monkeypatch.setattr(stored, "_LARGE_BYTES", 1000)
    os.utime(text, (1e9, 1e9))
    return text


@pytest.fixture
def unread(monkeypatch):
    """A function, after whose call opening a file that is given fails."""

    def forbid(path) -> None:
        def refuse(file, *arguments, opened=builtins.open, **options):
            assert not isinstance(file, (str, os.PathLike)) or str(file) != str(path), "the text is opened again"
            return opened(file, *arguments, **options)

        monkeypatch.setattr("builtins.open", refuse)
        monkeypatch.setattr("io.open", refuse)  # which pathlib calls

    return forbid


@pytest.mark.parametrize("layout", ["blocks", "windows"])
@pytest.mark.parametrize(("tokenizer", "vocab_size"), [("char", None), ("bpe", 280), (TOKENIZER, None)])
def test_a_large_text_gives_what_a_small_one_gives(text, large, monkeypatch, tokenizer, vocab_size, layout) -> None:
    corpus = Corpus.load(large, tokenizer, vocab_size=vocab_size, block_size=16, layout=layout)
    monkeypatch.setattr(stored, "_LARGE_BYTES", 10**9)
    small = Corpus.load(text, tokenizer, vocab_size=vocab_size, block_size=16, layout=layout)
    assert isinstance(corpus.train, ShardedTokens) and not isinstance(small.train, ShardedTokens)
    assert corpus.tokenizer.to_json() == small.tokenizer.to_json() and corpus.layout == small.layout
    assert np.array_equal(corpus.train, small.train) and np.array_equal(corpus.val, small.val)
    assert corpus.has_fingerprint(small.fingerprint), "a run of an older version goes on"
    for split in ("train", "val"):
        whole, mapped = (of.examples(split, 16).batch(8, 1, 2) for of in (small, corpus))
        assert all(torch.equal(one, other) for one, other in zip(whole, mapped, strict=True))


@pytest.mark.parametrize(("tokenizer", "vocab_size"), [("char", None), ("bpe", 280)])
def test_a_second_start_opens_no_text_and_hashes_no_tokens(large, unread, monkeypatch, tokenizer, vocab_size) -> None:
    first = Corpus.load(large, tokenizer, vocab_size=vocab_size)
    unread(large)
    monkeypatch.setattr("fastgpt.data.corpus.pieces", lambda _: pytest.fail("the tokens are read"))
    again = Corpus.load(large, tokenizer, vocab_size=vocab_size)
    assert again.fingerprint == first.fingerprint and len(again.train) == len(first.train)
    with pytest.raises(AssertionError, match="the text is opened again"):
        load_text(large)  # the test can fail


@pytest.mark.parametrize(("tokenizer", "vocab_size"), [("char", None), ("bpe", 280)])
def test_a_resumed_run_finds_the_tokens_by_its_tokenizer(large, monkeypatch, tokenizer, vocab_size) -> None:
    first = Corpus.load(large, tokenizer, vocab_size=vocab_size)
    monkeypatch.setattr(stored, "write_tokens", lambda *_: pytest.fail("tokenized again"))
    assert Corpus.load(large, first.tokenizer).fingerprint == first.fingerprint


def test_an_edited_text_of_the_same_size_is_noticed(large) -> None:
    before = Corpus.load(large)
    large.write_text(TEXT.replace("speak", "spoke"), encoding="utf-8")
    after = Corpus.load(large)
    assert after.tokenizer.decode(after.train) == TEXT.replace("speak", "spoke")[: len(after.train)]
    assert not after.has_fingerprint(before.fingerprint)


def test_a_folder_of_texts_is_joined_as_a_small_one_is(large, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.txt").write_text(name + TEXT, encoding="utf-8")
    corpus = Corpus.load(folder)
    text = f"a{TEXT}\nb{TEXT}"
    assert corpus.tokenizer.decode(np.concatenate([corpus.train, corpus.val])) == text
    (folder / "b.txt").unlink()
    assert len(Corpus.load(folder).train) == (len(TEXT) + 1) * 9 // 10


def damage_shard(folder) -> None:
    (folder / "tokens-00000.bin").write_bytes(b"")


def remove_shard(folder) -> None:
    (folder / "tokens-00000.bin").unlink()


def damage_index(folder) -> None:
    (folder / "index.json").write_text("{")


def remove_index(folder) -> None:
    (folder / "index.json").unlink()


@pytest.mark.parametrize("damage", [damage_shard, remove_shard, damage_index, remove_index])
def test_a_damaged_cache_is_rebuilt(large, cache, damage) -> None:
    first = np.asarray(Corpus.load(large).train)
    (folder,) = (path for path in cache.glob("prepared-*") if path.is_dir())
    damage(folder)
    assert np.array_equal(Corpus.load(large).train, first)


def test_a_cache_that_cannot_be_written(large, cache) -> None:
    first = Corpus.load(large)
    shutil.rmtree(cache)
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be written.*FASTGPT_CACHE"):
        corpus = Corpus.load(large)
    assert np.array_equal(corpus.train, first.train) and corpus.fingerprint == first.fingerprint


def test_no_folder_has_room_for_the_tokens(large, monkeypatch) -> None:
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "_write", full)
    with (
        pytest.warns(UserWarning, match="No space left on device"),
        pytest.raises(
            FileError, match=r"cannot be written there either: .*No space left.*; set FASTGPT_CACHE to a fol"
        ),
    ):
        Corpus.load(large)


def test_tokens_of_a_text_that_changes_while_it_is_read_are_not_kept(large, monkeypatch) -> None:
    """Later starts would take them for the tokens of the text as it was."""

    def changing(batch, tokenizer, encode=encoding.encode):
        large.write_text(TEXT[::-1])
        return encode(batch, tokenizer)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode", changing)
        with pytest.raises(DataError, match=r"text\.txt' was changed while it was read"):
            Corpus.load(large, TOKENIZER)
    large.write_text(TEXT)
    assert np.array_equal(
        np.asarray(Corpus.load(large, TOKENIZER).train),
        TOKENIZER.encode_array(TEXT)[: len(TOKENIZER.encode_array(TEXT)) * 9 // 10],
    )


def test_errors_of_large_texts_name_the_text(large, tmp_path) -> None:
    with pytest.raises(DataError, match=r"text\.txt': in the text from character 0 on: character '.' at position 0"):
        Corpus.load(large, CharTokenizer("abc"))
    (tmp_path / "dull.txt").write_text("a" * 2000)
    with pytest.raises(DataError, match=r"dull\.txt' has one distinct character, 'a': give a text"):
        Corpus.load(tmp_path / "dull.txt")
    with pytest.raises(ValueError, match="vocab_size: tokenizer 'bpe' needs it"):
        Corpus.load(large, "bpe")
    with pytest.raises(ValueError, match="tokenizer: expected 'char', 'bpe' or a tokenizer, got 'word'"):
        Corpus.load(large, "word")


def test_processes_that_start_together_write_the_tokens_once(large, monkeypatch) -> None:
    written, trained = [], CharTokenizer.train
    monkeypatch.setattr(CharTokenizer, "train", lambda *a: written.append("tokenizer") or trained(*a))

    def write_slowly(*arguments):
        written.append("tokens")
        time.sleep(0.05)
        write_tokens(*arguments)

    monkeypatch.setattr(stored, "write_tokens", write_slowly)
    with ThreadPoolExecutor(4) as pool:  # flock is of an open file, so threads exclude each other as processes do
        sizes = list(pool.map(lambda _: len(Corpus.load(large).train), range(4)))
    assert sizes == [len(TEXT) * 9 // 10] * 4 and written == ["tokenizer", "tokens"]


def test_a_large_text_is_evaluated_whole(large, monkeypatch) -> None:
    model = GPT(GPTConfig(vocab_size=280, block_size=8, n_layer=1, n_head=1, n_embd=8))
    model.tokenizer, model.layout = TOKENIZER, "blocks"
    mapped = examples_of(model, TOKENIZER, str(large))
    monkeypatch.setattr(stored, "_LARGE_BYTES", 10**9)
    whole = examples_of(model, TOKENIZER, str(large))
    assert isinstance(mapped.tokens, ShardedTokens) and np.array_equal(mapped.tokens, whole.tokens)
    numbers = np.arange(len(whole))
    assert len(mapped) == len(whole)
    assert all(torch.equal(one, other) for one, other in zip(mapped.cut(numbers), whole.cut(numbers), strict=True))


def test_what_is_counted_in_a_large_text_is_what_is_counted_in_memory(large, monkeypatch) -> None:
    monkeypatch.setattr("fastgpt.data.shards._TOKENS_AT_ONCE", 100)
    mapped = Corpus.load(large, block_size=16)
    monkeypatch.setattr(stored, "_LARGE_BYTES", 10**9)
    whole = Corpus.load(large, block_size=16)
    assert isinstance(mapped.train, ShardedTokens) and isinstance(whole.train, np.ndarray)
    assert counted_bigram(mapped) == counted_bigram(whole)
    assert frequency_loss(mapped, 16) == frequency_loss(whole, 16)
    before, after, V = whole.train[:-1], whole.train[1:], whole.tokenizer.vocab_size
    pairs = np.bincount(before.astype(int) * V + after, minlength=V * V).reshape(V, V) + 1.0
    loss = -np.log(pairs / pairs.sum(axis=1, keepdims=True))[whole.val[:-1], whole.val[1:]].mean()
    assert counted_bigram(whole) == pytest.approx(loss, abs=6e-5), "rounded to four decimals"


def test_a_file_of_tokens_has_its_folder_asked_for(nanogpt) -> None:
    with pytest.raises(DataError, match=r"val\.bin' has tokens, by its name: give the folder .* of both splits"):
        Corpus.load(nanogpt / "val.bin", TOKENIZER)
    folder = nanogpt.rename(nanogpt.with_name("other"))
    (folder / "train.bin").rename(folder / "tokens_000.bin")
    (folder / "val.bin").unlink()
    with pytest.raises(DataError, match=r"holds no files named \*\.txt: tokens_000\.bin has tokens, .*folder"):
        Corpus.load(folder, TOKENIZER)
