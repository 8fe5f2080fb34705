"""SNIPS: Langevin dynamics down the noise levels, on the posterior of the noisy image itself.

Kawar, Vaksman and Elad (2021), arXiv 2105.14951. The noise of y is taken to be part of the noise
of x_t = x + t n: with n and the noise of y coupled such that

    y = A x_t + e,    e ~ N(0, R) independent of x_t,    R = sigma_y^2 I - t^2 A A^T,

x_t has the posterior density p_t(x_t) N(y; A x_t, R), whose score is known exactly,

    (D(x_t, t) - x_t) / t^2  +  A^T R^-1 (y - A x_t),

as long as R is positive, t < sigma_y / ||A||. There the levels stop falling, Langevin dynamics
goes on at that level, and the reverse diffusion p(x | x_t), which does not depend on y, takes the
rest of the noise off. Above it t in R is held at that level, see `coupling.py`.

The paper takes overdamped steps, one length for each singular direction of A. Two things differ
here. Steps are preconditioned by P = (I / t^2 + A^T R^-1 A)^-1 = t^2 (I - h A^T A), so that no
stiff direction is left and P times the score is F(x_t) = D + h A^T (y - A D) - x_t. And x_t has a
velocity v (underdamped, or kinetic, Langevin dynamics),

    dx = v dt,    dv = F(x) dt - g v dt + (2 g P)^1/2 dW,

because a direction that y does not see, of prior variance u, is pulled with t^2 / (u + t^2) only:
overdamped dynamics needs some u / t^2 steps to cross it, these the square root of that number.
All of them forget at the rate g / 2, as long as that is not above t / u^1/2, so that the friction
g goes with the number of steps there are. One step is the splitting BAOAB of Leimkuhler and
Matthews (2013), "Rational construction of stochastic numerical methods for molecular sampling",
with one evaluation of D: for Gaussian laws its x_t has the exact variance at any stable length
(below 2).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..diffusion.prior import karras
from ..diffusion.samplers import diffuse
from ..errors import InputError
from ..problem import Problem
from ..rng import PerImageGenerator
from .base import Claim, CountingDenoiser, Requirement, StepCallback
from .coupling import EDGE, Coupling, shared_norm
from .pnp_dm import DEPTH
from .start import begin

__all__ = ["Snips"]


@dataclass(frozen=True)
class Snips:
    """Annealed Langevin dynamics with coupled noise. No gradient goes through the network.

    Raises:
        InputError: An option is out of its range.
    """

    name: ClassVar[str] = "snips"
    claims: ClassVar[Claim] = "posterior"
    requires: ClassVar[Requirement] = "linear"

    steps: int = 300
    """Langevin steps, one evaluation each: t falls during two thirds of them, and then stays."""
    length: float = 0.8
    """Length of a step, > 0 and below 2, where it becomes unstable."""
    friction: float = 8.0
    """g, times the length of all steps at the last level: lower moves further, higher forgets the
    velocity sooner."""
    final: int = 10
    """Levels of the reverse diffusion at the end."""
    sigma_max: float = 1.0
    """First t, no higher than the prior's highest level."""
    coupling: float = EDGE
    """Last t in units of sigma_y / ||A||. Up to 0.95 the samples are those of the posterior; more
    mixes faster, and adds noise."""
    noise_floor: float = 1e-3
    """Least noise level that y is believed to have."""
    init_sigma: float = 0.3
    """Where `init` is given: the level it is noised to, and the first one used."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.final < 1:
            raise InputError(f"steps is {self.steps}, final {self.final}: both must be at least 1")
        if not 0 < self.length < 2:
            raise InputError(f"length is {self.length}: a step is stable above 0 and below 2")
        if not self.friction > 0:
            raise InputError(f"friction is {self.friction}: it must be > 0")
        if self.coupling <= 0 or self.noise_floor <= 0:
            raise InputError(
                f"coupling is {self.coupling}, noise_floor {self.noise_floor}: both must be > 0"
            )

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
        sigma_eff = max(problem.sigma, self.noise_floor)
        still = self.steps // 3
        last = self.coupling * sigma_eff / shared_norm(problem, y)
        last = min(last, max(self.sigma_max, self.coupling * sigma_eff), denoise.sigma_max)
        falling, x = begin(
            y,
            problem,
            denoise,
            x,
            noise,
            self.steps - still,
            (self.sigma_max, last),
            self.init_sigma,
        )
        tie, half = Coupling(problem, y, sigma_eff, x), self.length / 2
        keep = math.exp(-self.friction / max(still, 1))
        v, before = tie.noise(noise, x, falling[0]), falling[0]
        for step, t in enumerate([*falling, *falling[-1:] * still], 1):
            x0 = denoise(x, t)
            v = t / before * v + self.length * (tie.mean(x0, t) - x)
            x, before = x + half * v, t
            v = keep * v + math.sqrt(1 - keep**2) * tie.noise(noise, x, t)
            x = x + half * v
            if callback(step, self.steps + 1, t, x0, x0):
                return x0
        x = diffuse(denoise, x, karras(self.final, t, DEPTH * t).tolist(), noise)
        callback(self.steps + 1, self.steps + 1, DEPTH * t, x, x)
        return x
