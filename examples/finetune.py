"""Fine-tuning: a model that knows a language learns a task from few examples.

    python examples/finetune.py                     # a few minutes on a CPU
    python examples/finetune.py --data input.txt    # plays: a speaker, as "ROMEO:", and below it the speech

A model that writes whole plays is to answer with one line: after "ROMEO says:" with a line of Romeo's, and then stop.
It has never seen "says:" after a name, nor an answer that ends. A thousand examples are enough, because it already
writes Shakespeare's language. A new model that is trained on the same examples shows what they are worth by themselves:
its validation loss stays far above that of the fine-tuned model.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

import fastgpt
from fastgpt.cli import main
from fastgpt.data.sources import load_text


def run(*words: str) -> None:
    """A command, as it would be typed; `fastgpt train --help` lists the options."""
    print("\n$ fastgpt", *words, flush=True)
    if main(list(words)) != 0:
        raise SystemExit(1)


def write_examples(text: str, path: Path, how_many: int) -> None:
    """Write a line of JSON for each example: the prompt, which is read, and the completion, which is learned."""
    speeches = re.findall(r"^([A-Z][A-Z ]+)[.:]\n(.+)$", text, flags=re.MULTILINE)  # the speaker, and the first line
    lines = sorted({(speaker, line) for speaker, line in speeches if len(speaker) + len(line) < 50})
    if not lines:
        raise SystemExit("--data: no line has a speaker's name alone, as ROMEO: or ROMEO., with a speech below it")
    random.Random(1337).shuffle(lines)
    with path.open("w", encoding="utf-8") as file:
        for speaker, line in lines[:how_many]:
            file.write(json.dumps({"prompt": f"{speaker} says:", "completion": f" {line}"}) + "\n")


def ask(checkpoint: Path, prompt: str) -> None:
    """`fastgpt.load` gives the model of a run, with its tokenizer: text in, text out."""
    model, _ = fastgpt.load(checkpoint)
    print(f"{checkpoint.name}: {model.generate_text(prompt, max_new_tokens=48, temperature=0.7)!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="shakespeare", help="a text file, or a text's name as in fastgpt train")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"), help="the folder for the three runs")
    parser.add_argument("--examples", type=int, default=1000, help="how many there are, a tenth of them for validation")
    parser.add_argument("--plays-steps", type=int, default=400, help="steps on the plays")
    parser.add_argument("--steps", type=int, default=200, help="steps on the examples")
    given = parser.parse_args()

    try:
        text = load_text(given.data)
    except ValueError as error:  # no such file, or one that is no text
        parser.error(f"--data: {error}")
    given.out.mkdir(parents=True, exist_ok=True)
    plays, tuned, new = (given.out / name for name in ("plays", "tuned", "new"))
    examples = given.out / "examples.jsonl"
    write_examples(text, examples, given.examples)

    # First the model that knows the language.
    small = ("--preset", "shakespeare-char-cpu")
    run("train", *small, "--data", given.data, "--out", str(plays), "--max-steps", str(given.plays_steps))

    # Then the task: from that model, and from nothing. The loss counts the completions alone.
    task = (
        "--data",
        str(examples),
        "--layout",
        "completions",
        "--max-steps",
        str(given.steps),
        "--eval-interval",
        "50",
    )
    run("train", "--init-from", str(plays), *task, "--out", str(tuned))
    run("train", *small, *task, "--out", str(new))

    print("\nWhat each writes:")
    for checkpoint in (plays, tuned, new):
        for speaker in ("ROMEO", "QUEEN"):
            ask(checkpoint, f"{speaker} says:")
