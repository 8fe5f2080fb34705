"""Libraries of optional formats, imported when a file of the format is opened."""

import importlib
from pathlib import Path
from typing import Any

from ...errors import InputError, reason

__all__ = ["library"]


def library(file: Path, name: str, extra: str) -> Any:
    """Import the library that reads a file.

    Args:
        file: The file.
        name: The module.
        extra: The extra of unmurk that installs it.

    Raises:
        InputError: It is not installed, or does not load.

    >>> library(Path("a.json"), "json", "web").__name__
    'json'
    >>> library(Path("a.xyz"), "no_such_library", "xyz")
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: cannot read a.xyz: pip install 'unmurk[xyz]'
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(f"cannot read {file}: pip install 'unmurk[{extra}]'") from error
    except Exception as error:  # a compiled library may fail to load in any way
        raise InputError(
            f"cannot read {file}: {name} does not load ({reason(error)}): install it again with "
            f"pip install 'unmurk[{extra}]'"
        ) from error
