"""unmurk: learn what clean images look like from corrupted images only, and restore with it.

The public face. Names are loaded when first used, so that `import unmurk` stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .diffusion.prior import Prior
    from .errors import InputError
    from .flows.posterior import Posterior
    from .io.images import load_images, save_images
    from .operators import as_operator as operator
    from .problem import Problem
    from .solvers import solve
    from .training import learn

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
    "Posterior": ("flows.posterior", "Posterior"),
    "Prior": ("diffusion.prior", "Prior"),
    "Problem": ("problem", "Problem"),
    "learn": ("training", "learn"),
    "load_images": ("io.images", "load_images"),
    "operator": ("operators", "as_operator"),
    "save_images": ("io.images", "save_images"),
    "solve": ("solvers", "solve"),
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'unmurk' has no attribute '{name}'")
    room, attribute = _ROOMS[name]
    value = getattr(import_module(f".{room}", __name__), attribute)
    globals()[name] = value  # after the import: a package named like the function would shadow it
    return value
