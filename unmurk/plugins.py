"""Solvers, operators, learners and readers that other packages offer by entry points.

Each kind has a group of entry points. An entry point is imported when its name is asked for, so a
package that does not load disturbs nobody who does not use it.
"""

from importlib import metadata
from typing import Any

from .errors import InputError, reason

__all__ = ["load", "offered"]


def offered(group: str) -> dict[str, metadata.EntryPoint]:
    """Return the entry points of a group by name; nothing is imported.

    >>> offered("unmurk.no_such_group")
    {}
    """
    return {point.name: point for point in metadata.entry_points(group=group)}


def load(point: metadata.EntryPoint, what: str) -> Any:
    """Import what an entry point offers.

    Args:
        point: The entry point.
        what: What cannot be used without it, for the message.

    Raises:
        InputError: The package raises an error of any kind while it is imported.

    >>> load(metadata.EntryPoint("root", "math:sqrt", "unmurk.solvers"), "method 'root'")(4)
    2.0
    >>> load(metadata.EntryPoint("root", "no_such_package:f", "unmurk.solvers"), "method 'root'")
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: method 'root' cannot be loaded from no_such_package:f ...
    """
    try:
        return point.load()
    except Exception as error:
        raise InputError(
            f"{what} cannot be loaded from {point.value} ({reason(error)}): repair or remove the"
            " package that offers it"
        ) from error
