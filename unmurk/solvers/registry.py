"""Solvers by name: how they are registered, found, and made with their options."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from torch import Tensor

from ..bounds import check_declared, shown
from ..devices import network_precision
from ..errors import InputError
from ..plugins import load, offered
from ..problem import Problem
from ..rng import PerImageGenerator
from .base import REGISTERED, REGISTERED_PRESETS, Solver
from .state import CountingDenoiser

__all__ = ["Draws", "build", "configure", "register", "resolve", "solver_class"]

GROUP = "unmurk.solvers"
"""Entry point group under which other packages offer solvers."""

S = TypeVar("S", bound=type[Solver])


def register(name: str, *, preset: str | None = None) -> Callable[[S], S]:
    """Decorate a solver class so that `solve` and the command line know it by name.

    A package offers a solver without being imported by an entry point of the group
    `unmurk.solvers`: `[project.entry-points."unmurk.solvers"]` with `my-solver =
    "my_package:MySolver"` in its pyproject.toml.

    Args:
        name: Name of the solver, or of the solver that it is a preset of.
        preset: Name of the preset, or None.

    Raises:
        InputError: The name is taken, or what is decorated is not a subclass of `Solver`.

    .. code-block:: python

        @unmurk.solvers.register("my-solver")
        class MySolver(unmurk.solvers.DiffPir):
            def step(self, state): ...

    >>> register("ddrm")(int)
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: solver 'ddrm' is <class 'int'>: give a subclass of Solver
    """

    def decorate(solver: S) -> S:
        label = name if preset is None else f"{name}:{preset}"
        if not (isinstance(solver, type) and issubclass(solver, Solver)):
            raise InputError(f"solver '{label}' is {shown(solver)}: give a subclass of Solver")
        known = REGISTERED.get(name) if preset is None else REGISTERED_PRESETS.get((name, preset))
        place = (solver.__module__, solver.__qualname__)
        again = known is not None and (known.__module__, known.__qualname__) == place
        if name == "auto" or preset == "default" or (known is not None and not again):
            raise InputError(f"the name '{label}' of a solver is taken: choose another")
        if preset is None:
            REGISTERED[name] = solver
        else:
            REGISTERED_PRESETS[name, preset] = solver
        if solver.name == solver.__name__:
            solver.name = name
        return solver

    return decorate


def solver_class(method: str) -> type[Solver]:
    """Return the solver class of a name, which an entry point may load.

    Raises:
        InputError: The name is unknown, or its entry point cannot be loaded.

    >>> solver_class("ddrm").__name__
    'Ddrm'
    """
    if method in REGISTERED:
        return REGISTERED[method]
    points = offered(GROUP)
    if method not in points:
        known = ", ".join(["auto", *REGISTERED, *points])
        raise InputError(f"method '{method}' is unknown: choose from {known}")
    return register(method)(load(points[method], f"method '{method}'"))


def configure(method: str, options: Mapping[str, Any]) -> Solver:
    """Return the solver of a name with its options set.

    Args:
        method: A name in `METHODS`, or of an entry point of the group `unmurk.solvers`.
        options: The solver's options by name, and `preset`.

    Raises:
        InputError: Unknown method, preset or option (the message lists those there are).

    >>> configure("diffpir", {"steps": 20}).steps
    20
    """
    chosen = dict(options)
    solver = solver_class(method)
    preset = chosen.pop("preset", "default")
    if preset != "default":
        known = [p for name, p in REGISTERED_PRESETS if name == method]
        if preset not in known:
            raise InputError(
                f"preset '{preset}' is unknown: {method} has {', '.join(['default', *known])}"
            )
        solver = REGISTERED_PRESETS[method, preset]
    return build(solver, chosen, method if preset == "default" else f"{method} (preset {preset})")


def build(solver: type[Solver], options: Mapping[str, Any], label: str) -> Solver:
    """Make a solver of a class with options by name; `label` is its name in messages.

    Raises:
        InputError: An option is unknown or out of its bounds.

    >>> from unmurk.solvers import DiffPir
    >>> build(DiffPir, {"steps": 20}, "diffpir").steps
    20
    >>> build(DiffPir, {"stride": 2}, "diffpir")
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: diffpir has no option 'stride': it takes ...
    """
    check_declared(solver, "@dataclass(frozen=True, kw_only=True)")
    known = sorted((option.name for option in fields(solver)), key="levels".__eq__)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise InputError(f"{label} has no option '{unknown[0]}': it takes {', '.join(known)}")
    return solver(**options)


class Draws:
    """A solver as a function (y, problem, prior, generator), which learners draw images with.

    Args:
        method: Name of the solver, a solver class, or a solver.
        options: Its options by name.

    Attributes:
        spec: Method and options as text, for the record of a run.

    Raises:
        InputError: Unknown method or option.

    >>> Draws("mmps", steps=12).spec
    'mmps,steps=12'
    """

    def __init__(self, method: "str | type[Solver] | Solver" = "diffpir", **options: Any) -> None:
        self.solver = resolve(method, options)
        name = method if isinstance(method, str) else self.solver.name
        self.spec = ",".join([name, *(f"{k}={v}" for k, v in sorted(options.items()))])

    def __call__(
        self, y: Tensor, problem: Problem, prior: Any, generator: PerImageGenerator
    ) -> Tensor:
        """Draw images (B, C, H, W) for measurements y (B, ...) of a problem bound to them."""
        with network_precision(None):
            return self.solver.sample(y, problem, CountingDenoiser(prior), generator)


def resolve(method: "str | type[Solver] | Solver", options: Mapping[str, Any]) -> Solver:
    """Return the solver that a name, a class or a solver stands for.

    Raises:
        InputError: Unknown method or option, or options beside a solver.

    >>> resolve("ddrm", {"steps": 5}).steps
    5
    """
    if isinstance(method, Solver):
        if options:
            raise InputError(
                f"{method.name} is given with its options set, and '{next(iter(options))}' beside"
                " it: set the options of the solver itself"
            )
        return method
    if isinstance(method, type) and issubclass(method, Solver):
        return build(method, options, method.__name__)
    if isinstance(method, str):
        return configure(method, options)
    raise InputError(f"method is {shown(method)}: give a name, a Solver class or a Solver")
