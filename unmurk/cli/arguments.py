"""Why arguments do not parse: one line that says what is wrong, where, and what to do.

tyro parses the arguments. If it refuses them, this module looks for the first mistake, since
tyro's own explanation takes a box of many lines.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..bounds import Option, annotations_of
from ..errors import InputError

__all__ = ["explain"]

NUMBER = re.compile(r"-(\d|\.\d)")  # a negative number is a value, not an option
BOX = re.compile(r"[─│╭╮╰╯|]+")
WORDS = {int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Argument:
    """One option of a command, or one positional argument.

    Attributes:
        name: The flag, or the metavar of a positional argument.
        aliases: Other flags.
        positional: Whether it has no flag.
        required: Whether it has no default.
        count: How many values it takes; None: any number.
        kind: The type of a value.
        choices: The values allowed; empty: any.
        bounds: The bounds of a value, if they are declared.
        metavar: The placeholder of its values.
    """

    name: str
    aliases: tuple[str, ...]
    positional: bool
    required: bool
    count: int | None
    kind: type
    choices: tuple[str, ...]
    bounds: Option | None
    metavar: str


def explain(commands: Mapping[str, Callable[..., Any]], argv: Sequence[str], said: str) -> str:
    """Explain in one line why arguments do not parse.

    Args:
        commands: The commands by name.
        argv: The arguments.
        said: The text that tyro printed, which is shortened if the mistake is not found here.
    """
    known = ", ".join(commands)
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        return f"a command is missing: give one of {known}; unmurk --help explains them"
    name, words = argv[0], argv[1:]
    if name not in commands:
        return f"unknown command '{name}'{_meant(name, commands)}: choose one of {known}"
    arguments = _arguments(commands[name])
    try:
        _walk(name, arguments, words)
    except InputError as error:
        return str(error)
    text = BOX.sub(" ", said.split("───", 2)[-1]) if said else "the arguments do not parse"
    return f"{name}: {' '.join(text.split())[:200]}: see unmurk {name} --help"


def _walk(where: str, arguments: list[Argument], words: Sequence[str]) -> None:
    """Raise InputError for the first mistake in the arguments of a command."""
    flags = {flag: a for a in arguments if not a.positional for flag in (a.name, *a.aliases)}
    positions = [a for a in arguments if a.positional]
    given: set[str] = set()
    place, index = 0, 0
    while index < len(words):
        word, index = words[index], index + 1
        if not _is_flag(word):
            if place == len(positions):
                names = " ".join(a.metavar for a in positions) or "options only"
                raise InputError(f"{where} takes {names}, and '{word}' is one too many: remove it")
            _check(where, positions[place], [word])
            given.add(positions[place].name)
            place += 1
            continue
        flag, sign, value = word.partition("=")
        flag = "--" + flag[2:].replace("_", "-") if flag.startswith("--") else flag
        if flag not in flags:
            raise InputError(
                f"{where} has no option {flag}{_meant(flag, flags)}: see unmurk {where} --help"
            )
        argument = flags[flag]
        values = [value] if sign else []
        while not sign and index < len(words) and not _is_flag(words[index]):
            if argument.count is not None and len(values) >= argument.count:
                break
            values.append(words[index])
            index += 1
        _check(where, argument, values)
        given.add(argument.name)
    missing = [a.name for a in arguments if a.required and a.name not in given]
    if missing:
        raise InputError(f"{where} needs {' and '.join(missing)}: see unmurk {where} --help")


def _check(where: str, argument: Argument, values: list[str]) -> None:
    """Raise InputError if the values do not fit the argument."""
    name, count = argument.name, argument.count
    if count == 0 and values:
        raise InputError(f"{where}: {name} takes no value, got '{values[0]}': remove it")
    if count is not None and len(values) < count:
        numbers = "a value" if count == 1 else f"{count} values"
        raise InputError(f"{where}: {name} needs {numbers}: write {name} {argument.metavar}")
    for value in values:
        if argument.choices and value not in argument.choices:
            raise InputError(
                f"{where}: {name} is '{value}'{_meant(value, argument.choices)}: choose one of "
                f"{', '.join(argument.choices)}"
            )
        if argument.bounds is not None:
            argument.bounds.parse(name, value)
        elif argument.kind in (int, float) and not _reads(argument.kind, value):
            raise InputError(f"{where}: {name} must be {WORDS[argument.kind]}, got '{value}'")


def _reads(kind: type, value: str) -> bool:
    try:
        kind(value)
    except ValueError:
        return False
    return True


def _is_flag(word: str) -> bool:
    return word.startswith("-") and len(word) > 1 and not NUMBER.match(word)


def _meant(word: str, known: Any) -> str:
    """The closest of the known words, as a question."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _arguments(command: Callable[..., Any]) -> list[Argument]:
    """Return the arguments that a command, a dataclass, takes."""
    hints = get_type_hints(command, include_extras=True)
    found = []
    for field in fields(command):  # type: ignore[arg-type]
        extras = annotations_of(hints[field.name])
        marks = [extra for extra in extras if hasattr(extra, "metavar")]
        metavar = next((mark.metavar for mark in marks if mark.metavar), None)
        aliases = [alias for mark in marks for alias in (getattr(mark, "aliases", None) or ())]
        positional = any("Positional" in repr(extra) for extra in extras)
        kind, count, choices = _shape(_bare(hints[field.name]))
        flag = f"--{field.name.replace('_', '-')}"
        metavar = metavar or ("{" + ",".join(choices) + "}" if choices else kind.__name__.upper())
        found.append(
            Argument(
                name=metavar if positional else flag,
                aliases=tuple(aliases),
                positional=positional,
                required=field.default is MISSING and field.default_factory is MISSING,
                count=count,
                kind=kind,
                choices=choices,
                bounds=next((extra for extra in extras if isinstance(extra, Option)), None),
                metavar=metavar,
            )
        )
    return found


def _bare(hint: Any) -> Any:
    """A type without `Annotated` and without None."""
    while hasattr(hint, "__metadata__"):
        hint = hint.__origin__
    if get_origin(hint) is UnionType or getattr(hint, "__origin__", None) is not None:
        parts = [part for part in get_args(hint) if part is not NoneType]
        if NoneType in get_args(hint) and len(parts) == 1:
            return _bare(parts[0])
    return hint


def _shape(kind: Any) -> tuple[type, int | None, tuple[str, ...]]:
    """The type of a value, the number of values, and the choices."""
    if get_origin(kind) is Literal:
        return str, 1, tuple(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        if get_origin(parts[0]) is tuple:  # an option that may be repeated
            return _shape(parts[0])
        return _bare(parts[0]), None if parts[-1] is Ellipsis else len(parts), ()
    return kind, 0 if kind is bool else 1, ()
