"""The command line: one table of commands, at the end. Exit codes: 0 done, 2 bad usage, 1 failed.

A setting is looked up in this order: command line, --config file, and for `train` the run resumed, preset; default.
"""

from __future__ import annotations

import codecs
import dataclasses
import io
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from .config import (
    BACKENDS,
    PRESETS,
    SOURCES,
    ConfigError,
    GPTConfig,
    TrainConfig,
    check_types,
    from_dict,
    preset,
)
from .files import expand_path


class UsageError(ValueError):
    """Wrong use of a command."""


# The settings that name files or folders, in whatever command they are.
PATHS = frozenset({"checkpoint", "config", "data", "lecture", "nanogpt", "out", "results", "tokenizer", "vectors"})

_MODEL_FIELDS = [f for f in dataclasses.fields(GPTConfig) if f.name != "vocab_size"]
_TRAIN_FIELDS = list(dataclasses.fields(TrainConfig))
_TYPES = {"int": int, "float": float, "bool": bool, "str": str, "float | None": float | None}

_RUN_FIELDS: list[tuple[str, Any, Any]] = [
    ("preset", str | None, None),
    ("config", str | None, None),
    ("model", str, "gpt"),
    ("data", str | None, None),
    ("out", str | None, None),
    ("resume", bool, False),
    ("backend", str, "auto"),
    ("tokenizer", str, "char"),
    ("vocab_size", int | None, None),
]


def _settings_class(fields: list[tuple[str, Any, Any]], doc: str) -> type:
    made = [(name, kind, dataclasses.field(default=default)) for name, kind, default in fields]
    cls = dataclasses.make_dataclass("Train", made)
    cls.__doc__ = doc
    return cls


def _train_fields() -> list[tuple[str, Any, Any]]:
    fields = [(f.name, _TYPES[str(f.type)], f.default) for f in (*_MODEL_FIELDS, *_TRAIN_FIELDS)]
    return [*_RUN_FIELDS, *fields]


def _documented(cls: type, fields: Sequence[dataclasses.Field]) -> str:
    """The lines of a configuration's docstring that say what each of `fields` is."""
    names = {f.name for f in fields}
    lines = (cls.__doc__ or "").splitlines()
    return "\n".join(line[4:] for line in lines if line.strip().partition(":")[0] in names)


_TRAIN_HELP = f"""Train a GPT on text.

Args:
    preset: settings to start from ({", ".join(PRESETS)}).
    config: a TOML file with any of these settings.
    model: gpt, bigram, positional-bigram, rnn, gru or lstm; they take what they need of the settings below.
    data: a UTF-8 file or folder, or shakespeare, tinyshakespeare, names.
    out: the run's folder.
    resume: go on with the run in --out.
    backend: auto, torch, triton or native.
    tokenizer: char, bpe (trained on the data), or a folder with GPT-2's vocab.json and merges.txt.
    vocab_size: number of tokens of a bpe tokenizer.
{_documented(GPTConfig, _MODEL_FIELDS)}
{_documented(TrainConfig, _TRAIN_FIELDS)}
"""


def _expanded(name: str, value: Any) -> Any:
    """The value of the setting `name`; of a path with its ~ replaced. An empty path is refused: it would be "here"."""
    if name not in PATHS or value is None:
        return value
    if isinstance(value, tuple):
        return tuple(_expanded(name, part) for part in value)
    if value == "":
        raise UsageError(f"--{name}: is empty; give a path, or leave it out")
    try:
        return str(expand_path(value)) if isinstance(value, str) and value.startswith("~") else value
    except ConfigError as error:
        raise UsageError(f"--{name}: {error}") from None


def _joined(cls: type, args: Sequence[str]) -> list[str]:
    """`args` with `--name value` as `--name=value` where `cls` has a setting of one value, so that it may be "-x"."""
    kinds = {f"--{name.replace('_', '-')}": kind for name, kind in get_type_hints(cls).items()}
    flags = {name for name, kind in kinds.items() if kind is bool}
    options = {"-h", "--help", *kinds, *(f"--no-{name[2:]}" for name in flags)}
    joined: list[str] = []
    rest = list(args)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
        takes_one = name in kinds and name not in flags and get_origin(kinds[name]) is not tuple
        if takes_one and not equals and rest and rest[0].partition("=")[0].replace("_", "-") not in options:
            equals, value = "=", rest.pop(0)
        joined.append(name + equals + value)
    return joined


def _option(args: Sequence[str], name: str) -> str | None:
    """The value of --name in args, which _joined gave: read before the full parse, it sets defaults of the others."""
    start = f"--{name}="
    values = [arg.removeprefix(start) for arg in args if arg.startswith(start)]
    if name == "config" and len(values) > 1:
        raise UsageError("--config: is given more than once; put the settings into one file")
    return _expanded(name, values[-1]) if values else None


def _read_toml(path: str, known: set[str], shown: str = "--config {}") -> dict[str, Any]:
    """The settings in the file `path`, which errors name as `shown`; each must be one of `known`."""
    import tomllib

    shown = shown.format(path)

    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))  # some editors begin with a byte order mark
    except OSError as error:
        raise UsageError(f"{shown}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{shown}: not a TOML file: not UTF-8 ({error}); save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{shown}: not a TOML file: {error}") from None
    for name, value in values.items():
        if isinstance(value, dict):
            raise UsageError(f"{shown}: [{name}] is a table; write the settings themselves, without tables")
        if name not in known:
            raise UsageError(f"{shown}: unknown setting {name!r}; known: {', '.join(sorted(known))}")
    return {name: _expanded(name, tuple(v) if isinstance(v, list) else v) for name, v in values.items()}


def _parse(cls: type, args: Sequence[str], command: str, quick: dict[str, Any] | None = None) -> Any:
    """`args` as an instance of the dataclass `cls`, over the settings of a --config file, over those of --quick."""
    import tyro

    args = _joined(cls, args)
    path = _option(args, "config")
    values = _read_toml(path, {f.name for f in dataclasses.fields(cls)} - {"config"}) if path else {}
    if quick and ("--quick" in args or values.get("quick") is True):
        values = quick | values
    default = cls(**values)
    check_types(default)
    settings = tyro.cli(cls, args=args, prog=f"fastgpt {command}", default=default)
    seed = getattr(settings, "seed", None)
    if seed is not None and not 0 <= seed < 2**63:
        raise UsageError(f"--seed: expected an integer in [0, 2**63), got {seed}")
    return dataclasses.replace(settings, **{name: _expanded(name, value) for name, value in vars(settings).items()})


def _require(settings: Any, command: str, *names: str) -> None:
    for name in names:
        if getattr(settings, name) is None:
            raise UsageError(f"--{name} is missing; see fastgpt {command} --help")


def _train_settings(args: Sequence[str]) -> Any:
    fields = _train_fields()
    args = _joined(_settings_class(fields, _TRAIN_HELP), args)
    known = {name for name, _, _ in fields}
    values: dict[str, Any] = {}
    from_file = _read_toml(path, known - {"config"}) if (path := _option(args, "config")) else {}
    name = _option(args, "preset") or from_file.get("preset")
    if name is not None:
        model, train = preset(name)
        model.pop("vocab_size", None)  # the data's tokenizer says
        values |= model | train
    out = _option(args, "out") or from_file.get("out")
    if ("--resume" in args or from_file.get("resume")) and out:
        values |= _settings_of_run(Path(out), args, known)
    values |= from_file
    cls = _settings_class([(n, kind, values.get(n, default)) for n, kind, default in fields], _TRAIN_HELP)
    settings = _parse(cls, args, "train")
    _require(settings, "train", "data", "out")
    return settings


def _settings_of_run(out: Path, args: Sequence[str], known: set[str]) -> dict[str, Any]:
    stored = out / "config.toml"
    if not stored.exists():
        raise RuntimeError(f"{out}: holds no run to resume; leave --resume out to start one")
    if _option(args, "preset"):
        raise UsageError(f"--preset: the run in {out} has its settings already; leave it out, or start another run")
    values = _read_toml(str(stored), known, "{}")
    for name in ("tokenizer", "vocab_size"):
        asked = _option(args, name.replace("_", "-"))
        if asked is not None and _absolute(asked) != _absolute(str(values.get(name))):
            raise UsageError(f"--{name}: the run in {out} has {values.get(name)}, not {asked}; it cannot be changed")
    return values


def train(args: Sequence[str]) -> None:
    settings = _train_settings(args)
    values = dataclasses.asdict(settings)
    train_config = from_dict(TrainConfig, {f.name: values[f.name] for f in _TRAIN_FIELDS})
    model_values = {f.name: values[f.name] for f in _MODEL_FIELDS}
    from_dict(GPTConfig, model_values)  # refuse a bad model before the data is read
    if settings.tokenizer == "char" and settings.vocab_size is not None:
        raise UsageError("--vocab-size: the characters of the data are the vocabulary; it goes with --tokenizer bpe")
    if settings.tokenizer == "bpe" and settings.vocab_size is None:
        raise UsageError("--vocab-size: --tokenizer bpe needs it, 512 for example")
    _check_backend(settings.backend)

    from .baselines import model_class
    from .data.corpus import Corpus
    from .machine import resolve_device
    from .ops.backend import use_backend
    from .tokenizer import BPETokenizer, tokenizer_from_json
    from .training import runs
    from .training.step import Precision

    model_class(settings.model)
    Precision(resolve_device(train_config.device), train_config.dtype)  # refused before anything is written
    saved = runs.load_latest(settings.out) if settings.resume else None
    tokenizer: Any = settings.tokenizer
    if saved is not None:
        tokenizer = tokenizer_from_json(saved.tokenizer)
    elif tokenizer not in ("char", "bpe"):
        tokenizer = BPETokenizer.from_gpt2_files(tokenizer)
    corpus = Corpus.load(
        settings.data,
        tokenizer,
        vocab_size=settings.vocab_size,
        block_size=settings.block_size,
        layout=settings.layout,
    )
    vocab_size = corpus.tokenizer.vocab_size
    if settings.vocab_size is not None and vocab_size < settings.vocab_size:
        print(f"vocab_size: {vocab_size} tokens, not {settings.vocab_size}: no further pair occurs twice in the text")
    model_config = from_dict(GPTConfig, {**model_values, "vocab_size": vocab_size})
    stored = {k: v for k, v in values.items() if k not in ("config", "resume", "preset")}
    for name in ("data", "tokenizer"):  # the run may be resumed from another working directory
        stored[name] = _absolute(stored[name])
    made: dict[str, Any] = {
        "kind": settings.model,
        "config": model_config,
        "train_config": train_config,
        "corpus": corpus,
        "settings": stored,
        "resume_command": f"fastgpt train --out {shlex.quote(settings.out)} --resume",
    }
    with use_backend(settings.backend):
        trainer = runs.start(settings.out, **made) if saved is None else runs.resume(settings.out, saved, **made)
        n = trainer.model.num_parameters()
        where = f"{trainer.device}, {trainer.precision}"
        print(f"{n:,} parameters, {len(corpus.train):,} training tokens, device {where}", flush=True)
        state = trainer.run()
    print(f"done: step {state['step']}, best val loss {state['best_val']:.4f}, {state['elapsed_s']:.1f} s of training")


def _check_backend(name: str) -> None:
    if name not in ("auto", *BACKENDS):
        raise UsageError(
            f"--backend: unknown backend {name!r}; expected one of 'auto', {', '.join(map(repr, BACKENDS))}"
        )


_NO_PATHS = (*SOURCES, "char", "bpe")  # values of --data and --tokenizer


def _absolute(path: str) -> str:
    return path if path in _NO_PATHS else str(Path(path).resolve())


@dataclass
class Sample:
    """Print a continuation of a prompt, token by token.

    Args:
        checkpoint: a run's folder (its best checkpoint), or one .safetensors checkpoint.
        prompt: the text to continue; --prompt=--seed for a text that is itself one of these options.
        max_new_tokens: tokens to add.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens.
        top_p: sample among the fewest tokens whose probability reaches p.
        seed: repeats a sample.
        device: auto, cpu, cuda, ...
        backend: auto, torch, triton or native.
        config: a TOML file with any of these settings.
    """

    checkpoint: str | None = None
    prompt: str = "\n"
    max_new_tokens: int = 500
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    device: str = "auto"
    backend: str = "auto"
    config: str | None = None


def sample(args: Sequence[str]) -> None:
    settings = _parse(Sample, args, "sample")
    _require(settings, "sample", "checkpoint")
    _check_backend(settings.backend)
    if not settings.prompt:
        raise UsageError("--prompt: is empty; give at least one character")
    import torch

    from .data.layouts import NAME_BOUNDARY, boundary_token
    from .generate import stream, stream_names
    from .machine import resolve_device
    from .ops.backend import use_backend
    from .tokenizer import StreamDecoder
    from .training.runs import load_model

    model, tokenizer, saved = load_model(settings.checkpoint)
    device = resolve_device(settings.device)
    model.to(device)
    generator = torch.Generator(device)
    generator.manual_seed(settings.seed) if settings.seed is not None else generator.seed()
    prompt = settings.prompt.replace("\r\n", "\n")  # as in the training data
    of_names = saved.train_config.get("layout") == "names"
    if of_names:  # the last line of the prompt is the name to go on with
        prompt = NAME_BOUNDARY + prompt.rpartition(NAME_BOUNDARY)[2]
    try:
        idx = torch.tensor([tokenizer.encode(prompt)], device=device)
    except ValueError as error:  # a character that the tokenizer does not know
        raise ValueError(f"--prompt: {error}") from None
    options: dict[str, Any] = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    options["generator"] = generator
    decoder = StreamDecoder(tokenizer)
    with use_backend(settings.backend):
        try:
            if of_names:
                tokens = stream_names(model, idx, settings.max_new_tokens, boundary_token(tokenizer), **options)
            else:
                tokens = stream(model, idx, settings.max_new_tokens, **options)
        except ValueError as error:  # a setting it cannot have
            raise UsageError(str(error)) from None
        print(settings.prompt, end="", flush=True)
        for token in tokens:
            print(decoder.push(int(token)), end="", flush=True)
    print(decoder.flush())


@dataclass
class DataShow:
    """Print one example of each layout of the data, context -> target.

    Args:
        data: a UTF-8 file or folder, or shakespeare, tinyshakespeare, names; without it, a few lines of its own.
        layout: blocks, windows or names; without it, all of them.
        block_size: tokens of a block; without it 8, and for names as many as the longest one needs.
        tokenizer: char, or a folder with GPT-2's vocab.json and merges.txt.
        seed: which example.
        config: a TOML file with any of these settings.
    """

    data: str | None = None
    layout: str | None = None
    block_size: int | None = None
    tokenizer: str = "char"
    seed: int = 1337
    config: str | None = None


def data(args: Sequence[str]) -> None:
    if not args or args[0] != "show":
        if args and args[0] in ("-h", "--help"):
            _parse(DataShow, ["--help"], "data show")
        raise UsageError(f"expected 'show', got {args[0]!r}" if args else "expected: fastgpt data show [options]")
    settings = _parse(DataShow, args[1:], "data show")
    from .data.show import show_layouts

    print(show_layouts(settings.data, settings.layout, settings.block_size, settings.tokenizer, settings.seed))


@dataclass
class Doctor:
    """Show what runs here: device, versions, and per op the backend and why not each faster one."""


def doctor(args: Sequence[str]) -> None:
    _parse(Doctor, args, "doctor")
    from .doctor import report

    print(report())


@dataclass
class Parity:
    """Measure every op, backend and dtype against the float64 oracle.

    Args:
        device: cpu or cuda.
        out: a JSON file to write the rows to.
        config: a TOML file with any of these settings.
    """

    device: str = "cpu"
    out: str | None = None
    config: str | None = None


def parity(args: Sequence[str]) -> int:
    settings = _parse(Parity, args, "parity")
    from .parity.report import main as run

    return run(settings.device, settings.out)


def study(args: Sequence[str]) -> None:
    from . import studies

    names = "\n".join(f"  {name:14} {question}" for name, question in studies.STUDIES.items())
    if args and args[0] in ("-h", "--help"):
        print(f"usage: fastgpt study NAME [options]      (fastgpt study NAME --help for its options)\n\n{names}")
        return
    if not args or args[0] not in studies.STUDIES:
        what = f"no study is called {args[0]!r}" if args else "which study?"
        raise UsageError(f"{what}; there are {', '.join(studies.STUDIES)}")
    from .studies.settings import STUDY_SETTINGS

    kind = STUDY_SETTINGS[args[0]]
    studies.run(args[0], _parse(kind, args[1:], f"study {args[0]}", kind.QUICK))


def learn(args: Sequence[str]) -> None:
    from .studies.settings import LearnSettings

    settings = _parse(LearnSettings, args, "learn", LearnSettings.QUICK)
    from .studies.learn import run

    run(settings)


@dataclass
class Bench:
    """Measure FastGPT and the things one would use instead, here, or report on what was measured.

    Args:
        only: some of the benchmarks instead of all: attention, layer_norm, ...
        device: auto (a GPU if there is one), cpu or cuda.
        out: where the rows go, a *.jsonl file or a folder (default: runs/bench); with --report the folder of the report
            (default: runs/bench-report).
        quick: the first case of each benchmark, few rounds.
        nanogpt: a checkout of karpathy/nanoGPT to compare with.
        lecture: gpt.py of karpathy/ng-video-lecture to compare with.
        data: text for the time to a loss, as in fastgpt train.
        report: measure nothing; render rows to results.md with pictures, and to one HTML page.
        results: what --report reads, files or folders of rows (default: runs/bench).
        config: a TOML file with any of these settings.
    """

    only: tuple[str, ...] = ()
    device: str = "auto"
    out: str | None = None
    quick: bool = False
    nanogpt: str | None = None
    lecture: str | None = None
    data: str | None = None
    report: bool = False
    results: tuple[str, ...] = ()
    config: str | None = None


def bench(args: Sequence[str]) -> int:
    settings = _parse(Bench, args, "bench")
    try:
        from .benchmarks import command
    except ModuleNotFoundError as error:
        if error.name != "fastgpt.benchmarks":
            raise
        raise ImportError("this source tree is not installed; run pip install -e . in it") from None

    if settings.report:
        for name in ("only", "quick", "nanogpt", "lecture", "data"):
            if getattr(settings, name):
                raise UsageError(f"--{name}: is for measuring; leave it out, or --report")
        command.write_report(settings.results, settings.out)
        return 0
    if settings.results:
        raise UsageError("--results: is what --report reads; add --report, or name a file to write to with --out")
    if settings.device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device: expected auto, cpu or cuda, got {settings.device!r}")
    for name in settings.only:
        if name not in command.benchmark_names():
            raise UsageError(f"--only: no benchmark {name!r}; there are {', '.join(command.benchmark_names())}")
    paths = {name: getattr(settings, name) for name in ("nanogpt", "lecture", "data")}
    return command.run_suite(settings.only, settings.device, settings.out, settings.quick, paths)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int | None], str]] = {
    "train": (train, "train a GPT, or another model, on text"),
    "sample": (sample, "continue a prompt with a trained model"),
    "data": (data, "show: one example of each layout of the data"),
    "learn": (learn, "from bigram to GPT: train every stage, write a report"),
    "study": (study, "measure what a part does: depth, norms, attention, ..."),
    "doctor": (doctor, "what runs here and why"),
    "parity": (parity, "proof: every op against the float64 oracle"),
    "bench": (bench, "times against named peers, and reports of them"),
}


def _usage() -> str:
    lines = ["usage: fastgpt COMMAND [options]      (fastgpt COMMAND --help for its options)", ""]
    return "\n".join(lines + [f"  {name:8} {about}" for name, (_, about) in COMMANDS.items()])


def _prepare_streams() -> None:
    """Give each standard stream what it needs to take any text.

    A stream that was closed becomes one that takes everything: its number, 1 or 2, would otherwise go to the next file
    that is opened. A console or pipe whose encoding has not all characters gets those it lacks as \\u2603.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  -- open as long as the process
        elif isinstance(stream, io.TextIOWrapper) and not codecs.lookup(stream.encoding).name.startswith("utf"):
            stream.reconfigure(errors="backslashreplace")


def _flush_or_drop() -> None:
    """Write what is buffered for stdout; where that fails let it go nowhere, or Python would fail again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# What a user's input or machine can cause. Anything else is a fault of this package, and shows its traceback.
_FAILURES = (ValueError, RuntimeError, OSError, IndexError, TypeError, ArithmeticError, MemoryError, ImportError)
_ONLY_PRINT = (
    "fastgpt",
    "fastgpt --version",
    "fastgpt sample",
    "fastgpt data",
    "fastgpt doctor",
)  # done when whoever reads their output has had enough of it


def _run(args: Sequence[str]) -> int:
    """The command that `args` ask for; returns its exit code."""
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0 if args else 2
    if args[0] == "--version":
        from . import __version__

        print(f"fastgpt {__version__}")
        return 0
    if args[0] not in COMMANDS:
        print(f"fastgpt: unknown command {args[0]!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    for arg in args:
        if any("\ud800" <= character <= "\udfff" for character in arg):  # how Python passes on bytes it cannot decode
            encoding = sys.getfilesystemencoding()
            raise UsageError(f"{arg!r}: is not {encoding} text; give UTF-8, under a UTF-8 locale or PYTHONUTF8=1")
    try:
        return COMMANDS[args[0]][0](args[1:]) or 0
    except SystemExit as error:  # tyro's: 0 after --help, 2 for bad usage
        return error.code if isinstance(error.code, int) else 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    prog = " ".join(["fastgpt", *args[:1]])
    warnings.filterwarnings("ignore", message=".*CUDA initialization.*")
    warnings.filterwarnings("ignore", message=".*does not match any type in Union.*")  # check_types says it in a line
    try:
        _prepare_streams()
        code = _run(args)
        sys.stdout.flush()  # now, while an error can still be told
        return code
    except (ConfigError, UsageError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        _flush_or_drop()
        if prog in _ONLY_PRINT or not {"-h", "--help"}.isdisjoint(args):
            return 0
        print(f"{prog}: stopped: whatever read its output has gone", file=sys.stderr)
        return 1
    except _FAILURES as error:
        _flush_or_drop()
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"{prog}: {lines[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{prog}: stopped", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
