"""The program `fastgpt`, which is also `python -m fastgpt`: the command line, and Ctrl-C at any moment of it."""

import contextlib
import os
import signal
import sys
import warnings
from types import FrameType
from typing import NoReturn

_format_with_place = warnings.formatwarning


def stop(number: int, frame: FrameType | None) -> None:
    """Ctrl-C raises KeyboardInterrupt, as always, but in the middle of an import it ends the process here.

    The C code of PyTorch and NumPy swallows an exception that it meets while it is being imported, or makes another one
    of it, and nothing is lost that early. A second Ctrl-C ends the process wherever it is.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, b"\nfastgpt: stopped\n")
            os._exit(1)
        frame = frame.f_back
    raise KeyboardInterrupt


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A UserWarning is for the user of the program: one line. Other warnings also name their place in the source."""
    if category is UserWarning:
        return f"fastgpt: warning: {str(message).removeprefix('fastgpt: ')}\n"
    return _format_with_place(message, category, filename, lineno, line)


def end_at_once(code: int) -> NoReturn:
    """End without taking the interpreter down, amid which a thread of gloo that frees a tensor aborts the process.

    Source: pytorch/pytorch#179291.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whatever read it has gone
            stream.flush()
    os._exit(code)


def main() -> int | str | None:
    """Run the command line; returns what is given to `sys.exit`. One of several processes ends here."""
    warnings.formatwarning = format_warning
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as under nohup
        signal.signal(signal.SIGINT, stop)
    from .cli import main as run
    from .settings import is_one_of_several
    from .threads import choose_waiting

    choose_waiting()
    code: int | str | None
    try:
        code = run()
    except SystemExit as end:
        code = end.code
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command is over, whatever comes while the process is taken down
    if is_one_of_several() and isinstance(code, int):
        end_at_once(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
