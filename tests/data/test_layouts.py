"""The three layouts: how many examples there are, which they are, and that none crosses a border, all exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.cli import main
from fastgpt.config import ConfigError, TrainConfig
from fastgpt.data.corpus import Corpus
from fastgpt.data.layouts import Blocks, Examples, Names, Windows, boundary_token
from fastgpt.data.prefetch import Prefetcher
from fastgpt.data.sources import DataError
from fastgpt.tokenizer import CharTokenizer

NAME = st.text("abc", min_size=1, max_size=6)


BOUNDARY = 0  # the newline sorts before the letters


def pairs(examples: Examples, tokenizer=None) -> list[tuple[tuple[int, ...], int]]:
    """Every (context, target) that counts, of all examples in order."""
    x, y = examples.cut(np.arange(len(examples)))
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (len(examples), examples.block_size)
    return [
        (tuple(row[: t + 1].tolist()), int(targets[t]))
        for row, targets in zip(x, y, strict=True)
        for t in range(len(row))
        if targets[t] != -100
    ]


def of_names(names: list[str], block_size: int) -> tuple[Names, CharTokenizer]:
    tokenizer = CharTokenizer("\nabc")
    return Names(tokenizer.encode_array("\n" + "".join(n + "\n" for n in names)), block_size, BOUNDARY), tokenizer


@given(st.integers(1, 12), st.integers(1, 30))
def test_every_prefix_of_every_block_is_an_example(block: int, extra: int) -> None:
    tokens = np.arange(block + extra)
    examples = Blocks(tokens, block)
    assert len(examples) == len(tokens) - block
    expected = [(tuple(range(s, s + t + 1)), s + t + 1) for s in range(len(tokens) - block) for t in range(block)]
    assert pairs(examples) == expected


@given(st.integers(1, 12), st.integers(1, 30))
def test_a_window_slides_over_the_text_one_token_at_a_time(block: int, extra: int) -> None:
    tokens = np.arange(block + extra)
    examples = Windows(tokens, block)
    assert len(examples) == len(tokens) - block
    assert pairs(examples) == [(tuple(range(s, s + block)), s + block) for s in range(len(tokens) - block)]


@given(st.lists(NAME, min_size=1, max_size=8), st.integers(0, 3))
def test_names_give_every_prefix_inside_each_name_and_nothing_else(names: list[str], room: int) -> None:
    block_size = max(map(len, names)) + 1 + room
    examples, tokenizer = of_names(names, block_size)
    assert len(examples) == len(names)
    expected = [("\n" + name[:t], (name + "\n")[t]) for name in names for t in range(len(name) + 1)]
    assert [(tokenizer.decode(context), tokenizer.decode([target])) for context, target in pairs(examples)] == expected


def test_one_row_is_cut_like_many() -> None:
    """A single row of a memory-mapped array is contiguous as it is: x and y must not become the same memory."""
    for examples in (Blocks(np.arange(9), 4), Windows(np.arange(9), 4), of_names(["ab", "c"], 4)[0]):
        x, y = examples.cut(np.arange(len(examples)))
        for i in range(len(examples)):
            one_x, one_y = examples.cut(np.array([i]))
            assert torch.equal(one_x[0], x[i]) and torch.equal(one_y[0], y[i])


def test_padding_is_the_boundary_and_does_not_count() -> None:
    x, y = of_names(["ab", "c"], 5)[0].cut(np.arange(2))
    assert x.tolist() == [[0, 1, 2, 0, 0], [0, 3, 0, 0, 0]]
    assert y.tolist() == [[1, 2, 0, -100, -100], [3, 0, -100, -100, -100]]


@pytest.mark.parametrize("examples", [Blocks(np.arange(50), 4), Windows(np.arange(50), 4), of_names(["ab", "c"], 4)[0]])
def test_batches_follow_from_seed_and_step(examples: Examples) -> None:
    with Prefetcher(examples, 8, seed=3, start_step=5) as batches:
        for step, batch in zip(range(5, 8), batches, strict=False):
            assert all(torch.equal(a, b) for a, b in zip(batch, examples.batch(8, 3, step), strict=True))
    assert not torch.equal(examples.batch(32, 3, 0)[0], examples.batch(32, 3, 1)[0])
    first, last = examples.evenly_spaced(7)[0][[0, -1]]
    assert torch.equal(first, examples.cut(np.array([0]))[0][0])
    assert torch.equal(last, examples.cut(np.array([len(examples) - 1]))[0][0])


def load(tmp_path, text: str, layout: str, block_size: int, **options) -> Corpus:
    (tmp_path / "data.txt").write_text(text, encoding="utf-8")
    return Corpus.load(tmp_path / "data.txt", layout=layout, block_size=block_size, **options)


NAMES = [a + b + c for a in "abcde" for b in "xyz" for c in "rst"]


@pytest.mark.parametrize("options", [{}, {"tokenizer": "bpe", "vocab_size": 270}], ids=["char", "bpe"])
@pytest.mark.parametrize("end", ["", "\n"])
def test_a_corpus_of_names_is_split_between_names(tmp_path, options, end: str) -> None:
    corpus = load(tmp_path, "\n".join(NAMES) + end, "names", 4, **options)
    assert corpus.layout == "names"
    found = {}
    for split in ("train", "val"):
        examples = corpus.examples(split, 4)
        x, y = examples.cut(np.arange(len(examples)))
        found[split] = [corpus.tokenizer.decode(row[t >= 0]) for row, t in zip(x, y, strict=True)]
        ends = [corpus.tokenizer.decode(row[row >= 0]) for row in y]
        assert ends == [name.removeprefix("\n") + "\n" for name in found[split]]
    assert len(found["train"]) == len(NAMES) * 9 // 10
    assert sorted(found["train"] + found["val"]) == sorted("\n" + name for name in NAMES)
    assert found["train"] != sorted(found["train"]), "a sorted list is mixed, so that the splits are alike"


def test_names_of_other_scripts_and_with_blanks(tmp_path) -> None:
    corpus = load(tmp_path, " Zoë Ann\nÅsa\t\n李\n" * 4, "names", 20, tokenizer="bpe", vocab_size=256)
    x, y = corpus.examples("train", 20).cut(np.arange(10))
    rows = {corpus.tokenizer.decode(row[t >= 0]) for row, t in zip(x, y, strict=True)}
    assert rows <= {"\nZoë Ann", "\nÅsa", "\n李"} and len(rows) > 1


BAD = [
    ("ann\n\nbob\n", "names", 8, "line 2 is a name of length 0: remove the empty line"),
    ("ann\n \nbob", "names", 8, "line 2 is a name of length 0"),
    (
        "ann\nbarbara\nbob\n",
        "names",
        4,
        "'barbara' .* longer than the block: .* 8 tokens, and block_size is 4",
    ),
    ("ann\n", "names", 8, "has one name"),
    ("abcd" * 5, "windows", 20, "has 20 tokens, and a block of 20 needs 21"),
    ("abcd" * 5, "windows", 40, "has 20 tokens, and a block of 40 needs 41"),
    ("abcd" * 5, "blocks", 19, "the train split"),
    ("aaaaaaaa" * 9, "blocks", 4, "has one distinct character, 'a'"),
    ("\n" * 9, "names", 4, "has one distinct character"),
]


@pytest.mark.parametrize(("text", "layout", "block_size", "message"), BAD)
def test_bad_data_is_refused_in_one_line(tmp_path, text, layout, block_size, message) -> None:
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path, text, layout, block_size)
    assert "\n" not in str(error.value)


def test_bad_arguments() -> None:
    with pytest.raises(DataError, match="needs 11"):
        Windows(np.arange(10), 10)
    with pytest.raises(DataError, match="name 0 has length 0"):
        Names(np.array([0, 0, 1, 0]), 4, 0)
    with pytest.raises(DataError, match="boundary tokens"):
        Names(np.array([1, 2, 0]), 4, 0)
    with pytest.raises(DataError, match="name 1 is longer than the block"):
        of_names(["a", "abcabc"], 4)
    with pytest.raises(ValueError, match="layout: expected one of blocks, windows, names, completions, got 'rows'"):
        Corpus.load("names", layout="rows")
    with pytest.raises(ConfigError, match="layout: expected one of"):
        TrainConfig(layout="rows")
    assert boundary_token(CharTokenizer("\nab")) == 0


OF_A_TEXT = ("blocks", "windows", "names")  # test_completions.py has the layout of JSON lines
SMALL = "--block-size 12 --n-layer 1 --n-head 2 --n-embd 16 --batch-size 8 --max-steps 6 --eval-interval 3 --dropout 0"


SMALL += " --eval-batches 1 --log-interval 3 --device cpu"


@pytest.mark.parametrize("layout", OF_A_TEXT)
def test_every_layout_trains_resumes_to_the_same_bits_and_samples(layout, tmp_path, capsys) -> None:
    from fastgpt.checkpoint import Checkpoint

    (tmp_path / "data.txt").write_text("\n".join(NAMES * 3), encoding="utf-8")
    train = ["train", "--data", str(tmp_path / "data.txt"), "--layout", layout, *SMALL.split()]
    rate = ["--warmup-steps", "0", "--lr", "0.001", "--min-lr", "0.001"]
    assert main([*train, *rate, "--out", str(tmp_path / "whole")]) == 0
    assert main([*train, *rate, "--out", str(tmp_path / "parts"), "--max-steps", "3"]) == 0
    assert main(["train", "--out", str(tmp_path / "parts"), "--resume", "--max-steps", "6"]) == 0
    whole, parts = (Checkpoint.load(tmp_path / run / "checkpoint/latest.safetensors") for run in ("whole", "parts"))
    assert whole.state["best_val"] == parts.state["best_val"] and whole.train_config["layout"] == layout
    assert all(torch.equal(tensor, parts.tensors[name]) for name, tensor in whole.tensors.items())
    other = OF_A_TEXT[OF_A_TEXT.index(layout) - 1]
    assert main(["train", "--out", str(tmp_path / "parts"), "--resume", "--layout", other, "--max-steps", "9"]) == 1
    capsys.readouterr()
    assert main(["sample", "--checkpoint", str(tmp_path / "whole"), "--max-new-tokens", "30", "--seed", "1"]) == 0
    assert len(capsys.readouterr().out) == 1 + 30 + 1


def test_sampled_names_start_anew_after_each_end_token(tmp_path) -> None:
    """What follows an end token is drawn as after the start token alone, whatever came before."""
    from fastgpt import GPT, GPTConfig
    from fastgpt.generate import stream_names

    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=4, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.0))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.5)
    seen = []
    real = model.hidden

    def hidden(idx, cache=None):
        seen.append((0 if cache is None else cache.length, idx[0].tolist()))
        return real(idx, cache)

    model.hidden = hidden
    tokens = [int(t) for t in stream_names(model, torch.tensor([[0]]), 40, 0, generator=torch.manual_seed(1))]
    assert len(tokens) == 40 and 0 in tokens[:-1]
    starts = [fed for i, (length, fed) in enumerate(seen) if i and tokens[i - 1] == 0 and length == 0]
    assert len(starts) == tokens[:-1].count(0) and all(fed == [0] for fed in starts)
