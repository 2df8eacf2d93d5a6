"""Embeddings: which vectors lie close together, their map in two dimensions, and analogies, a - b + c.

The vectors are the token embedding of a model, or word vectors from a text file in the format of word2vec or GloVe. A
line of such a file is a word and its numbers; word2vec has a first line with the number of words and of numbers.

Sources: Mikolov et al. 2013 (analogies by vector sums); Pennington et al. 2014 (GloVe).
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..loading import load
from ..plots import BLUE, INK, VERMILION, label_points, panels
from ..tokenizer import label
from .experiment import StudyError, at_least, small_gpt, train_small_gpt
from .page import counted, together
from .settings import EmbeddingsSettings

SHOWN = 200  # points in the picture: the first ones, which are the most frequent words in a file of word vectors


def measure(settings: EmbeddingsSettings) -> dict[str, Any]:
    if settings.checkpoint is not None and settings.vectors is not None:
        raise ConfigError("vectors: give a file of vectors or a checkpoint, not both")
    at_least(settings, neighbours=1, max_words=1, steps=1)
    analogies(settings.analogy or "")  # is checked before anything is read
    words, vectors, origin = _vectors(settings)
    n, width = vectors.shape
    if n < 3 or width < 2:
        raise StudyError(
            f"{origin['source']}: {n} vectors of {width} numbers; neighbours and a map need 3 vectors of 2 numbers"
        )
    rows_of, asked = _asked(settings, words, origin["source"])
    unit = torch.nn.functional.normalize(vectors, dim=1)
    rows = [{"word": words[i], "neighbours": nearest(unit, unit[i], words, [i], settings.neighbours)} for i in rows_of]
    found = []
    for ids in asked:
        a, b, c = ids
        answers = nearest(unit, unit[a] - unit[b] + unit[c], words, ids, settings.neighbours)
        found.append({"a": words[a], "b": words[b], "c": words[c], "answers": answers})
    coordinates, explained = project(vectors)
    drawn = sorted({*range(min(n, SHOWN)), *rows_of})
    return {
        **origin,
        "vectors": n,
        "width": width,
        "rows": rows,
        "analogies": found,
        "case": _case(unit, _index(words)),
        "kinds": _kinds(unit, words),
        "explained": [round(share, 4) for share in explained],
        "points": [[words[i], *(round(value, 4) for value in coordinates[i].tolist())] for i in drawn],
    }


def _index(words: list[str]) -> dict[str, int]:
    """The number of each word; of several tokens with one label, the first."""
    return {word: i for i, word in reversed(list(enumerate(words)))}


def _asked(settings: EmbeddingsSettings, words: list[str], source: str) -> tuple[list[int], list[list[int]]]:
    """The numbers of the words whose neighbours are asked for, and of the three words of each analogy."""
    index = _index(words)
    chosen = settings.words.split() if settings.words else _default_words(words)
    of_letters = "a - A + E t - T + S" if set("aeAEtsTS") <= set(words) else ""
    triples = analogies(of_letters if settings.analogy is None else settings.analogy)
    return [find(word, index, source) for word in chosen], [[find(w, index, source) for w in t] for t in triples]


def _vectors(settings: EmbeddingsSettings) -> tuple[list[str], Tensor, dict[str, Any]]:
    """Words or tokens, their vectors (n, width) in float64, and where they come from."""
    if settings.vectors is not None:
        words, vectors = read_vectors(Path(settings.vectors), settings.max_words)
        return words, vectors, {"source": Path(settings.vectors).name, "loss": None}
    if settings.checkpoint is None:
        return _vectors_of_a_small_gpt(settings)
    model, tokenizer = load(settings.checkpoint, dropout=0.0)
    table = getattr(model, "token_embedding", None)
    if table is None:
        raise StudyError(f"--checkpoint {settings.checkpoint}: a model of kind {model.kind!r} has no token embedding")
    words = [label(tokenizer, token) for token in range(tokenizer.vocab_size)]
    return (
        words,
        _rows(table.weight, len(words)),
        {"source": f"the model in {Path(settings.checkpoint).name}", "loss": None},
    )


def _vectors_of_a_small_gpt(settings: EmbeddingsSettings) -> tuple[list[str], Tensor, dict[str, Any]]:
    model, corpus = small_gpt(settings)
    words = [label(corpus.tokenizer, token) for token in range(corpus.tokenizer.vocab_size)]
    source = f"a model trained here for {counted(settings.steps, 'step')}"
    _asked(settings, words, source)  # an unknown word is an error before the training, and not after it
    loss = train_small_gpt(model, corpus, settings)
    return words, _rows(model.token_embedding.weight, len(words)), {"source": source, "loss": loss}


def _rows(table: Tensor, n: int) -> Tensor:
    """The first `n` rows of an embedding's table, (n, width) in float64."""
    return table.detach().double().cpu()[:n]


def read_vectors(path: Path, max_words: int) -> tuple[list[str], Tensor]:
    """Words and vectors (n, width) of a text file. A word that comes twice keeps its first vector."""
    if path.is_dir():
        raise StudyError(f"--vectors {path}: is a folder; give a text file of word vectors")
    found: dict[str, list[float]] = {}
    number = 1
    try:
        with open(path, encoding="utf-8") as file:
            first = file.readline()
            if not first.strip():
                raise StudyError(f"--vectors {path}: its first line is empty; a line is a word and its numbers")
            header = re.fullmatch(r"(\d+) (\d+)\s*", first)
            width = int(header[2]) if header else len(first.split()) - 1
            lines = enumerate(file, 2) if header else enumerate(itertools.chain([first], file), 1)
            for number, line in itertools.islice(lines, max_words):
                word, values = _read_line(path, number, line, width)
                found.setdefault(word, values)
    except OSError as error:
        raise StudyError(f"--vectors {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise StudyError(f"--vectors {path}: is not UTF-8 text; word2vec's binary files must be converted") from None
    if not found:
        raise StudyError(f"--vectors {path}: holds no vectors")
    if header and number - 1 < min(int(header[1]), max_words):
        raise StudyError(f"--vectors {path}: its first line promises {header[1]} words, but it has {number - 1}")
    return list(found), torch.tensor(list(found.values()), dtype=torch.float64)


def _read_line(path: Path, number: int, line: str, width: int) -> tuple[str, list[float]]:
    """One word and its numbers. Some of GloVe's words have blanks in them: the numbers are counted from the right."""
    parts = line.rstrip().rsplit(" ", width) if width > 0 else []
    if len(parts) != width + 1 or width < 1:
        raise StudyError(
            f"--vectors {path}: line {number} is not a word and {max(width, 1)} numbers, as the first line has them"
        )
    try:
        values = [float(part) for part in parts[1:]]
    except ValueError:
        raise StudyError(f"--vectors {path}: line {number} has something else than numbers after its word") from None
    if not all(map(math.isfinite, values)):
        raise StudyError(f"--vectors {path}: line {number} has a number that is not finite")
    return parts[0].strip(), values


def analogies(text: str) -> list[tuple[str, str, str]]:
    """ "king - man + woman" -> [("king", "man", "woman")]; several may follow one another."""
    parts = text.split()
    groups = [parts[i : i + 5] for i in range(0, len(parts), 5)]
    if any(len(group) < 5 or group[1] != "-" or group[3] != "+" for group in groups):
        raise ConfigError(f'analogy: expected "a - b + c" with blanks around the signs, got {text!r}')
    return [(group[0], group[2], group[4]) for group in groups]


def find(word: str, index: dict[str, int], source: str) -> int:
    """The number of a word. The error for an unknown word names the known words with a similar spelling."""
    if word in index:
        return index[word]
    lower = {known.lower(): known for known in index}
    near = difflib.get_close_matches(word.lower(), lower, n=5, cutoff=0.6)
    near += [other for other in (f"␣{word.lower()}",) if other in lower and other not in near]
    spelled = ", ".join(repr(lower[known]) for known in near)
    hint = f"spelled nearly so: {spelled}" if near else "none is spelled nearly so"
    raise StudyError(f"no word {word!r} among the {len(index):,} of {source}; {hint}")


def nearest(unit: Tensor, target: Tensor, words: list[str], without: list[int], n: int) -> list[list[Any]]:
    """The `n` words whose vectors have the largest cosine with `target`, those in `without` left out."""
    cosines = unit @ torch.nn.functional.normalize(target, dim=0)
    cosines[without] = -math.inf
    top = cosines.topk(min(n, len(words) - len(set(without))))
    return [[words[i], round(value, 4)] for value, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)]


def project(vectors: Tensor) -> tuple[Tensor, list[float]]:
    """The first two principal components (n, 2), and the share of the variance each explains."""
    centred = vectors - vectors.mean(0)
    variances, directions = torch.linalg.eigh(centred.t() @ centred)  # ascending
    top = directions[:, [-1, -2]]
    largest = top.gather(0, top.abs().argmax(0, keepdim=True))
    total = variances.clamp_min(0.0).sum().clamp_min(1e-300)
    # The sign of a direction is arbitrary: its largest component is made positive.
    return centred @ (top * largest.sign()), (variances[[-1, -2]].clamp_min(0.0) / total).tolist()


def _default_words(words: list[str]) -> list[str]:
    """Characters of each kind where tokens are characters, otherwise the first ten words."""
    characters = [char for char in "aetA3.␣⏎" if char in words]
    return characters if len(characters) > 2 else words[:10]


def _case(unit: Tensor, index: dict[str, int]) -> dict[str, Any] | None:
    """How many analogies of letters, such as a - A + B = b, come out right, over all pairs of letters."""
    letters = [c for c in index if len(c) == 1 and c.islower() and len(c.upper()) == 1 and c.upper() in index]
    if len(letters) < 3:
        return None
    right, pairs = 0, list(itertools.permutations(letters, 2))
    for one, other in pairs:
        ids = [index[one], index[one.upper()], index[other.upper()]]
        cosines = unit @ (unit[ids[0]] - unit[ids[1]] + unit[ids[2]])
        cosines[ids] = -math.inf
        right += int(cosines.argmax()) == index[other]
    return {"letters": len(letters), "pairs": len(pairs), "right": right, "candidates": len(unit) - 3}


KINDS = {
    "vowels": lambda word: word in "aeiou",
    "consonants": lambda word: word.islower() and word not in "aeiou",
    "capitals": str.isupper,
    "signs": lambda word: not word.isalnum() and word not in "␣⏎⇥",
}


def _kinds(unit: Tensor, words: list[str]) -> dict[str, dict[str, Any]]:
    """For each kind of character: the mean cosine of two of that kind, and of one of that kind with any other."""
    single = [i for i, word in enumerate(words) if len(word) == 1]
    result = {}
    for name, belongs in KINDS.items():
        inside = [i for i in single if belongs(words[i])]
        outside = [i for i in single if i not in set(inside)]
        if len(inside) > 1 and outside:
            within = unit[inside] @ unit[inside].t()
            n = len(inside)
            result[name] = {
                "count": n,
                "within": round(float((within.sum() - within.trace()) / (n * (n - 1))), 4),
                "between": round(float((unit[inside] @ unit[outside].t()).mean()), 4),
            }
    return result


# ---- what is shown ----


def show(results: dict[str, Any], page: Any) -> None:
    trained = f" (validation loss {results['loss']:.3f})" if results["loss"] is not None else ""
    page.paragraph(
        f"The {results['vectors']:,} vectors, of {counted(results['width'], 'number')} each, are from "
        f"{results['source']}{trained}. Two vectors are the more similar, the larger the cosine of the angle between "
        f"them is. The map shows the two directions in which the vectors differ most."
    )
    page.picture(
        "map",
        "The vectors' first two principal components",
        lambda: _draw_map(results),
        nothing="" if sum(results["explained"]) > 0 else "all vectors are the same",
    )
    page.findings(_kinds_in_words(results), _analogies_in_words(results), _map_in_words(results))
    with page.numbers():
        page.table(
            ["word", "nearest (cosine)"],
            [[row["word"], _neighbours_text(row["neighbours"])] for row in results["rows"]],
        )
        if results["analogies"]:
            page.table(
                ["analogy", "nearest (cosine)"],
                [[f"{r['a']} - {r['b']} + {r['c']}", _neighbours_text(r["answers"])] for r in results["analogies"]],
            )
        if results["kinds"]:
            page.table(
                ["kind", "characters", "cosine of two", "cosine with others", "chance allows"],
                [
                    [
                        name,
                        kind["count"],
                        *(f"{v:z.2f}" for v in (kind["within"], kind["between"], _chance(results, kind))),
                    ]
                    for name, kind in results["kinds"].items()
                ],
            )
            page.paragraph(
                "Mean cosines of two characters of a kind, and of one with a character of another kind. A difference "
                "of up to the last column can be chance: it is three standard deviations of the mean cosine of so "
                "many pairs of random vectors."
            )


def _neighbours_text(neighbours: list[list[Any]]) -> str:
    return " · ".join(f"{word} {cosine:z.2f}" for word, cosine in neighbours)


def _chance(results: dict[str, Any], kind: dict[str, Any]) -> float:
    """Three standard deviations of the mean cosine of so many pairs of random vectors, whose mean is zero."""
    return 3.0 / math.sqrt(results["width"] * kind["count"] * (kind["count"] - 1) / 2)


def _kinds_in_words(results: dict[str, Any]) -> str:
    """Whether characters of one kind are more similar to each other than to others; of words, the nearest two."""
    if not results["kinds"]:
        closest = max(results["rows"], key=lambda row: row["neighbours"][0][1])
        word, cosine = closest["neighbours"][0]
        return f"Of the words asked for, {closest['word']} has the nearest neighbour: {word} (cosine {cosine:z.2f})."
    alike: list[str] = []
    others: list[str] = []
    for name, kind in results["kinds"].items():
        is_alike = kind["within"] - kind["between"] > _chance(results, kind)
        cosines = f"{name} (mean cosine {kind['within']:z.2f}, with others {kind['between']:z.2f})"
        (alike if is_alike else others).append(cosines)
    if not alike:
        return f"No kind of character is more similar to itself than chance allows: {together(others)}."
    text = f"More similar to each other than to other characters, by more than chance allows, are {together(alike)}"
    return f"{text}; this is not seen of {together(others)}." if others else f"{text}."


def _analogies_in_words(results: dict[str, Any]) -> str:
    """How often an analogy gives the right answer, beside guessing."""
    case = results["case"]
    if case is None:
        if not results["analogies"]:
            return "No analogy was asked for."
        parts = [f"{r['a']} - {r['b']} + {r['c']} is nearest to {r['answers'][0][0]}" for r in results["analogies"]]
        return f"Of the analogies asked for, {together(parts)}."
    pairs, share = case["pairs"], 1 / case["candidates"]
    found = (
        f"In {case['right'] / pairs:.0%} of {pairs} analogies such as a - A + B = b, the right letter is the nearest"
    )
    if case["right"] <= pairs * share + 3 * math.sqrt(pairs * share * (1 - share)):
        return f"{found}, which is no more than guessing may find (on average {share:.1%})."
    return f"{found}; guessing would find {share:.1%}."


def _map_in_words(results: dict[str, Any]) -> str:
    """How much of the vectors' differences the map shows."""
    shown, even = sum(results["explained"]), 2 / min(results["width"], results["vectors"] - 1)
    if shown < 2 * even:
        return (
            f"The map shows {shown:.0%} of the variance, hardly more than the {even:.0%} of any two directions of "
            f"vectors without structure: nearness in the map means little."
        )
    return f"The map shows {shown:.0%} of the variance; of vectors without structure it would show {even:.0%}."


def _draw_map(results: dict[str, Any]) -> Any:
    figure, [[axes]] = panels(5.6)
    asked = {row["word"] for row in results["rows"]}
    points = sorted(results["points"], key=lambda point: point[0] not in asked)
    for words, style in ((True, {"color": VERMILION, "marker": "D"}), (False, {"color": BLUE, "marker": "o"})):
        at = [(x, y) for word, x, y in points if (word in asked) == words]
        name = "in the tables" if words else "others"
        axes.plot(*zip(*at, strict=True), linestyle="none", markersize=3.5, label=name, **style)
    first, second = results["explained"]
    axes.set(xlabel=f"first component ({first:.0%} of the variance)", ylabel=f"second ({second:.0%})")
    axes.margins(0.08)
    figure.legend(loc="outside upper right", ncols=2, handlelength=1)
    label_points(axes, [((x, y), word, VERMILION if word in asked else INK) for word, x, y in points])
    return figure
