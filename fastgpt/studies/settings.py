"""The options of `fastgpt learn` and of each study. Importing them needs no PyTorch, so that --help is fast.

The `Args:` of a docstring are the help of the options; the first line of a study's docstring is the question that it
answers. QUICK holds the values that --quick sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import DEFAULT_TEXT


@dataclass
class LearnSettings:
    """From the bigram to the GPT: train every stage, and write a report that shows what each one adds.

    Args:
        data: a UTF-8 file or folder, or shakespeare, tinyshakespeare, names.
        out: the folder for report.html, results.json, the pictures and the runs.
        resume: go on with the stages in --out, with their settings.
        quick: a preview of 1000 steps at a higher rate, in about two minutes on two cores.
        steps: training steps of each stage, of 1024 tokens each.
        lr: the learning rate; the last stage takes at most 0.003.
        seed: of weights, data order, dropout and samples.
        device: auto, cpu, cuda, ...
        threads: of the CPU; by default one for each core.
        config: a TOML file with any of these settings.
    """

    data: str = DEFAULT_TEXT
    out: str = "runs/learn"
    resume: bool = False
    quick: bool = False
    steps: int = 2000
    lr: float = 1.5e-2
    seed: int = 1337
    device: str = "auto"
    threads: int | None = None
    config: str | None = None

    QUICK: ClassVar[dict[str, Any]] = {"steps": 1000, "lr": 2e-2}


@dataclass
class StudySettings:
    """The options that every study has.

    Args:
        out: the folder for report.html, results.json and the pictures; runs/study-NAME if not given.
        data: a UTF-8 file or folder, or shakespeare, tinyshakespeare, names.
        quick: a preview at a smaller size, in about half a minute on two cores.
        seed: of weights and data order.
        device: auto, cpu, cuda, ...
        threads: of the CPU; by default one for each core.
        config: a TOML file with any of these settings.
    """

    out: str | None = None
    data: str = DEFAULT_TEXT
    quick: bool = False
    seed: int = 1337
    device: str = "auto"
    threads: int | None = None
    config: str | None = None

    QUICK: ClassVar[dict[str, Any]] = {}


@dataclass
class DepthSettings(StudySettings):
    """What do initialisation, normalisation and residual connections each do to a deep network?

    Args:
        depths: numbers of blocks, with commas between them.
        steps: training steps of each network.
        width: of the residual stream.
        lr: the learning rate, the same for all.
        repeats: seeds with which the usual GPT is trained at the largest depth, to tell an effect from chance.
    """

    depths: str = "2,6,16"
    steps: int = 150
    width: int = 64
    lr: float = 1e-3
    repeats: int = 3

    QUICK: ClassVar[dict[str, Any]] = {"depths": "2,8", "steps": 60, "lr": 3e-3, "repeats": 2}


@dataclass
class NormalisationSettings(StudySettings):
    """Layer norm or batch norm: what differs between training and inference?

    Args:
        steps: training steps of each of the two models.
        points: evaluations, spread over the training so that the early ones are close together.
        momenta: how much of a running average each step replaces, with commas between them; PyTorch's default is 0.1.
        coin_steps: training steps on coin flips, which nothing but the future can predict.
    """

    steps: int = 500
    points: int = 12
    momenta: str = "0.1,0.01,0.001"
    coin_steps: int = 1500

    QUICK: ClassVar[dict[str, Any]] = {"steps": 300, "points": 10, "coin_steps": 800}


@dataclass
class ParallelismSettings(StudySettings):
    """How do transformers and recurrent networks compare when it comes to training?

    Args:
        contexts: numbers of tokens, with commas between them.
        batches: numbers of rows, with commas between them.
        width: of the GPT, which has 4 layers; the recurrent networks get the width that gives as many parameters.
        seconds: to spend at most on each combination of context, batch and direction, after three rounds.
        steps: training steps of each model for the loss.
        rates: learning rates for that, with commas between them; each model is shown at its best.
    """

    contexts: str = "16,32,64,128,256,512,1024,2048"
    batches: str = "1,8"
    width: int = 128
    seconds: float = 1.0
    steps: int = 200
    rates: str = "1e-3,3e-3,1e-2"

    QUICK: ClassVar[dict[str, Any]] = {
        "contexts": "16,64,256", "batches": "1,8", "width": 64, "seconds": 0.2, "steps": 150, "rates": "3e-3",
    }  # fmt: skip


@dataclass
class AttentionSettings(StudySettings):
    """What does each attention head look at?

    Args:
        checkpoint: a run, a checkpoint, a saved model, the folder of a Hugging Face GPT-2, or its name there, as gpt2;
            without one a small model is trained.
        prompt: the text to look at.
        layer: show this layer only, counted from 1.
        head: show this head only, counted from 1.
        steps: training steps of the small model.
    """

    checkpoint: str | None = None
    prompt: str = "ROMEO:\nBut, soft! what light through"
    layer: int | None = None
    head: int | None = None
    steps: int = 1200

    QUICK: ClassVar[dict[str, Any]] = {"steps": 400}


@dataclass
class EmbeddingsSettings(StudySettings):
    """Which tokens have similar embeddings?

    Args:
        checkpoint: a run, a checkpoint, a saved model, the folder of a Hugging Face GPT-2, or its name there, as gpt2;
            without one a small model is trained.
        vectors: a text file of word vectors (word2vec, GloVe) to look at instead of a model.
        words: whose neighbours to show, with blanks between them (a blank itself is written ␣, a line's end ⏎).
        analogy: "a - b + c", or several of them one after the other; of letters, two of case if not given.
        neighbours: how many to show.
        max_words: read this many lines of --vectors.
        steps: training steps of the small model.
    """

    checkpoint: str | None = None
    vectors: str | None = None
    words: str | None = None
    analogy: str | None = None
    neighbours: int = 5
    max_words: int = 100_000
    steps: int = 1200

    QUICK: ClassVar[dict[str, Any]] = {"steps": 400}


@dataclass
class LearningRateSettings(StudySettings):
    """What does the learning rate do, and where does training diverge?

    Args:
        rates: learning rates, with commas between them.
        widths: of the models' residual streams, with commas between them; each has a block for every 32 features.
        steps: training steps of each run.
        repeats: seeds of each run.
    """

    rates: str = "1e-4,3e-4,1e-3,3e-3,1e-2,3e-2,1e-1"
    widths: str = "32,64,128"
    steps: int = 150
    repeats: int = 2

    QUICK: ClassVar[dict[str, Any]] = {"widths": "32,64", "steps": 100}


@dataclass
class RecipeSettings(StudySettings):
    """Which optimizer, rates, schedule and batch size bring a small GPT to a given loss in the least time?

    Args:
        loss: the validation loss to reach, in nats; nanoGPT's README names 1.88 for tinyshakespeare.
        most_steps: no recipe trains for longer.
        repeats: seeds with which each recipe is tried.
        eval_blocks: blocks of the validation text on which the loss is measured.
        variants: how many changed forms of each recipe are tried beside it, at most.
    """

    loss: float = 1.88
    most_steps: int = 2000
    repeats: int = 3
    eval_blocks: int = 240
    variants: int = 8

    QUICK: ClassVar[dict[str, Any]] = {"loss": 2.3, "repeats": 1, "eval_blocks": 64, "variants": 1}


STUDIES: dict[str, type[StudySettings]] = {
    "depth": DepthSettings,
    "normalisation": NormalisationSettings,
    "parallelism": ParallelismSettings,
    "attention": AttentionSettings,
    "embeddings": EmbeddingsSettings,
    "learning-rate": LearningRateSettings,
    "recipe": RecipeSettings,
}


def question(name: str) -> str:
    """The question that the study called `name` answers."""
    return (STUDIES[name].__doc__ or "").partition("\n")[0]
