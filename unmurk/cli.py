"""The command line. Progress goes to stderr, the result to stdout.

Arguments are parsed before anything heavy is imported, so that `--help` answers at once.

Exit codes: 0 done; 2 bad input or options (one line on stderr, nothing left behind);
130 interrupted; 141 nobody reads what is printed.
"""

import errno
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

import tyro

from . import __version__
from .commands import COMMANDS
from .console import plain
from .errors import InputError

__all__ = ["main"]

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments after the program's name; None: those of the process.

    Returns:
        The exit code.
    """
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:  # as in `unmurk --help | head -1`
        # what is left in the buffer goes nowhere, so that Python's own end is quiet too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def _main(argv: list[str]) -> int:
    if argv == ["--version"]:
        print(f"unmurk {__version__}")
        return 0
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="unmurk",
            description="Learn what clean images look like from corrupted images only, "
            "and restore any corruption of them.",
            args=argv,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except SystemExit as end:
        return int(end.code or 0)
    try:
        with redirect_stdout(sys.stderr):
            command.check()
            result = command.run()
    except InputError as error:
        return _stop(str(error), 2)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        return _stop(f"cannot write {error.filename or 'the output'}: {error.strerror}", 2)
    except KeyboardInterrupt:
        return _stop("interrupted; the same command continues or starts again", 130)
    if not result:  # another process of the same run has it
        return 0
    if command.json:
        print(json.dumps(plain(result)))
    else:
        command.show(result)
    return 0


def _stop(message: str, code: int) -> int:
    print("unmurk: " + " ".join(message.split()), file=sys.stderr)
    return code
