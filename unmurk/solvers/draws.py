"""A solver as a function (y, problem, prior, streams): what learning draws its images with.

unmurk.learn(y, problem, method="em", solver=Draws("mmps", steps=12), out="runs/cells")
"""

from typing import Any

from torch import Tensor

from ..devices import network_precision
from ..problem import Problem
from ..rng import PerImageGenerator
from .base import CountingDenoiser
from .solve import configure

__all__ = ["Draws"]


class Draws:
    """Draws one image for each measurement by a solver, with the random streams given.

    Args:
        method: Name of the solver.
        options: Its options by name.

    Attributes:
        spec: Method and options in words, for the record of a run.

    Raises:
        InputError: Unknown method or option.
    """

    def __init__(self, method: str = "diffpir", **options: Any) -> None:
        self.solver = configure(method, options)
        self.spec = ",".join([method, *(f"{k}={v}" for k, v in sorted(options.items()))])

    def __call__(
        self, y: Tensor, problem: Problem, prior: Any, streams: PerImageGenerator
    ) -> Tensor:
        """Images (B, C, H, W) from measurements y (B, ...) of a problem bound to them."""
        with network_precision(None):
            found = self.solver.run(y, problem, CountingDenoiser(prior), None, streams, _go_on)
        return found.detach()


def _go_on(*_: Any, **__: Any) -> bool:
    return False
