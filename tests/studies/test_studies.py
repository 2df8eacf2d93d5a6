"""The studies: each runs at a tiny size, shows its results and nothing else, and measures what it says it measures."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from fastgpt import GPT, GPTConfig, ops
from fastgpt.cli import main
from fastgpt.config import ConfigError
from fastgpt.studies import STUDIES, attention, depth, embeddings, learning_rate, load, normalisation, parallelism
from fastgpt.studies.experiment import StudyError, label, load_run, numbers
from fastgpt.studies.page import Page, studies_page
from fastgpt.tokenizer import BPETokenizer, CharTokenizer

DOCS = Path(__file__).resolve().parents[2] / "docs"
SMALL = GPTConfig(vocab_size=11, block_size=12, n_layer=2, n_head=2, n_embd=8, dropout=0.0)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("ROMEO: But, soft! what light 3 through\nyonder window breaks? Be or not TO BE.\n" * 40)
    return path


@pytest.fixture(scope="module")
def reports(tmp_path_factory, text_file) -> Path:
    """Every study at its --quick size, run once; the tests below read the folders."""
    out = tmp_path_factory.mktemp("studies")
    for name in STUDIES:
        more = ["--prompt", "BE or not"] if name == "attention" else []
        arguments = ["--quick", "--data", str(text_file), "--out", str(out / name), "--device", "cpu", *more]
        assert main(["study", name, *arguments]) == 0
    return out


def results(reports: Path, name: str) -> dict:
    return json.loads((reports / name / "results.json").read_text())


# ---- every study ----


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_leaves_a_report_results_and_pictures(reports, name):
    found = results(reports, name)
    assert found["study"] == name and found["settings"]["quick"] is True and found["rows"]
    for fact in ("device", "threads", "python", "torch", "fastgpt", "commit", "date", "seconds"):
        assert fact in found
    assert str(reports) not in json.dumps(found), "no path of this machine"
    report = (reports / name / "report.html").read_text(encoding="utf-8")
    pictures = list((reports / name).glob("*.png"))
    assert pictures and report.count("data:image/png") == len(pictures)
    assert "<table>" in report and found["torch"] in report


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_is_made_from_the_results_alone(reports, name):
    found = results(reports, name)
    page = Page(found, pictures=False)
    report = (reports / name / "report.html").read_text(encoding="utf-8")
    for part in page.parts:  # the pictures are in neither list
        assert part in report
    assert "| --- |" in page.text() or "---: |" in page.text()


def test_a_study_prints_its_table(text_file, tmp_path, capsys):
    arguments = ["--quick", "--data", str(text_file), "--out", str(tmp_path), "--rates", "1e-3", "--widths", "16"]
    assert main(["study", "learning-rate", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "| learning rate |" in printed and "the lowest loss" in printed and "report.html" in printed


def test_settings_come_from_command_line_then_file_then_quick(text_file, tmp_path):
    (tmp_path / "study.toml").write_text('quick = true\nwidths = "16"\nsteps = 3\n')
    arguments = ["--config", str(tmp_path / "study.toml"), "--steps", "2", "--data", str(text_file)]
    assert main(["study", "learning-rate", *arguments, "--out", str(tmp_path / "out")]) == 0
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    quick = learning_rate.Settings.QUICK
    assert (settings["steps"], settings["widths"], settings["repeats"]) == (2, "16", quick["repeats"])


@pytest.mark.parametrize("name", STUDIES)
def test_quick_changes_settings_that_exist(name):
    load(name).Settings(**load(name).Settings.QUICK)


# ---- depth ----


@pytest.mark.parametrize("norm", ["pre", "post", "none"])
@pytest.mark.parametrize("residual", [True, False])
def test_the_gradient_at_a_block_is_that_of_the_stream(norm, residual):
    """Against a forward from the stream on, written out: what ends the network reads x + branch."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**vars(SMALL), "norm": norm, "residual": residual})).double()
    idx, targets = torch.randint(11, (2, 2, 12)).unbind(0)
    found = depth.layers(model, idx, targets)
    assert all(p.grad is None for p in model.parameters())
    kept = []
    hook = model.blocks[-1].register_forward_hook(lambda block, inputs, output: kept.append(output))
    model.hidden(idx)
    hook.remove()
    x, branch = kept[0]
    stream = (x if branch is None else x + branch).detach().requires_grad_()
    last = stream if model.ln_f is None else model.ln_f(stream)
    ops.linear_cross_entropy(last, model.lm_head.weight, targets).backward()
    assert found["gradient"][-1] == pytest.approx(float(stream.grad.norm()), rel=1e-3)
    assert found["activation"][-1] == pytest.approx(float(stream.detach().square().mean().sqrt()), rel=1e-3)
    assert len(found["gradient"]) == 2


@pytest.mark.parametrize(("init", "std"), [("plain", 0.02), ("large", 0.5), ("xavier", math.sqrt(2 / (64 + 192)))])
def test_initialisations(init, std):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_embd=64, n_head=2))
    before = model.token_embedding.weight.clone()
    depth.redraw(model, init)
    assert float(model.blocks[0].attn.qkv.weight.detach().std()) == pytest.approx(std, rel=0.03)
    assert torch.equal(model.token_embedding.weight, before)


def test_what_depth_says_follows_the_numbers(reports):
    found = results(reports, "depth")
    deepest = max(row["depth"] for row in found["rows"])
    for row in found["rows"]:
        row["loss"] = 1.0 if row["residual"] else 9.0
    text = depth._who_learned(found, deepest)
    assert "with residual connections 12 of 12, without 0 of 12" in text
    assert "no residual connections +8.000" in depth._one_change(found, deepest)
    found["repeats"] = [1.0, 1.5]
    assert "not told apart from chance: plain initialisation, xavier" in depth._one_change(found, deepest)


def test_a_network_that_diverged_is_shown_as_a_dash(reports):
    found = results(reports, "depth")
    for row in found["rows"]:
        row["loss"] = None
        row["before"] = {key: [None] * len(values) for key, values in row["before"].items()}
    page = Page(found)
    assert "| – |" in page.text() and "did not end with a finite loss" in page.text()


# ---- normalisation ----


def test_batch_norm_is_torchs():
    torch.manual_seed(0)
    ours, theirs = normalisation.BatchNorm(5, [0.1, 0.5]), torch.nn.BatchNorm1d(5, momentum=0.5)
    for _ in range(3):
        x = torch.randn(4, 6, 5) * 3 + 1
        torch.testing.assert_close(ours(x), theirs(x.flatten(0, 1)).view_as(x))
    ours.which = 1
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x.flatten(0, 1)).view_as(x))


@pytest.mark.parametrize("kind", normalisation.KINDS)
def test_who_depends_on_its_neighbours(kind):
    model = normalisation.build(kind, SMALL, 0, [0.1])
    x = torch.randint(11, (4, 12), generator=torch.Generator().manual_seed(1))
    training, inference = (normalisation.dependence_of(model, x, train_mode=mode) for mode in (True, False))
    assert inference == {"other_rows": 0.0, "future": 0.0}
    if kind == "layer norm":
        assert training == {"other_rows": 0.0, "future": 0.0}
    else:
        assert training["other_rows"] > 1e-4 and training["future"] > 1e-4


def test_measuring_leaves_the_running_averages_alone():
    model = normalisation.build("batch norm", SMALL, 0, [0.1])
    before = copy.deepcopy(model.state_dict())
    x = torch.randint(11, (4, 12))
    normalisation.loss_in_mode(model, x, x, 2, train_mode=True)
    normalisation.dependence_of(model, x, train_mode=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_normalisation_says_follows_the_numbers(reports):
    found = results(reports, "normalisation")
    for row in found["dependence"]:
        row["future"] = 0.25 if row["norm"] == "layer norm" and row["mode"] == "eval" else 0.0
    assert (
        "its first half moved with layer norm in eval mode (0.25), and kept"
        in normalisation._dependence_on_neighbours(found)
    )
    found["coins"][0]["train"], found["coins"][1]["train"] = 0.69, 0.5
    assert (
        "that chance allows with batch norm: the model read the input of later positions"
        in normalisation._coin_flips_in_words(found)
    )
    found["coins"][1]["train"] = 0.69
    assert "None is below ln 2" in normalisation._coin_flips_in_words(found)


# ---- parallelism ----


def test_crossings():
    assert parallelism.crossings([16, 64, 256], [2.0, 0.5, 0.25]) == [pytest.approx(32.0)]
    assert parallelism.crossings([16, 64], [2.0, 1.5]) == []
    assert len(parallelism.crossings([1, 2, 4], [0.5, 2.0, 0.5])) == 2


def test_sequential_steps():
    assert [parallelism.sequential_steps("gpt", 4, context) for context in (16, 2048)] == [4, 4]
    assert [parallelism.sequential_steps("lstm", 4, context) for context in (1, 16)] == [4, 19]


def test_what_parallelism_says_follows_the_numbers(reports):
    found = results(reports, "parallelism")
    contexts = sorted({row["context"] for row in found["rows"]})
    assert len(found["rows"]) == 4 * 2 * 2 * 2 and all(row["rounds"] >= 3 for row in found["rows"])
    for row in found["rows"]:
        row["ms"] = 1.0 if row["model"] == "gpt" else row["context"] / 12.0
    text = parallelism._crossovers(found["rows"], contexts, 1, "forward")
    assert "slower than the RNN up to about 12 tokens, faster from there" in text and "GPT at 16" in text


def test_a_model_is_shown_at_its_best_rate(reports):
    found = results(reports, "parallelism")
    for row in found["losses"]:
        row["loss"] = 1.0 if row["lr"] == {"gpt": 1e-3}.get(row["model"], 3e-3) else None
    assert {row["lr"] for row in parallelism._best_curve(found, "gpt")} == {1e-3}
    assert {row["lr"] for row in parallelism._best_curve(found, "lstm")} == {3e-3}
    for row in found["losses"]:
        row["loss"] = None
    assert "without a finite loss" in parallelism._losses_in_words(found)
    Page(found)


# ---- attention ----


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_maps_are_those_of_the_model(is_causal):
    """Times v they give what the op gave, and through the projection what the layer gave."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**vars(SMALL), "is_causal": is_causal, "dropout": 0.3}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)  # maps far from even
    idx = torch.randint(11, (1, 9))
    outputs = []
    hooks = [block.attn.register_forward_hook(lambda m, i, out: outputs.append(out)) for block in model.blocks]
    captured = attention.capture(model, idx)
    for hook in hooks:
        hook.remove()
    assert len(captured) == 2 and model.training
    for block, (maps, v, out), output in zip(model.blocks, captured, outputs, strict=True):
        torch.testing.assert_close(maps @ v, out, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(block.attn.proj((maps @ v).transpose(1, 2).reshape(1, 9, 8)), output)
        torch.testing.assert_close(maps.sum(-1), torch.ones(1, 2, 9))
        assert (maps.triu(1) == 0).all() == is_causal


def test_summary_of_a_head_that_looks_at_the_token_before():
    maps = torch.zeros(5, 5)
    maps[0, 0] = 1.0
    maps[range(1, 5), range(4)] = 1.0
    found = attention.summary(maps)
    assert found["previous"] == 1.0 and found["entropy"] == 0.0 and found["distance"] == pytest.approx(0.8)
    assert found["itself"] == pytest.approx(0.2) and found["first"] == pytest.approx(0.25)


def test_a_single_token_and_a_single_head(text_file, tmp_path):
    arguments = ["--quick", "--data", str(text_file), "--prompt", "B", "--layer", "2", "--head", "4"]
    assert main(["study", "attention", *arguments, "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (row["layer"], row["head"], row["map"]) == (2, 4, [[1.0]])


def test_labels():
    tokenizer = CharTokenizer("\n \t$aé\x07")
    assert [label(tokenizer, i) for i in range(7)] == ["⏎", "␣", "⇥", "$", "a", "é", "<7>"]
    bpe = BPETokenizer.train("the cat and the dog " * 20, 280)
    labels = [label(bpe, i) for i in range(bpe.vocab_size)]
    assert "␣the" in labels and "<ff>" in labels


# ---- learning rate ----


def test_a_run_that_does_not_train_has_diverged():
    rows = [{"width": 32, "lr": rate, "losses": losses} for rate, losses in
            ((1e-4, [3.5, 3.5]), (1e-3, [2.0, 2.1]), (1e-2, [2.05, 3.4]), (1e-1, [None, 2.0]))]  # fmt: skip
    found = {"rows": rows, "data": {"frequency_loss": 3.3}, "parameters": {"32": 1000}}
    rates = [row["lr"] for row in rows]
    assert learning_rate._best(found, 32, rates) == 1e-3
    assert learning_rate._diverged(found, 32, rates) == [1e-2, 1e-1], "a rate that is too small has not diverged"
    assert "Diverged at 0.01, 0.1" in learning_rate._findings(found, 32, rates)


def test_a_run_that_is_not_finite_is_recorded(text_file, tmp_path):
    arguments = ["--quick", "--data", str(text_file), "--rates", "1e-3,1e30", "--widths", "16", "--steps", "5"]
    assert main(["study", "learning-rate", *arguments, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows[0]["losses"][0] < 4.0 and rows[1]["losses"] == [None]


# ---- embeddings ----

VECTORS = "king 1 1 0\nqueen 1 0 1\nman 0 1 0\nwoman 0 0 1\nkings 0.9 1 0.1\n"


@pytest.fixture
def vectors(tmp_path) -> Path:
    path = tmp_path / "vectors.txt"
    path.write_text(VECTORS)
    return path


def test_an_analogy_of_given_vectors(vectors, tmp_path, capsys):
    arguments = ["--vectors", str(vectors), "--analogy", "king - man + woman", "--words", "king man", "--out"]
    assert main(["study", "embeddings", *arguments, str(tmp_path / "out")]) == 0
    assert "| king - man + woman | queen " in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["word"] for row in found["rows"]] == ["king", "man"]
    assert found["rows"][0]["neighbours"][0][0] == "kings"
    assert found["source"] == "vectors.txt" and len(found["points"]) == 5


def test_word2vecs_header_and_words_with_blanks(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text("3 2\na 1 2\nb c 3 4\na 9 9 \n")
    words, table = embeddings.read_vectors(path, 10)
    assert words == ["a", "b c"] and table.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert embeddings.read_vectors(path, 1)[0] == ["a"]


def test_projection_finds_the_plane_the_points_lie_in():
    torch.manual_seed(0)
    plane = torch.linalg.qr(torch.randn(10, 2, dtype=torch.float64)).Q
    flat = torch.randn(50, 2, dtype=torch.float64) * torch.tensor([5.0, 1.0], dtype=torch.float64)
    coordinates, explained = embeddings.project(flat @ plane.t())
    assert sum(explained) == pytest.approx(1.0) and explained[0] > explained[1] > 0
    torch.testing.assert_close(torch.pdist(coordinates), torch.pdist(flat))


def trained(kind: str, text_file: Path, folder: Path) -> str:
    settings = "--block-size 16 --n-layer 1 --n-head 2 --n-embd 16 --batch-size 4 --max-steps 2 --eval-batches 1"
    run = ["--data", str(text_file), "--out", str(folder / kind), "--model", kind, "--device", "cpu"]
    assert main(["train", *run, *settings.split()]) == 0
    return str(folder / kind)


def test_studies_of_a_trained_model(tmp_path, text_file):
    run = trained("gpt", text_file, tmp_path)
    model, tokenizer = load_run(run)
    assert not model.training and tokenizer.vocab_size == model.cfg.vocab_size
    for name, more in (("embeddings", ["--words", "B e"]), ("attention", ["--prompt", "TO BE"])):
        assert main(["study", name, "--checkpoint", run, *more, "--out", str(tmp_path / name)]) == 0
        assert json.loads((tmp_path / name / "results.json").read_text())["settings"]["checkpoint"] == "gpt"


def test_studies_of_models_without_attention_or_embedding(tmp_path, text_file, capsys):
    lstm, bigram = (trained(kind, text_file, tmp_path) for kind in ("lstm", "bigram"))
    out = ["--out", str(tmp_path / "out")]
    assert main(["study", "embeddings", "--checkpoint", lstm, *out]) == 0
    assert main(["study", "attention", "--checkpoint", lstm, *out]) == 1
    assert "kind 'lstm', which has no attention" in capsys.readouterr().err
    assert main(["study", "embeddings", "--checkpoint", bigram, *out]) == 1
    assert "kind 'bigram' has no token embedding" in capsys.readouterr().err


# ---- bad input ----


def test_numbers():
    assert numbers("depths", "2,8", int) == [2, 8] and numbers("rates", "1e-3", float) == [1e-3]
    for bad in ("", "2,", "2,2", "-1", "0", "1.5", "nan", "many"):
        with pytest.raises(ConfigError, match="depths"):
            numbers("depths", bad, int)
    with pytest.raises(ConfigError, match="rates"):
        numbers("rates", "inf", float)


BAD_USAGE = [
    ([], "which study?"),
    (["sleep"], "no study is called 'sleep'; there are depth, "),
    (["depth", "--depths", "2,x"], "depths: expected whole numbers above 0"),
    (["depth", "--repeats", "1"], "repeats: expected at least 2, got 1"),
    (["learning-rate", "--rates", "0"], "rates: expected numbers above 0"),
    (["learning-rate", "--seed", "-1"], "seed: expected"),
    (["normalisation", "--momenta", "2"], "momenta: expected numbers above 0 and at most 1"),
    (["parallelism", "--contexts", ""], "contexts: expected whole numbers"),
    (["parallelism", "--seconds", "nan"], "seconds: expected at least 0, got nan"),
    (["depth", "--lr", "nan"], "lr: expected a finite number"),
    (["embeddings", "--analogy", "king-man"], "analogy: expected"),
    (["embeddings", "--neighbours", "0"], "neighbours: expected at least 1"),
    (["embeddings", "--vectors", "x", "--checkpoint", "y"], "not both"),
    (["attention", "--steps", "0"], "steps: expected at least 1"),
]

FAILED = [
    (["depth", "--data", "missing.txt"], "'missing.txt' does not exist"),
    (["depth", "--data", "ONE"], "has one distinct character"),
    (["learning-rate", "--data", "SHORT"], "a block of 64 needs 65"),
    (["depth", "--device", "tpu9"], "device: 'tpu9'"),
    (["depth", "--out", "ONE"], "cannot be written"),
    (["attention", "--prompt", ""], "--prompt: is empty"),
    (["attention", "--prompt", "☃"], "character '☃' at position 0"),
    (["attention", "--prompt", "o" * 65], "65 tokens do not fit the model's context of 64"),
    (["attention", "--layer", "5"], "--layer 5: the model has layers 1 to 4"),
    (["attention", "--checkpoint", "missing"], "missing: no such file"),
    (["embeddings", "--vectors", "VECTORS", "--analogy", "kinng - man + woman"],
     "no word 'kinng' among the 5 of vectors.txt; spelled nearly so: 'king', 'kings'"),
    (["embeddings", "--vectors", "VECTORS", "--words", "xyzzy"], "none is spelled nearly so"),
    (["embeddings", "--vectors", "missing"], "cannot be read: No such file"),
    (["embeddings", "--vectors", "FOLDER"], "is a folder"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [(*case, 2) for case in BAD_USAGE] + [(*case, 1) for case in FAILED],
    ids=lambda v: " ".join(v)[:60] if isinstance(v, list) else "",
)
def test_errors_are_one_line_with_the_right_code(arguments, message, code, text_file, vectors, tmp_path, capsys):
    (tmp_path / "one").write_text("a" * 1000)
    (tmp_path / "short").write_text("ab" * 20)
    places = {"ONE": tmp_path / "one", "SHORT": tmp_path / "short", "VECTORS": vectors, "FOLDER": tmp_path}
    arguments = [str(places.get(a, a)) for a in arguments]
    if len(arguments) > 1:
        arguments += ["--quick"]
        arguments += [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
        arguments += [] if "--data" in arguments else ["--data", str(text_file)]
    assert main(["study", *arguments]) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its first line is empty"),
        ("word\n", "line 1 is not a word and 1 numbers"),
        ("a 1 2\nb 3\n", "line 2 is not a word and 2 numbers"),
        ("a 1 2\nb 3 x\n", "line 2 has something else than numbers"),
        ("a 1 2\nb 3 nan\n", "line 2 has a number that is not finite"),
        ("0 2\n", "holds no vectors"),
        ("5 2\na 1 2\n", "promises 5 words, but it has 1"),
        ("a 1 2\nb 3 4\n", "neighbours and a map need 3 vectors"),
        ("a 1\nb 2\nc 3\n", "neighbours and a map need 3 vectors of 2 numbers"),
    ],
)
def test_bad_files_of_vectors(text, message, tmp_path, capsys):
    (tmp_path / "v.txt").write_text(text)
    arguments = ["--vectors", str(tmp_path / "v.txt"), "--out", str(tmp_path / "out")]
    assert main(["study", "embeddings", *arguments]) == 1
    assert message in capsys.readouterr().err
    (tmp_path / "v.txt").write_bytes(b"3 2\nword \xff\xfe\x00\x01\n")
    with pytest.raises(StudyError, match="is not UTF-8 text"):
        embeddings.read_vectors(tmp_path / "v.txt", 10)


# ---- what is committed ----


def test_the_committed_page_is_that_of_the_committed_results():
    text, _ = studies_page(DOCS, pictures=False)
    assert (DOCS / "studies.md").read_text(encoding="utf-8") == text, "python -m fastgpt.studies.page docs"
    for name in STUDIES:
        assert (DOCS / "studies" / f"{name}.json").exists()
    pictures = {line.split("(images/")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert pictures == {file.name for file in (DOCS / "images").glob("study-*.png")}
