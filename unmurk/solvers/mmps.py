"""Moment matching posterior sampling: the reverse diffusion with the denoiser told of y.

Rozet, Andry, Lanusse and Louppe (2024), arXiv 2405.13712, Algorithms 1 and 2. Given x_t = x + t n,
Tweedie's formulas give mean and covariance of the clean image,

    E[x | x_t] = D(x_t, t),    V[x | x_t] = t^2 J,    J = dD/dx_t,

and taking p(x | x_t) for the Gaussian of these moments, y = A x + sigma_y n turns D into

    D_y = D + V A^T (sigma_y^2 I + A V A^T)^-1 (y - A D)    ~  E[x | x_t, y].

The system is solved by conjugate gradients, each of whose steps costs one product with J^T (J is
symmetric for the exact denoiser). D_y then takes the place of D in the reverse diffusion.

For a Gaussian prior D_y is the exact E[x | x_t, y], so that samples are exact in the limit of many
steps and conjugate gradients. For any other prior p(x | x_t) is not Gaussian, the weights of
separate modes come out wrong at high noise, and the distribution of the samples is not known.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..diffusion.samplers import Reverse
from ..errors import InputError
from ..operators.base import conjugate_gradient
from ..problem import Problem
from ..rng import PerImageGenerator
from .base import Claim, CountingDenoiser, Requirement, StepCallback
from .start import begin

__all__ = ["Mmps", "correction", "informed", "moments"]


@dataclass(frozen=True)
class Mmps:
    """Moment matching posterior sampling.

    A step costs one evaluation of the network, and its back-propagation `iterations` + 1 times.

    Raises:
        InputError: An option is out of its range, or the prior cannot be differentiated.
    """

    name: ClassVar[str] = "mmps"
    claims: ClassVar[Claim] = "heuristic"
    requires: ClassVar[Requirement] = "linear"

    steps: int = 30
    """Noise levels. The spread of Gaussian posteriors is then right to 3 %."""
    iterations: int = 5
    """Most steps of conjugate gradients. Low noise on many correlated pixels wants more."""
    tolerance: float = 1e-3
    """Residual of the system, relative to y - A D, at which an image takes no more of them."""
    sigma_max: float = 5.0
    """First noise level, no higher than the prior's highest."""
    sigma_min: float = 0.002
    """Last noise level; well below that of the measurement, or the spread comes out too small."""
    init_sigma: float = 0.3
    """Where `init` is given: the level it is noised to, and the first one used."""

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise InputError(f"iterations is {self.iterations}: at least 1 is needed")

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
        reverse = Reverse(noise)
        for step, (t, s) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True), 1):
            x0 = informed(problem, denoise, x, y, t, self.iterations, self.tolerance)
            x = reverse.step(x, x0, t, s)
            if callback(step, len(levels), t, x, x0):
                break
        return x


def informed(
    problem: Problem,
    denoise: Callable[[Tensor, float], Tensor],
    x: Tensor,
    y: Tensor,
    sigma: float,
    iterations: int,
    tolerance: float = 1e-3,
) -> Tensor:
    """D_y(x), (B, C, H, W): the clean image expected given x at level sigma and y.

    Raises:
        InputError: No gradient comes through the prior.
    """
    x0, spread = moments(denoise, x, sigma, Mmps.name)
    return x0 + correction(problem, x0, spread, y, problem.sigma, iterations, tolerance)[0]


@torch.no_grad()
def correction(
    problem: Problem,
    x0: Tensor,
    spread: Callable[[Tensor], Tensor],
    y: Tensor,
    sigma_eff: float,
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """How y corrects the denoised image, and how little it had been expected.

    Args:
        x0: Denoised images D (B, C, H, W), and their covariance `spread`, as from `moments`.
        y: Measurements (B, ...), believed to have noise `sigma_eff`.
        iterations: Most steps of conjugate gradients.
        tolerance: Residual of the system, relative to y - A D, at which an image takes no more.

    Returns:
        V A^T S^-1 m (B, C, H, W) and m^T S^-1 m (B,), float64, with m = y - A D and
        S = trust^2 I + A V A^T.
    """

    def back(v: Tensor) -> Tensor:
        """V A^T v."""
        return spread(problem.A_adjoint(v))

    def system(v: Tensor) -> Tensor:
        return sigma_eff**2 * v + problem.A(back(v))

    missing = problem.residual(x0, y)
    v = conjugate_gradient(system, missing, iterations, tolerance)
    return back(v), (missing.double() * v.double()).flatten(1).sum(1)


def moments(
    denoise: Callable[[Tensor, float], Tensor], x: Tensor, sigma: float, name: str
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """E[x | x_t], (B, C, H, W), and the map v -> V[x | x_t] v on images, by Tweedie's formulas.

    Raises:
        InputError: No gradient comes through the prior; `name` is the solver that needs it.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x0 = denoise(x, sigma)
    if not x0.requires_grad:
        raise InputError(
            f"{name} needs a prior that autograd can differentiate: use pnp-dm or daps"
        )

    def spread(v: Tensor) -> Tensor:
        return sigma**2 * torch.autograd.grad(x0, x, v, retain_graph=True)[0]

    return x0.detach(), spread
