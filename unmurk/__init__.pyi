"""Public names of unmurk; `__init__.py` reads this file and imports each name on first use."""

from . import (
    bounds,
    checks,
    citations,
    cli,
    devices,
    diffusion,
    errors,
    evaluation,
    flows,
    gaussian,
    interrupts,
    io,
    missing,
    noise,
    noise_checks,
    noise_estimation,
    noise_scale,
    noise_units,
    operators,
    patches,
    plugins,
    problem,
    progress,
    repeats,
    rng,
    solvers,
    tiling,
    training,
    whitening,
)
from .citations import citation
from .diffusion.prior import Prior
from .errors import InputError
from .flows.posterior import Posterior
from .io.images import load_images
from .io.saving import save_images
from .operators import operator
from .problem import Problem
from .solvers import solve
from .training import learn

__version__: str

__all__ = [
    "InputError",
    "Posterior",
    "Prior",
    "Problem",
    "bounds",
    "checks",
    "citation",
    "citations",
    "cli",
    "devices",
    "diffusion",
    "errors",
    "evaluation",
    "flows",
    "gaussian",
    "interrupts",
    "io",
    "learn",
    "load_images",
    "missing",
    "noise",
    "noise_checks",
    "noise_estimation",
    "noise_scale",
    "noise_units",
    "operator",
    "operators",
    "patches",
    "plugins",
    "problem",
    "progress",
    "repeats",
    "rng",
    "save_images",
    "solve",
    "solvers",
    "tiling",
    "training",
    "whitening",
]
