"""The command line. Progress goes to stderr, the result to stdout.

Arguments are parsed before anything heavy is imported, so that `--help` answers at once.

Exit codes: 0 success; 2 bad input or options, or a file that cannot be read or written (one line
on stderr, nothing left behind); 130 interrupted by Ctrl-C, SIGTERM or SIGHUP; 141 nobody reads the
output.
"""

import contextlib
import errno
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import FrameType
from typing import Any

import tyro

from .. import __version__
from ..errors import InputError, reason
from ..interrupts import deliver_interrupt, forget_interrupt, is_uninterrupted
from ..io.locks import local_rank, ranks
from ..progress import working
from .arguments import explain
from .commands import COMMANDS
from .console import escape, plain
from .help import HelpPage, with_help

__all__ = ["main"]

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}
OWN = ("learn", "demo", "app")  # commands that show their progress themselves
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments after the name of the program; None: those of the process.

    Returns:
        The exit code.
    """
    if sys.stderr is None:  # it was closed, and Python opens nothing in its place
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        return _stop("stdout is closed: redirect it, to /dev/null if nobody reads it", 2)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # characters that the encoding lacks are written as \u2500
            stream.reconfigure(errors="backslashreplace")
    with _signals() as came:
        try:
            code = _main(list(sys.argv[1:] if argv is None else argv))
            sys.stdout.flush()
        except KeyboardInterrupt:
            code = _interrupted()
        except BrokenPipeError:  # as in `unmurk --help | head -1`
            _drop_stdout()
            return 141
        except Exception as error:
            if came:  # libraries turn an interrupt into errors of their own
                code = _interrupted()
            elif isinstance(error, InputError):
                code = _stop(str(error), 2)
            elif isinstance(error, OSError) and error.errno is not None:
                code = _stop(_one_line(error), 2)
            else:
                raise
    return code


def _main(argv: list[str]) -> int:
    if argv == ["--version"]:
        _print(f"unmurk {__version__}")
        return 0
    empty = next((i for i, word in enumerate(argv) if not word or _ends_empty(word)), None)
    if empty is not None:
        name = argv[empty].rstrip("=") or (argv[empty - 1] if empty else "an argument")
        raise InputError(f"{name} is empty: give a value")
    command = _parse(argv)
    if isinstance(command, int):
        return command
    ranks(), local_rank()  # wrong ones are reported before anything is read
    command.check()
    name = type(command).__name__.lower()
    shown = name not in OWN and ranks()[0] == 0
    with redirect_stdout(sys.stderr), working(name, shown):
        result = command.run()
    if not result:  # another process of the same run has the result
        return 0
    if command.json:
        _print(json.dumps(plain(result)))
    else:
        with _stdout():
            command.show(result)
    return 0


def _ends_empty(word: str) -> bool:
    return word.startswith("--") and word.endswith("=")


def _parse(argv: list[str]) -> Any:
    """Return the command with its options, or the exit code of --help."""
    said, page = io.StringIO(), HelpPage(sys.stdout)
    commands: dict[str, Callable[..., Any]] = dict(COMMANDS)
    if {"-h", "--help"} & set(argv):
        commands = {name: with_help(kind) for name, kind in COMMANDS.items()}
    try:
        with redirect_stdout(page), redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                commands,
                prog="unmurk",
                description="Learn what clean images look like from corrupted images only, "
                "and restore any corruption of them.",
                args=argv,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as end:
        if end.code:
            raise InputError(explain(COMMANDS, argv, said.getvalue())) from end
        _print(page.text())
        return 0


def _print(text: str) -> None:
    with _stdout():
        print(text)


@contextmanager
def _stdout() -> Iterator[None]:
    """Report if stdout cannot be written to."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_stdout()
        raise InputError(
            f"cannot write to stdout: {reason(error)}; the files that were written stay"
        ) from error


def _drop_stdout() -> None:
    """Discard the buffer of stdout, so that Python prints no error at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(error: OSError) -> str:
    """Return an error of the system as one line."""
    name = "the output" if error.filename is None else os.fsdecode(error.filename)
    return f"cannot {'write' if error.errno in UNWRITABLE else 'use'} {name}: {error.strerror}"


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Make signals that ask to end raise KeyboardInterrupt; return the list of those that came."""
    came: list[int] = []
    ended = threading.Event()

    def repeat(number: int, seconds: float) -> None:
        def send() -> None:
            if not ended.wait(seconds):
                os.kill(os.getpid(), number)

        threading.Thread(target=send, daemon=True).start()

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if _busy(frame):
            return repeat(number, 0.05)
        repeat(number, 2.0)  # a library may swallow the exception
        sys.unraisablehook = lambda _: None  # of what was half imported
        deliver_interrupt()

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {n: signal.getsignal(n) for n in numbers if _is_usual(signal.getsignal(n))}
    hook = sys.unraisablehook
    for number in before:
        signal.signal(number, note)
    try:
        yield came
    finally:
        ended.set()
        forget_interrupt()
        for number, handler in before.items():
            signal.signal(number, handler)
        if not came:
            sys.unraisablehook = hook


def _busy(frame: FrameType | None) -> bool:
    """Whether an interrupt has to wait: during an import, where libraries would abort, and in
    functions that are done as a whole."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith("<frozen importlib") or is_uninterrupted(code):
            return True
        frame = frame.f_back
    return False


def _is_usual(handler: Any) -> bool:
    """Whether a handler is that of the start; others, such as SIG_IGN of nohup, stay."""
    at_start = getattr(handler, "__name__", "") == "end_at_once"  # in __main__
    return at_start or handler in (signal.SIG_DFL, signal.default_int_handler)


def _interrupted() -> int:
    return _stop("interrupted; the same command continues or starts again", 130)


def _stop(message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # stderr is closed
        print("unmurk: " + escape(message.strip()), file=sys.stderr, flush=True)
    return code
