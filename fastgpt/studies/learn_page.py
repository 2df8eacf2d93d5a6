"""What `fastgpt learn` shows: the report of its stages, and the same numbers in docs/from-bigram-to-gpt.md.

    python -m fastgpt.studies.learn_page docs

makes the numbers, the examples of the data and the pictures of that page again, from docs/from-bigram-to-gpt.json.
"""

from __future__ import annotations

import json
import sys
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..data.show import show_layouts
from ..files import atomic_path
from ..plots import BLUE, FAINT, label_ends, line_style, panels, png, styled
from ..report import Report, markdown_table
from .page import counted, duration, filled, preview, provenance
from .settings import LearnSettings
from .stages import LADDER, STAGES, find_stage

HEADERS = ["stage", "builds on", "parameters", "validation loss", "change"]


def table_rows(results: dict[str, Any]) -> list[list[Any]]:
    """The report's table: losses in nats per character, and the change from the stage that each one builds on."""
    losses = {row["name"]: row["loss"] for row in results["stages"]}
    table = []
    for row in results["stages"]:
        after = find_stage(row["name"]).after
        change = "–" if after is None else f"{row['loss'] - losses[after]:+.3f}"
        table.append([row["name"], after or "–", row["parameters"], f"{row['loss']:.3f}", change])
    return table


def differences(results: dict[str, Any], name: str) -> str:
    """What the stage changes: its model, and each setting that differs from the stage it builds on."""
    stage, found = find_stage(name), {row["name"]: row for row in results["stages"]}
    if stage.after is None:
        return f"model: {stage.model}"
    before, now = found[stage.after], found[name]
    lines = [f"{key}: {before[key]} -> {now[key]}" for key in ("model", "batch_size", "lr") if before[key] != now[key]]
    lines += [f"{k}: {v} -> {now['config'][k]}" for k, v in before["config"].items() if v != now["config"][k]]
    return "\n".join(lines)


# ---- in words ----


def budget(results: dict[str, Any]) -> str:
    settings, n, each = results["settings"], results["training_tokens"], results["tokens_per_step"]
    return (
        f"All stages have the same budget: {counted(settings['steps'], 'step')} of {each} characters, which is "
        f"{_passes(results)} the training text of {n:,} characters; seed {settings['seed']}; "
        f"AdamW with a warm-up and a cosine. The learning rate is {settings['lr']:g}, and "
        f"{results['stages'][-1]['lr']:g} in the last stage. Losses are in nats per character, on text that was not "
        f"trained on."
    )


def preview_note(results: dict[str, Any]) -> str:
    """What stands above the results of --quick."""
    return preview("fastgpt learn", results["settings"], LearnSettings())


def _passes(results: dict[str, Any]) -> str:
    """How many times each stage read as many characters as the training text has: "2.0 times"."""
    times = results["settings"]["steps"] * results["tokens_per_step"] / results["training_tokens"]
    return f"{times:.1f} times" if times >= 0.05 else "less than 0.1 times"


def findings(results: dict[str, Any]) -> list[str]:
    """Sentences about the results, made from their numbers."""
    losses = {row["name"]: row["loss"] for row in results["stages"]}
    return [
        _ladder_in_words(losses),
        f"The trained bigram reaches {losses['bigram']:.3f}. A bigram made by counting the pairs of the training text, "
        f"which no bigram can beat on that text, has {results['counted_bigram']:.3f} over all of the validation text.",
        _norms_in_words(losses),
        _dropout_in_words(results, losses),
        _scaling_in_words(results),
    ]


def _ladder_in_words(losses: dict[str, float]) -> str:
    rising = [(a, b) for a, b in pairwise(LADDER) if losses[b] >= losses[a]]

    def said(name: str) -> str:
        return f'"{name}" ({losses[name]:.3f})'

    way = f"From {said(LADDER[0])} to {said(LADDER[-1])}"
    if not rising:
        return f"{way} the loss falls with every stage."
    exceptions = "; ".join(f"{said(b)} is no better than {said(a)}" for a, b in rising)
    return f"{way} the loss does not fall with every stage: {exceptions}."


def _norms_in_words(losses: dict[str, float]) -> str:
    post, pre = losses["+ layer norm, post"], losses["+ layer norm, pre"]
    better, worse = ("pre", "post") if pre <= post else ("post", "pre")
    return (
        f"With one block, the loss of {better}-norm is {abs(pre - post):.3f} lower than that of {worse}-norm; "
        f"`fastgpt study depth` asks the same of deep networks."
    )


def _dropout_in_words(results: dict[str, Any], losses: dict[str, float]) -> str:
    cost = losses["+ dropout"] - losses["+ layer norm, pre"]
    read = _passes(results)
    if cost > 0:
        return f"Dropout costs {cost:.3f} here, where the text was read {read}; it is for texts read many times over."
    return f"Dropout gains {-cost:.3f}, although the text was read {read}."


def _scaling_in_words(results: dict[str, Any]) -> str:
    *small, last = results["stages"]
    best = min(small, key=lambda row: row["loss"])
    larger = (
        f'"{last["name"]}", with {last["parameters"] / best["parameters"]:.0f} times the parameters of "{best["name"]}"'
    )
    if last["loss"] < best["loss"]:
        return f"{larger}, has a loss that is {best['loss'] - last['loss']:.3f} lower."
    return (
        f"{larger}, has a loss that is {last['loss'] - best['loss']:.3f} higher: a larger model needs more than "
        f"{counted(results['settings']['steps'], 'step')} to get ahead."
    )


def _provenance(results: dict[str, Any]) -> str:
    return f"{provenance(results)}; {duration(results['seconds'])} in all."


# ---- pictures ----


@styled
def final_losses(results: dict[str, Any]) -> Any:
    """The loss of each stage as a point, with lines to the stages that build on it; dashed ones to a side branch.

    Points, because bars would have to begin at 0, where the differences between the stages could hardly be seen.
    """
    rows = results["stages"]
    figure, [[axes]] = panels(0.8 + 0.31 * len(rows))
    at = {row["name"]: (row["loss"], number) for number, row in enumerate(rows)}
    for name, point in at.items():
        aside, after = is_side_branch(name), find_stage(name).after
        if after is not None:
            bend = 0.0 if point[1] == at[after][1] + 1 else 0.5  # around the stages that it passes
            line = {"arrowstyle": "-", "color": FAINT, "linewidth": 1.7, "linestyle": ":" if aside else "-"}
            axes.annotate("", point, at[after], arrowprops={**line, "connectionstyle": f"arc3,rad={bend}"}, zorder=1)
        axes.plot(*point, "D" if aside else "o", color=BLUE, markerfacecolor="white" if aside else BLUE)
        axes.text(1.12, point[1], f"{point[0]:.3f}", ha="right", va="center", transform=axes.get_yaxis_transform())
    axes.plot([], [], "o-", color=BLUE, label="on the way to the GPT")
    axes.plot([], [], "D:", color=BLUE, markerfacecolor="white", label="side branch")
    axes.legend(loc="upper left")
    axes.set_yticks(range(len(rows)), list(at))
    axes.invert_yaxis()
    axes.set_xlabel("validation loss (nats per character)")
    return figure


def is_side_branch(name: str) -> bool:
    """Whether no stage builds on this one, though it is not the last."""
    return name != STAGES[-1].name and all(stage.after != name for stage in STAGES)


@styled
def curves(results: dict[str, Any]) -> Any:
    figure, [[axes]] = panels(4.2)
    for number, row in enumerate(results["stages"]):
        points = [(step, loss) for step, loss in row["curve"] if step > 0]  # all start at ln(vocabulary)
        axes.plot(*zip(*points, strict=True), label=row["name"], **line_style(number))
    axes.set(xlabel="step", ylabel="validation loss (nats per character)")
    label_ends(axes)
    return figure


# ---- the report ----


def learn_report(results: dict[str, Any], code: dict[str, list[tuple[str, int, str]]]) -> Report:
    """The report, from the results, and from what `code_of` found in the source for each stage."""
    page = Report("From bigram to GPT", "one idea at a time, each trained with the same budget")
    if results["settings"]["quick"]:
        page.note(preview_note(results))
    page.paragraph(budget(results))
    page.table(HEADERS, table_rows(results))
    for text in findings(results):
        page.paragraph(text)
    page.figure(final_losses(results), "losses", "Validation loss after training, nats per character")
    page.figure(curves(results), "curves", "Validation loss during training, nats per character")
    for number, row in enumerate(results["stages"], 1):
        stage = find_stage(row["name"])
        page.heading(f"{number}. {stage.name}")
        page.paragraph(stage.about)
        page.code(differences(results, stage.name))
        lines = [(f"{file}:{line}", text) for file, line, text in code[stage.name]]
        width = max(len(place) for place, _ in lines)
        page.code("\n".join(f"{place:{width}}  {text}" for place, text in lines))
        page.paragraph(
            f"Validation loss {row['loss']:.3f} with {row['parameters']:,} parameters after {duration(row['seconds'])} "
            f"of training. A sample, at temperature 0.8:"
        )
        page.sample(row["sample"])
    page.paragraph(_provenance(results))
    return page


# ---- the page in docs/ ----


def refreshed(text: str, results: dict[str, Any]) -> str:
    """The text of docs/from-bigram-to-gpt.md, with the examples of the data and the numbers of `results` in it."""
    examples = show_layouts(None, None, None, "char", results["settings"]["seed"]).rpartition("\n\n")[0]
    text = _between(text, "data show", f"```text\n{examples}\n```")
    return _between(text, "results", _results_in_markdown(results))


def _between(text: str, name: str, new: str) -> str:
    """`text` with `new` between the marks <!-- name --> and <!-- end -->."""
    before, mark, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not mark or not end:
        raise LookupError(f"<!-- {name} --> ... <!-- end --> not found")
    return f"{before}{mark}{new}\n{end}{after}"


def _results_in_markdown(results: dict[str, Any]) -> str:
    found = {row["name"]: row for row in results["stages"]}
    samples = [
        f"`{name}` writes:\n\n```text\n{_wrapped(found[name]['sample'].strip()[:160])}\n```"
        for name in ("bigram", "scaled up")
    ]
    words = [budget(results), " ".join(findings(results)), _provenance(results)]
    above, below, source = (filled(part, 120) for part in words)
    return "\n\n".join([above, markdown_table(HEADERS, table_rows(results)), below, *samples, source])


def _wrapped(sample: str) -> str:
    """The sample with no line of more than 80 letters, as a page does not wrap what stands in a block of code."""
    return "\n".join(textwrap.fill(line, 80) for line in sample.split("\n"))


def main(docs: Path) -> None:
    page = docs / "from-bigram-to-gpt.md"
    results = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    text = refreshed(page.read_text(encoding="utf-8"), results)
    for name, draw in (("losses", final_losses), ("curves", curves)):
        with atomic_path(docs / "images" / f"learn-{name}.png") as temporary:
            temporary.write_bytes(png(draw(results)))
    with atomic_path(page) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
