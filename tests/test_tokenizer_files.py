"""The tokenizer in a model's folder: written, read back as it was, and read by transformers with the same tokens."""

from __future__ import annotations

import json

import pytest

from fastgpt.tokenizer import BPETokenizer, CharTokenizer
from fastgpt.tokenizer_files import read_tokenizer, write_tokenizer

TEXT = "Speak, speak.\r\n\n\tWe're all résumés — naïve 日本語 🎉🎉!  It's 1623.\n" * 8


def with_special_tokens() -> BPETokenizer:
    """As GPT-2's: its last token is the end of a text."""
    learned = BPETokenizer.train(TEXT, 300)
    special = {"<|endoftext|>": learned.vocab_size, "<pad>": learned.vocab_size + 1}
    return BPETokenizer([*learned.vocab, *special], learned.merges, special)


TOKENIZERS = {
    "char": CharTokenizer.train(TEXT),
    "unsorted": CharTokenizer("".join(sorted(set(TEXT), reverse=True))),
    "char with an end": CharTokenizer.train(TEXT, with_end=True),
    "bpe": BPETokenizer.train(TEXT, 300),
    "gpt2": with_special_tokens(),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def test_what_was_written_is_read_back(tokenizer, tmp_path):
    write_tokenizer(tmp_path, tokenizer, block_size=32)
    assert read_tokenizer(tmp_path).to_json() == tokenizer.to_json()
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    assert read_tokenizer(tmp_path).to_json() == tokenizer.to_json(), "as a prepared folder has it"
    (tmp_path / "tokenizer.json").write_text('{"kind": "bpe"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json': tokenizer: the field 'vocab' is missing"):
        read_tokenizer(tmp_path)


def test_transformers_reads_the_same_tokens(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path, tokenizer, block_size=100_000)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size and theirs.model_max_length == 100_000
    ids = tokenizer.encode(TEXT)
    assert theirs(TEXT)["input_ids"] == ids
    assert theirs.decode(ids) == TEXT
    assert theirs.eos_token_id == tokenizer.end_of_text
    theirs.save_pretrained(tmp_path / "again")
    assert read_tokenizer(tmp_path / "again").to_json() == tokenizer.to_json()
    if tokenizer.kind == "char":
        with pytest.raises(Exception, match="UNK"):
            theirs("Ω")


def test_a_folder_holds_one_tokenizer(tmp_path):
    for name, text in (("vocab.json", "{}"), ("merges.txt", ""), ("added_tokens.json", "{}")):
        (tmp_path / name).write_text(text)
    for tokenizer in TOKENIZERS.values():
        write_tokenizer(tmp_path, tokenizer, block_size=32)
        assert read_tokenizer(tmp_path).fingerprint() == tokenizer.fingerprint()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_foreign_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"vocab\.json and merges\.txt not found, nor tokenizer\.json"):
        read_tokenizer(tmp_path)
    for data in ({"model": {"type": "Unigram"}}, {"model": {"type": "WordLevel", "vocab": {"a": 0}}}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(data))
        with pytest.raises(ValueError, match=r"tokenizer\.json': not a GPT-2 tokenizer"):
            read_tokenizer(tmp_path)
    for text in ("{", "[" * 100_000, '{"model": ' + "9" * 5_000 + "}"):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer\.json': not JSON"):
            read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("char", lambda d: d.update(model=[1]), "not a GPT-2 tokenizer"),
        ("char", lambda d: d.update(pre_tokenizer="Split"), "not a GPT-2 tokenizer"),
        ("char", lambda d: d["model"].pop("vocab"), "a vocabulary is an object of tokens with their ids, got NoneType"),
        ("char", lambda d: d["model"].update(vocab=[1, 2]), "a vocabulary is an object of tokens with their ids"),
        ("char", lambda d: d["model"].update(vocab={"a": 0, "b": "1"}), "the ids of a vocabulary must be 0, 1, 2"),
        ("char", lambda d: d["model"].update(vocab={"a": 0, "b": 5}), "the ids of a vocabulary must be 0, 1, 2"),
        ("char", lambda d: d["model"].update(vocab={"a": False, "b": True}), "the ids of a vocabulary must be 0, 1, 2"),
        ("char", lambda d: d["model"].update(vocab={"ab": 0, "c": 1}), "the token 'ab' is not one character"),
        ("bpe", lambda d: d.update(pre_tokenizer="ByteLevel"), "not a GPT-2 tokenizer"),
        ("bpe", lambda d: d.update(added_tokens=[1]), "added_tokens: expected a list of objects"),
        ("bpe", lambda d: d.update(added_tokens=[{"id": 300}]), "added_tokens: expected a list of objects"),
        ("bpe", lambda d: d.update(added_tokens=[{"id": "300", "content": "x"}]), "added_tokens: expected a list"),
        ("bpe", lambda d: d["model"].update(vocab=["a"]), "a vocabulary is an object of tokens with their ids"),
        ("bpe", lambda d: d["model"].update(merges=None), "merges: expected a list, got NoneType"),
        ("bpe", lambda d: d["model"].update(merges=[["a", 5]]), "merge 0: expected two tokens"),
        ("bpe", lambda d: d["model"]["vocab"].update({"é日": 300}), "not a byte-level vocabulary: '日' in token"),
    ],
)
def test_a_broken_file_is_named(name, change, message, tmp_path):
    write_tokenizer(tmp_path, TOKENIZERS[name], block_size=32)
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"^'.*tokenizer\.json': {message}"):
        read_tokenizer(tmp_path)
