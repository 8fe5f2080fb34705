"""SNIPS: Langevin dynamics down the noise levels, on the posterior of the noisy image itself.

Kawar, Vaksman and Elad (2021), arXiv 2105.14951. The noise of y is taken to be part of the noise
of x_t = x + t n: with n and the noise of y coupled such that

    y = A x_t + e,    e ~ N(0, R) independent of x_t,    R = sigma_y^2 I - t^2 A A^T,

x_t has the posterior density p_t(x_t) N(y; A x_t, R), whose score is known exactly,

    (D(x_t, t) - x_t) / t^2  +  A^T R^-1 (y - A x_t),

as long as R is positive, t < sigma_y / ||A||. There the levels stop falling, Langevin dynamics
goes on at that level, and the reverse diffusion p(x | x_t), which does not depend on y, takes the
rest of the noise off. Above it R is replaced by its positive part, (.)_+ below.

The paper takes a step of its own for each singular direction of A. Here all are steps of length c
of dynamics preconditioned by P = (I / t^2 + A^T R^-1 A)^-1 = t^2 (I - (t^2 / sigma_y^2) A^T A),

    x_t  <-  x_t + c (D + h(A^T A) A^T (y - A D) - x_t) + (2 c)^1/2 t F n,

with F^2 = (I - (t / sigma_y)^2 A^T A)_+ and h = min((t / sigma_y)^2, 1 / s^2) at a singular value
s, as in `pnp_dm` (F^2 = I - h A^T A was used): no stiff direction is left, and no SVD is needed.
The error is that c is finite: the variance of x_t comes out too large by up to c / 2 of t^2.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from ..prior import karras
from ..problem import Problem
from ..samplers import diffuse
from ..seeds import Streams
from .base import Claim, Denoiser, Report, Requirement, randn
from .pnp_dm import DEPTH, filtered, toward
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
    length: float = 0.25
    """c, the length of a step. Longer ones mix faster and leave too much spread."""
    final: int = 10
    """Levels of the reverse diffusion at the end."""
    sigma_max: float = 1.0
    """First t, no higher than the prior's highest level."""
    coupling: float = 0.95
    """Last t in units of sigma_y. Up to 1 / ||A|| the samples are those of the posterior (1 for
    masks and blurs); more mixes faster, and adds noise."""
    noise_floor: float = 1e-3
    """Least noise level that y is believed to have."""
    init_sigma: float = 0.3
    """Where `init` is given: the level it is noised to, and the first one used."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.final < 1:
            raise InputError(f"steps is {self.steps}, final {self.final}: both must be at least 1")
        if not 0 < self.length <= 1:
            raise InputError(f"length is {self.length}: a step is above 0 and at most 1")
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
        still = self.steps // 3
        span = self.sigma_max, min(self.coupling * trust, denoise.sigma_max)
        falling, x = begin(
            y, problem, denoise, x, noise, self.steps - still, span, self.init_sigma
        )
        top = problem.operator.norm(x)
        for step, t in enumerate([*falling, *falling[-1:] * still], 1):
            x0 = denoise(x, t)
            ratio = (t / trust) ** 2
            aim = x0 + toward(problem, x0, y, ratio, top)
            root = filtered(problem, randn(noise, x), partial(_root, ratio), top)
            x = x + self.length * (aim - x) + math.sqrt(2 * self.length) * t * root
            if callback(step, self.steps + 1, t, x0, x0):
                return x0
        x = diffuse(denoise, x, karras(self.final, t, DEPTH * t).tolist(), noise)
        callback(self.steps + 1, self.steps + 1, DEPTH * t, x, x)
        return x


def _root(ratio: float, s: Tensor) -> Tensor:
    """F at the squared singular values s."""
    return (1 - ratio * s).clamp_min(0).sqrt()
