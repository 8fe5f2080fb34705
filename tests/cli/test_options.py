"""What commands share: options of solvers as text."""

from dataclasses import fields
from typing import get_args, get_origin, get_type_hints

import pytest

from unmurk.cli.options import solver_options
from unmurk.solvers import METHODS, PRESETS

KINDS = [(name, None, solver) for name, solver in METHODS.items()]
KINDS += [(name, preset, solver) for (name, preset), solver in PRESETS.items()]


def text(declared, default) -> str:
    """A value of the declared type that is in range, as a user writes it."""
    if default is None:  # unset, so that the text has to be of the other type
        declared = next(kind for kind in get_args(declared) if kind is not type(None))
        return {float: "1", int: "3", str: "2"}[declared]
    return str(default).lower()


@pytest.mark.parametrize("name, preset, solver", KINDS)
def test_every_option_of_every_solver_can_be_written(name, preset, solver):
    hints = get_type_hints(solver)
    for option in fields(solver):
        written = text(hints[option.name], option.default)
        chosen = [] if preset is None else [f"preset={preset}"]
        found = solver_options(name, [*chosen, f"{option.name}={written}"], None)[option.name]
        wanted = option.default
        if wanted is None:  # a number, or levels, which are read as text
            wanted = type(found)(written)
        assert found == wanted, option.name
        if get_origin(hints[option.name]) is None and option.default is not None:
            assert type(found) is type(option.default), option.name
