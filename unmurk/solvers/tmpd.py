"""Tweedie moment projected diffusion: moment matching with a diagonal in place of a system.

Boys, Girolami, Pidstrigach, Reich, Mosca and Akyildiz (2023), arXiv 2310.06721. As in `mmps`,
p(x | x_t) is taken for the Gaussian of Tweedie's moments, mean x0 = D(x_t, t) and covariance
V = t^2 dD/dx_t, so that

    E[x | x_t, y]  ~  D_y = x0 + V A^T (sigma_y^2 I + A V A^T)^-1 (y - A x0).

Here A V A^T is replaced by the diagonal of its row sums, its product with a vector of ones:

    D_y = x0 + V A^T [ (y - A x0) / (sigma_y^2 + A V A^T 1) ].

That takes two products with V, two back-propagations, where the system of `mmps` takes some more.
It is exact if A V A^T is diagonal; where its values are correlated and positive the row sums
exceed the variances, and y is believed less than it should be. D_y takes the place of D in the
reverse diffusion. Row sums below zero (a network's Jacobian is no covariance) count as zero. Where
they come out too small the correction would go far beyond y, and the more so the less noise y has:
one after which an image fits y worse than before is shortened to the length that fits best.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..diffusion.samplers import Reverse
from ..errors import InputError
from ..operators.base import per_image
from ..problem import Problem
from ..rng import PerImageGenerator
from .base import TINY, Claim, CountingDenoiser, Requirement, StepCallback
from .mmps import moments
from .start import begin

__all__ = ["Tmpd", "projected"]


@dataclass(frozen=True)
class Tmpd:
    """Tweedie moment projected diffusion. One network evaluation and two gradients a step.

    Raises:
        InputError: An option is out of its range, or the prior cannot be differentiated.
    """

    name: ClassVar[str] = "tmpd"
    claims: ClassVar[Claim] = "heuristic"
    requires: ClassVar[Requirement] = "linear"

    steps: int = 100
    """Noise levels."""
    sigma_max: float = 5.0
    """First noise level, no higher than the prior's highest."""
    sigma_min: float = 0.002
    """Last noise level."""
    noise_floor: float = 1e-3
    """Least noise level that y is believed to have, > 0."""
    init_sigma: float = 0.3
    """Where `init` is given: the level it is noised to, and the first one used."""

    def __post_init__(self) -> None:
        if not self.noise_floor > 0:
            raise InputError(f"noise_floor is {self.noise_floor}: it divides, so it is above 0")

    def run(
        self,
        y: Tensor,
        problem: Problem,
        denoise: CountingDenoiser,
        x: Tensor | None,
        noise: PerImageGenerator,
        callback: StepCallback,
    ) -> Tensor:
        """See `Solver.run`."""
        span = self.sigma_max, self.sigma_min
        levels, x = begin(y, problem, denoise, x, noise, self.steps, span, self.init_sigma)
        sigma_eff = max(problem.sigma, self.noise_floor)
        reverse = Reverse(noise)
        for step, (t, s) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True), 1):
            x0 = projected(problem, denoise, x, y, t, sigma_eff)
            x = reverse.step(x, x0, t, s)
            if callback(step, len(levels), t, x, x0):
                break
        return x


def projected(
    problem: Problem,
    denoise: Callable[[Tensor, float], Tensor],
    x: Tensor,
    y: Tensor,
    sigma: float,
    sigma_eff: float,
) -> Tensor:
    """D_y(x), (B, C, H, W), for x at level sigma and y believed to have noise `sigma_eff`.

    Raises:
        InputError: No gradient comes through the prior.
    """
    x0, spread = moments(denoise, x, sigma, Tmpd.name)
    with torch.no_grad():
        sums = problem.A(spread(problem.A_adjoint(torch.ones_like(y)))).clamp_min(0)
        missing = problem.residual(x0, y)
        step = spread(problem.A_adjoint(missing / (sigma_eff**2 + sums)))
        return x0 + per_image(_length(missing, problem.A(step)), x0) * step


def _length(missing: Tensor, gained: Tensor) -> Tensor:
    """How much of a step to take, (B,): all of it, but where it makes the fit to y worse what
    makes it best.

    Args:
        missing: y - A x0.
        gained: A applied to the step.
    """
    square = gained.square().flatten(1).sum(1)
    along = (missing * gained).flatten(1).sum(1)
    best = (along / square.clamp_min(TINY)).clamp(0, 1)
    return torch.where(2 * along < square, best, torch.ones_like(best))
