"""`fastgpt data prepare`: the tokens that `Corpus.load` gives, of a text and of documents; going on; errors."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest

from command_line import SMALL, TEXT
from fastgpt.cli import main
from fastgpt.data import encoding
from fastgpt.data import prepare as module
from fastgpt.data.corpus import Corpus
from fastgpt.data.prepare import prepare
from fastgpt.data.prepared import INDEX, open_prepared, read_index
from fastgpt.data.shard_writer import ShardWriter, alone_in
from fastgpt.data.sources import DataError
from fastgpt.files import FileError
from fastgpt.tokenizer import BPETokenizer, CharTokenizer

AWKWARD = ("\ufeffzwölf\r\n日本語 🎉\r" + TEXT).encode()


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 200)
    monkeypatch.setattr("fastgpt.data.text_pieces._BYTES_AT_ONCE", 100)
    monkeypatch.setattr("fastgpt.bpe._PIECE_CHARS", 20)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_bytes(AWKWARD)
    return tmp_path / "text.txt"


@pytest.fixture
def documents(tmp_path):
    """Twenty documents: the files of a folder."""
    folder = tmp_path / "documents"
    for number in range(20):
        (folder / f"{number:02d}").mkdir(parents=True)
        (folder / f"{number:02d}" / "it.txt").write_text(f"Document {number}\n" * (number + 1), encoding="utf-8")
    (folder / "README.md").write_text("no text")
    return folder


@pytest.mark.parametrize(("tokenizer", "vocab_size"), [("char", None), ("bpe", 300)])
def test_a_text_has_the_tokens_of_the_corpus(text, tmp_path, tokenizer, vocab_size, capsys) -> None:
    prepare([text], tokenizer, tmp_path / "out", vocab_size=vocab_size, shard_tokens=150)
    corpus = Corpus.load(text, tokenizer, vocab_size=vocab_size)
    again = Corpus.load(tmp_path / "out", tokenizer, vocab_size=vocab_size)
    assert again.tokenizer.to_json() == corpus.tokenizer.to_json()
    assert np.array_equal(again.train, corpus.train) and np.array_equal(again.val, corpus.val)
    assert len(again.train.shards) > 3 and again.has_fingerprint(corpus.fingerprint)
    assert f"tokenized {len(AWKWARD.decode()) - 2:,} characters in " in capsys.readouterr().out


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_documents_end_with_a_token_and_the_last_tenth_validates(documents, tmp_path, tokenizer) -> None:
    jsonl = tmp_path / "documents.jsonl"
    texts = [file.read_text() for file in sorted(documents.rglob("*.txt"))]
    jsonl.write_text("".join(json.dumps({"body": text}) + "\n" for text in [*texts, ""]))
    for number, (sources, field) in enumerate([([documents], "text"), ([jsonl], "body")]):
        out = tmp_path / str(number)
        prepared = prepare(sources, tokenizer, out, vocab_size=270, field=field)
        end = "\x03" if tokenizer == "char" else "<|endoftext|>"
        assert prepared.tokenizer.decode(prepared.train) == "".join(text + end for text in texts[:18])
        assert prepared.tokenizer.decode(prepared.val) == "".join(text + end for text in texts[18:])
        assert np.count_nonzero(np.asarray(prepared.all) == prepared.tokenizer.end_of_text) == 20
        assert read_index(out)["documents"] == 20


def test_parquet_and_several_sources(documents, tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["Eins", "Zwei"]}), documents / "rows.parquet")
    prepared = prepare([documents / "03", documents / "rows.parquet"], "char", tmp_path / "out")
    text = prepared.tokenizer.decode(prepared.all)
    assert text.split("\x03") == ["Document 3\n" * 4, "Eins", "Zwei", ""]


class Killed(BaseException):
    """Stands for a process that ends."""


@pytest.mark.parametrize(("tokenizer", "vocab_size"), [("char", None), ("bpe", 300)])
@pytest.mark.parametrize("n_batches", [0, 1, 7])
def test_the_same_call_goes_on(text, tmp_path, monkeypatch, tokenizer, vocab_size, n_batches) -> None:
    """After a process that has ended, neither is the tokenizer trained again, nor a batch of whole shards tokenized."""
    arguments = {"vocab_size": vocab_size, "shard_tokens": 100}
    whole = prepare([text], tokenizer, tmp_path / "whole", **arguments)
    n_encoded = 0

    def counted(batch, tokenizer, limit, encode=encoding.encode):
        nonlocal n_encoded
        if n_encoded == limit:
            raise Killed
        n_encoded += 1
        return encode(batch, tokenizer)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode", lambda *a: counted(*a, n_batches))
        with pytest.raises(Killed):
            prepare([text], tokenizer, tmp_path / "out", **arguments)
    for kind in (CharTokenizer, BPETokenizer):
        monkeypatch.setattr(kind, "train", lambda *_: pytest.fail("the tokenizer is trained again"))
    n_encoded = 0
    monkeypatch.setattr(encoding, "encode", lambda *a: counted(*a, None))
    again = prepare([text], tokenizer, tmp_path / "out", **arguments)
    assert again.digest == whole.digest
    assert n_encoded <= 15 - n_batches + 1


def test_a_folder_that_is_prepared_is_compared_with_its_sums(text, tmp_path) -> None:
    first = prepare([text], "char", tmp_path / "out")
    before = (tmp_path / "out" / INDEX).stat().st_mtime_ns
    assert prepare([text], "char", tmp_path / "out").digest == first.digest
    assert (tmp_path / "out" / INDEX).stat().st_mtime_ns == before
    shard = tmp_path / "out" / "tokens-00000.bin"
    shard.write_bytes(shard.read_bytes()[::-1])
    with pytest.raises(DataError, match="its content has changed"):
        prepare([text], "char", tmp_path / "out")


def test_a_folder_of_other_data_is_refused(text, tmp_path, monkeypatch) -> None:
    prepare([text], "char", tmp_path / "out")
    with pytest.raises(DataError, match="out' holds other data, or tokens of another tokenizer: choose another folder"):
        prepare([text], "bpe", tmp_path / "out", vocab_size=300)
    (tmp_path / "other.txt").write_text("é")
    with pytest.raises(DataError, match="out' holds other data"):
        prepare([tmp_path / "other.txt"], "char", tmp_path / "out")
    monkeypatch.setattr(ShardWriter, "finish", lambda _: None)
    with pytest.raises(DataError, match=r"index\.json' cannot be read"):
        prepare([text], "char", tmp_path / "begun", shard_tokens=1000)
    with pytest.raises(DataError, match=r"begun' holds the beginning of other data, .*: remove the folder, or choose"):
        prepare([text], "bpe", tmp_path / "begun", vocab_size=300)


def test_data_that_cannot_be_used(text, documents, tmp_path) -> None:
    def refused(*sources, tokenizer="char", error=DataError, **more) -> str:
        with pytest.raises(error) as found:
            prepare(sources, tokenizer, tmp_path / "out", **more)
        assert not (tmp_path / "out" / INDEX).exists()
        return str(found.value)

    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "dull.txt").write_text("aaa")
    (tmp_path / "bright.txt").write_text("a")
    (tmp_path / "latin.txt").write_bytes(b"a\xe9")
    (tmp_path / "some.jsonl").write_text('{"text": "a"}\n{}\n')
    assert "empty.txt' is empty: give a file with text" in refused(tmp_path / "empty.txt")
    assert "empty.txt' is empty: give a file with text" in refused(
        tmp_path / "empty.txt", tokenizer=CharTokenizer("ab")
    )
    assert "dull.txt' has one distinct character, 'a'" in refused(tmp_path / "dull.txt")
    assert "'a'" in refused(tmp_path / "dull.txt", tmp_path / "bright.txt"), (
        "the end of text is no character of the text"
    )
    assert "latin.txt' is not UTF-8: byte 0xe9 at offset 1; if it is text, convert" in refused(tmp_path / "latin.txt")
    assert "some.jsonl', line 2: has no field 'text'" in refused(tmp_path / "some.jsonl")
    assert "in the text from character 0 on: character 'z'" in refused(text, tokenizer=CharTokenizer("ab"))
    assert "no end of text, which joins documents" in refused(documents, tokenizer=CharTokenizer("ab"))
    assert "names is a text that is given alone" in refused("names", text)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "README.md").touch()
    assert "nothing' holds no files named *.txt, *.jsonl, *.parquet: put" in refused(tmp_path / "nothing")
    assert "bright.txt' is in it twice" in refused(tmp_path, tmp_path / "nothing" / ".." / "bright.txt")
    (tmp_path / "ended.JSONL").write_text('{"text": "whole"}\n{"text": "en\\u0003ded"}\n')
    assert "from character 0 on: a document has the character '\\x03', which ends" in refused(tmp_path / "ended.JSONL")
    assert "'none' does not exist" in refused("none")
    assert "vocab_size" in refused(text, tokenizer="bpe", error=ValueError)


def test_a_document_that_is_the_only_one_is_divided_as_a_stream(tmp_path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "abcdefghi" * 11}))
    prepared = prepare([tmp_path / "one.jsonl"], "char", tmp_path / "out")
    assert (len(prepared.train), len(prepared.val)) == (90, 10)


def test_a_text_that_changes_while_it_is_read_is_refused(text, tmp_path, monkeypatch) -> None:
    def changing(batch, tokenizer, encode=encoding.encode):
        text.write_bytes(AWKWARD + b"more")
        return encode(batch, tokenizer)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode", changing)
        with pytest.raises(
            DataError, match=r"text\.txt' was changed while it was read: start again when nothing writes"
        ):
            prepare([text], "char", tmp_path / "out")
    assert (
        prepare([text], "char", tmp_path / "out").tokenizer.decode(open_prepared(tmp_path / "out").val[-4:]) == "more"
    )


def test_a_folder_that_another_process_prepares_is_left_alone(text, tmp_path, monkeypatch) -> None:
    """Neither while it trains the tokenizer, nor when it has finished before the lock was free."""
    pytest.importorskip("fcntl")
    with alone_in(tmp_path / "out"), pytest.raises(FileError, match="another process writes it now"):
        prepare([text], "char", tmp_path / "out")
    (tmp_path / "other.txt").write_text("other text")

    @contextlib.contextmanager
    def after_another(folder):
        with monkeypatch.context() as patch:
            patch.setattr(module, "alone_in", alone_in)
            prepare([tmp_path / "other.txt"], "char", folder)
        yield

    monkeypatch.setattr(module, "alone_in", after_another)
    with pytest.raises(DataError, match="holds other data"):
        prepare([text], "char", tmp_path / "out")
    assert len(open_prepared(tmp_path / "out", verify=True).all) == len("other text")


def test_no_file_of_the_user_is_overwritten_or_hidden(text, tmp_path) -> None:
    for name in ("tokenizer.json", "index.json"):
        own = tmp_path / f"with {name}" / name
        own.parent.mkdir()
        own.write_text("{}")
        with pytest.raises(DataError, match=rf"holds a file {name}, which would be overwritten: remove it, or choose"):
            prepare([text], "char", own.parent)
        assert own.read_text() == "{}" and list(own.parent.iterdir()) == [own]
    before = set(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"holds the text itself, text\.txt: choose another folder"):
        prepare([text], "char", tmp_path)
    assert set(tmp_path.iterdir()) == before


def test_the_command(text, documents, tmp_path, capsys) -> None:
    out = str(tmp_path / "out")
    command = ["data", "prepare", "--data", str(documents), str(text), "--out", out, "--tokenizer", "bpe"]
    assert main([*command, "--vocab-size", "300", "--processes", "1"]) == 0
    said = capsys.readouterr().out
    n = len(open_prepared(tmp_path / "out").train)
    assert "characters in" in said and f"{out}: {n:,} tokens to train on and " in said
    assert "to validate, vocabulary of 301 (bpe)" in said and f"fastgpt train --data {out} --out " in said
    assert main([*command, "--vocab-size", "300"]) == 0
    assert "was prepared already, and all of its shards are whole" in capsys.readouterr().out
    assert main(["train", "--data", out, "--out", str(tmp_path / "run"), *SMALL]) == 0
    assert "vocab_size" not in capsys.readouterr().out, "the token that ends documents is beyond what was asked for"
    other = [
        "train",
        "--data",
        out,
        "--tokenizer",
        "bpe",
        "--vocab-size",
        "290",
        "--out",
        str(tmp_path / "290"),
        *SMALL,
    ]
    assert main(other) == 0
    assert "vocab_size: 301 tokens, not 290: those of the folder of tokens" in capsys.readouterr().out
    large = ["data", "prepare", "--data", str(text), "--out", str(tmp_path / "large"), "--tokenizer", "bpe"]
    assert main([*large, "--vocab-size", "30000", "--processes", "1"]) == 0
    assert "tokens, not 30000: no further pair occurs twice in the text" in capsys.readouterr().out
    more = ["data", "prepare", "--data", str(text), "--out", str(tmp_path / "more"), "--tokenizer", out]
    assert main(more) == 0
    assert open_prepared(tmp_path / "more").tokenizer.to_json() == open_prepared(tmp_path / "out").tokenizer.to_json()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("", 2, "--data is missing: give text files"),
        ("--data x", 2, "--out is missing: give a folder for the tokens"),
        ("--data x --out y --tokenizer bpe", 2, "--vocab-size: --tokenizer bpe needs it"),
        ("--data x --out y --vocab-size 300", 2, "--vocab-size: the characters"),
        ("--data x --out y --processes 0", 2, "--processes: expected at least 1"),
        ("--data x --out y", 1, "'x' does not exist"),
        ("--data x --out y --tokenizer none", 1, "none"),
    ],
)
def test_wrong_use_of_the_command(tmp_path, monkeypatch, capsys, options, code, message) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "prepare", *options.split()]) == code
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_the_text_is_taken_as_it_is_written(text, tmp_path, monkeypatch) -> None:
    """No more of it is in memory: shards are whole while it is read."""
    seen = []

    def read(files, progress, read_pieces=module.read_pieces):
        for piece in read_pieces(files, progress):
            seen.append(len(list((tmp_path / "out").glob("tokens-*.bin"))))
            yield piece

    monkeypatch.setattr(module, "read_pieces", read)
    prepare([text], CharTokenizer.train(AWKWARD.decode()), tmp_path / "out", shard_tokens=500)
    assert seen[0] == 0 and seen[-1] >= 3
