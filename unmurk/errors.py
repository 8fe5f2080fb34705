"""The exception for bad input, and text that is safe to print."""

import re
import sys
from collections.abc import Iterable
from typing import Any

from .interrupts import repeat_interrupt

__all__ = ["InputError", "escape", "on_terminal", "reason", "remark", "size_text"]

WORD = 400  # characters of a value that a message repeats
MESSAGE = 1000  # characters of a message
REASON = 200  # characters of the message of another error


class InputError(ValueError):
    r"""Input that unmurk cannot work with.

    The message is one line. It says what is wrong, where, and what to do. The command line prints
    it without a traceback and exits with code 2. Messages repeat names and values from files and
    arguments that are not trusted, so every message is escaped and shortened here.

    After an interrupt of a command none can be made. Libraries turn the interrupt into errors of
    their own; wrapped in this class, it would call an intact file damaged and leave it out.

    Args:
        message: The text. A word of more than 400 characters and a text of more than 1,000
            characters lose their middle.

    Raises:
        KeyboardInterrupt: The command was interrupted.

    >>> from unmurk import InputError
    >>> print(InputError("cannot read a\nb.png"))
    cannot read a\nb.png
    """

    def __init__(self, message: object = "") -> None:
        repeat_interrupt()
        super().__init__(_line(str(message)))


def size_text(size: Iterable[int]) -> str:
    """Format a size or a shape for a message.

    Args:
        size: The numbers of pixels, channels or images along each axis.

    >>> from unmurk.errors import size_text
    >>> size_text((28, 32))
    '28x32'
    """
    return "x".join(str(int(n)) for n in size)


def reason(error: BaseException) -> str:
    """Return the message of another error for a message: one line of at most 200 characters.

    Of an error of the system it is the text without number and file name; of an error without a
    message it is the name of the class.

    >>> from unmurk.errors import reason
    >>> reason(ValueError("two\\nlines")), reason(OSError(28, "No space left on device", "a.npy"))
    ('two lines', 'No space left on device')
    >>> reason(KeyError())
    'KeyError'
    """
    said = getattr(error, "strerror", None) or str(error)
    text = " ".join(str(said).split()) or type(error).__name__
    return text if len(text) <= REASON else f"{text[:REASON]}..."


def escape(text: Any) -> str:
    r"""Escape every character that is not printable, so that the text is one safe line.

    File names may hold newlines, ANSI escape sequences, marks that reverse the direction of
    writing, unusual spaces, and bytes that are not UTF-8. Each such character becomes ``\n``,
    ``\x1b``, ``\u202e``, ``\xa0`` or, for a byte, ``\xff``. All other characters stay, so the
    function changes nothing in text that is escaped already.

    >>> from unmurk.errors import escape
    >>> print(escape("a\x1b[31mb"))
    a\x1b[31mb
    """
    return "".join(_shown(char) for char in str(text))


def remark(text: object) -> None:
    r"""Print a line on standard error, with what is not printable escaped.

    Everything that is said beside results goes through here, as it may repeat names from files.

    Args:
        text: The line.

    >>> import contextlib
    >>> from unmurk.errors import remark
    >>> with contextlib.redirect_stderr(sys.stdout):
    ...     remark("images in \ufeffx were left out")
    images in \ufeffx were left out
    """
    print(escape(text), file=sys.stderr)


def on_terminal() -> bool:
    """Whether a person sees what is said on standard error at once.

    >>> from unmurk.errors import on_terminal
    >>> on_terminal()  # in a test
    False
    """
    return sys.stderr is not None and sys.stderr.isatty()


def _shown(char: str) -> str:
    if char.isprintable():
        return char
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte of a name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def _line(text: str) -> str:
    if len(text) > 10 * MESSAGE:  # before the work of escaping it
        text = _cut(text, 10 * MESSAGE)
    text = re.sub(rf"\S{{{WORD + 1},}}", lambda word: _cut(word[0], WORD), escape(text.strip()))
    return _cut(text, MESSAGE)


def _cut(text: str, most: int) -> str:
    """Drop the middle of a text that is longer than `most` characters."""
    if len(text) <= most:
        return text
    half = most // 2 - 3
    return f"{text[:half]} ... {text[-half:]}"
