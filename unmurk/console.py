"""Results as JSON, and as lines for a person."""

import math
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["escape", "lines", "plain"]

HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format (direction marks), surrogates, breaks


def escape(text: Any) -> str:
    r"""Text that is safe to print: one line, without control characters.

    File names may hold newlines, ANSI escape sequences, marks that turn the direction of writing,
    and bytes that are not UTF-8. Each such character becomes ``\n``, ``\x1b``, ``\u202e`` or, for
    a byte, ``\xff``. Everything else stays as it is.
    """
    return "".join(_shown(char) for char in str(text))


def _shown(char: str) -> str:
    if char.isprintable() or unicodedata.category(char) not in HIDDEN:
        return char
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte of a name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def plain(value: Any) -> Any:
    """The value in what JSON knows; a number that is not finite becomes None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def lines(result: dict[str, Any], indent: str = "") -> Iterator[str]:
    """One line for every entry of a result that says something, without control characters."""
    for key, value in result.items():
        name = escape(key)
        if isinstance(value, dict):
            if value:
                yield f"{indent}{name}"
                yield from lines(value, indent + "  ")
        elif value is not None:
            text = f"{value:.4g}" if isinstance(value, float) else escape(value)
            yield f"{indent}{name:<10} {text}"
