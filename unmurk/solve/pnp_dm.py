"""PnP-DM: split Gibbs sampling, with the reverse diffusion as the step that knows the prior.

Wu, Sun, Chen, Zhang, Yue and Bouman (2024), arXiv 2405.18782, Algorithm 1. The posterior is split
over two images that are tied together by rho,

    p(x, z | y)  ~  p(x) exp(-||x - z||^2 / (2 rho^2)) exp(-||y - A z||^2 / (2 sigma_y^2)),

and sampled by turns while rho falls:

    likelihood step    z ~ N(P (A^T y / sigma_y^2 + x / rho^2), P)
                       P = (A^T A / sigma_y^2 + I / rho^2)^-1
    prior step         x ~ p(x | z), the reverse diffusion from z at noise level rho

The likelihood step is exact, by perturbing and optimising: z is the prox of x + rho n at the
measurement y + sigma_y n'. At a fixed rho the images x are drawn from

    p(x) N(y; A x, sigma_y^2 I + rho^2 A A^T),

the posterior under somewhat more noise, so that rho has to end well below sigma_y. A direction
that y does not see, of prior variance v, forgets rho^2 / (v + rho^2) of its value in a turn: this
is why rho starts high and falls slowly, and why too few turns show as an error of the mean.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from ..prior import karras
from ..problem import Problem
from ..seeds import Streams
from .base import Claim, Denoiser, Report, Requirement, prox, randn
from .reverse import diffuse
from .start import begin

__all__ = ["PnpDm", "likelihood_step"]


@dataclass(frozen=True)
class PnpDm:
    """Split Gibbs sampling. No gradient goes through the network.

    Raises:
        InputError: An option is out of its range.
    """

    name: ClassVar[str] = "pnp-dm"
    claims: ClassVar[Claim] = "posterior"
    requires: ClassVar[Requirement] = "linear"

    turns: int = 150
    """Likelihood and prior steps, at falling values of rho."""
    steps: int = 5
    """Noise levels of each prior step: `turns` x `steps` network evaluations in all."""
    rho_max: float = 0.5
    """First rho, no higher than the prior's highest level."""
    coupling: float = 0.25
    """Last rho in units of sigma_y: the effective noise is sqrt(1 + coupling^2) sigma_y."""
    noise_floor: float = 1e-3
    """Least noise level that y is believed to have."""
    init_sigma: float = 0.3
    """Where `init` is given: the first rho."""

    def __post_init__(self) -> None:
        if self.turns < 1 or self.steps < 1:
            raise InputError(f"turns is {self.turns}, steps {self.steps}: both must be at least 1")
        if self.coupling <= 0 or self.noise_floor <= 0:
            raise InputError(
                f"coupling is {self.coupling}, noise_floor {self.noise_floor}: both must be > 0"
            )

    @torch.no_grad()
    def run(
        self,
        y: Tensor,
        problem: Problem,
        denoise: Denoiser,
        x: Tensor | None,
        noise: Streams,
        callback: Report,
    ) -> Tensor:
        """See `Solver.run`."""
        trust = max(problem.sigma, self.noise_floor)
        span = self.rho_max, min(self.coupling * trust, denoise.sigma_max)
        rhos, x = begin(y, problem, denoise, x, noise, self.turns, span, self.init_sigma)
        for turn, rho in enumerate(rhos, 1):
            z = likelihood_step(problem, x, y, rho, trust, noise)
            x = diffuse(denoise, z, karras(self.steps, rho, rho / 5).tolist(), noise)
            if callback(turn, len(rhos), rho, x, x):
                break
        return x


def likelihood_step(
    problem: Problem, x: Tensor, y: Tensor, rho: float, sigma: float, noise: Streams
) -> Tensor:
    """A draw of z given x and y, (B, C, H, W), exact for a linear operator and noise sigma.

    With z = prox(x + rho n, y + sigma n') and P as above, z - E[z] has the covariance
    P (A^T A / sigma^2 + I / rho^2) P = P.
    """
    return prox(problem, x + rho * randn(noise, x), y + sigma * randn(noise, y), rho, sigma)
