"""The settings of each command, and where their values come from. Importing this needs no PyTorch.

A value comes from the first of these sources that gives one:

1. the command line;
2. the TOML file of --config;
3. for `train` the run that is resumed, or the model that --init-from names, then the preset; for `learn` and the
   studies the small sizes of --quick;
4. the default.

A class has the options of one command. A field is an option (`max_steps` is --max-steps), and the comment beside it or
above it is the option's help. REQUIRED names the settings that the command cannot do without.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
import tomllib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from .config import (
    BACKENDS,
    DEFAULT_TEXT,
    FINE_TUNING,
    LOGGERS,
    SOURCES,
    ConfigError,
    GPTConfig,
    TrainConfig,
    check_types,
    fine_tuning_rate,
    from_dict,
    preset,
)
from .files import expand_path
from .plan import Cluster, Job

# The settings that name files or folders, in whatever command they are.
PATHS = frozenset(
    {
        "checkpoint",
        "config",
        "data",
        "init_from",
        "lecture",
        "nanogpt",
        "out",
        "results",
        "runs",
        "tokenizer",
        "vectors",
    }
)
_NOT_PATHS = (*SOURCES, "char", "bpe")  # values of --data and --tokenizer that are names
MOST_THREADS = 1024


class UsageError(ValueError):
    """Wrong use of a command."""


def flag(name: str) -> str:
    """The setting `name` as the command line spells it: max_steps is --max-steps."""
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class RunSettings:
    """What a run is made of, besides its model's shape and its training."""

    # settings to start from (shakespeare-char, shakespeare-char-cpu, gpt2, gpt2-medium, gpt2-large, gpt2-xl); auto is
    # shakespeare-char on a CUDA GPU and shakespeare-char-cpu elsewhere.
    preset: str = "auto"
    config: str | None = None  # a TOML file with any of these settings.
    # gpt, bigram, positional-bigram, rnn, gru or lstm; they take what they need of the settings below.
    model: str = "gpt"
    data: str = DEFAULT_TEXT  # a UTF-8 file or folder, a folder of tokens, or shakespeare, tinyshakespeare, names.
    out: str | None = None  # the run's folder.
    resume: bool = False  # go on with the run in --out.
    # train this model further instead of a new one: a run, a checkpoint, a saved model, the folder of a Hugging Face
    # GPT-2, or its name there, as gpt2. It keeps its shape and its tokenizer.
    init_from: str | None = None
    backend: str = "auto"  # preferred where it has the op: torch, triton or native; auto: see fastgpt doctor.
    threads: int | None = None  # of the CPU; by default one for each core.
    # char, bpe (trained on the data), or a folder that has one: a saved model, GPT-2's vocab.json and merges.txt, or
    # what fastgpt data prepare wrote.
    tokenizer: str = "char"
    # also log to tensorboard, to wandb, or to both with a comma between them.
    log: str = "none"
    # record a few steps after the first ones, and write a trace that Perfetto opens, trace.json.gz, into --out.
    profile: bool = False


@dataclass(frozen=True)
class TrainSettings(TrainConfig, GPTConfig, RunSettings):
    """Train a GPT, or another model, on text.

    Args:
        vocab_size: number of tokens of a bpe tokenizer.
    """

    REQUIRED: ClassVar[tuple[str, ...]] = ("out",)

    vocab_size: int | None = None  # type: ignore[assignment]  # a GPTConfig's is known: it is the tokenizer's

    def __post_init__(self) -> None:
        """Values are checked by `train_config` and `model_config`, when all sources have given theirs."""

    def train_config(self) -> TrainConfig:
        return from_dict(TrainConfig, self._part(TrainConfig))

    def model_config(self, vocab_size: int) -> GPTConfig:
        return from_dict(GPTConfig, {**self._part(GPTConfig), "vocab_size": vocab_size})

    def rate_of_another_optimizer(self) -> str | None:
        """In words, where `lr` is the preset's, which was chosen for another optimizer than this one."""
        usual = TrainConfig(**preset(self.preset)[1]) if self.preset != "auto" else None
        if usual is None or usual.optimizer == self.optimizer or usual.lr != self.lr:
            return None
        return (
            f"lr: {self.lr:g} is the preset's, chosen for {usual.optimizer}; --optimizer {self.optimizer} learns "
            f"better with an --lr of its own ({TrainConfig.lr:g} where there is no preset)"
        )

    def origin(self, device_type: str) -> str:
        """In words, which settings the given ones were added to."""
        if self.resume:
            return "settings of the run"
        if self.init_from:
            return f"starts from {self.init_from}"
        if self.preset != "auto":
            return f"preset {self.preset}"
        return f"preset {default_preset(device_type == 'cuda')}, the default on {device_type}"

    def follow_the_device(self) -> bool:
        """Whether the defaults depend on the device. ConfigError where the settings are wrong on any device."""
        if self.preset != "auto" or self.resume or self.init_from or self.out is None:
            return False
        self.train_config(), self.model_config(vocab_size=1)
        return True

    def recorded(self) -> dict[str, Any]:
        """What config.toml keeps. Paths are absolute: the run may be resumed from another working directory."""
        values = dataclasses.asdict(self)
        for name in ("config", "resume", "preset", "profile"):
            del values[name]
        values |= {name: absolute(values[name]) for name in ("data", "tokenizer")}
        return values | {"init_from": _recorded_start(self.init_from)}

    def asked_of_the_start(self) -> dict[str, Any]:
        """The settings that --init-from would decide, and that were given all the same."""
        return {name: value for name in OF_THE_START if (value := getattr(self, name)) is not None}

    def with_start(self, kind: str, tokenizer: str, layout: str, config: GPTConfig) -> TrainSettings:
        """These settings with what the model that --init-from names decides: its own settings, and those not given."""
        own = {"model": kind, "tokenizer": tokenizer, **dataclasses.asdict(config)}
        if tokenizer == "char":
            own["vocab_size"] = None  # only a bpe tokenizer is given a size
        if self.layout is None:
            own["layout"] = layout
        if self.lr is None:
            own["lr"] = fine_tuning_rate(config.n_embd)
        return dataclasses.replace(self, **own)

    def _part(self, kind: type) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(kind)}


@dataclass(frozen=True)
class SampleSettings:
    """Continue a prompt with a trained model, token by token."""

    REQUIRED: ClassVar[tuple[str, ...]] = ("checkpoint",)

    # a run (its best checkpoint is taken), one checkpoint, a saved model, the folder of a Hugging Face
    # GPT-2, or its name there, as gpt2. In first place it needs no option: fastgpt sample runs/demo.
    checkpoint: str | None = None
    # the text to continue; a text that begins with "-" is given as --prompt=TEXT. May be given again.
    prompt: str | tuple[str, ...] = "\n"
    max_new_tokens: int = 500  # tokens to add.
    num_samples: int = 1  # how many samples of a prompt to print, drawn as one batch.
    # end a sample before this text; a line's end is --stop $'\n' in bash. May be given again: the first ends it.
    stop: str | tuple[str, ...] | None = None
    temperature: float = 0.8  # divides the logits; 0 takes the likeliest token.
    top_k: int | None = None  # sample among the k likeliest tokens.
    top_p: float | None = None  # sample among the fewest tokens whose probability reaches p.
    # above 1, the tokens of the text so far become less likely: their logits are divided by it, or multiplied below 0.
    repetition_penalty: float = 1.0
    # once the context is full, drop this many of its tokens at once instead of one at each step: faster, another text.
    stride: int | None = None
    seed: int | None = None  # repeats a sample.
    device: str = "auto"  # auto, cpu, cuda, ...
    backend: str = "auto"  # preferred where it has the op: torch, triton or native; auto: see fastgpt doctor.
    threads: int | None = None  # of the CPU; by default one for each core.
    # compute tokens by a CUDA graph, after a check against others.
    cuda_graph: bool = False
    config: str | None = None  # a TOML file with any of these settings.


@dataclass(frozen=True)
class ServeSettings:
    """Serve a trained model: a page to try it on, and OpenAI's /v1/completions."""

    REQUIRED: ClassVar[tuple[str, ...]] = ("checkpoint",)

    # a run (its best checkpoint is taken), one checkpoint, a saved model, the folder of a Hugging Face
    # GPT-2, or its name there, as gpt2. In first place it needs no option: fastgpt serve runs/demo.
    checkpoint: str | None = None
    host: str = "127.0.0.1"  # the address to listen on; 0.0.0.0 lets other machines in, who need the token.
    port: int = 8000  # 0 takes one that is free.
    token: str | None = None  # what requests must bring; one is made where other machines are let in.
    name: str | None = None  # the model's name in requests; by default the last part of --checkpoint.
    max_batch: int = 8  # texts that are continued at a time.
    max_queue: int = 64  # texts that may wait for their turn; more are refused.
    max_new_tokens: int = 4096  # the most tokens of one completion.
    timeout: float = 600.0  # seconds until an answer must be complete.
    stride: int | None = None  # once a context is full, drop this many of its tokens at once; by default half of it.
    device: str = "auto"  # auto, cpu, cuda, ...
    backend: str = "auto"  # preferred where it has the op: torch, triton or native; auto: see fastgpt doctor.
    threads: int | None = None  # of the CPU; by default one for each core.
    config: str | None = None  # a TOML file with any of these settings.


@dataclass(frozen=True)
class EvalSettings:
    """Measure how well a model predicts a text: loss in nats per token, bits per byte, and perplexity."""

    REQUIRED: ClassVar[tuple[str, ...]] = ("checkpoint", "data")

    # a run (its best checkpoint is taken), one checkpoint, a saved model, the folder of a Hugging Face
    # GPT-2, or its name there, as gpt2. In first place it needs no option: fastgpt eval runs/demo --data FILE.
    checkpoint: str | None = None
    # a UTF-8 file or folder, or shakespeare, tinyshakespeare, names; for a model of completions, JSON lines. All of it
    # is predicted; give a text that the model was not trained on.
    data: str | None = None
    # a text is read in windows as long as the model's context, each begins this many tokens after the one before it,
    # and only new tokens count: a smaller stride gives more context and takes longer; by default half of the context.
    stride: int | None = None
    json: bool = False  # print the figures as one JSON object.
    device: str = "auto"  # auto, cpu, cuda, ...
    dtype: str = "float32"  # of the matrix products: float32, bfloat16, float16, or auto, as in training.
    backend: str = "auto"  # preferred where it has the op: torch, triton or native; auto: see fastgpt doctor.
    threads: int | None = None  # of the CPU; by default one for each core.
    config: str | None = None  # a TOML file with any of these settings.


# The formats of fastgpt export, and the packages that each needs; the extra of its name brings them.
EXPORT_FORMATS: dict[str, tuple[str, ...]] = {
    "fastgpt": (),
    "huggingface": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "torch": (),
}


def check_export_format(format: str) -> None:
    """Raises ConfigError for a format that is none of them, ImportError where a package that it needs is missing."""
    if format not in EXPORT_FORMATS:
        raise ConfigError(f"format: expected one of {', '.join(EXPORT_FORMATS)}, got {format!r}")
    for package in EXPORT_FORMATS[format]:
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"format: {format} needs {package}, which is not installed: pip install 'fastgpt-kernels[{format}]'"
            )


@dataclass(frozen=True)
class ExportSettings:
    """Write a model into a folder that FastGPT or another program reads, and compare what it computes with the model.

    The folder has the tokenizer's files and config.json beside the model, and is written as a whole or not at all.
    """

    REQUIRED: ClassVar[tuple[str, ...]] = ("checkpoint", "out")

    # a run (its best checkpoint is taken), one checkpoint, a saved model, the folder of a Hugging Face GPT-2, or its
    # name there, as gpt2. In first place it needs no option: fastgpt export runs/demo --out models/demo.
    checkpoint: str | None = None
    out: str | None = None  # the folder to write, which must not exist, or be empty.
    # fastgpt, which fastgpt.load reads; huggingface, which transformers reads, too; onnx, for onnxruntime and others;
    # or torch, for torch.export.load without FastGPT. onnx and torch take every model, the first two a GPT.
    format: str = "fastgpt"
    config: str | None = None  # a TOML file with any of these settings.


@dataclass(frozen=True)
class CompareSettings:
    """Compare runs: a table, and one picture of their losses over steps, tokens and seconds."""

    REQUIRED: ClassVar[tuple[str, ...]] = ("runs",)

    # the folders of runs. They need no option: fastgpt compare runs/first runs/second.
    runs: tuple[str, ...] = ()
    out: str | None = None  # the picture, a *.png file (default: runs/compare.png).
    config: str | None = None  # a TOML file with any of these settings.


@dataclass(frozen=True)
class DataShowSettings:
    """Print one example of each layout of the data, context -> target."""

    # a UTF-8 file or folder, or shakespeare, tinyshakespeare, names; without it, a few lines of its own.
    data: str | None = None
    layout: str | None = None  # blocks, windows, names or completions; without it, all of them.
    # tokens of a block; without it 8, and for names and completions as many as the longest one needs.
    block_size: int | None = None
    tokenizer: str = "char"  # char, or a folder that has one, as for fastgpt train.
    seed: int = 1337  # which example.
    config: str | None = None  # a TOML file with any of these settings.


@dataclass(frozen=True)
class DataPrepareSettings:
    """Tokenize text of any size into a folder that --data takes. No more than pieces of the text are in memory.

    One file of text is one stream, of which the last tenth is for validation. Several files, and the rows of JSON lines
    and of Parquet, are documents: each ends with a token of its own, and the last tenth of them is for validation. If
    the command was killed, the same command goes on; on a folder that is prepared, it compares the shards with their
    sums.
    """

    REQUIRED: ClassVar[tuple[str, ...]] = ("data", "out")

    # files and folders, of text (*.txt), JSON lines (*.jsonl) and Parquet (*.parquet), or shakespeare, ...
    data: tuple[str, ...] = ()
    out: str | None = None  # the folder to write.
    # char, bpe (trained on the data), or a folder that has one: a saved model, GPT-2's vocab.json and merges.txt, or
    # what this command wrote.
    tokenizer: str = "char"
    vocab_size: int | None = None  # number of tokens of a bpe tokenizer.
    field: str = "text"  # the field of JSON lines and Parquet that has the text.
    # how many processes tokenize by BPE, with about 0.1 GB each; by default one for each core.
    processes: int | None = None
    config: str | None = None  # a TOML file with any of these settings.


@dataclass(frozen=True)
class PlanSettings(Cluster, GPTConfig, Job):
    """What training on many GPUs will take, by arithmetic: memory, operations, bytes moved, time.

    Args:
        vocab_size: number of tokens, V; where neither this nor the preset says, that of Shakespeare's characters.
        batch_size: sequences of a micro-step over all GPUs; without a value, the preset's on each GPU.
    """

    batch_size: int | None = None  # type: ignore[assignment]  # a Job's is known
    # the model: shakespeare-char, shakespeare-char-cpu, gpt2, gpt2-medium, gpt2-large or gpt2-xl.
    preset: str = "gpt2"  # type: ignore[assignment]  # a GPTConfig's is a method
    json: bool = False  # print the plan as one JSON object, in bytes, operations and seconds.
    config: str | None = None  # a TOML file with any of these settings.

    def __post_init__(self) -> None:
        """Values are checked by the methods below, when all sources have given theirs."""

    def part(self, kind: type) -> Any:
        """The settings that are a GPTConfig's, a Job's or a Cluster's, as one."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(kind)}
        if values.get("batch_size", 0) is None:
            values["batch_size"] = self.gpus * preset(self.preset)[1].get("batch_size", TrainConfig.batch_size)
        return from_dict(kind, values)


@dataclass(frozen=True)
class DoctorSettings:
    """Show what runs here: device, versions, and for each op the backend and why not each faster one."""

    self_test: bool = False  # run the self-tests of common calls on this GPU first.
    backend: str = "auto"  # show what preferring this one gives: torch, triton or native.


@dataclass(frozen=True)
class ParitySettings:
    """Measure every op, backend and dtype against its formula in float64."""

    only: tuple[str, ...] = ()  # some of the ops instead of all: attention, layer_norm, ...
    device: str = "cpu"  # cpu or cuda.
    out: str | None = None  # a JSON file to write the rows to.
    config: str | None = None  # a TOML file with any of these settings.


@dataclass(frozen=True)
class BenchSettings:
    """Measure FastGPT and the things one would use instead, here, or report on what was measured."""

    # some of the benchmarks instead of all: activation, attention, cross_entropy, data, embedding, generate,
    # import, layer_norm, linear, linear_cross_entropy, linear_log_probs, patch, recipe, scale, time_to_loss,
    # train_step, training_loop.
    only: tuple[str, ...] = ()
    device: str = "auto"  # auto (a GPU if there is one), cpu or cuda.
    # where the rows go, a *.jsonl file or a folder (default: runs/bench); with --report the folder of the report
    # (default: runs/bench-report).
    out: str | None = None
    quick: bool = False  # the first case of each benchmark, few rounds.
    threads: int | None = None  # of the CPU; by default one for each core.
    nanogpt: str | None = None  # a checkout of karpathy/nanoGPT to compare with.
    lecture: str | None = None  # gpt.py of karpathy/ng-video-lecture to compare with.
    data: str | None = None  # text for the time to a loss, as in fastgpt train.
    report: bool = False  # measure nothing; render rows to results.md with pictures, and to one HTML page.
    results: tuple[str, ...] = ()  # what --report reads, files or folders of rows (default: runs/bench).
    config: str | None = None  # a TOML file with any of these settings.


# ---- where values come from ----


def with_sources(kind: type, given: dict[str, Any], on_gpu: bool = False) -> Any:
    """The settings of `kind`, of which the command line has `given` some; every other one from its first source.

    `on_gpu` says whether training that has no preset of its own gets that for a GPU.
    """
    given = {name: _expanded(name, value) for name, value in given.items()}
    path = given.get("config")
    given = (read_toml(path, kind, f"--config {path}") if path else {}) | given
    check_types(kind(**given))  # a file may give a number for a path, which is looked into below
    out = given.get("out", getattr(kind, "out", None))
    if given.get("resume") and out:
        below = _of_resumed_run(kind, given, out)
    elif kind is PlanSettings:
        below = preset(given.get("preset", PlanSettings.preset))[0]
    elif kind is not TrainSettings:
        below = getattr(kind, "QUICK", {}) if given.get("quick") else {}
    elif given.get("init_from"):
        return _from_a_start(given)
    else:
        below = _of_preset(given, on_gpu)
    settings = kind(**(below | given))
    check_types(settings)
    return settings


def default_preset(on_gpu: bool) -> str:
    """The preset that --preset auto stands for."""
    return "shakespeare-char" if on_gpu else "shakespeare-char-cpu"


def _of_preset(given: dict[str, Any], on_gpu: bool) -> dict[str, Any]:
    """The values of the preset. The data's tokenizer says how many tokens there are."""
    name = given.get("preset", "auto")
    is_auto = name == "auto"
    model, train = preset(default_preset(on_gpu) if is_auto else name)
    if is_auto and given.get("optimizer", train.get("optimizer")) != train.get("optimizer"):
        # Nobody asked for this preset's rates, and they are for the optimizer that it has.
        train = {key: value for key, value in train.items() if key in ("batch_size", "max_steps", "eval_interval")}
    return {key: value for key, value in (model | train).items() if key != "vocab_size"}


OF_THE_START = ("model", "tokenizer", *(field.name for field in dataclasses.fields(GPTConfig)))


def _from_a_start(given: dict[str, Any]) -> TrainSettings:
    """The settings of a run that --init-from starts; None stands for what its model will decide, or for no data.

    A preset gives the settings of training alone.
    """
    name = given.get("preset", "auto")
    below = FINE_TUNING if name == "auto" else preset(name)[1]
    settings = TrainSettings(**(below | given))
    check_types(settings)
    open_names = (*OF_THE_START, "data", "layout", *(() if "lr" in below else ("lr",)))
    left: dict[str, Any] = {name: None for name in open_names if name not in given}
    return dataclasses.replace(settings, **left)


def _of_resumed_run(kind: type, given: dict[str, Any], out: str) -> dict[str, Any]:
    if "preset" in given:
        raise UsageError(f"--preset: the run in {out} has its settings already; leave it out, or start another run")
    values = _settings_of_run(Path(out), kind)
    if is_one_of_several():  # which share the cores
        values.pop("threads", None)
    return values


def is_one_of_several() -> bool:
    """Whether torchrun has started this process beside others."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def _settings_of_run(out: Path, kind: type = TrainSettings) -> dict[str, Any]:
    stored = out / "config.toml"
    folder, other = ("stages", "learn") if kind is TrainSettings else ("checkpoint", "train")
    if (out / folder).is_dir():
        raise UsageError(f"--resume: {out} holds a run of fastgpt {other}; resume it by that command")
    if not stored.exists() and (out / "checkpoint").is_dir():
        raise RuntimeError(
            f"{stored}: is missing, and has the settings of the run; --init-from {out} starts another run"
        )
    if not stored.exists():
        raise RuntimeError(f"{out}: holds no run to resume; leave --resume out to start one")
    return read_toml(str(stored), kind, str(stored))


def check_tokenizer(settings: TrainSettings) -> None:
    """Refuse a size that the tokenizer cannot have, and another tokenizer than that of a run that is resumed."""
    if settings.resume and settings.out:
        run = _settings_of_run(Path(settings.out))
        for name in ("tokenizer", "vocab_size", "init_from"):
            was, now = run.get(name, getattr(TrainSettings, name)), getattr(settings, name)
            if absolute(str(now)) != absolute(str(was)):
                was = "none" if was is None else was
                raise UsageError(f"{flag(name)}: the run in {settings.out} has {was}, not {now}; it cannot be changed")
    check_vocab_size(settings)


def check_vocab_size(settings: TrainSettings | DataPrepareSettings) -> None:
    if settings.tokenizer == "char" and settings.vocab_size is not None:
        raise UsageError("--vocab-size: the characters of the data are the vocabulary; it goes with --tokenizer bpe")
    if settings.tokenizer == "bpe" and settings.vocab_size is None:
        raise UsageError("--vocab-size: --tokenizer bpe needs it, 512 for example")


def read_toml(path: str, kind: type, shown: str) -> dict[str, Any]:
    """The settings in the TOML file `path`, which errors call `shown`; each must be a field of the dataclass `kind`."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))  # some editors begin with a byte order mark
    except OSError as error:
        raise UsageError(f"{shown}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{shown}: not a TOML file: not UTF-8 ({error}); save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{shown}: not a TOML file: {error}") from None
    known = {field.name for field in dataclasses.fields(kind)} - {"config"}
    for name, value in values.items():
        if isinstance(value, dict):
            raise UsageError(f"{shown}: [{name}] is a table; write the settings themselves, without tables")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            raise UsageError(f"{shown}: unknown setting {name!r}; {hint}")
    return {name: _expanded(name, tuple(v) if isinstance(v, list) else v) for name, v in values.items()}


def _expanded(name: str, value: Any) -> Any:
    """The value of the setting `name`; of a path, with its ~ replaced. An empty path would be the working directory."""
    if name not in PATHS or value is None:
        return value
    if isinstance(value, tuple):
        return tuple(_expanded(name, part) for part in value)
    if value == "":
        raise UsageError(f"{flag(name)}: is empty; give a path, or leave it out")
    try:
        return str(expand_path(value)) if isinstance(value, str) and value.startswith("~") else value
    except ConfigError as error:
        raise UsageError(f"{flag(name)}: {error}") from None


def absolute(path: str) -> str:
    """`path` as an absolute one; the names of texts and of tokenizers stay as they are."""
    return path if path in _NOT_PATHS else str(Path(path).resolve())


def _recorded_start(path: str | None) -> str | None:
    """What --init-from names: an absolute path, or a name on the Hugging Face Hub as it is."""
    return path if path is None or not Path(path).exists() else str(Path(path).resolve())


def check_common(settings: Any) -> None:
    """Refuse a seed of more than 63 bits, a backend or a logger that is not there, and a number of threads."""
    loggers_of(getattr(settings, "log", "none"))
    seed, backend = getattr(settings, "seed", None), getattr(settings, "backend", "auto")
    if seed is not None and not 0 <= seed < 2**63:
        raise UsageError(f"--seed: expected an integer in [0, 2**63), got {seed}")
    if backend not in ("auto", *BACKENDS):
        expected = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise UsageError(f"--backend: unknown backend {backend!r}; expected one of {expected}")
    threads = getattr(settings, "threads", None)
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise UsageError(f"--threads: expected an integer in [1, {MOST_THREADS}], got {threads}")


def loggers_of(log: str) -> list[str]:
    """The loggers that --log names, each once. Raises UsageError for one that does not exist or is not installed."""
    names = list(dict.fromkeys(part.strip() for part in log.split(",")))
    if names == ["none"]:
        return []
    for name in names:
        if name not in LOGGERS:
            expected = f"{' or '.join(LOGGERS)}, both with a comma between them, or none"
            raise UsageError(f"--log: unknown logger {name!r}; expected {expected}")
        package = find_spec(name)
        if package is None or package.origin is None:  # a folder that is called like the package is none
            raise UsageError(f"--log: {name} is not installed: pip install 'fastgpt-kernels[{name}]'")
    return names
