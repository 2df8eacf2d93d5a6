"""The command line: a function for each command, and the table of them. Exit codes: 0 done, 2 bad usage, 1 failed.

settings.py has the options of each command, options.py reads and shows them.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import io
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from .config import DTYPES, ConfigError
from .options import commands_help, completion, help_text, options_of, read
from .settings import (
    BenchSettings,
    DataShowSettings,
    DoctorSettings,
    EvalSettings,
    ParitySettings,
    SampleSettings,
    TrainSettings,
    UsageError,
    check_common,
    check_tokenizer,
    required,
    with_sources,
)
from .studies.settings import STUDIES, LearnSettings, StudySettings, question
from .threads import use_threads


def _on_backend(name: str, device: str) -> contextlib.AbstractContextManager:
    """Ops prefer the backend called `name`; with "auto" the environment's FASTGPT_BACKEND still counts.

    Refuses one that can serve nothing on `device`, before anything is read.
    """
    from .machine import resolve_device
    from .ops.backend import check_preference, preferred, use_backend

    source = "FASTGPT_BACKEND" if name == "auto" else "--backend"
    check_preference(preferred() if name == "auto" else name, source, resolve_device(device).type)
    return contextlib.nullcontext() if name == "auto" else use_backend(name)


def _initial(settings: TrainSettings) -> tuple[Any, Any, TrainSettings]:
    """The model that --init-from names, its tokenizer, and the settings that it completes."""
    from .training.initial import initial_model

    assert settings.init_from is not None
    if settings.data is None:  # the default text is probably what it has been trained on
        raise UsageError("--data is missing: say what the model shall learn now, a file, a folder, or a text's name")
    try:
        model, tokenizer = initial_model(settings.init_from, settings.asked_of_the_start())
    except ConfigError as error:
        raise UsageError(_naming_option(error, settings)) from None
    completed = settings.with_start(model.kind, tokenizer.kind, model.layout, model.cfg)
    if settings.layout != completed.layout != TrainSettings.layout:
        print(f"layout: {completed.layout}, that of the model's data; --layout {TrainSettings.layout} takes plain text")
    if settings.lr is None:
        print(f"lr: {completed.lr:g}, which follows from the model's width of {model.cfg.n_embd}")
    return model, tokenizer, completed


def train(settings: TrainSettings) -> None:
    (out,) = required(settings, "train")
    initial: Any = None
    tokenizer: Any = settings.tokenizer
    if settings.init_from and not settings.resume:
        initial, tokenizer, settings = _initial(settings)
    data = settings.data
    train_config = settings.train_config()
    settings.model_config(vocab_size=1)  # refuse a bad model before the data is read
    check_tokenizer(settings)

    import torch

    from .baselines import model_class
    from .cuda_graph import recorder
    from .data.corpus import Corpus
    from .machine import resolve_device
    from .tokenizer_files import read_tokenizer
    from .training import runs
    from .training.muon import who_trains
    from .training.progress import first_lines
    from .training.step import Precision

    model_class(settings.model)
    device = resolve_device(train_config.device)
    Precision(device, train_config.dtype)  # refused before anything is written
    on_backend = _on_backend(settings.backend, train_config.device)
    if train_config.cuda_graph:
        recorder(device)
    if advice := settings.rate_of_another_optimizer():
        print(advice)
    if settings.layout != "completions" and data.endswith(".jsonl"):
        print(f"data: {data} is read as plain text; --layout completions learns the completions in JSON lines")
    saved = runs.load_latest(out) if settings.resume else None
    if saved is not None:
        tokenizer = saved.read_tokenizer()
    elif initial is None and tokenizer not in ("char", "bpe"):
        tokenizer = read_tokenizer(tokenizer)
    corpus = Corpus.load(
        data, tokenizer, vocab_size=settings.vocab_size, block_size=settings.block_size, layout=settings.layout
    )
    vocab_size = corpus.tokenizer.vocab_size
    if tokenizer == "bpe" and vocab_size < (settings.vocab_size or 0):
        print(f"vocab_size: {vocab_size} tokens, not {settings.vocab_size}: no further pair occurs twice in the text")
    if initial is not None:  # which may have more than its tokenizer needs
        vocab_size = initial.cfg.vocab_size
    elif saved is not None:
        vocab_size = saved.config().vocab_size
    run: dict[str, Any] = {
        "kind": settings.model,
        "config": settings.model_config(vocab_size),
        "train_config": train_config,
        "corpus": corpus,
        # PyTorch divides some sums among its threads, so the bits of a run depend on their number.
        "settings": settings.recorded() | {"threads": torch.get_num_threads()},
        "resume_command": f"fastgpt train --out {shlex.quote(out)} --resume",
    }
    with on_backend:
        trainer = runs.start(out, **run, initial=initial) if saved is None else runs.resume(out, saved, **run)
        if (reached := trainer.finished()) is not None:
            print(f"the run in {out} is finished: {reached}")
            return
        print(*first_lines(trainer, settings.origin(device.type), data), sep="\n", flush=True)
        if train_config.optimizer == "muon":
            print(f"optimizer: {who_trains(trainer.optimizer)}", flush=True)
        state = trainer.run()
    print(f"done: step {state['step']}, best val loss {state['best_val']:.4f}, {state['elapsed_s']:.1f} s of training")


def sample(settings: SampleSettings) -> None:
    (checkpoint,) = required(settings, "sample")
    for name in ("prompt", "stop"):
        if getattr(settings, name) == "":
            raise UsageError(f"--{name}: is empty; give at least one character")
    on_backend = _on_backend(settings.backend, settings.device)
    import torch

    from .generate_text import stream_text
    from .loading import load
    from .machine import resolve_device

    model, tokenizer = load(checkpoint, dropout=0.0)
    if settings.prompt == SampleSettings.prompt:
        _check_default_prompt(model.layout, tokenizer)
    device = resolve_device(settings.device)
    model.to(device)
    generator = torch.Generator(device)
    generator.manual_seed(settings.seed) if settings.seed is not None else generator.seed()
    options: dict[str, Any] = {"layout": model.layout, "device": device, "generator": generator}
    for name in ("num_samples", "stop", "temperature", "top_k", "top_p", "stride"):
        options[name] = getattr(settings, name)
    if settings.cuda_graph:
        options["cuda_graph"] = True
    with on_backend:
        try:
            pieces = stream_text(model, tokenizer, settings.prompt, settings.max_new_tokens, **options)
        except ValueError as error:  # a setting that it cannot have
            raise UsageError(_naming_option(error, settings)) from None
        _print_samples(pieces, settings.prompt, settings.num_samples)


def _check_default_prompt(layout: str, tokenizer: Any) -> None:
    """Refuse a model that cannot go on from the prompt that is taken where none is given."""
    if layout == "completions":
        raise UsageError("--prompt is missing: this model completes prompts; give one like those of its data")
    try:
        tokenizer.encode(SampleSettings.prompt)
    except ValueError:
        raise UsageError("--prompt is missing: the text that the model knows has no line's end to begin with") from None


def _naming_option(error: ValueError, settings: Any) -> str:
    """The text of an error that begins with an argument's name, with the name of the option in its place."""
    name, colon, rest = str(error).partition(": ")
    return f"--{name.replace('_', '-')}{colon}{rest}" if name in vars(settings) else str(error)


def _print_samples(pieces: Iterator[tuple[int, str]], prompt: str, n: int) -> None:
    """Print the first sample while it is drawn; the others are drawn beside it, and wait until it is complete."""
    waiting = [prompt] * n
    for number in range(n):
        if n > 1:
            print(f"--- sample {number + 1} of {n} ---")
        print(waiting[number], end="", flush=True)
        for of, text in pieces:  # all of them come while the first sample is printed
            if of == number:
                print(text, end="", flush=True)
            else:
                waiting[of] += text
        print()


def evaluate(settings: EvalSettings) -> None:
    checkpoint, data = required(settings, "eval")
    if settings.dtype not in DTYPES:
        raise UsageError(f"--dtype: expected one of {', '.join(DTYPES)}, got {settings.dtype!r}")
    on_backend = _on_backend(settings.backend, settings.device)
    import json

    from .evaluate import evaluate, examples_of, results, table
    from .loading import load
    from .machine import resolve_device
    from .training.step import Precision

    model, tokenizer = load(checkpoint, dropout=0.0)
    try:
        examples = examples_of(model, tokenizer, data, settings.stride)
    except ConfigError as error:
        raise UsageError(_naming_option(error, settings)) from None
    precision = Precision(resolve_device(settings.device), settings.dtype)
    model.to(precision.device)
    with on_backend:
        found = results(evaluate(model, tokenizer, examples, precision), model, examples)
    found = {"checkpoint": checkpoint, "data": data, **found}
    found |= {"device": str(precision.device), "dtype": precision.name}
    print(json.dumps(found, indent=2) if settings.json else table(found))


def data_show(settings: DataShowSettings) -> None:
    from .data.show import show_layouts

    print(show_layouts(settings.data, settings.layout, settings.block_size, settings.tokenizer, settings.seed))


def learn(settings: LearnSettings) -> None:
    from .studies.learn import run

    with _on_backend("auto", settings.device):
        run(settings)


def study(settings: StudySettings) -> None:
    from .studies import run

    (name,) = (name for name, kind in STUDIES.items() if kind is type(settings))
    with _on_backend("auto", settings.device):
        run(name, settings)


def doctor(settings: DoctorSettings) -> None:
    from .doctor import report

    print(report(settings.self_test, settings.backend))


def parity(settings: ParitySettings) -> int:
    from .parity.report import main as run

    return run(settings.device, settings.out, settings.only)


def bench(settings: BenchSettings) -> int:
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
            there = ", ".join(command.benchmark_names())
            raise UsageError(f"--only: there is no benchmarks/bench_{name}.py; there are {there}")
    for name in ("nanogpt", "lecture"):
        if (path := getattr(settings, name)) is not None and not os.path.exists(path):
            raise UsageError(f"--{name}: {path} does not exist; give what --help names, or leave it out")
    paths = {name: getattr(settings, name) for name in ("nanogpt", "lecture", "data")}
    return command.run_suite(settings.only, settings.device, settings.out, settings.quick, paths)


# ---- the table of commands ----


class Command(NamedTuple):
    settings: type
    run: Callable[[Any], int | None]
    about: str


class Group(NamedTuple):
    commands: Mapping[str, Command | Group]
    about: str


COMMANDS: dict[str, Command | Group] = {
    "train": Command(TrainSettings, train, "train a GPT, or another model, on text"),
    "sample": Command(SampleSettings, sample, "continue a prompt with a trained model"),
    "eval": Command(EvalSettings, evaluate, "measure how well a model predicts a text"),
    "data": Group(
        {"show": Command(DataShowSettings, data_show, "print one example of each layout of the data")},
        "show: one example of each layout of the data",
    ),
    "learn": Command(LearnSettings, learn, "from bigram to GPT: train every stage, write a report"),
    "study": Group(
        {name: Command(kind, study, question(name)) for name, kind in STUDIES.items()},
        "measure what a part does: depth, normalisation, attention, ...",
    ),
    "doctor": Command(DoctorSettings, doctor, "what runs here and why"),
    "parity": Command(ParitySettings, parity, "proof: every op against its formula in float64"),
    "bench": Command(BenchSettings, bench, "times against named peers, and reports of them"),
}


def _find(args: Sequence[str]) -> tuple[Command | Group, int]:
    """The command that `args` begin with, and of how many words its name is.

    It is a group where they name no command of it. A word that is no command is refused, with the one that it may have
    been meant for.
    """
    found: Command | Group = Group(COMMANDS, _ABOUT)
    for n_words, word in enumerate(args):
        if isinstance(found, Command) or word.startswith("-"):
            return found, n_words
        if word not in found.commands:
            near = difflib.get_close_matches(word, found.commands, n=1)
            hint = f"did you mean {near[0]!r}?" if near else _there_are(found.commands)
            raise UsageError(f"unknown command {word!r}; {hint}")
        found = found.commands[word]
    return found, len(args)


def _there_are(commands: Collection[str]) -> str:
    return f"there {'is' if len(commands) == 1 else 'are'} {', '.join(commands)}"


def parse(args: Sequence[str]) -> tuple[Command, Any]:
    """The command in `args`, and its settings, an instance of its dataclass. Raises SystemExit after help."""
    if args and args[0] == "help":  # fastgpt help train
        args = [*args[1:], "--help"]
    found, n_words = _find(args)
    prog, words = " ".join(["fastgpt", *args[:n_words]]), list(args[n_words:])
    asks_help = not {"-h", "--help"}.isdisjoint(words)
    if isinstance(found, Group):
        _print_about_commands(found, prog, words, asks_help)
    words = [word for word in words if word not in ("-h", "--help")]
    if sum(word.partition("=")[0] == "--config" for word in words) > 1:
        raise UsageError("--config: is given more than once; put the settings into one file")
    given = read(found.settings, words, prog)
    if asks_help:
        values = [with_sources(found.settings, given, on_gpu) for on_gpu in (False, True)]
        _print_and_exit(help_text(prog, found.about, found.settings, *values))
    settings = with_sources(found.settings, given)
    check_common(settings)
    if isinstance(settings, TrainSettings) and settings.follow_the_device() and _is_gpu(settings.device):
        settings = with_sources(found.settings, given, on_gpu=True)
    return found, settings


def _is_gpu(device: str) -> bool:
    """Whether the device called `device`, which may be auto, is a CUDA GPU."""
    from .machine import resolve_device

    return resolve_device(device).type == "cuda"


_ABOUT = "A GPT as readable as the lecture, on fused kernels."


def _print_about_commands(group: Group, prog: str, words: list[str], asks_help: bool) -> NoReturn:
    """The help of all commands or of a group, or a script for completion; refuses all other words."""
    flag, _, shell = " ".join(words).replace("=", " ").partition(" ")
    if flag == "--print-completion":
        _print_and_exit(completion(shell, _words_after(COMMANDS)))
    if words and not asks_help:
        raise UsageError(f"{words[0]!r}: a command comes first; see {prog} --help")
    text = commands_help(prog, group.about, {name: command.about for name, command in group.commands.items()})
    if asks_help or prog == "fastgpt":
        _print_and_exit(text)
    raise UsageError(f"{prog.split()[-1]!r} needs a command after it; {_there_are(group.commands)}")


def _words_after(commands: Mapping[str, Command | Group], prefix: str = "") -> dict[str, list[str]]:
    """What may follow each beginning of a command line: "" is followed by all commands, "train" by its options."""
    found = {prefix: list(commands)}
    for name, command in commands.items():
        line = f"{prefix} {name}".strip()
        if isinstance(command, Group):
            found |= _words_after(command.commands, line)
        else:
            found[line] = [option.flag for option in options_of(command.settings)]
    return found


def _print_and_exit(text: str) -> NoReturn:
    print(text, end="")
    raise SystemExit(0)


# ---- running a command ----


def _prepare_streams() -> None:
    """Give each standard stream what it needs to take any text.

    A stream that was closed becomes one that takes everything: the next file that is opened would otherwise get its
    descriptor, 1 or 2. A console or pipe whose encoding has not all characters gets those it lacks as \\u2603.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  -- open as long as the process
        elif isinstance(stream, io.TextIOWrapper) and not codecs.lookup(stream.encoding).name.startswith("utf"):
            stream.reconfigure(errors="backslashreplace")


def _flush_or_drop() -> None:
    """Flush stdout. Where that fails the rest is dropped, because Python would try again, and fail, when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# What a user's input or machine can cause. Anything else is a fault of this package, and shows its traceback.
_FAILURES = (ValueError, RuntimeError, OSError, IndexError, TypeError, ArithmeticError, MemoryError, ImportError)
# These commands only print, so they have succeeded when the reader of their output closes the pipe.
_ONLY_PRINT = ("fastgpt", "fastgpt --version", "fastgpt sample", "fastgpt eval", "fastgpt data", "fastgpt doctor")


def _run(args: Sequence[str]) -> int:
    """Run the command that `args` ask for; returns its exit code."""
    if args and args[0] == "--version":
        from . import __version__

        print(f"fastgpt {__version__}")
        return 0
    for arg in args:
        if any("\ud800" <= character <= "\udfff" for character in arg):  # how Python passes on bytes it cannot decode
            encoding = sys.getfilesystemencoding()
            raise UsageError(f"{arg!r}: is not {encoding} text; give UTF-8, under a UTF-8 locale or PYTHONUTF8=1")
    try:
        command, settings = parse(args)
    except SystemExit as error:  # after help
        return int(error.code or 0) if args else 2
    with use_threads(getattr(settings, "threads", None)):
        return command.run(settings) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    prog = " ".join(["fastgpt", *(arg for arg in args[:1] if arg in (*COMMANDS, "--version"))])
    warnings.filterwarnings("ignore", message=".*CUDA initialization.*")
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
