"""Pseudoinverse-guided diffusion: the reverse diffusion, guided by a Gaussian belief about x.

Song, Vahdat, Mardani and Kautz (2023), "Pseudoinverse-Guided Diffusion Models for Inverse
Problems", ICLR, openreview 9_gsMA8MRKQ, Algorithm 1. Believing p(x | x_t) = N(x0, r_t^2 I) with
x0 = D(x_t, t),

    grad_{x_t} log p(y | x_t) = J^T A^T (r_t^2 A A^T + sigma_y^2 I)^-1 (y - A x0),   J = dD / dx_t.

Scaled by r_t^2 (the paper's adaptive weight) it is the guidance g, added to a DDIM step from level
t to level s:

    x_s = x0 + c2 e + c1 z + g,     e = (x_t - x0) / t,   z ~ N(0, I),
    c1  = eta s sqrt(1 - s^2 / t^2),      c2 = sqrt(s^2 - c1^2).

Images are variance-exploding here. In the paper u_t = a_t x_t, and in the released code u_s gains
a_s a_t g_u with g_u the same product with dx0 / du_t = J / a_t: divided by a_s, that is g.

The linear system need not be solved apart. The minimiser of
||y - A x||^2 / (2 sigma_y^2) + ||x - x0||^2 / (2 r^2) is x = x0 + d with, for k = sigma_y^2 / r^2,
(A^T A + k I) d = A^T (y - A x0). As (A^T A + k I)^-1 A^T = A^T (A A^T + k I)^-1,

    prox(x0) - x0 = r^2 A^T (r^2 A A^T + sigma_y^2 I)^-1 (y - A x0),
    g             = J^T (prox(x0) - x0),

in closed form where the operator has one. Without noise it is J^T A^+ (y - A x0).

r_t: for images of variance 1, E var(x | x_t) = tau^2 / (1 + tau^2) at level tau, the paper's
choice for its images in [-1, 1]. Those are 2 x - 1, so that tau = 2 t and their r is 2 r_t:

    r_t^2 = (1/4) (2 t)^2 / (1 + (2 t)^2) = t^2 / (1 + 4 t^2).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from ..problem import Problem
from ..rng import PerImageGenerator
from .base import Claim, CountingDenoiser, Requirement, StepCallback, prox, randn
from .start import begin

__all__ = ["Pigdm", "pseudoinverse_guidance"]


@dataclass(frozen=True)
class Pigdm:
    """Pseudoinverse-guided diffusion. One network evaluation and its gradient a step.

    Raises:
        InputError: An option is out of its range, or the prior cannot be differentiated.
    """

    name: ClassVar[str] = "pigdm"
    claims: ClassVar[Claim] = "heuristic"
    requires: ClassVar[Requirement] = "linear"

    steps: int = 100
    """Noise levels."""
    eta: float = 1.0
    """Fresh noise: 1, as released, is the ancestral step; 0 has none (DDIM)."""
    sigma_max: float = 20.0
    """First noise level, no higher than the prior's highest."""
    sigma_min: float = 0.005
    """Last noise level before none."""
    init_sigma: float = 0.3
    """Where `init` is given: the level it is noised to, and the first one used."""

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise InputError(f"eta is {self.eta}: it goes from 0 (DDIM) to 1 (ancestral)")

    @torch.no_grad()
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
        span = (self.sigma_max, self.sigma_min)
        levels, x = begin(y, problem, denoise, x, noise, self.steps, span, self.init_sigma)
        for step, (t, s) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True), 1):
            g, x0 = pseudoinverse_guidance(problem, denoise, x, y, t)
            c1 = self.eta * s * math.sqrt(1 - (s / t) ** 2)
            c2 = math.sqrt(s**2 - c1**2)
            x = x0 + c2 * (x - x0) / t + c1 * randn(noise, x) + g
            if callback(step, len(levels), t, x, x0):
                break
        return x


def pseudoinverse_guidance(
    problem: Problem, denoise: CountingDenoiser, x: Tensor, y: Tensor, sigma: float
) -> tuple[Tensor, Tensor]:
    """g = J^T (prox(x0) - x0) and x0 = D(x, sigma), (B, C, H, W) both.

    Args:
        x: Noisy images (B, C, H, W) at level sigma.

    Raises:
        InputError: No gradient comes through the prior.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x0 = denoise(x, sigma)
    if not x0.requires_grad:
        raise InputError(
            "pigdm needs a prior that autograd can differentiate: use ddnm or diffpir"
        )
    r = sigma / math.sqrt(1 + 4 * sigma**2)
    with torch.no_grad():
        toward = prox(problem, x0, y, r, problem.sigma) - x0
    return torch.autograd.grad(x0, x, toward)[0], x0.detach()
