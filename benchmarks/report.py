"""The README's table of training steps, from a file of results: python benchmarks/report.py FILE.jsonl"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def train_step_table(path: Path) -> str:
    """Markdown: milliseconds of a step, and how many times FastGPT's each peer takes."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["op"] == "train_step"]
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    medians = {(row["shape"], row["implementation"]): row["median_ms"] for row in rows}
    lines = [
        "| one training step | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for shape in shapes:
        ours = medians[shape, "fastgpt"]
        cells = [f"{ours:.1f} ms" if n == "fastgpt" else f"{medians[shape, n] / ours:.2f}x" for n in names]
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    facts = rows[0]
    lines += [
        "",
        f"{facts['device']} ({facts['cpu_capability']}), {facts['threads']} threads, float32, torch {facts['torch']}, "
        f"{facts['date']}, commit {facts['commit'][:10]}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(train_step_table(Path(sys.argv[1])))
