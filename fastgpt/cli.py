"""The command line: the table of commands, and how one is found and run. Exit codes: 0 done, 2 bad usage, 1 failed.

What a command does is in commands.py, and which options it has in settings.py; options.py reads and shows them.
"""

from __future__ import annotations

import codecs
import difflib
import io
import os
import sys
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from .commands import (
    bench,
    compare,
    data_prepare,
    data_show,
    doctor,
    evaluate,
    export,
    learn,
    parity,
    plan,
    sample,
    serve,
    study,
    train,
)
from .config import ConfigError
from .options import commands_help, completion, help_text, options_of, read
from .settings import (
    BenchSettings,
    CompareSettings,
    DataPrepareSettings,
    DataShowSettings,
    DoctorSettings,
    EvalSettings,
    ExportSettings,
    ParitySettings,
    PlanSettings,
    SampleSettings,
    ServeSettings,
    TrainSettings,
    UsageError,
    check_common,
    is_one_of_several,
    with_sources,
)
from .studies.settings import STUDIES, LearnSettings, question
from .threads import use_threads


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
    "serve": Command(ServeSettings, serve, "a page and OpenAI's interface for a trained model"),
    "eval": Command(EvalSettings, evaluate, "measure how well a model predicts a text"),
    "compare": Command(CompareSettings, compare, "runs side by side: a table, and a picture of their losses"),
    "export": Command(ExportSettings, export, "write a model for transformers, onnxruntime or torch.export"),
    "data": Group(
        {
            "show": Command(DataShowSettings, data_show, "print one example of each layout of the data"),
            "prepare": Command(DataPrepareSettings, data_prepare, "tokenize text of any size, once for many runs"),
        },
        "show: one example of each layout; prepare: text of any size to tokens",
    ),
    "plan": Command(PlanSettings, plan, "what training on many GPUs will take: memory, bytes moved, time"),
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
_FIRST_SPEAKS_WITHIN_S = 10
# These commands only print, so they have succeeded when the reader of their output closes the pipe.
_ONLY_PRINT = (
    "fastgpt",
    "fastgpt --version",
    "fastgpt sample",
    "fastgpt eval",
    "fastgpt compare",
    "fastgpt data",
    "fastgpt doctor",
    "fastgpt plan",
)


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
    except RuntimeError:  # of the folder or the file that settings are read from
        _let_first_process_speak()
        raise
    if is_one_of_several() and not isinstance(settings, TrainSettings):
        raise UsageError("torchrun: only fastgpt train shares its work among processes; give this command without it")
    with use_threads(getattr(settings, "threads", None)):
        return command.run(settings) or 0


def _let_first_process_speak() -> None:
    """Wait in the others that torchrun has started, whose command line is the same, and so is its error.

    The first shows the error and ends, and torchrun then ends the others. One that ended sooner would have torchrun end
    the first before it could speak. Where the first has no error, this process shows its own after the wait.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_FIRST_SPEAKS_WITHIN_S)


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
        _let_first_process_speak()
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
