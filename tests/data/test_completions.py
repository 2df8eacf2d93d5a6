"""The layout of JSON lines: what is read, which targets count, and a model that completes its prompts and stops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastgpt import GPT, GPTConfig, use_backend
from fastgpt.checkpoint import Checkpoint
from fastgpt.cli import main
from fastgpt.data.completions import Pair, end_token, load_pairs
from fastgpt.data.corpus import Corpus
from fastgpt.data.layouts import IGNORED, Completions
from fastgpt.data.sources import DataError
from fastgpt.tokenizer import BPETokenizer, CharTokenizer, Tokenizer

SUMS = [(f"{a}+{b}=", f"{a + b}") for a in range(2, 9) for b in range(2, 9)]
MULTILINE = [(f"list {n}:", "".join(f"\n- {'ab' * (i % 3)}é" for i in range(1, n))) for n in range(2, 9)]


def write(path: Path, pairs: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs), encoding="utf-8")
    return path


def a_bpe(special: bool) -> BPETokenizer:
    trained = BPETokenizer.train("list of lists: ababab\n\n- ab\n- abab\n" * 5, 280)
    return trained.with_end() if special else trained


# ---- reading ----


def test_pairs_are_mixed_and_know_their_lines(tmp_path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "a.jsonl", SUMS[:20])
    write(tmp_path / "deep" / "b.jsonl", SUMS[20:])
    (tmp_path / "notes.txt").write_text("not read")
    pairs = load_pairs(tmp_path)
    assert sorted((p.prompt, p.completion) for p in pairs) == sorted(SUMS)
    assert [(p.prompt, p.completion) for p in pairs] != SUMS, "a sorted list is mixed, so that the splits are alike"
    assert pairs == load_pairs(tmp_path)
    last = next(p for p in pairs if p.prompt == SUMS[-1][0])
    assert last.place == f"{str(tmp_path / 'deep' / 'b.jsonl')!r}, line {len(SUMS) - 20}"


def test_line_ends_and_other_fields(tmp_path) -> None:
    lines = ['{"prompt": "a\\r\\nb", "completion": "\u2028c\\rd", "id": 7}', "", '{"completion": "y", "prompt": "x"}']
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8", newline="")
    found = {pair.prompt: pair for pair in load_pairs(tmp_path / "a.jsonl")}
    assert found["a\nb"].completion == "\u2028c\nd" and found["x"][1] == "y" and found["x"].line == 3


BAD = [
    ('{"prompt": "a"', r"line 2: is not JSON \(Expecting ',' delimiter at character 15\); expected {\"prompt\": "),
    ("[" * 100_000, "line 2: cannot be read as JSON"),
    ('["a", "b"]', "line 2: is a list; expected"),
    ("7", "line 2: is a number; expected"),
    ('{"prompt": "a", "answer": "b"}', "line 2: has no field 'completion'; .* got 'prompt', 'answer'"),
    ("{}", "line 2: has no field 'prompt'; .* got no field"),
    ('{"prompt": ["a"], "completion": "b"}', "line 2: field 'prompt' is a list; expected a text"),
    ('{"prompt": "a", "completion": null}', "line 2: field 'completion' is null; expected a text"),
    ('{"prompt": "", "completion": "b"}', "line 2: field 'prompt' is empty"),
    ('{"prompt": "a", "completion": "b\\u0003"}', "line 2: field 'completion' has the character that ends"),
    ('{"prompt": "a", "completion": "b\\ud800"}', "line 2: field 'completion' has half of a surrogate pair"),
    ('{"prompt": "aaaaa", "completion": "bbbb"}', "line 2: prompt and completion have 9 tokens, and block_size is 8"),
    ('{"prompt": "a", "completion": "b", "prompt": "c"}', "line 2: has the field 'prompt' twice: remove one"),
    ("", "has one example, and needs one to train on and one to validate: give more lines"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_lines_are_named(tmp_path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "a", "completion": "b"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(DataError, match=message) as error:
        Corpus.load(tmp_path / "a.jsonl", block_size=8, layout="completions")
    assert "\n" not in str(error.value) and "a.jsonl'" in str(error.value)


def test_all_that_do_not_fit_are_named_and_the_longest_first(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", [("p", "c" * n) for n in (1, 9, 3, 12, 8, 7)])
    message = "line 4: prompt .* 13 tokens, and block_size is 8; set block_size to 13 .*; 2 more .* line 2, .* line 5$"
    with pytest.raises(DataError, match=message):
        Corpus.load(path, block_size=8, layout="completions")


def test_other_data_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="'shakespeare' is a text; layout completions takes"):
        Corpus.load("shakespeare", layout="completions")
    with pytest.raises(DataError, match=r"holds no files named \*\.jsonl"):
        load_pairs(tmp_path)
    path = write(tmp_path / "a.jsonl", [("é", "b"), ("a", "b")])
    with pytest.raises(DataError, match=r"line 1: field 'prompt': character 'é' at position 0 is not among"):
        Corpus.load(path, CharTokenizer("ab\n"), block_size=8, layout="completions")
    with pytest.raises(DataError, match="neither an end of text nor a newline"):
        Corpus.load(path, CharTokenizer("abé"), block_size=8, layout="completions")
    path = write(tmp_path / "b.jsonl", [("a", "b\nb"), ("a", "b")])
    with pytest.raises(DataError, match=r"line 1: field 'completion' has a newline, which ends a completion"):
        Corpus.load(path, CharTokenizer("ab\n"), block_size=8, layout="completions")
    with pytest.raises(DataError, match="example 0 is longer than block_size 2"):
        Completions(np.zeros(4), 2, np.array([[3, 1]]))


# ---- targets ----

TOKENIZERS = {
    "char": ("char", MULTILINE),
    "bpe": ("bpe", MULTILINE),
    "GPT-2's": (a_bpe(special=True), MULTILINE),
    "a run's characters": (CharTokenizer.train("0123456789+=\n"), SUMS),
    "a run's bpe": (a_bpe(special=False), SUMS),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_only_the_completion_and_its_end_are_targets(tmp_path, name: str) -> None:
    given, pairs = TOKENIZERS[name]
    corpus = Corpus.load(write(tmp_path / "a.jsonl", pairs), given, vocab_size=300, block_size=99, layout="completions")
    tokenizer = corpus.tokenizer
    end, found = end_token(tokenizer), []
    for split, n in (("train", len(pairs) * 9 // 10), ("val", len(pairs) - len(pairs) * 9 // 10)):
        examples = corpus.examples(split, 99)
        assert len(examples) == n and not examples.equal_targets
        x, y = examples.cut(np.arange(n))
        sizes = []
        for row, targets in zip(x, y, strict=True):
            (counted,) = torch.nonzero(targets != IGNORED, as_tuple=True)
            first, last = int(counted[0]), int(counted[-1])
            assert torch.equal(row[first + 1 : last + 1], targets[first:last]) and int(targets[last]) == end
            assert (row[last + 1 :] == end).all()
            prompt, completion = tokenizer.decode(row[: first + 1]), tokenizer.decode(targets[first:last])
            found.append((prompt, completion))
            assert tokenizer.encode(prompt) == row[: first + 1].tolist(), "as `fastgpt sample` encodes it"
            sizes.append(last + 1)
        assert x.shape[1] == max(sizes), "rows are as long as the longest example, not as the block"
    assert sorted(found) == sorted(pairs)


def test_a_trained_tokenizer_gets_a_token_that_ends_completions(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", MULTILINE)
    char, bpe = (Corpus.load(path, kind, vocab_size=260, block_size=99, layout="completions").tokenizer
                 for kind in ("char", "bpe"))  # fmt: skip
    assert char.decode([char.end_of_text]) == "\x03" and bpe.decode([bpe.end_of_text]) == "<|endoftext|>"
    assert bpe.vocab_size == 261 and bpe.with_end() is bpe
    assert bpe.end_of_text not in bpe.encode("<|endoftext|>")
    assert CharTokenizer("ab").end_of_text is None and a_bpe(special=False).end_of_text is None


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_loss_is_that_of_the_completions(tmp_path, backend: str) -> None:
    """Against the probability of each completion, one prompt at a time, without padding."""
    corpus = Corpus.load(write(tmp_path / "a.jsonl", MULTILINE), block_size=99, layout="completions")
    tokenizer: Tokenizer = corpus.tokenizer
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=99, n_layer=2, n_head=2, n_embd=16, dropout=0.0))
    examples = corpus.examples("train", 99)
    x, y = examples.cut(np.arange(len(examples)))
    total, n = torch.zeros(()), 0
    for pair in load_pairs(tmp_path / "a.jsonl")[: len(examples)]:
        prompt = tokenizer.encode(pair.prompt)
        rest = [*tokenizer.encode(pair.completion), end_token(tokenizer)]
        logits, _ = model(torch.tensor([[*prompt, *rest[:-1]]]))
        total = total + F.cross_entropy(logits[0, len(prompt) - 1 :], torch.tensor(rest), reduction="sum")
        n += len(rest)
    expected = torch.autograd.grad(total / n, model.token_embedding.weight)[0]
    with use_backend(backend):
        for loss in (model.loss(x, y), model(x, y)[1]):
            torch.testing.assert_close(loss, total / n)
            torch.testing.assert_close(torch.autograd.grad(loss, model.token_embedding.weight)[0], expected)


# ---- a run ----

SMALL = "--block-size 8 --n-layer 1 --n-head 2 --n-embd 32 --batch-size 16 --dropout 0 --eval-batches 2 --device cpu"
SMALL += " --lr 0.01 --min-lr 0.01 --warmup-steps 0 --eval-interval 40 --log-interval 20"
ANSWERS = [(f"{number}{letter}?", f"{letter.upper()}!") for number in range(9) for letter in "abcdefgh"]


def test_a_run_learns_to_complete_and_to_stop_and_is_resumed_to_the_same_bits(tmp_path, capsys) -> None:
    path = write(tmp_path / "a.jsonl", ANSWERS)
    train = ["train", "--data", str(path), "--layout", "completions", *SMALL.split()]
    assert main([*train, "--out", str(tmp_path / "whole"), "--max-steps", "80"]) == 0
    assert main([*train, "--out", str(tmp_path / "parts"), "--max-steps", "40"]) == 0
    assert main(["train", "--out", str(tmp_path / "parts"), "--resume", "--max-steps", "80"]) == 0
    whole, parts = (Checkpoint.load(tmp_path / run / "checkpoint/latest.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(tensor, parts.tensors[name]) for name, tensor in whole.tensors.items())
    assert whole.state["tokens"] == 80 * 16 * 5, "rows have 5 tokens: what is counted is what is computed"
    assert whole.state["best_val"] < 0.1
    assert "each of 80 tokens" in capsys.readouterr().out
    sample = ["sample", "--checkpoint", str(tmp_path / "whole"), "--temperature", "0"]
    for prompt, completion in ANSWERS[20:23]:
        assert main([*sample, "--prompt", prompt]) == 0
        assert capsys.readouterr().out == prompt + completion + "\n"
    assert main(sample) == 2
    assert "--prompt is missing: this model completes prompts" in capsys.readouterr().err


def test_json_lines_in_another_layout_are_refused_with_the_ways_to_read_them(tmp_path, capsys) -> None:
    path = write(tmp_path / "a.jsonl", ANSWERS)
    assert main(["train", "--data", str(path), *SMALL.split(), "--out", str(tmp_path / "r")]) == 1
    error = capsys.readouterr().err
    assert f"fastgpt data prepare --data {path} --out" in error and "--layout completions" in error
    assert not (tmp_path / "r").exists()


def test_a_place_is_the_file_and_the_line() -> None:
    assert Pair("a", "b", "data.jsonl", 3).place == "'data.jsonl', line 3"
