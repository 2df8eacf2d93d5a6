"""The study of embeddings: analogies, projections, and files of vectors."""

from __future__ import annotations

import json

import pytest
import torch

from fastgpt.cli import main
from fastgpt.studies import embeddings
from fastgpt.studies.experiment import StudyError


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


def test_what_embeddings_say_follows_the_numbers(results):
    found = results("embeddings")
    found["kinds"] = {"vowels": {"count": 5, "within": 0.9, "between": 0.0}}
    found["case"] = {"letters": 26, "pairs": 650, "right": 325, "candidates": 62}
    found |= {"width": 128, "vectors": 65, "explained": [0.3, 0.1]}
    assert "than chance allows, are vowels" in embeddings._kinds_in_words(found)
    assert embeddings._analogies_in_words(found).startswith("In 50% of 650 analogies")
    assert "shows 40% of the variance; of vectors" in embeddings._map_in_words(found)
    found["kinds"]["vowels"]["within"] = 0.01
    found["case"]["right"] = 12
    found["explained"] = [0.02, 0.02]
    assert "No kind of character" in embeddings._kinds_in_words(found)
    assert "no more than guessing may find" in embeddings._analogies_in_words(found)
    assert "nearness in the map means little" in embeddings._map_in_words(found)
