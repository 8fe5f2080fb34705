"""Learners by name: registration, entry points, and options from text.

A learner class of your own gets a name by a decorator::

    @training.register("mine")
    @dataclass(eq=False, kw_only=True)
    class Mine(training.Learner): ...

or by an entry point of the group `unmurk.learners` in the `pyproject.toml` of a package::

    [project.entry-points."unmurk.learners"]
    mine = "my_package:Mine"

Entry points are imported only when their name is asked for.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ..bounds import Option, check_declared, check_fields, shown
from ..errors import InputError
from ..plugins import load, offered
from ..problem import Problem
from ..solvers.registry import Draws, solver_class
from .learner import Learner
from .settings import Settings

__all__ = [
    "METHODS",
    "configure",
    "configure_settings",
    "describe",
    "learner_class",
    "names",
    "register",
    "resolve",
    "sampler_of",
]

GROUP = "unmurk.learners"
LearnerType = TypeVar("LearnerType", bound=type[Learner])

_learners: dict[str, type[Learner]] = {}

METHODS: Mapping[str, type[Learner]] = MappingProxyType(_learners)
"""The registered learner classes by name; a read-only view, see `register`."""


def register(name: str) -> Callable[[LearnerType], LearnerType]:
    """Register a learner class under a name, as a decorator.

    Args:
        name: The name for `learn(method=name)` and `--method name`.

    Raises:
        InputError: The name is taken, or the class does not derive from `Learner`.

    >>> @register("halved")
    ... class Halved(Learner):
    ...     pass
    >>> METHODS["halved"] is Halved
    True
    >>> del _learners["halved"]  # this example leaves nothing behind
    """

    def decorate(cls: LearnerType) -> LearnerType:
        if not (isinstance(cls, type) and issubclass(cls, Learner)):
            raise InputError(f"learner '{name}' is {shown(cls)}: derive it from training.Learner")
        held = _learners.get(name)
        if held is not None and held.__qualname__ != cls.__qualname__:
            raise InputError(f"a learner '{name}' is registered already: choose another name")
        cls.name = name
        _learners[name] = cls
        return cls

    return decorate


def names() -> list[str]:
    """List the names of all learners, registered or offered by entry points.

    >>> names()[:2]
    ['flowdiff', 'em']
    """
    return [*_learners, *(name for name in offered(GROUP) if name not in _learners)]


def learner_class(name: str) -> type[Learner]:
    """Return the learner class of a name.

    Raises:
        InputError: No learner has this name, or its entry point cannot be imported.

    >>> learner_class("flowdiff").__name__
    'FlowDiff'
    """
    if name in _learners:
        return _learners[name]
    point = offered(GROUP).get(name)
    if point is None:
        raise InputError(f"unknown method '{name}': choose one of {', '.join(names())}")
    return register(name)(load(point, f"method '{name}'"))


def resolve(method: str | type[Learner] | Learner, options: Mapping[str, Any]) -> Learner:
    """Return the learner of a name, a class or an instance, with further options set.

    Args:
        method: A name, a learner class, or a learner that is not built.
        options: Options by name, with their values.

    Raises:
        InputError: The method or an option is unknown, a value is out of its bounds, or options
            are given beside an instance.

    >>> resolve("ambient", {"delta": 0.2}).delta
    0.2
    >>> resolve("ambient", {"eps": 0.2})
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: unknown setting or option 'eps' of ambient: its options are delta
    """
    if isinstance(method, Learner):
        if options:
            raise InputError(
                f"option '{next(iter(options))}' is given beside a learner: set it in the learner"
            )
        return method
    return _class_of(method)(**_known(method, options))


def _class_of(method: Any) -> type[Learner]:
    if isinstance(method, str):
        return learner_class(method)
    if isinstance(method, type) and issubclass(method, Learner):
        return method
    raise InputError(
        f"method is {shown(method)}: give a name, a class derived from training.Learner, or an"
        " instance of one"
    )


def name_of(learner: Learner) -> str:
    """Return the registered name of a learner, or the path of its class."""
    cls = type(learner)
    own = cls.__dict__.get("name", "")
    return own or f"{cls.__module__}.{cls.__qualname__}"


def takes(name: str, problem: Problem) -> bool:
    """Whether the learner of a name can learn from measurements of this kind."""
    return learner_class(name).takes(problem)


def _options(cls: type) -> dict[str, Field[Any]]:
    """Return the options of a dataclass by name."""
    return {field.name: field for field in fields(cls) if field.init}


def _known(method: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options. Raises InputError for one that the method does not have."""
    cls = _class_of(method)
    check_declared(cls, "@dataclass(eq=False, kw_only=True)")
    known = _options(cls)
    for key in options:
        if key.partition(".")[0] not in known:
            what = method if isinstance(method, str) else cls.__name__
            listed = f"its options are {', '.join(known)}" if known else "it has none"
            raise InputError(f"unknown setting or option '{key}' of {what}: {listed}")
    return dict(options)


# -- options from text ---------------------------------------------------------------------------


def configure(method: str | type[Learner], options: Mapping[str, Any]) -> dict[str, Any]:
    """Read options of a method from (name, value) pairs, and check them.

    Options of a nested schedule are named with a dot. Text is read as the type that the option is
    declared with; other values are taken as they are. A solver is written as its name and options.

    Args:
        method: The name of a learner, or a class.
        options: Values or texts by name, such as {"recipe.e_step": "0.7", "solver":
            "mmps,steps=8"}.

    Returns:
        The options by name, for `learn` or for the class of the method.

    Raises:
        InputError: The method or an option is unknown, or a value is out of its bounds.

    >>> configure("flowdiff", {"recipe.e_step": "0.7"})["recipe"].e_step
    0.7
    >>> configure("ambient", {"delta": "0.2"})
    {'delta': 0.2}
    >>> configure("em", {"rounds.rounds": "0"})
    Traceback (most recent call last):
    ...
    unmurk.errors.InputError: rounds.rounds must be a whole number from 1 to 10000, got '0'
    """
    cls = _class_of(method)
    hints = get_type_hints(cls, include_extras=True)
    values: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in _known(method, options).items():
        name, dot, inner = key.partition(".")
        if dot:
            nested.setdefault(name, {})[inner] = value
        else:
            values[name] = _read(name, hints[name], value)
    for name, parts in nested.items():
        values[name] = _nested(name, hints[name], values.get(name, _default(cls, name)), parts)
    cls(**values)  # it checks them
    return values


def configure_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Read fields of `Settings` from (name, value) pairs, and check them.

    Args:
        options: Values or texts by name; each name is that of a field.

    Returns:
        The values by name, for `learn` or for `Settings`.

    Raises:
        InputError: A value is out of its bounds.

    >>> configure_settings({"rate": "1e-3", "average": "5"})
    {'rate': 0.001, 'average': 5.0}
    """
    hints = get_type_hints(Settings, include_extras=True)
    values = {name: _read(name, hints[name], value) for name, value in options.items()}
    check_fields(Settings(**values))
    return values


def describe(method: str | type[Learner]) -> dict[str, str]:
    """List the options of a method and the values that each allows.

    Args:
        method: The name of a learner, or a class.

    Returns:
        Text by option name, with a dot for nested options.

    >>> describe("ambient")
    {'delta': 'a number from 0.001 to 0.999 (default 0.1)'}
    """
    found: dict[str, str] = {}
    cls = _class_of(method)
    for name, hint in get_type_hints(cls, include_extras=True).items():
        if name not in _options(cls):
            continue
        if is_dataclass(hint):
            inner = get_type_hints(hint, include_extras=True)
            defaults = _default(cls, name)
            for key, kind in inner.items():
                found[f"{name}.{key}"] = _text(kind, getattr(defaults, key))
        else:
            found[name] = _text(hint, _default(cls, name))
    return found


def _text(hint: Any, default: Any) -> str:
    """Describe the values of a type and its default."""
    return f"{_bounds(hint)} (default {'none' if default is None else default})"


def _default(cls: type, name: str) -> Any:
    """Return the default of an option; MISSING if it has none."""
    option = _options(cls)[name]
    if option.default_factory is not MISSING:
        return option.default_factory()
    return option.default


def _nested(where: str, hint: Any, given: Any, parts: Mapping[str, Any]) -> Any:
    """Return a nested dataclass with some of its fields set."""
    if not is_dataclass(hint) or not is_dataclass(given) or isinstance(given, type):
        raise InputError(f"option '{where}' has no parts: write it as {where}=VALUE")
    hints, known = get_type_hints(hint, include_extras=True), _options(type(given))
    for key in parts:
        if key not in known:
            raise InputError(f"unknown option '{where}.{key}': {where} has {', '.join(known)}")
    return replace(
        given, **{key: _read(f"{where}.{key}", hints[key], value) for key, value in parts.items()}
    )


def _read(where: str, hint: Any, value: Any) -> Any:
    """Return the value of a text, by the type that the option is declared with."""
    if not isinstance(value, str):
        return value
    members = [part for part in get_args(hint) if part is not type(None)]
    optional = type(None) in get_args(hint)
    if optional and value == "none":
        return None
    kind = members[0] if optional and len(members) == 1 else hint
    bound = [extra for extra in getattr(kind, "__metadata__", ()) if isinstance(extra, Option)]
    if bound:
        return bound[0].parse(where, value)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise InputError(f"{where} must be {_bounds(kind)}, got '{value}'")
        return value
    if is_dataclass(kind):
        raise InputError(
            f"option '{where}' is a group: write one of its parts, as in {where}.PART=VALUE"
        )
    if kind in PLAIN:
        return _plain(where, kind, value)
    if get_origin(kind) is Callable:
        return sampler_of(value)
    return value


def _bounds(hint: Any) -> str:
    """Describe the values that an option allows."""
    for part in (hint, *get_args(hint)):
        for extra in getattr(part, "__metadata__", ()):
            if isinstance(extra, Option):
                return extra.bounds
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    if any(get_origin(part) is Callable for part in (hint, *get_args(hint))):
        return "a solver and its options, as in mmps,steps=16"
    return PLAIN.get(hint, "a value")


PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _plain(where: str, kind: type, text: str) -> Any:
    """Read a value whose declaration gives no bounds."""
    try:
        if kind is bool:
            return {"true": True, "false": False}[text]
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError(text)
        return value
    except (KeyError, ValueError) as error:
        raise InputError(f"{where} must be {PLAIN[kind]}, got {shown(text)}") from error


def sampler_of(text: str) -> Draws:
    """Return the solver "NAME,OPTION=VALUE,..." as a function that draws images.

    A solver with an option `steps` takes 16, unless the text says otherwise.

    >>> sampler_of("mmps,iterations=3").spec
    'mmps,iterations=3,steps=16'

    Raises:
        InputError: The solver or an option is unknown.
    """
    name, *pairs = text.split(",")
    hints = get_type_hints(solver_class(name), include_extras=True)
    options = {"steps": "16"} if "steps" in hints else {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise InputError(f"solver {text}: write it as NAME,OPTION=VALUE, not '{pair}'")
        options[key] = value
    typed = {k: _read(f"solver option {k}", hints.get(k, str), v) for k, v in options.items()}
    return Draws(name, **typed)
