"""The options of a command: read from its words, shown as help, completed by a shell. Importing this needs no PyTorch.

A field of the command's dataclass in settings.py is an option: `max_steps` is --max-steps. Its help is the field's line
under `Args:` in the docstring, else the comment above the field or beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
import shutil
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from .settings import PATHS, UsageError, flag

_METAVARS = {"data": "PATH|NAME", "tokenizer": "NAME|PATH", "log": "LIST"}
_METAVARS |= dict.fromkeys(("prompt", "stop", "words", "analogy"), "TEXT")
_METAVARS |= {name: "PATH" for name in PATHS if name not in _METAVARS}
_METAVARS |= {"runs": "RUN", "token": "TEXT"}
# The settings that need no option: words in first place are their values, and where it takes several, words anywhere.
_WITHOUT_OPTION = ("checkpoint", "runs")
# What a word without an option is probably the value of: the first of these that the command has and was not given.
_MEANT = ("only", "checkpoint", "data", "out", "preset")


class Option(NamedTuple):
    """One setting of a command, as the command line has it."""

    name: str  # of the setting: max_steps
    kind: str  # int, float, bool, str, texts for one that may be given again, or tuple for several at once
    default: Any
    help: str

    @property
    def flag(self) -> str:
        return flag(self.name)

    @property
    def usage(self) -> str:
        """How a command that needs it is written."""
        several = self.kind == "tuple" and self.name in _WITHOUT_OPTION
        return f"{self.metavar}..." if several else f"{self.flag} {self.metavar}"

    @property
    def metavar(self) -> str:
        """What stands for the value in the help."""
        if self.kind not in ("str", "texts"):
            return {"int": "N", "float": "X"}.get(self.kind, _METAVARS.get(self.name, "NAME"))
        is_list = isinstance(self.default, str) and "," in self.default
        return _METAVARS.get(self.name, "LIST" if is_list else "NAME")


def options_of(kind: type) -> list[Option]:
    """The options of the command whose settings are of `kind`; those that it needs come first."""
    help_of = _help_of_fields(kind)
    needed = getattr(kind, "REQUIRED", ())
    options = [
        Option(field.name, _kind_of(str(field.type)), field.default, help_of.get(field.name, ""))
        for field in dataclasses.fields(kind)
    ]
    return sorted(options, key=lambda option: needed.index(option.name) if option.name in needed else len(needed))


def _kind_of(annotation: str) -> str:
    return "texts" if annotation.startswith("str | tuple") else re.split(r"\W", annotation)[0]


def _help_of_fields(kind: type) -> dict[str, str]:
    """The help of each field. What a subclass says of a field replaces what its bases say."""
    found: dict[str, str] = {}
    for cls in filter(dataclasses.is_dataclass, reversed(kind.__mro__)):
        source = inspect.getsource(cls)
        for above, name, beside in re.findall(r"((?:^ {4}#.*\n)*)^ {4}(\w+): (.*)$", source, re.M):
            comments = re.findall(r"# (?!type:)(.*)", above) or re.findall(r"  # (?!type:)(.*)$", beside)
            if comments:
                found[name] = " ".join(comments)
        arguments = (inspect.getdoc(cls) or "").partition("\nArgs:\n")[2]
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", arguments, re.M):
            found[name] = " ".join(text.split())
    return found


# ---- reading ----


class _Parser(argparse.ArgumentParser):
    """A parser that leaves it to its caller to say what is wrong, in one line."""

    def error(self, message: str) -> Any:
        raise UsageError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


_READ = {"int": _integer, "float": _number, "str": str, "texts": str, "tuple": str}
_WHERE_AGAIN: dict[str, dict[str, Any]] = {"texts": {"action": "append"}, "tuple": {"nargs": "+", "action": "extend"}}


def _parser(prog: str, options: Sequence[Option], **texts: Any) -> _Parser:
    """A parser of `options`. What the words do not give is left out of the result."""
    parser = _Parser(prog, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS, **texts)
    for option in options:
        _add(parser, option, option.help)
    return parser


def _add(parser: Any, option: Option, text: str) -> None:
    arguments: dict[str, Any] = {"dest": option.name, "help": text.replace("%", "%%")}
    if option.kind == "bool":
        arguments["action"] = argparse.BooleanOptionalAction
    else:
        arguments |= {"type": _READ[option.kind], "metavar": option.metavar, **_WHERE_AGAIN.get(option.kind, {})}
    parser.add_argument(option.flag, **arguments)


def read(kind: type, words: Sequence[str], prog: str) -> dict[str, Any]:
    """The settings of `kind` that `words` give. Raises UsageError for anything that is no option, or has no value."""
    options = options_of(kind)
    free = next((option for option in options if option.name in _WITHOUT_OPTION), None)
    if free and words and not words[0].startswith("-"):
        words = [free.flag, *words]  # fastgpt sample runs/demo
    given, unknown = _parser(prog, options).parse_known_args([_with_hyphens(word) for word in words])
    values = vars(given)
    for word in unknown:
        if not free or free.kind != "tuple" or word.startswith("-"):
            raise UsageError(_about_unknown(word, options, values, prog))
        values[free.name] = [*values.get(free.name, ()), word]  # fastgpt compare --out FILE runs/a runs/b
    several = {option.name for option in options if option.kind == "tuple"}
    return {name: _value(value, name in several) for name, value in values.items()}


def _value(value: Any, is_tuple: bool) -> Any:
    """What was read, of an option that was given again as a tuple. Python before 3.13 drops a value that is "--"."""
    if value == [] or not isinstance(value, list):
        return "--" if value == [] else value
    values = tuple("--" if part == [] else part for part in value)
    return values if is_tuple or len(values) > 1 else values[0]


def _with_hyphens(word: str) -> str:
    """An option may be written as the setting is called: --max_steps."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if re.fullmatch(r"--\w[\w-]*", flag) else word


def _about_unknown(word: str, options: Sequence[Option], given: Collection[str], prog: str) -> str:
    if not word.startswith("-"):
        free = {option.name for option in options}.difference(given)
        meant = next((name for name in _MEANT if name in free), None)
        hint = f"did you mean --{meant} {word}?" if meant else f"see {prog} --help"
        return f"{word!r}: every value belongs to an option; {hint}"
    flag = word.partition("=")[0]
    near = difflib.get_close_matches(flag, [option.flag for option in options], n=1) if flag != "--" else []
    hint = f"did you mean {near[0]}? See" if near else "see"
    return f"{flag}: no such option; {hint} {prog} --help"


# ---- help ----


class _Formatter(argparse.HelpFormatter):
    """Breaks no name at its hyphens. On a narrow terminal each help text is under its option, so that it has room."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26 if _width() >= 60 else 6, width=_width())

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


def help_text(prog: str, about: str, kind: type, *settings: Any) -> str:
    """The help of a command. Several `settings` are values on a CPU and on a GPU; both are shown where they differ."""
    needed = getattr(kind, "REQUIRED", ())
    options = options_of(kind)
    usage = [prog, *(option.usage for option in options if option.name in needed), "[options]"]
    shown = textwrap.fill(" ".join(usage), _width() - len("usage: "), subsequent_indent="    ")
    parser = _parser(prog, [], usage=shown, description=about, formatter_class=_Formatter)
    required, others = (parser.add_argument_group(title) for title in ("required", "options"))
    for option in options:
        values = list(dict.fromkeys(getattr(value, option.name) for value in settings))
        group = required if option.name in needed else others
        text = option.help + _default(values)
        if option.kind == "bool" and values == [False]:  # what it does is what is of interest, not how it is taken back
            group.add_argument(option.flag, action="store_true", help=text.replace("%", "%%"))
        else:
            _add(group, option, text)
    others.add_argument("-h", "--help", action="store_true", help="show this help.")
    return parser.format_help()


def _default(values: Sequence[Any]) -> str:
    """The value in effect, in words; none where a setting is off, or left to the command."""
    if values[0] is None or values[0] is False or values[0] == ():
        return ""
    on_gpu = f"; on a GPU {_shown(values[1])}" if values[1:] else ""
    return f" (default: {_shown(values[0])}{on_gpu})"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(value)
    if isinstance(value, float) and value >= 1e6:
        return f"{value:g}"  # 9.89e+14
    return repr(value) if isinstance(value, str) and (value.split("\n") != [value] or not value) else str(value)


def commands_help(prog: str, about: str, commands: Mapping[str, str]) -> str:
    """The help of `fastgpt`, or of a group of commands: each command with what it does."""
    indent = max(map(len, commands)) + 4
    lines = [f"usage: {prog} COMMAND [options]", "", *textwrap.wrap(about, _width()), "", "commands:"]
    for name, what in commands.items():
        first = f"  {name}".ljust(indent)
        lines += textwrap.wrap(what, _width(), initial_indent=first, subsequent_indent=" " * indent)
    end = f"{prog} COMMAND --help shows the options of a command."
    return "\n".join([*lines, "", *textwrap.wrap(end, _width()), ""])


def _width() -> int:
    """As wide as the terminal, which is 80 columns where there is none, and at most 100."""
    return min(shutil.get_terminal_size().columns, 100)


# ---- completion ----

SHELLS = ("bash", "zsh")
_COMPLETION = {
    "bash": """_fastgpt() {{
    local words
    case " ${{COMP_WORDS[*]:1:COMP_CWORD-1}} " in
{cases}
    esac
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o bashdefault -o default -F _fastgpt fastgpt
""",
    "zsh": """#compdef fastgpt
local list
case " ${{words[2,CURRENT-1]}} " in
{cases}
esac
compadd -- ${{=list}}
_files
""",
}


def completion(shell: str, words: Mapping[str, Sequence[str]]) -> str:
    """A script by which `shell` completes what may follow each command line in `words`, and else a file's name."""
    if shell not in SHELLS:
        raise UsageError(f"--print-completion: expected {' or '.join(SHELLS)}, got {shell!r}")
    name = "words" if shell == "bash" else "list"
    longest_first = sorted(words.items(), key=lambda item: -len(item[0]))
    cases = [f'        " {line} "*) {name}="{" ".join(following)}" ;;' for line, following in longest_first if line]
    cases.append(f'        *) {name}="{" ".join(words[""])}" ;;')
    return _COMPLETION[shell].format(cases="\n".join(cases))
