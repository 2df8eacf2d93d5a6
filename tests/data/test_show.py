"""`fastgpt data show`: one example of each layout."""

from __future__ import annotations

from itertools import chain, pairwise

from fastgpt.cli import main
from fastgpt.config import LAYOUTS


def test_data_show_prints_one_example_of_each(capsys) -> None:
    assert main(["data", "show", "--block-size", "9"]) == 0
    parts = capsys.readouterr().out.split("\n\n")
    assert [part.partition(":")[0] for part in parts[:4]] == list(LAYOUTS)
    lines = [[line.split(" -> ") for line in part.splitlines() if " -> " in line] for part in parts[:4]]
    blocks, windows, names, completions = lines
    assert [len(context.strip()) for context, _ in blocks] == list(range(1, 10))
    assert len(windows) == 1 and len(windows[0][0].strip()) == 9
    assert names[0][0].strip() == "⏎" and names[-1][1] == "⏎" and "⏎" not in names[-1][0].strip()[1:]
    assert completions[0][0].strip().endswith("=") and completions[-1][1] == "␃"
    for (context, target), (longer, _) in chain(pairwise(blocks), pairwise(names), pairwise(completions)):
        assert longer.strip() == context.strip() + target


def test_data_show_counts_the_windows(tmp_path, capsys) -> None:
    (tmp_path / "data.txt").write_text("a b\tc\n" * 10, encoding="utf-8")
    assert main(["data", "show", "--data", str(tmp_path / "data.txt"), "--layout", "windows", "--block-size", "6"]) == 0
    out = capsys.readouterr().out
    assert "54 examples (60 tokens - 6)" in out and all(mark in out for mark in "␣⏎⇥")


def test_data_show_shows_the_end_of_a_long_context(tmp_path, capsys) -> None:
    (tmp_path / "data.txt").write_text("ab" * 150, encoding="utf-8")
    assert (
        main(["data", "show", "--data", str(tmp_path / "data.txt"), "--layout", "blocks", "--block-size", "200"]) == 0
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if " -> " in line]
    assert len(lines) == 200 and max(map(len, lines)) == 8 + 64 + 5 and lines[-1].strip().startswith("…")


def test_data_show_says_why_not(tmp_path, capsys) -> None:
    (tmp_path / "data.txt").write_text("a text\n\nwith an empty line", encoding="utf-8")
    show = ["data", "show", "--data", str(tmp_path / "data.txt")]
    assert main(show) == 0
    assert "names: not from this text" in (out := capsys.readouterr().out) and "blocks: 8 tokens" in out
    assert "completions: not from this text" in out and "data.txt', line 1: is not JSON" in out
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "completion": "b"}', encoding="utf-8")
    assert main(["data", "show", "--data", str(tmp_path / "pairs.jsonl")]) == 0
    assert "blocks: not from this text" in (out := capsys.readouterr().out) and "completions: one prompt" in out
    assert main([*show, "--layout", "names"]) == 1
    assert "line 2 is a name of length 0" in capsys.readouterr().err
    assert main([*show, "--layout", "windows", "--block-size", "99"]) == 1
    assert "data.txt' has 26 tokens, and a block of 99 needs 100" in capsys.readouterr().err
    assert main([*show, "--block-size", "0"]) == 1
    assert "block_size: expected an integer of at least 1" in capsys.readouterr().err
    assert main([*show, "--layout", "rows"]) == 2
    assert main(["data", "hide"]) == 2
    (tmp_path / "data.txt").write_text("a" * 99, encoding="utf-8")
    assert main(show) == 1
    assert "one distinct character" in capsys.readouterr().err
    assert main(["data"]) == 2
    assert main(["data", "--help"]) == 0
