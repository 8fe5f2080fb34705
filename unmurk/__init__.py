"""unmurk: learn what clean images look like from corrupted images only, and restore with it.

The public face. Names are loaded when first used, so that `import unmurk` stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import InputError
    from .io.images import load_images, save_images
    from .learn import learn
    from .operators import parse as operator
    from .posterior import Posterior
    from .prior import Prior
    from .problem import Problem
    from .solve import solve

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "Posterior",
    "Prior",
    "Problem",
    "learn",
    "load_images",
    "operator",
    "save_images",
    "solve",
]

_ROOMS = {
    "InputError": ("errors", "InputError"),
    "Posterior": ("posterior", "Posterior"),
    "Prior": ("prior", "Prior"),
    "Problem": ("problem", "Problem"),
    "learn": ("learn", "learn"),
    "load_images": ("io.images", "load_images"),
    "operator": ("operators", "parse"),
    "save_images": ("io.images", "save_images"),
    "solve": ("solve", "solve"),
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'unmurk' has no attribute '{name}'")
    room, attribute = _ROOMS[name]
    value = getattr(import_module(f".{room}", __name__), attribute)
    globals()[name] = value  # after the import: a package named like the function would shadow it
    return value
