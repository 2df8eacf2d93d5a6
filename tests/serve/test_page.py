"""What the page of `fastgpt serve` asks of the server: its files, facts, attention maps and the loss curve."""

from __future__ import annotations

import json
import re

import pytest
import torch

from fastgpt import GPT, GPTConfig
from fastgpt.attention_maps import capture
from fastgpt.baselines import MODELS
from fastgpt.serve import page
from fastgpt.tokenizer import BPETokenizer, CharTokenizer

TOKENIZER = CharTokenizer.train("the cat sat on the mat\n")


def model_of(kind: str = "gpt", block_size: int = 80):
    torch.manual_seed(0)
    shape = {"block_size": block_size, "n_layer": 2, "n_head": 2, "n_embd": 8, "dropout": 0.0}
    model = MODELS[kind](GPTConfig(vocab_size=TOKENIZER.vocab_size, **shape))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)  # maps far from even
    return model.eval()


# ---- the files ----

FILES = {path: content.decode() for path, content, _ in page.files()}


def test_the_files_are_served_under_a_policy_that_allows_nothing_inside_the_page():
    kinds = {path: kind for path, _, kind in page.files()}
    assert kinds["/"] == "text/html" and kinds["/static/page.css"] == "text/css"
    assert kinds["/static/page.js"] == "text/javascript"
    for rule in ("default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'"):
        assert rule in page.HEADERS["Content-Security-Policy"]
    assert "unsafe" not in page.HEADERS["Content-Security-Policy"]


def test_the_page_asks_no_other_host_and_has_no_script_or_style_inside():
    for path, text in FILES.items():
        addresses = set(re.findall(r"https?://[\w./-]+", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}, path  # a namespace, which nothing fetches
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "eval(" not in text, path
    html = FILES["/"]
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    for name in re.findall(r'(?:src|href)="(static/[^"]+)"', html):
        assert f"/{name}" in FILES
    for path, text in FILES.items():
        for name in re.findall(r'from "\./([^"]+)"', text):
            assert f"/static/{name}" in FILES, path


def test_every_label_and_description_leads_to_an_element():
    html = FILES["/"]
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for names in re.findall(r'\s(?:for|aria-labelledby|aria-describedby)="([^"]+)"', html):
        assert set(names.split()) <= set(ids), names


# ---- facts ----


def test_facts_of_a_gpt():
    model = model_of()
    described = page.describe(model, TOKENIZER, "cats", max_tokens=99)
    assert described["name"] == "cats" and described["max_tokens"] == 99 and described["has_attention"]
    facts = dict(described["facts"])
    assert facts["Parameters"] == f"{model.num_parameters():,}" and facts["Context"] == "80 tokens"
    assert facts["Shape"] == "2 layers of 2 heads, width 8" and facts["Device"].startswith("cpu")
    assert facts["Vocabulary"] == f"{TOKENIZER.vocab_size} characters"
    ops = ", ".join(fact for term, fact in facts.items() if term in page.MAKERS.values())
    assert "attention" in ops and "linear cross entropy" in ops
    json.dumps(described, allow_nan=False)


@pytest.mark.parametrize(("kind", "context"), [("bigram", "1 token"), ("lstm", "all of the text")])
def test_facts_of_a_model_without_attention(kind, context):
    described = page.describe(model_of(kind), TOKENIZER, "cats")
    assert not described["has_attention"] and described["n_head"] == 0
    assert dict(described["facts"])["Context"] == context


@pytest.mark.parametrize(
    ("text", "layout", "prompt", "said"),
    [
        ("a\nb", "blocks", "\n", "begins a new line"),
        ("abc", "blocks", "a", "begins with “a”"),
        ("a\nb", "names", "\n", "begins a new name"),
        ("a\nb", "completions", "\n", "completes prompts"),
    ],
)
def test_the_prompt_that_stands_for_an_empty_one(text, layout, prompt, said):
    first, hint = page.first_prompt(CharTokenizer.train(text), layout)
    assert first == prompt and said in hint


# ---- the end of a text ----


@pytest.mark.parametrize(
    ("text", "fits"), [("the cat", "the cat"), ("the cat sat", "e cat sat"), ("the cat s", "the cat s")]
)
def test_the_end_of_a_text_is_a_prompt_that_fits(text, fits):
    assert page.fitting(model_of(block_size=9), TOKENIZER, text) == fits
    assert page.fitting(model_of("lstm", block_size=9), TOKENIZER, text) == text  # which sees all of it


def test_the_end_of_a_text_of_byte_pairs_begins_with_a_whole_character():
    tokenizer = BPETokenizer.train("the cat sat on the mat, naïve — 日本語 " * 9, 280)
    model = model_of(block_size=5)
    for text in ("日本語日本語", "the naïve cat — on the mat"):
        end = page.fitting(model, tokenizer, text)
        assert end and text.endswith(end) and 3 <= len(tokenizer.encode(end)) <= 5


def test_a_model_of_names_sees_its_last_line():
    model = model_of(block_size=9)
    model.layout = "names"
    assert page.fitting(model, TOKENIZER, "the cat\nsat") == "the cat\nsat"
    assert page.fitting(model, TOKENIZER, "sat\nthe cat sat") == " cat sat"  # and a boundary before it


# ---- attention ----


def map_of(model, text: str, layer: int, head: int) -> dict:
    return page.attention_map(model, TOKENIZER, page.last_tokens(model, TOKENIZER, text), layer, head)


def test_the_map_has_the_weights_of_the_model():
    """Times v they give what the model's own attention gave, for the last tokens that it sees."""
    model, text = model_of(block_size=16), "the cat sat on the mat"
    found = map_of(model, text, layer=2, head=1)
    assert found["labels"] == list(text[-16:].replace(" ", "␣")) and found["first"] == 1 and found["is_causal"]
    _, v, out = capture(model, torch.tensor([TOKENIZER.encode(text[-16:])]))[1]
    weights = torch.tensor(found["weights"])  # of four decimals
    torch.testing.assert_close(weights @ v[0, 0], out[0, 0], atol=2e-3, rtol=0)
    assert (weights.triu(1) == 0).all()


def test_of_a_long_text_the_end_is_shown():
    model, text = model_of(block_size=80), "the cat sat on the mat\n" * 5
    found = map_of(model, text, layer=1, head=2)
    assert len(found["labels"]) == page.MOST_SHOWN and found["first"] == 80 - page.MOST_SHOWN + 1
    maps = capture(model, torch.tensor([TOKENIZER.encode(text[-80:])]))[0][0]
    torch.testing.assert_close(torch.tensor(found["weights"]), maps[0, 1, 16:, 16:], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        (("the", 3, 1), "layer: the model has layers 1 to 2, got 3"),
        (("the", 1, 0), "head: "),
        (("", 1, 1), "text: is empty"),
        (("X", 1, 1), "text: character 'X'"),
    ],
)
def test_a_map_that_there_is_not_is_an_error_that_names_the_field(asked, problem):
    with pytest.raises(ValueError, match=problem):
        map_of(model_of(), *asked)


def test_a_model_without_attention_has_no_map():
    with pytest.raises(ValueError, match="kind 'gru' has no attention"):
        map_of(model_of("gru"), "the", 1, 1)


def test_weights_that_are_not_finite_are_an_error_and_not_a_map():
    model = model_of()
    assert isinstance(model, GPT)
    torch.nn.init.constant_(model.blocks[0].attn.qkv.weight, torch.inf)
    with pytest.raises(ValueError, match="not finite"):
        map_of(model, "the", 1, 1)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ([], "body: expected a JSON object"),
        ({"layer": 1, "head": 1}, "text: expected a string"),
        ({"text": "a", "layer": "1", "head": 1}, "layer: "),
        ({"text": "a", "layer": 1, "head": True}, "head: "),
        ({"text": "a", "layer": 1}, "head: "),
    ],
)
def test_a_wrong_question_for_a_map_names_the_field(body, problem):
    with pytest.raises(ValueError, match=problem):
        page.asked_map(body)


# ---- the loss ----


def rows_of(n: int) -> list[dict]:
    return [{"step": i, "split": "val" if i % 10 == 0 else "train", "loss": 4.0 - i / n, "lr": 0.1} for i in range(n)]


def written(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_the_curve_has_every_loss_of_a_short_run(tmp_path):
    answer = page.curve(written(tmp_path, [*rows_of(30), {"step": 30, "split": "train", "loss": float("nan")}]))
    assert answer["why"] is None and len(answer["rows"]) == 30
    assert {row["split"] for row in answer["rows"]} == {"train", "val"}
    json.dumps(answer, allow_nan=False)


def test_of_a_long_run_the_curve_has_evenly_spread_losses_and_the_last(tmp_path):
    n = 5 * page.MOST_POINTS
    rows = page.curve(written(tmp_path, rows_of(n)))["rows"]
    train = [row["step"] for row in rows if row["split"] == "train"]
    assert page.MOST_POINTS / 2 < len(train) <= page.MOST_POINTS and train[-1] == n - 1 and train == sorted(train)


def test_words_stand_for_a_curve_that_there_is_not(tmp_path):
    assert "without the metrics" in page.curve(None)["why"] and "without the metrics" in page.curve(tmp_path)["why"]
    assert "no losses yet" in page.curve(written(tmp_path, []))["why"]
    (tmp_path / "metrics.jsonl").write_text("{\n{}\n{}\n", encoding="utf-8")
    assert "cannot be read" in page.curve(tmp_path)["why"]
