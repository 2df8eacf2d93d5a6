"""The stages from the bigram to the GPT: ten models, each an idea further than one before it.

A stage is a model of `baselines.MODELS` and a configuration that differs from an earlier stage's in one idea. It names
functions that carry out the idea; the report shows the relevant statements of these functions from the source.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import baselines, model, modules
from ..config import GPTConfig
from ..ops import reference

SMALL_BLOCK = 8  # of all stages but the last, as in the lecture
SCALED = {"n_layer": 4, "n_embd": 128, "block_size": 64}
DROPOUT = 0.1
# The parts of a GPT's block that the first stages do not have.
LEFT_OUT: dict[str, Any] = {"dropout": 0.0, "norm": "none", "residual": False, "feed_forward": False}
PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Stage:
    """One model on the way, and what it adds.

    `changes` are made to the configuration of the stage called `after`. `code` names the source that carries out the
    idea: pairs of a function and, with blanks between them, names of variables, attributes or keyword arguments in it.
    """

    name: str
    after: str | None
    about: str
    code: tuple[tuple[Callable[..., Any], str], ...]
    model: str = "gpt"
    changes: dict[str, Any] = field(default_factory=dict)


STAGES = (
    Stage(
        "bigram",
        None,
        "One table. Row i holds a score for every token that may follow token i. The model sees one token, and a "
        "table of pair counts would say the same.",
        ((baselines.Bigram.__init__, "table"), (baselines.Bigram.hidden, "table")),
        model="bigram",
    ),
    Stage(
        "+ position",
        "bigram",
        "The table becomes an embedding and a head, and the place in the block gets an embedding too. The model knows "
        "where it is and still not what came before; as blocks start anywhere in the text, the place says next to "
        "nothing.",
        (
            (baselines.PositionalBigram.__init__, "position_embedding"),
            (baselines.PositionalBigram.hidden, "position_embedding"),
        ),
        model="positional-bigram",
    ),
    Stage(
        "one head",
        "+ position",
        "Self-attention: a token's query is compared with the keys of all tokens up to it, and their values are "
        "averaged with the softmax of the scores as weights. For the first time the context counts.",
        ((model.CausalSelfAttention.forward, "qkv attention"), (reference.attention, "scores weights")),
    ),
    Stage(
        "many heads",
        "one head",
        "Four heads of a quarter of the width each look for four things at once, for the same number of parameters.",
        ((model.CausalSelfAttention.forward, "n_head proj"),),
        changes={"n_head": 4},
    ),
    Stage(
        "+ feed-forward",
        "many heads",
        "Attention moves information between tokens; two linear layers with a non-linearity between them give each "
        "token the means to make something of it.",
        ((model.MLP.__init__, "up down"), (model.MLP.forward, "activation"), (model.Block.forward, "mlp")),
        changes={"feed_forward": True},
    ),
    Stage(
        "+ residual",
        "+ feed-forward",
        "Each branch is added to its input instead of replacing it. What a token is survives every layer, and the "
        "gradient reaches every layer.",
        ((model.Block._finish, "residual"),),
        changes={"residual": True},
    ),
    Stage(
        "+ layer norm, post",
        "+ residual",
        "The sum is normalised after each branch, as in the first transformer (Vaswani et al. 2017).",
        ((reference.layer_norm, "centred"), (model.Block._finish, "add_norm")),
        changes={"norm": "post"},
    ),
    Stage(
        "+ layer norm, pre",
        "+ residual",
        "The input of each branch is normalised instead, and the sum once before the head, as in GPT-2: the way "
        "through the residuals stays free. This is the GPT's block, whole.",
        ((model.Block.forward, "add_norm"), (model.GPT.hidden, "ln_f")),
        changes={"norm": "pre"},
    ),
    Stage(
        "+ dropout",
        "+ layer norm, pre",
        "A tenth of the embeddings, attention weights and branch outputs is zeroed in training, so that nothing can "
        "be learned by heart. That pays where a model sees its text many times over, which a run this short does not.",
        (
            (model.GPT.hidden, "dropout"),
            (model.CausalSelfAttention.forward, "dropout"),
            (modules.add_norm, "dropout_p"),
        ),
        changes={"dropout": DROPOUT},
    ),
    Stage(
        "scaled up",
        "+ dropout",
        "The same model with four blocks, twice the width and eight times the context, on batches of as many tokens.",
        ((model.GPT.__init__, "blocks"),),
        changes=SCALED,
    ),
)

# The way to the GPT. Post-norm is an alternative to pre-norm, and dropout gains nothing in a run as short as these.
LADDER = ("bigram", "+ position", "one head", "many heads", "+ feed-forward", "+ residual", "+ layer norm, pre")


def find_stage(name: str) -> Stage:
    return next(stage for stage in STAGES if stage.name == name)


def config_of(stage: Stage, vocab_size: int) -> GPTConfig:
    """The stage's configuration: the bigram's, with the changes of every stage on the way."""
    if stage.after is None:
        return GPTConfig(vocab_size, SMALL_BLOCK, n_layer=1, n_head=1, n_embd=64, tie_weights=False, **LEFT_OUT)
    return dataclasses.replace(config_of(find_stage(stage.after), vocab_size), **stage.changes)


# ---- the source ----


def code_of(stage: Stage) -> list[tuple[str, int, str]]:
    """(file, line number, line) of the statements in the source that carry out the stage's idea."""
    return [line for function, names in stage.code for line in statements_using(function, names.split())]


def statements_using(function: Callable[..., Any], names: list[str]) -> list[tuple[str, int, str]]:
    """(file, line number, line) of the statements of `function` that use one of `names`, in the order of the source.

    They are found in the syntax tree, so that the way the source is formatted makes no difference. A name that no
    statement uses raises LookupError: it was renamed, or the code has moved.
    """
    lines, first = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    file = Path(inspect.getsourcefile(function) or "").resolve().relative_to(PACKAGE).as_posix()
    missing, found = set(names), []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return)):
            used = _names_in(node) & set(names)
            missing -= used
            if used:
                found.append((node.lineno, node.end_lineno or node.lineno))
    if missing:
        raise LookupError(f"{function.__qualname__} in {file}: no statement uses {', '.join(sorted(missing))}")
    return [
        (file, first + start - 1 + i, line)
        for start, end in sorted(found)
        for i, line in enumerate(textwrap.dedent("".join(lines[start - 1 : end])).splitlines())
    ]


def _names_in(statement: ast.stmt) -> set[str]:
    """The variables, attributes and keyword arguments that a statement reads, calls or assigns."""
    names = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            names.add(node.arg)
    return names
