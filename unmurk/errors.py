"""The one exception a user meets, and text that is safe to print."""

import re
from typing import Any

__all__ = ["InputError", "escape"]

WORD = 400  # characters of a value that a message repeats
MESSAGE = 1000  # characters of a message


class InputError(ValueError):
    """Input that cannot be worked with.

    The message is one line that says what is wrong, where, and how to mend it. The command line
    prints it without a traceback and exits with code 2. Messages repeat names and values that come
    from strangers, so the text is escaped and shortened here, for every message alike.

    Args:
        message: The text; a value of more than 400 characters and a text of more than 1,000 lose
            their middle.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(_line(str(message)))


def escape(text: Any) -> str:
    r"""Text that is safe to print: one line, without control characters.

    File names may hold newlines, ANSI escape sequences, marks that turn the direction of writing,
    spaces of other kinds, and bytes that are not UTF-8. Each such character becomes ``\n``,
    ``\x1b``, ``\u202e``, ``\xa0`` or, for a byte, ``\xff``. Everything else stays as it is, and so
    does text that is escaped already.
    """
    return "".join(_shown(char) for char in str(text))


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
    """Text without its middle, where it is longer than that; at most so many characters."""
    if len(text) <= most:
        return text
    half = most // 2 - 3
    return f"{text[:half]} ... {text[-half:]}"
