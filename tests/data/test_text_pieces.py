"""Text in pieces: the same text, and the same errors, as of a file that is read whole."""

from __future__ import annotations

import pytest

from fastgpt.data import text_pieces
from fastgpt.data.sources import DataError, load_text
from fastgpt.data.text_pieces import read_pieces
from fastgpt.tokenizer import BPETokenizer, CharTokenizer
from helpers import PANGRAM

AWKWARD = ["\ufeffzwölf\r\n日本語 🎉\r", "\n\r\r\nend\r\n", "", "\ufeff\r", "a\ufeffb"]


@pytest.mark.parametrize("n_bytes", [1, 2, 3, 5, 1 << 20])
def test_the_pieces_are_the_text(tmp_path, monkeypatch, n_bytes) -> None:
    monkeypatch.setattr(text_pieces, "_BYTES_AT_ONCE", n_bytes)
    for i, text in enumerate(AWKWARD):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    files = sorted(tmp_path.glob("*.txt"))
    sizes: list[int] = []
    found = list(read_pieces(files, sizes.append))
    assert "".join(found) == load_text(tmp_path)
    assert sum(sizes) == sum(file.stat().st_size for file in files)
    assert n_bytes > 5 or max(map(len, found)) <= n_bytes + 1


@pytest.mark.parametrize("raw", [b"ab\xff", b"abcd\xc3", b"\xff\xfea\0", b"a\0b\0c\0d\0", b"\0a\0b", b"\xed\xa0\x80"])
@pytest.mark.parametrize("n_bytes", [4, 5, 1 << 20])
def test_errors_are_those_of_a_file_that_is_read_whole(tmp_path, monkeypatch, raw, n_bytes) -> None:
    monkeypatch.setattr(text_pieces, "_BYTES_AT_ONCE", n_bytes)
    path = tmp_path / "data.txt"
    path.write_bytes(raw)
    messages = []
    for read in (load_text, lambda path: list(read_pieces([path]))):
        with pytest.raises(DataError) as error:
            read(path)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_a_file_that_is_gone(tmp_path) -> None:
    with pytest.raises(DataError, match=r"none.txt' cannot be read: No such file"):
        list(read_pieces([tmp_path / "none.txt"]))


def test_tokenizers_learn_the_same_from_pieces() -> None:
    text = PANGRAM + "日本語 über\n\n  x = 1\n" * 3
    pieces = [text[i : i + 7] for i in range(0, len(text), 7)]
    for kind, more in ((CharTokenizer, ()), (BPETokenizer, (300,))):
        assert kind.train(iter(pieces), *more).to_json() == kind.train(text, *more).to_json()
