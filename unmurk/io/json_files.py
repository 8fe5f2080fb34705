"""JSON files, read with limits on their size, their depth and their numbers.

Run folders and pipelines come from strangers. Python's own reader takes any size, follows nested
lists until it runs out of stack, and turns 400 digits into a number that no float can hold.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InputError, reason

__all__ = ["json_lines", "read_json", "read_object", "typed"]

SIZE = 16 * 2**20  # bytes of a file that is one value
LINES = 2**30  # bytes of a file of lines
CHUNK = 2**20  # bytes that are read at once
DEPTH = 64  # brackets inside one another
DIGITS = 20  # of a whole number: a 64-bit one has 19

STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
BRACKETS = re.compile(r"[\[{\]}]")


def read_json(path: str | Path, infinite: bool = False) -> Any:
    """Read the value of a JSON file.

    Args:
        path: The file.
        infinite: Whether NaN and infinities are read, which JSON does not have.

    Raises:
        InputError: There is no such file; or it has more than `SIZE` bytes or `DEPTH` levels,
            whole numbers of more than `DIGITS` digits, or is not JSON.

    >>> _ = Path("a.json").write_text("[1, 2.5]")
    >>> read_json("a.json")
    [1, 2.5]
    """
    return _parsed(_text(Path(path), SIZE), str(path), float if infinite else _no_constant)


def read_object(path: str | Path, infinite: bool = False) -> dict[str, Any]:
    """Read the object of a JSON file. Raises InputError as `read_json`, and for other values.

    >>> _ = Path("a.json").write_text('{"kimg": 3}')
    >>> read_object("a.json")
    {'kimg': 3}
    """
    value = read_json(path, infinite)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {type(value).__name__}, not an object {{...}}")
    return value


def json_lines(path: str | Path) -> Iterator[tuple[int, bool, dict[str, Any] | None]]:
    """Iterate over the objects of a file with one JSON object per line.

    Numbers that are not finite are read: figures of a run may be NaN.

    Yields:
        The number of the line, whether it is the last one, and the object; None where the line is
        not a JSON object within the limits.

    Raises:
        InputError: There is no such file, or it has more than `LINES` bytes.

    >>> _ = Path("a.jsonl").write_text('{"kimg": 1}\\nno json\\n')
    >>> list(json_lines("a.jsonl"))
    [(1, False, {'kimg': 1}), (2, True, None)]
    """
    lines = _text(Path(path), LINES).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            value = _parsed(line, str(path), float) if len(line) <= SIZE else None
        except InputError:
            value = None
        yield number, number == len(lines), value if isinstance(value, dict) else None


def typed(values: dict[str, Any], name: str, kind: type, where: object) -> Any:
    """Return an entry of an object, checked to be of a type.

    Args:
        values: The object.
        name: The name of the entry.
        kind: bool, int, float (whole numbers too), str, list or dict.
        where: The file, for the message.

    Raises:
        InputError: The entry is missing or of another type.

    >>> typed({"steps": 5}, "steps", int, "config.json")
    5
    """
    value = values.get(name)
    fits = isinstance(value, int | float if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        found = "is missing" if name not in values else f"is of type {type(value).__name__}"
        raise InputError(f"{where}: {name} {found}, it must be of type {kind.__name__}")
    return value


def _text(path: Path, limit: int) -> str:
    try:
        if not path.is_file():
            raise InputError(f"there is no file {path}")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = b"" if size > limit else _up_to(file, limit)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {path}: {reason(error)}") from error
    if max(size, len(data)) > limit:
        raise InputError(f"{path} is larger than {limit // 2**20} MiB, so it is no file of unmurk")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path}: it is not UTF-8 text") from error


def _up_to(file: BinaryIO, limit: int) -> bytes:
    """Read the rest of a file, up to about `limit` bytes.

    The file is read in parts because one read of `limit` bytes would allocate all of them.
    """
    data = bytearray()
    while len(data) <= limit and (part := file.read(CHUNK)):
        data += part
    return bytes(data)


def _parsed(text: str, where: str, constant: Any) -> Any:
    if _depth(text) > DEPTH:
        raise InputError(f"cannot read {where}: its values are nested more than {DEPTH} deep")
    try:
        value = json.loads(text, parse_int=_integer, parse_constant=constant)
        if SURROGATE.search(text):  # half a character, which cannot be written to a page
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise InputError(f"cannot read {where}: {reason(error)}") from error


def _depth(text: str) -> int:
    """Return how deep brackets outside of strings are nested."""
    deep = most = 0
    for bracket in BRACKETS.findall(STRING.sub("", text)):
        deep += 1 if bracket in "[{" else -1
        most = max(most, deep)
    return most


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")
