"""The command `unmurk`, and `python -m unmurk`: what happens before anything heavy is imported.

A Ctrl-C that comes during the imports ends the program at once: nothing has been written yet.
"""

import os
import signal
import sys
from types import FrameType

__all__ = ["end_at_once", "main"]

INTERRUPTED = 130
LINE = b"unmurk: interrupted; the same command continues or starts again\n"


def main() -> int:
    """Runs the command line. Returns the exit code."""
    _open_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)
    from .cli.main import main as run

    code = run()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the rest takes a moment and writes nothing
    if code == INTERRUPTED:  # Python itself forgets the code if a library's import was interrupted
        processes = sys.modules.get("multiprocessing.util")
        if processes is not None:  # semaphores of a pool: their tracker complains of what is left
            processes._exit_function()
        sys.stderr.flush()
        os._exit(code)
    return code


def end_at_once(_number: int, _frame: FrameType | None) -> None:
    """Ends the program; for a time in which nothing is written."""
    os.write(2, LINE)
    os._exit(INTERRUPTED)


def _open_streams() -> None:
    """Opens what is closed of the standard streams: a file opened later would take its place, and
    what libraries print would go into it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


if __name__ == "__main__":
    sys.exit(main())
