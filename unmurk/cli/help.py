"""Help of the commands, so that it reads well at any width of the terminal.

tyro writes the help. It finds the docstrings of fields itself, but joins their lines before it
removes the indentation, so that most line breaks of the source stay in the text. It names the
default None of options that nobody gave. And it wraps only what stands in its boxes. Here every
docstring becomes one paragraph, defaults that say nothing are left out, and long lines outside of
the boxes are wrapped too.
"""

import ast
import inspect
import io
import re
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Annotated, Any, TextIO, get_type_hints

from tyro.conf import arg

__all__ = ["HelpPage", "with_help"]

BOX = re.compile(r"[─│╭╮╰╯|]")
STYLE = re.compile(r"\x1b\[[0-9;]*m")


def with_help(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return a subclass of a command whose options carry their help texts.

    Args:
        command: A dataclass whose fields are the options. The text of an option is the docstring
            below its field, unless its type has a text.
    """
    assert isinstance(command, type)
    texts = _docstrings(command)
    hints: dict[str, Any] = get_type_hints(command, include_extras=True)
    for field in fields(command):
        default = None if field.default is MISSING else _default
        if field.default is None or field.default is False or field.default == ():
            default = _nothing  # the words of the option say what happens without it
        mark = arg(help=texts.get(field.name), help_behavior_hint=default)
        hints[field.name] = Annotated[hints[field.name], mark]
    members = {"__annotations__": hints, "__doc__": command.__doc__}
    return type(command.__name__, (command,), members)


def _default(label: str) -> str:
    return f"(default: {label.removesuffix('.0')})"


def _nothing(label: str) -> str:
    return ""


def _docstrings(command: type) -> dict[str, str]:
    """Return the docstrings of the fields of a class and its bases, each as one paragraph."""
    found: dict[str, str] = {}
    for kind in reversed(command.__mro__[:-1]):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(node, ast.ClassDef)
        for field, below in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[field.target.id] = " ".join(str(below.value.value).split())
    return found


class HelpPage(io.StringIO):
    """What tyro prints instead of on a stream, so that `text` can be printed there.

    Args:
        stream: Where the text goes later: its encoding decides the boxes, and a terminal gets
            colors.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream, in the case in which tyro compares it."""
        return (self._stream.encoding or "").lower()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream.isatty()

    def text(self) -> str:
        """Return what was printed, with the lines outside of the boxes wrapped."""
        width = max(40, shutil.get_terminal_size().columns)
        return "\n".join(_wrapped(line, width) for line in self.getvalue().splitlines())


def _wrapped(line: str, width: int) -> str:
    """Break a line at spaces, and a list without spaces at its commas.

    Codes of colors take no place. Boxes stay as they are.
    """
    plain = STYLE.sub("", line)
    if len(plain) <= width or BOX.match(plain):
        return line
    start = re.match(r"usage: unmurk (?:[a-z]+ )?", plain)
    indent = " " * len(start[0] if start else "")
    lines, used = [""], 0
    for piece in re.findall(r"[^ ,]*,? ?", line):
        size = len(STYLE.sub("", piece))
        if used > len(indent) and used + len(STYLE.sub("", piece.rstrip())) > width:
            lines[-1] = lines[-1].rstrip()
            lines.append(indent)
            used = len(indent)
        lines[-1] += piece
        used += size
    return "\n".join(lines)
