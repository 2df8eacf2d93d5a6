"""`fastgpt learn`: from the bigram to the GPT, one idea at a time, each trained and measured with the same budget.

A stage is a model of `baselines.MODELS` and a configuration that differs from an earlier stage's in one idea. The
report shows that difference, the lines of the source it switches on (read from the source when the report is made),
the loss it reaches, and a sample. results.json holds all that was measured, and the report is made from nothing else.

What is equal in all stages: the text, the seed, the steps, the tokens in a step, the optimizer and its schedule. The
learning rate is the same too, but for the last stage: a larger model takes a smaller one.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import baselines, model, modules
from ..baselines import build_model
from ..config import ConfigError, GPTConfig, TrainConfig
from ..data.corpus import Corpus
from ..files import atomic_path
from ..ops import reference
from ..report import Report, markdown_table, pyplot
from ..training import TrainingError
from ..training.loop import Trainer
from ..training.run_folder import RunFolder, read_metrics
from .experiment import recorded, study_facts

TOKENS_PER_STEP = 1024
SMALL_BLOCK = 8  # of all stages but the last, as in the lecture
SCALED = {"n_layer": 4, "n_embd": 128, "block_size": 64}
SCALED_LR = 3e-3
DROPOUT = 0.1
SAMPLE_TOKENS = 240


@dataclass
class Settings:
    """From the bigram to the GPT: train every stage, and write a report that shows what each one adds.

    Args:
        data: a UTF-8 file or folder, or shakespeare, tinyshakespeare, names.
        out: the folder for report.html, results.json, the pictures and the runs; it must not hold a report yet.
        quick: 600 steps at a higher rate: under three minutes on two cores.
        steps: training steps of each stage, of 1024 tokens each.
        lr: the learning rate; the last stage takes at most 0.003.
        seed: of weights, data order, dropout and samples.
        device: auto, cpu, cuda, ...
        config: a TOML file with any of these settings.
    """

    data: str = "tinyshakespeare"
    out: str = "runs/learn"
    quick: bool = False
    steps: int = 2000
    lr: float = 1.5e-2
    seed: int = 1337
    device: str = "auto"
    config: str | None = None


QUICK = {"steps": 600, "lr": 3e-2}


@dataclass(frozen=True)
class Stage:
    """`changes` are made to the configuration of the stage called `after`; `code` is (object, part of a line) pairs."""

    name: str
    after: str | None
    about: str
    code: tuple[tuple[Callable, str], ...]
    model: str = "gpt"
    changes: dict[str, Any] = field(default_factory=dict)


_ATTENTION = model.CausalSelfAttention.forward

STAGES = (
    Stage(
        "bigram",
        None,
        "One table. Row i holds a score for every token that may follow token i. The model sees one token, and a "
        "table of pair counts would say the same.",
        (
            (baselines.Bigram.__init__, "self.table = "),
            (baselines.Bigram.hidden, "embed(idx, self.table)"),
        ),
        model="bigram",
    ),
    Stage(
        "+ position",
        "bigram",
        "The table becomes an embedding and a head, and the place in the block gets an embedding too. The model knows "
        "where it is and still not what came before; as blocks start anywhere in the text, the place says next to "
        "nothing.",
        (
            (baselines.PositionalBigram.__init__, "self.position_embedding = "),
            (baselines.PositionalBigram.hidden, "embed(idx, "),
        ),
        model="positional-bigram",
    ),
    Stage(
        "one head",
        "+ position",
        "Self-attention: a token's query is compared with the keys of all tokens up to it, and their values are "
        "averaged with the softmax of the scores as weights. For the first time the context counts.",
        (
            (_ATTENTION, "linear(self.qkv, x).split("),
            (reference.attention, "scores = (q @ "),
            (reference.attention, "scores = scores.masked_fill("),
            (reference.attention, "return weights @ v"),
            (_ATTENTION, "ops.attention("),
        ),
    ),
    Stage(
        "many heads",
        "one head",
        "Four heads of a quarter of the width each look for four things at once, for the same number of parameters.",
        (
            (_ATTENTION, "linear(self.qkv, x).split("),
            (_ATTENTION, "return linear(self.proj, "),
        ),
        changes={"n_head": 4},
    ),
    Stage(
        "+ feed-forward",
        "many heads",
        "Attention moves information between tokens; two linear layers with a non-linearity between them give each "
        "token the means to make something of it.",
        (
            (model.MLP.__init__, "self.up = "),
            (model.MLP.__init__, "self.down = "),
            (model.MLP.forward, "x = F.gelu(x)"),
            (model.Block.forward, 'x = self._finish("ln_2"'),
        ),
        changes={"feed_forward": True},
    ),
    Stage(
        "+ residual",
        "+ feed-forward",
        "Each branch is added to its input instead of replacing it. What a token is survives every layer, and the "
        "gradient reaches every layer.",
        ((model.Block._finish, "x = x + branch if self.residual"),),
        changes={"residual": True},
    ),
    Stage(
        "+ layer norm, post",
        "+ residual",
        "The sum is normalised after each branch, as in the first transformer (Vaswani et al. 2017).",
        (
            (reference.layer_norm, "centred = "),
            (reference.layer_norm, "torch.rsqrt("),
            (model.Block._finish, "add_norm(getattr(self, ln), "),
        ),
        changes={"norm": "post"},
    ),
    Stage(
        "+ layer norm, pre",
        "+ residual",
        "The input of each branch is normalised instead, and the sum once before the head, as in GPT-2: the way "
        "through the residuals stays free. This is the GPT's block, whole.",
        (
            (model.Block.forward, "normed, x = (norm(self.ln_1, x), x)"),
            (model.Block.forward, "normed, x = add_norm(self.ln_2, "),
            (model.GPT.hidden, "norm(self.ln_f, x) if branch is None"),
        ),
        changes={"norm": "pre"},
    ),
    Stage(
        "+ dropout",
        "+ layer norm, pre",
        "A tenth of the embeddings, attention weights and branch outputs is zeroed in training, so that nothing can "
        "be learned by heart. That pays where a model sees its text many times over, which a run this short does not.",
        (
            (model.GPT.hidden, "dropout(x, p)"),
            (_ATTENTION, "dropout_p=self.dropout if self.training"),
            (modules.add_norm, "dropout_p=dropout_p"),
        ),
        changes={"dropout": DROPOUT},
    ),
    Stage(
        "scaled up",
        "+ dropout",
        "The same model with four blocks, twice the width and eight times the context, on batches of as many tokens.",
        ((model.GPT.__init__, "self.blocks = "),),
        changes=SCALED,
    ),
)

# The way to the GPT. Post-norm is a side road, and dropout a price that a short run pays for nothing.
LADDER = ("bigram", "+ position", "one head", "many heads", "+ feed-forward", "+ residual", "+ layer norm, pre")


def stage(name: str) -> Stage:
    return next(s for s in STAGES if s.name == name)


def config_of(s: Stage, vocab_size: int) -> GPTConfig:
    """The stage's configuration: the first head's, and the changes of all stages on the way."""
    if s.after is None:
        return GPTConfig(
            vocab_size=vocab_size,
            block_size=SMALL_BLOCK,
            n_layer=1,
            n_head=1,
            n_embd=64,
            dropout=0.0,
            norm="none",
            residual=False,
            feed_forward=False,
            tie_weights=False,
        )
    return dataclasses.replace(config_of(stage(s.after), vocab_size), **s.changes)


# ---- measuring ----


def measure(settings: Settings, out: Path) -> dict[str, Any]:
    """Train every stage into a folder of `out`. Gives plain data: what results.json keeps."""
    if settings.steps < 1:
        raise ConfigError(f"steps: expected an integer of at least 1, got {settings.steps}")
    if settings.lr <= 0.0:
        raise ConfigError(f"lr: expected a number above 0, got {settings.lr}")
    configs = [config_of(s, 1) for s in STAGES]
    train_configs = [_train_config(settings, s, cfg) for s, cfg in zip(STAGES, configs, strict=True)]
    corpus = Corpus.load(settings.data, block_size=max(cfg.block_size for cfg in configs))
    results: dict[str, Any] = {
        "settings": recorded(settings),
        "tokens_per_step": TOKENS_PER_STEP,
        "characters": corpus.tokenizer.vocab_size,
        "training_tokens": len(corpus.train),
        "counted_bigram": counted_bigram(corpus),
        "stages": [],
    }
    for number, (s, train_config) in enumerate(zip(STAGES, train_configs, strict=True), 1):
        print(f"stage {number} of {len(STAGES)}: {s.name}", flush=True)
        results["stages"].append(_train(s, train_config, corpus, out / "stages" / _slug(s.name)))
    return results


def _train_config(settings: Settings, s: Stage, cfg: GPTConfig) -> TrainConfig:
    lr = min(settings.lr, SCALED_LR) if s.name == "scaled up" else settings.lr
    return TrainConfig(
        batch_size=TOKENS_PER_STEP // cfg.block_size,
        max_steps=settings.steps,
        lr=lr,
        min_lr=lr / 10,
        warmup_steps=min(100, settings.steps // 10),
        eval_interval=max(settings.steps // 10, 1),
        seed=settings.seed,
        device=settings.device,
        dtype="float32",
    )


def _slug(name: str) -> str:
    return "-".join(name.replace("+", "").replace(",", "").split())


def _train(s: Stage, train_config: TrainConfig, corpus: Corpus, folder: Path) -> dict[str, Any]:
    cfg = config_of(s, corpus.tokenizer.vocab_size)
    run = RunFolder(folder)
    run.create({"model": s.model, **dataclasses.asdict(cfg), **dataclasses.asdict(train_config)})
    trainer = Trainer(build_model(cfg, train_config.seed, s.model), corpus, train_config, run)
    state = trainer.run()
    curve = [[row["step"], round(row["loss"], 4)] for row in read_metrics(run.metrics_path) if row["split"] == "val"]
    return {
        "name": s.name,
        "model": s.model,
        "config": dataclasses.asdict(cfg),
        "batch_size": train_config.batch_size,
        "lr": train_config.lr,
        "parameters": trainer.model.num_parameters(),
        "loss": curve[-1][1],
        "seconds": round(state["elapsed_s"], 1),
        "curve": curve,
        "sample": _sample(trainer, corpus, train_config.seed),
    }


def _sample(trainer: Trainer, corpus: Corpus, seed: int) -> str:
    try:
        start = corpus.tokenizer.encode("\n")
    except ValueError:  # a text of one line
        start = corpus.train[:1].tolist()
    idx = torch.tensor([start], device=trainer.device)
    generator = torch.Generator(trainer.device).manual_seed(seed)
    out = trainer.model.generate(idx, SAMPLE_TOKENS, temperature=0.8, generator=generator)
    return corpus.tokenizer.decode(out[0, 1:])


def counted_bigram(corpus: Corpus) -> float:
    """The validation loss of counting: pairs of the training text, one added to each count. No bigram is far better."""
    V = corpus.tokenizer.vocab_size
    counts = np.ones((V, V))
    np.add.at(counts, (corpus.train[:-1], corpus.train[1:]), 1)
    log_p = np.log(counts / counts.sum(axis=1, keepdims=True))
    return round(float(-log_p[corpus.val[:-1], corpus.val[1:]].mean()), 4)


# ---- showing ----


def code_of(s: Stage) -> list[tuple[str, int, str]]:
    """(file, line number, line) of each line of the source that the stage is about."""
    found = []
    for thing, part in s.code:
        lines, first = inspect.getsourcelines(thing)
        hits = [(first + i, line.strip()) for i, line in enumerate(lines) if part in line]
        if len(hits) != 1:
            raise LookupError(f"{part!r}: {len(hits)} lines of {thing.__qualname__}, expected one")
        source = Path(inspect.getsourcefile(thing) or "").resolve()
        found.append((source.relative_to(Path(__file__).resolve().parent.parent).as_posix(), *hits[0]))
    return found


def differences(results: dict[str, Any], name: str) -> str:
    """What the stage changes: its model, and each setting that differs from the stage it builds on."""
    s, found = stage(name), {row["name"]: row for row in results["stages"]}
    if s.after is None:
        return f"model: {s.model}"
    before, now = found[s.after], found[name]
    lines = [f"model: {before['model']} -> {now['model']}"] if before["model"] != now["model"] else []
    for key in ("batch_size", "lr"):
        if before[key] != now[key]:
            lines.append(f"{key}: {before[key]} -> {now[key]}")
    lines += [f"{k}: {v} -> {now['config'][k]}" for k, v in before["config"].items() if v != now["config"][k]]
    return "\n".join(lines)


HEADERS = ["stage", "builds on", "parameters", "validation loss", "change"]


def rows(results: dict[str, Any]) -> list[list[Any]]:
    """The report's table: losses in nats per character."""
    losses = {row["name"]: row["loss"] for row in results["stages"]}
    table = []
    for row in results["stages"]:
        after = stage(row["name"]).after
        change = "–" if after is None else f"{row['loss'] - losses[after]:+.3f}"
        table.append([row["name"], after or "–", row["parameters"], f"{row['loss']:.3f}", change])
    return table


def findings(results: dict[str, Any]) -> list[str]:
    """What the numbers say, in sentences made from them."""
    losses = {row["name"]: row["loss"] for row in results["stages"]}
    rising = [(a, b) for a, b in pairwise(LADDER) if losses[b] >= losses[a]]
    way = f"From {LADDER[0]} ({losses[LADDER[0]]:.3f}) to {LADDER[-1]} ({losses[LADDER[-1]]:.3f})"
    if rising:
        text = f"{way} the loss does not fall with every stage: " + "; ".join(
            f"{b} ({losses[b]:.3f}) is no better than {a} ({losses[a]:.3f})" for a, b in rising
        )
    else:
        text = f"{way} the loss falls with every stage"
    said = [text + "."]
    counted, bigram = results["counted_bigram"], losses["bigram"]
    said.append(
        f"The trained bigram reaches {bigram:.3f}. Counting the pairs of the training text, which no bigram can beat "
        f"on that text, gives {counted:.3f} over all of the validation text."
    )
    post, pre = losses["+ layer norm, post"], losses["+ layer norm, pre"]
    better, worse = ("pre", "post") if pre <= post else ("post", "pre")
    said.append(
        f"With one block, {better}-norm is {abs(pre - post):.3f} ahead of {worse}-norm; `fastgpt study depth` asks the "
        f"same of deep networks."
    )
    cost = losses["+ dropout"] - pre
    if cost > 0:
        said.append(
            f"Dropout costs {cost:.3f} at this budget, where the text is not seen often enough to be memorised."
        )
    else:
        said.append(f"Dropout gains {-cost:.3f}, even at this budget.")
    *small, last = results["stages"]
    best = min(small, key=lambda row: row["loss"])
    growth = f"{last['parameters'] / best['parameters']:.0f} times the parameters of {best['name']}"
    if last["loss"] < best["loss"]:
        said.append(f"{last['name'].capitalize()}, to {growth}, it gains {best['loss'] - last['loss']:.3f} over it.")
    else:
        said.append(
            f"{last['name'].capitalize()}, to {growth}, it is {last['loss'] - best['loss']:.3f} behind it: a larger "
            f"model needs more than {results['settings']['steps']:,} steps to get ahead."
        )
    return said


def budget(results: dict[str, Any]) -> str:
    settings, n, last = results["settings"], results["training_tokens"], results["stages"][-1]
    each = results["tokens_per_step"]
    epochs = settings["steps"] * each / n
    return (
        f"Equal in all stages: {settings['steps']:,} steps of {each} characters, {epochs:.1f} times "
        f"the training text of {n:,}; seed {settings['seed']}; AdamW with a warm-up and a cosine. The learning rate is "
        f"{settings['lr']:g}, in the last stage {last['lr']:g}. Losses are in nats per character, on text that was not "
        f"trained on."
    )


def show(results: dict[str, Any]) -> Report:
    """The report, from the results and the source alone."""
    page = Report("From bigram to GPT", "one idea at a time, each trained with the same budget")
    page.paragraph(budget(results))
    page.table(HEADERS, rows(results))
    for text in findings(results):
        page.paragraph(text)
    page.figure(final_losses(results), "losses", "Validation loss after training, nats per character")
    page.figure(curves(results), "curves", "Validation loss during training, nats per character")
    for number, row in enumerate(results["stages"], 1):
        s = stage(row["name"])
        page.heading(f"{number}. {s.name}")
        page.paragraph(s.about)
        page.code(differences(results, s.name))
        found = [(f"{file}:{line}", text) for file, line, text in code_of(s)]
        width = max(len(place) for place, _ in found)
        page.code("\n".join(f"{place:{width}}  {text}" for place, text in found))
        page.paragraph(
            f"Validation loss {row['loss']:.3f} with {row['parameters']:,} parameters after {row['seconds']:.0f} "
            f"seconds of training. A sample, at temperature 0.8:"
        )
        page.code(row["sample"])
    page.paragraph(provenance(results))
    return page


def provenance(results: dict[str, Any]) -> str:
    return (
        f"{results['device']}, {results['threads']} threads, Python {results['python']}, torch {results['torch']}, "
        f"fastgpt {results['fastgpt']}, commit {results['commit'] or 'of an installed package'}, {results['date']}; "
        f"{results['seconds']:.0f} seconds in all."
    )


def _colours(results: dict[str, Any]) -> list[Any]:
    return list(pyplot().get_cmap("viridis")(np.linspace(0.0, 0.9, len(results["stages"]))))


def final_losses(results: dict[str, Any]) -> Any:
    """A bar a stage. Bars start at 0 nats: their lengths can be compared."""
    names, losses = [r["name"] for r in results["stages"]], [r["loss"] for r in results["stages"]]
    figure, axes = pyplot().subplots(figsize=(7, 3.6), constrained_layout=True)
    bars = axes.barh(names, losses, color=_colours(results))
    axes.bar_label(bars, [f"{loss:.3f}" for loss in losses], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel="validation loss (nats per character)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def curves(results: dict[str, Any]) -> Any:
    figure, axes = pyplot().subplots(figsize=(7, 4.4), constrained_layout=True)
    for row, colour in zip(results["stages"], _colours(results), strict=True):
        points = [(step, loss) for step, loss in row["curve"] if step > 0]  # all start at ln(vocabulary)
        axes.plot(*zip(*points, strict=True), label=row["name"], color=colour, marker="o", ms=3, lw=1.4)
    axes.set(xlabel="step", ylabel="validation loss (nats per character)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    return figure


def run(settings: Settings) -> Path:
    """Train all stages, write results.json, report.html and the pictures; gives the report's path."""
    pyplot()  # what is missing is said now, not after minutes of training
    out = Path(settings.out)
    if (out / "results.json").exists() or (out / "stages").exists():
        raise TrainingError(f"--out {out}: holds a report or its runs already; give another folder, or remove it")
    began = time.perf_counter()
    results = {**study_facts(settings.device), **measure(settings, out)}
    results["seconds"] = round(time.perf_counter() - began, 1)
    with atomic_path(out / "results.json") as temporary:
        temporary.write_text(
            json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    print("\n" + "\n".join([markdown_table(HEADERS, rows(results)), "", *findings(results)]))
    report = show(results).write(out)
    print(f"\n{report}, {results['seconds']:.0f} s")
    return report


# ---- the page in docs/ ----


def refreshed(text: str, results: dict[str, Any], root: Path) -> str:
    """docs/from-bigram-to-gpt.md with its numbers from `results` and its links to the lines of today's source."""
    from ..data.show import show_layouts

    shown = show_layouts(None, None, None, "char", results["settings"]["seed"]).rpartition("\n\n")[0]
    text = _between(text, "data show", f"```text\n{shown}\n```")
    text = _between(text, "results", _results_in_markdown(results))

    def link(match: re.Match) -> str:
        code, file = match.groups()
        lines = (root / file).read_text(encoding="utf-8").splitlines()
        hits = [number for number, line in enumerate(lines, 1) if code in line]
        if len(hits) != 1:
            raise LookupError(f"{code!r} is in {len(hits)} lines of {file}, expected one")
        return f"[`{code}`](../{file}#L{hits[0]})"

    return re.sub(r"\[`([^`]+)`\]\(\.\./([\w/.]+)#L\d+\)", link, text)


def _between(text: str, name: str, new: str) -> str:
    before, mark, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not mark or not end:
        raise LookupError(f"<!-- {name} --> ... <!-- end --> not found")
    return f"{before}{mark}{new}\n{end}{after}"


def _results_in_markdown(results: dict[str, Any]) -> str:
    found = {row["name"]: row for row in results["stages"]}
    samples = [
        f"`{name}` writes:\n\n```text\n{found[name]['sample'].strip()[:160]}\n```" for name in ("bigram", "scaled up")
    ]
    words = [textwrap.fill(t, 120, break_on_hyphens=False) for t in (budget(results), " ".join(findings(results)))]
    source = textwrap.fill(provenance(results), 120, break_on_hyphens=False)
    return "\n\n".join([words[0], markdown_table(HEADERS, rows(results)), words[1], *samples, source])


def main(docs: Path) -> None:
    """Make the page and its pictures again from docs/from-bigram-to-gpt.json: python -m fastgpt.studies.learn docs"""
    page = docs / "from-bigram-to-gpt.md"
    results = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    text = refreshed(page.read_text(encoding="utf-8"), results, docs.resolve().parent)
    for name, draw in (("losses", final_losses), ("curves", curves)):
        with atomic_path(docs / "images" / f"learn-{name}.png") as temporary:
            draw(results).savefig(temporary, format="png", dpi=100, facecolor="white")
    with atomic_path(page) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
