"""The command `unmurk`, and `python -m unmurk`: the first moments, before the heavy imports.

Ctrl-C, SIGTERM and SIGHUP during the imports end the program at once, with one line: nothing has
been written yet.
"""

import os
import signal
import sys
from types import FrameType

__all__ = ["end_at_once", "main"]

INTERRUPTED = 130
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
USUAL = (signal.SIG_DFL, signal.default_int_handler)  # others, such as SIG_IGN of nohup, stay
LINE = b"unmurk: interrupted; the same command continues or starts again\n"


def main() -> int:
    """Run the command line and return the exit code."""
    _open_streams()
    for name in SIGNALS:
        number = getattr(signal, name, None)  # a system may lack one
        if number is not None and signal.getsignal(number) in USUAL:
            signal.signal(number, end_at_once)
    from .cli.main import main as run

    code = run()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the rest takes a moment and writes nothing
    if code == INTERRUPTED:  # Python loses the code if the import of a library was interrupted
        processes = sys.modules.get("multiprocessing.util")
        if processes is not None:  # semaphores of a pool: their tracker warns of leftovers
            processes._exit_function()
        sys.stderr.flush()
        os._exit(code)
    return code


def end_at_once(_number: int, _frame: FrameType | None) -> None:
    """End the program at once, at a time when nothing is being written."""
    os.write(2, LINE)
    os._exit(INTERRUPTED)


def _open_streams() -> None:
    """Open the standard streams that are closed.

    Otherwise a file that is opened later takes the number of the stream, and the output of
    libraries goes into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it takes the lowest free number


if __name__ == "__main__":
    sys.exit(main())
