"""Options with bounds: what a text form, a constructor or a command takes, declared once.

An option of an operator, of a noise model or of a command is declared as one of the classes of
this module. The declaration reads the text, checks the value and states the bounds. So the parser,
the Python constructor, the docstring and the error message agree::

    options = {"sigma": Real(0.01, 256), "size": Sides(1, 1537, odd=True, optional=True)}
    samples: Annotated[int, Whole(1, 100_000)] = 16

Numbers are written with ASCII digits, without underscores; Python's `int` and `float` accept more.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from numbers import Integral
from numbers import Real as RealNumber
from typing import Any, get_args, get_type_hints

from .errors import InputError

__all__ = [
    "SEED",
    "TABLES",
    "Choice",
    "File",
    "Option",
    "Real",
    "Sides",
    "Text",
    "Whole",
    "annotations_of",
    "check_fields",
    "check_tables",
    "check_total_memory",
    "shown",
    "size_of_memory",
]

TABLES = 2 * 2**30
"""Largest size in bytes of the matrices, masks and kernels of one operator for one image shape."""

INTEGER = re.compile(r"[+-]?[0-9]{1,30}")
NUMBER = re.compile(r"[+-]?([0-9]{1,30}\.?[0-9]{0,30}|\.[0-9]{1,30})([eE][+-]?[0-9]{1,4})?")
LONGEST = 4096  # characters of a path


def shown(value: Any) -> str:
    """Format a value for a message: one line of at most about 60 characters.

    >>> from unmurk.bounds import shown
    >>> shown("a" * 100)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa... (102 characters)"
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints
        text = f"a {type(value).__name__} too long to print"
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"


def size_of_memory(size: float) -> str:
    """Format a number of bytes.

    >>> from unmurk.bounds import size_of_memory
    >>> size_of_memory(3.2 * 2**30)
    '3.2 GiB'
    """
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def _plain(value: Any) -> Any:
    """Unpack a tensor or array of one number; return anything else as it is."""
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        return value.item()
    return value


@dataclass(frozen=True)
class Option:
    """Base class of options.

    Attributes:
        optional: Whether None stands for "not given".

    >>> from unmurk.bounds import Option, Whole
    >>> option: Option = Whole(1, 9)
    >>> option.bounds, option.parse("n", "3"), option.check("n", 3)
    ('a whole number from 1 to 9', 3, 3)
    """

    @property
    def bounds(self) -> str:
        """The allowed values in words: "a number from 0.01 to 256"."""
        raise NotImplementedError

    def read(self, text: str) -> Any:
        """Convert a text to a value, without checking the bounds. Raises ValueError."""
        raise NotImplementedError

    def fits(self, value: Any) -> Any:
        """Convert a value to its kept type. Raises ValueError or TypeError out of bounds."""
        raise NotImplementedError

    def parse(self, where: str, text: str) -> Any:
        """Read a text.

        Args:
            where: Name of the option, for the message.
            text: The text.

        Raises:
            InputError: "WHERE must be BOUNDS, got TEXT".
        """
        try:
            return self.fits(self.read(text))
        except (ValueError, TypeError, OverflowError) as error:
            raise self._refusal(where, text) from error

    def check(self, where: str, value: Any) -> Any:
        """Check a value that was given in Python.

        Args:
            where: Name of the option, for the message.
            value: The value; a tensor of one number counts as a number.

        Raises:
            InputError: "WHERE must be BOUNDS, got VALUE".
        """
        if value is None and getattr(self, "optional", False):
            return None
        try:
            return self.fits(_plain(value))
        except (ValueError, TypeError, OverflowError) as error:
            raise self._refusal(where, value) from error

    def _refusal(self, where: str, value: Any) -> InputError:
        return InputError(f"{where} must be {self.bounds}, got {shown(_plain(value))}")


@dataclass(frozen=True)
class Real(Option):
    """A number between two bounds, both included; with `zero`, 0 is allowed too.

    >>> from unmurk.bounds import Real
    >>> Real(0.01, 256).parse("sigma", "1.5")
    1.5
    >>> Real(0.01, 256).check("sigma", 300)
    Traceback (most recent call last):
    ...
    unmurk.errors.InputError: sigma must be a number from 0.01 to 256, got 300
    """

    least: float
    most: float
    optional: bool = False
    zero: bool = False

    @property
    def bounds(self) -> str:
        return f"{'0 or ' if self.zero else ''}a number from {self.least:g} to {self.most:g}"

    def read(self, text: str) -> float:
        if not NUMBER.fullmatch(text):
            raise ValueError(text)
        return float(text)

    def fits(self, value: Any) -> float:
        if not isinstance(value, RealNumber) or isinstance(value, bool):
            raise TypeError
        number = float(value) + 0.0  # -0 becomes 0
        if not (self.least <= number <= self.most or (self.zero and number == 0)):
            raise ValueError
        return number


@dataclass(frozen=True)
class Whole(Option):
    """A whole number between two bounds, both included; with `even`, an even one.

    >>> from unmurk.bounds import Whole
    >>> Whole(1, 9).check("factor", 4.0)
    4
    """

    least: int
    most: int
    optional: bool = False
    even: bool = False

    @property
    def bounds(self) -> str:
        kind = "an even number" if self.even else "a whole number"
        return f"{kind} from {self.least} to {self.most}"

    def read(self, text: str) -> int:
        if not INTEGER.fullmatch(text):
            raise ValueError(text)
        return int(text)

    def fits(self, value: Any) -> int:
        if not isinstance(value, RealNumber) or isinstance(value, bool):
            raise TypeError
        if not isinstance(value, Integral) and not float(value).is_integer():
            raise ValueError
        number = int(value)  # type: ignore[call-overload]
        if not self.least <= number <= self.most or (self.even and number % 2):
            raise ValueError
        return number


@dataclass(frozen=True)
class Sides(Option):
    """Height and width, "12x8", or one side for both, "12"; with `odd`, odd ones.

    >>> from unmurk.bounds import Sides
    >>> Sides(1, 64).parse("size", "12x8"), Sides(1, 64).parse("size", "12")
    ((12, 8), (12, 12))
    """

    least: int
    most: int
    optional: bool = False
    odd: bool = False

    @property
    def bounds(self) -> str:
        kind = "an odd number" if self.odd else "a whole number"
        return f"{kind} from {self.least} to {self.most}, or two of them as in 12x8".replace(
            "12x8", "9x5" if self.odd else "12x8"
        )

    def read(self, text: str) -> tuple[int, int]:
        parts = text.lower().split("x")
        if len(parts) not in (1, 2) or not all(INTEGER.fullmatch(part) for part in parts):
            raise ValueError(text)
        return int(parts[0]), int(parts[-1])

    def fits(self, value: Any) -> tuple[int, int]:
        pair = value if isinstance(value, tuple | list) else (value, value)
        if len(pair) != 2:
            raise ValueError
        side = Whole(self.least, self.most)
        height, width = (side.fits(_plain(n)) for n in pair)
        if self.odd and not (height % 2 and width % 2):
            raise ValueError
        return height, width


@dataclass(frozen=True)
class Choice(Option):
    """One of a few words.

    >>> from unmurk.bounds import Choice
    >>> Choice(("reflect", "circular")).bounds
    'one of reflect, circular'
    """

    words: tuple[str, ...]
    optional: bool = False

    @property
    def bounds(self) -> str:
        return f"one of {', '.join(self.words)}"

    def read(self, text: str) -> str:
        return text

    def fits(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise ValueError
        return value


@dataclass(frozen=True)
class File(Option):
    """The path of a file, which may not exist yet: it is opened later.

    >>> from pathlib import Path
    >>> from unmurk.bounds import File
    >>> File().check("mask", Path("mask.npy"))
    'mask.npy'
    """

    optional: bool = False

    @property
    def bounds(self) -> str:
        return f"the path of a file, at most {LONGEST} characters"

    def read(self, text: str) -> str:
        return text

    def fits(self, value: Any) -> str:
        if not isinstance(value, str | os.PathLike):
            raise TypeError
        path = os.fspath(value)
        if not isinstance(path, str) or not 0 < len(path) <= LONGEST or "\0" in path:
            raise ValueError
        return path


@dataclass(frozen=True)
class Text(Option):
    """A short text.

    Attributes:
        most: The largest number of characters.

    >>> from unmurk.bounds import Text
    >>> Text(8).check("name", "cells"), Text(4).bounds
    ('cells', 'a text of 1 to 4 characters')
    """

    most: int
    optional: bool = False

    @property
    def bounds(self) -> str:
        return f"a text of 1 to {self.most} characters"

    def read(self, text: str) -> str:
        return text

    def fits(self, value: Any) -> str:
        if not isinstance(value, str):
            raise TypeError
        if not 0 < len(value) <= self.most:
            raise ValueError
        return value


SEED = Whole(0, 2**63 - 1)
"""A seed of random draws."""


def check_fields(values: object, names: Mapping[str, str] | None = None) -> None:
    """Check the fields of an object that are annotated with an option.

    Args:
        values: An object whose class declares fields such as `n: Annotated[int, Whole(1, 9)]`.
        names: Names of fields in messages, where they differ from the fields' own.

    Raises:
        InputError: A value is out of its bounds; the message names the first one.

    >>> from unmurk.bounds import check_fields
    >>> from unmurk.training import Settings
    >>> check_fields(Settings(batch=8))
    >>> check_fields(Settings(batch=1))
    Traceback (most recent call last):
    ...
    unmurk.errors.InputError: batch must be a whole number from 2 to 65536, got 1
    """
    for name, hint in get_type_hints(type(values), include_extras=True).items():
        for option in (extra for extra in annotations_of(hint) if isinstance(extra, Option)):
            value = getattr(values, name)
            if value is not None:
                option.check((names or {}).get(name, name), value)


def check_declared(kind: type, decorator: str) -> None:
    """Check that every option that a class declares is a field of it, as a decorator makes it.

    Without the decorator Python takes the declaration for an attribute of the class, which no
    caller could set.

    Args:
        kind: A class that derives from a dataclass of options.
        decorator: The decorator, for the message.

    Raises:
        InputError: A class was not decorated.

    >>> from unmurk.solvers import DiffPir
    >>> class Weighted(DiffPir):
    ...     weight: float = 1.0
    >>> Weighted(weight=2.0)
    Traceback (most recent call last):
    ...
    unmurk.errors.InputError: Weighted declares the option weight but is no dataclass: ...
    """
    known = {field.name for field in fields(kind)}
    for one in kind.__mro__:
        for name, hint in one.__dict__.get("__annotations__", {}).items():
            if is_dataclass(one) and name not in known and "ClassVar" not in str(hint):
                raise InputError(
                    f"{one.__name__} declares the option {name} but is no dataclass: write "
                    f"{decorator} above the class"
                )


def annotations_of(hint: Any) -> list[Any]:
    """Return what `Annotated` adds to a type, at any depth of unions.

    >>> from typing import Annotated
    >>> annotations_of(Annotated[int, "of pixels"] | None)
    ['of pixels']
    """
    found = list(getattr(hint, "__metadata__", ()))
    return found + [extra for part in get_args(hint) for extra in annotations_of(part)]


def check_tables(where: str, what: str, size: float, advice: str) -> None:
    """Refuse matrices, masks and kernels above the limit, before they take any memory.

    Args:
        where: The operator's form and the option that decides: "ct:parallel,angles=9999".
        what: The object that takes the memory: "the matrix for images of 512x512".
        size: Its size in bytes.
        advice: What the user can do.

    Raises:
        InputError: The size is above `TABLES`.

    >>> from unmurk.bounds import check_tables
    >>> check_tables("ct", "the matrix", 2**20, "take fewer angles")
    >>> check_tables("ct", "the matrix", 2**32, "take fewer angles")
    Traceback (most recent call last):
    ...
    unmurk.errors.InputError: ct: the matrix takes 4 GiB, above the limit of 2 GiB: take fewer ...
    """
    if size > TABLES:
        raise InputError(
            f"{where}: {what} takes {size_of_memory(size)}, above the limit of"
            f" {size_of_memory(TABLES)}: {advice}"
        )


def check_total_memory(what: str, size: float, advice: str) -> None:
    """Refuse results that do not fit into this machine's memory.

    Args:
        what: The result.
        size: Its size in bytes.
        advice: What the user can do.

    Raises:
        InputError: The size is above the machine's memory.

    >>> from unmurk.bounds import check_total_memory
    >>> check_total_memory("a mask", 2**20, "take a smaller one")
    >>> check_total_memory("a mask", 2**60, "take a smaller one")
    Traceback (most recent call last):
    ...
    unmurk.errors.InputError: a mask would take 1.05e+06 TiB, but this machine has ...
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # a system that does not know
        return
    if size > memory:
        raise InputError(
            f"{what} would take {size_of_memory(size)}, but this machine has"
            f" {size_of_memory(memory)} of memory: {advice}"
        )
