"""What users of neighbouring projects reported about texts, tokens and batches (see test_citations.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastgpt.data.corpus import Corpus
from fastgpt.data.layouts import Blocks
from fastgpt.data.prefetch import Prefetcher
from fastgpt.data.sources import DataError, load_text
from fastgpt.tokenizer import BPETokenizer, CharTokenizer, StreamDecoder
from helpers import run_python, write

LINE_ENDS = ("\n", "\r\n", "\r")


def test_data_a_split_shorter_than_a_block(tmp_path):
    """karpathy/nanoGPT#292: randint failed on the validation split, hundreds of steps into a run."""
    file = write(tmp_path / "short.txt", "abcdefghij" * 10)
    with pytest.raises(DataError, match=r"the val split of .*short.txt' has 10 tokens, and a block of 16 needs 17"):
        Corpus.load(file, block_size=16)
    assert len(Corpus.load(file, block_size=9).examples("val", 9)) == 1


def test_data_the_last_place_is_a_place():
    """AOSSIE-Org/OpenVerifiableLLM#92: a text of one block was refused, and the last start was never drawn."""
    tokens = np.arange(6, dtype=np.uint16)
    x, y = Blocks(tokens, 5).batch(1, seed=1, step=0)
    assert x.tolist() == [[0, 1, 2, 3, 4]] and y.tolist() == [[1, 2, 3, 4, 5]]
    starts = {int(s) for step in range(60) for s in Blocks(tokens, 3).batch(4, seed=2, step=step)[0][:, 0]}
    assert starts == {0, 1, 2}


def test_data_evaluation_reaches_the_end():
    """karpathy/build-nanogpt#109, karpathy/build-nanogpt#41: tokens at the end were skipped, or made a short batch."""
    tokens = np.arange(101, dtype=np.uint16)
    for n in (1, 2, 7):
        x, y = Blocks(tokens, 8).evenly_spaced(n)
        assert x.shape == y.shape == (n, 8) and torch.equal(x[:, 1:], y[:, :-1])
    assert x[0, 0] == 0 and y[-1, -1] == 100


@pytest.mark.parametrize("size", [2**16, 2**16 + 1])
def test_data_more_tokens_than_16_bits_hold(size, tmp_path, monkeypatch):
    """huggingface/transformers#2825, alasdairforsythe/tokenmonster#23: ids of 65536 and more wrapped around."""
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
    text = "".join(chr(c) for c in range(0x10000, 0x10000 + size))
    file = write(tmp_path / "many.txt", text)
    for corpus in (Corpus.load(file), Corpus.load(file)):  # made, then from the cache
        assert corpus.tokenizer.vocab_size == size
        ids = np.concatenate([corpus.train, corpus.val]).astype(np.int64)
        assert (ids == np.arange(size)).all()
        assert corpus.tokenizer.decode(corpus.val[-3:]) == text[-3:]


def test_data_batches_own_their_memory(tmp_path, monkeypatch):
    """karpathy/nanoGPT#287: the text is mapped, not read, and what a batch keeps is the batch alone."""
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
    corpus = Corpus.load(write(tmp_path / "text.txt", "to be or not to be\n" * 40))
    owner = corpus.train
    while getattr(owner, "base", None) is not None and not isinstance(owner, np.memmap):
        owner = owner.base
    assert isinstance(owner, np.memmap)
    x, y = corpus.examples("train", 4).batch(2, seed=0, step=0)
    before = corpus.train[:].copy()
    x.fill_(0), y.fill_(0)
    assert (corpus.train == before).all() and x.untyped_storage().nbytes() == 2 * 4 * 8


def test_data_a_resumed_run_draws_what_comes_next():
    """karpathy/nanoGPT#467: after each restart the seed gave the first batches again."""
    examples = Blocks(np.arange(500, dtype=np.uint16), 4)
    with Prefetcher(examples, 3, seed=9) as batches:
        whole = [next(batches)[0] for _ in range(6)]
    with Prefetcher(examples, 3, seed=9, start_step=4) as batches:
        rest = [next(batches)[0] for _ in range(2)]
    assert all(map(torch.equal, rest, whole[4:])) and not torch.equal(rest[0], whole[0])


def test_data_batches_do_not_end():
    """karpathy/nanochat#360: the loader hung when it had given every example once."""
    with Prefetcher(Blocks(np.arange(4, dtype=np.uint16), 2), 2, seed=0) as batches:
        assert sum(next(batches)[0].shape[0] for _ in range(50)) == 100


def test_data_files_are_utf8_whatever_the_locale(tmp_path):
    """karpathy/nanoGPT#711, Lightning-AI/litgpt#162: open() without an encoding takes the locale's, cp1252 say."""
    file = write(tmp_path / "text.txt", "naïve café — “quotes”, 日本語 🙂\n" * 30)
    code = f"""
import dataclasses, warnings
from pathlib import Path
from fastgpt import GPTConfig
from fastgpt.config import TrainConfig
from fastgpt.data.corpus import Corpus
from fastgpt.baselines import build_model
from fastgpt.training.loop import Trainer
from fastgpt.training.run_folder import RunFolder, read_metrics
warnings.filterwarnings("error", category=EncodingWarning, module="fastgpt")
corpus = Corpus.load({str(file)!r}, block_size=4)
cfg = TrainConfig(max_steps=1, batch_size=2, eval_batches=1, warmup_steps=0, device="cpu")
folder = RunFolder(Path({str(tmp_path / "run")!r}))
folder.create(dataclasses.asdict(cfg))
model = GPTConfig(vocab_size=corpus.tokenizer.vocab_size, block_size=4, n_layer=1, n_head=1, n_embd=4)
Trainer(build_model(model, 1), corpus, cfg, folder).run()
assert read_metrics(folder.metrics_path)
print(ascii(corpus.tokenizer.decode(corpus.train[-31:])))
"""
    out = run_python(code, "-X", "warn_default_encoding", FASTGPT_CACHE=str(tmp_path / "cache"))
    assert "\\u65e5\\u672c\\u8a9e \\U0001f642" in out


def test_data_lines_of_every_system(tmp_path):
    """betalgo/openai#145: a text with \\r\\n had other tokens than the same text with \\n."""
    texts = [load_text(write(tmp_path / f"{i}.txt", f"to be{end}or not{end}{end}")) for i, end in enumerate(LINE_ENDS)]
    assert texts == ["to be\nor not\n\n"] * 3


def test_data_a_character_the_model_never_saw():
    """karpathy/nanoGPT#434, sherjilozair/char-rnn-tensorflow#97: KeyError for a character of the prompt."""
    tokenizer = CharTokenizer.train("hello world")
    with pytest.raises(ValueError, match=r"character 'é' at position 1 is not among the tokenizer's 8 characters"):
        tokenizer.encode("hé")


def test_data_an_id_the_vocabulary_lacks():
    """karpathy/nanoGPT#169: KeyError 271, where the model had another vocabulary than the tokenizer."""
    with pytest.raises(ValueError, match="token id 271 at position 1 is outside the vocabulary of 8"):
        CharTokenizer.train("hello world").decode([0, 271])


def test_data_emoji_come_whole_from_a_stream():
    """huggingface/text-generation-inference#131, latitudegames/GPT-3-Encoder#1: half an emoji was printed as U+FFFD."""
    text = "🤗 안녕 👩‍👩‍👧 naïve\u0301 \U0001f1e9\U0001f1ea"
    tokenizer = BPETokenizer.train("plain text, nothing else " * 20, 300)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) > len(text)
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(i) for i in ids]
    assert "".join(parts) + decoder.flush() == text and "\ufffd" not in "".join(parts)


def test_data_text_cut_inside_a_character():
    """guillaume-be/rust-bert#27, timtoole02/Camelid#288: an incomplete character at the end was an error."""
    tokenizer = BPETokenizer.train("plain text " * 20, 260)
    ids = tokenizer.encode("ok 🙂")[:-1]
    assert tokenizer.decode(ids) == "ok \ufffd"
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.push(i) for i in ids) == "ok " and decoder.flush() == "\ufffd"


def test_data_text_that_spells_a_special_token(tmp_path):
    """karpathy/minGPT#140: text is text; the id of <|endoftext|> is not what its spelling encodes to."""
    trained = BPETokenizer.train("some text to learn from, some more text " * 9, 270)
    tokenizer = BPETokenizer([*trained.vocab, "<|endoftext|>"], trained.merges, {"<|endoftext|>": len(trained.vocab)})
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.special_tokens["<|endoftext|>"] not in ids and tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode([tokenizer.special_tokens["<|endoftext|>"]]) == "<|endoftext|>"
