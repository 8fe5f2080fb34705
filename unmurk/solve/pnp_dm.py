"""PnP-DM: split Gibbs sampling, with the reverse diffusion as the step that knows the prior.

Wu, Sun, Chen, Zhang, Yue and Bouman (2024), arXiv 2405.18782, Algorithm 1. The posterior is split
over two images that are tied together by rho, and sampled by turns while rho falls:

    p(x, z | y)  ~  p(x) exp(-||x - z||^2 / (2 rho^2)) N(y; A z, R)

    likelihood step    z ~ p(z | x, y), a Gaussian
    prior step         x ~ p(x | z), the reverse diffusion from z at noise level rho

At a fixed rho the images x are drawn from p(x) N(y; A x, R + rho^2 A A^T). The paper takes
R = sigma_y^2 I: the posterior under too much noise, unless rho ends far below sigma_y. But of a
direction that y does not see, of prior variance v, a turn forgets only rho^2 / (v + rho^2), so
that a small rho hardly moves. Here rho^2 A A^T is taken out of R as far as it goes,

    R = (sigma_y^2 I - rho^2 A A^T)_+

(the auxiliary variable of Marnissi, Chouzenoux, Benazza-Benyahia and Pesquet 2018, Entropy 20(2)).
Then x has the exact posterior at every rho up to sigma_y / ||A||, the last turns can keep rho that
high, and no inverse is needed: on the right singular vectors of A, with singular values s_i,

    z = x + h(A^T A) A^T (y - A x) + rho c(A^T A) n      h_i   = min(rho^2 / sigma_y^2, 1 / s_i^2)
                                                         c_i^2 = (1 - rho^2 s_i^2 / sigma_y^2)_+

h and c are polynomials of A^T A that agree with these functions at the Chebyshev points between 0
and ||A||^2. They are exact where all s_i that are not 0 are equal (masks, block averages).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from ..operators.base import per_image
from ..prior import karras
from ..problem import Problem
from ..samplers import diffuse
from ..seeds import Streams
from .base import Claim, Denoiser, Report, Requirement, randn
from .start import begin

__all__ = ["PnpDm", "filtered", "likelihood_step", "toward"]

DEPTH = 0.03  # last level of a prior step in units of its first


@dataclass(frozen=True)
class PnpDm:
    """Split Gibbs sampling. No gradient goes through the network.

    Raises:
        InputError: An option is out of its range.
    """

    name: ClassVar[str] = "pnp-dm"
    claims: ClassVar[Claim] = "posterior"
    requires: ClassVar[Requirement] = "linear"

    turns: int = 75
    """Likelihood and prior steps: rho falls during the first two thirds, and then stays."""
    steps: int = 8
    """Noise levels of each prior step: `turns` x `steps` network evaluations in all. Fewer than 8
    change the spread by 5 % and more."""
    rho_max: float = 1.0
    """First rho, no higher than the prior's highest level."""
    coupling: float = 0.95
    """Last rho in units of sigma_y. Up to 1 / ||A|| the samples are those of the posterior (1 for
    masks and blurs); more mixes faster, and adds noise."""
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
        still = self.turns // 3
        span = self.rho_max, min(self.coupling * trust, denoise.sigma_max)
        falling, x = begin(
            y, problem, denoise, x, noise, self.turns - still, span, self.init_sigma
        )
        top = problem.operator.norm(x)
        for turn, rho in enumerate([*falling, *falling[-1:] * still], 1):
            z = likelihood_step(problem, x, y, rho, trust, noise, top)
            x = diffuse(denoise, z, karras(self.steps, rho, DEPTH * rho).tolist(), noise)
            if callback(turn, self.turns, rho, x, x):
                break
        return x


def likelihood_step(
    problem: Problem,
    x: Tensor,
    y: Tensor,
    rho: float,
    sigma: float,
    noise: Streams,
    top: Tensor,
) -> Tensor:
    """A draw of z given x and y, (B, C, H, W), for a linear operator and noise sigma.

    Args:
        x: Images (B, C, H, W).
        y: Measurements (B, ...).
        top: Largest singular value of A, shape (B,).
    """
    ratio = (rho / sigma) ** 2
    fresh = filtered(problem, randn(noise, x), lambda s: (1 - ratio * s).clamp_min(0).sqrt(), top)
    return x + toward(problem, x, y, ratio, top) + rho * fresh


def toward(problem: Problem, x: Tensor, y: Tensor, ratio: float, top: Tensor) -> Tensor:
    """h(A^T A) A^T (y - A x), (B, C, H, W), where ratio = rho^2 / sigma_y^2; else as above."""
    pulled = problem.A_adjoint(problem.residual(x, y))
    if ratio * float(top.max()) ** 2 <= 1:
        return ratio * pulled
    return filtered(problem, pulled, lambda s: 1 / s.clamp_min(1 / ratio), top)


def filtered(
    problem: Problem, b: Tensor, f: Callable[[Tensor], Tensor], top: Tensor, degree: int = 8
) -> Tensor:
    """f(A^T A) b, (B, C, H, W), by a polynomial in A^T A.

    The polynomial meets f at the points (1 + cos(pi i / degree)) / 2 top^2, ends included, and is
    summed by the recurrence T_{k+1} = 2 M T_k - T_{k-1}, M = 2 A^T A / top^2 - I.

    Args:
        b: Images (B, C, H, W).
        f: A function of the squared singular values of A, element by element.
        top: Largest singular value of A, shape (B,).
    """
    grid = torch.arange(degree + 1, dtype=torch.float64, device=b.device)
    chebyshev = torch.cos(math.pi / degree * grid[:, None] * grid)  # T_k at point i, [i, k]
    points = (1 + chebyshev[:, 1:2]) / 2 * top.double().square()
    weights = torch.linalg.solve(chebyshev, f(points))  # [k, image]

    def scaled(v: Tensor) -> Tensor:
        return per_image(2 / top.square(), v) * problem.A_adjoint(problem.A(v)) - v

    before, now = b, scaled(b)
    total = per_image(weights[0], b) * before + per_image(weights[1], b) * now
    for weight in weights[2:]:
        before, now = now, 2 * scaled(now) - before
        total = total + per_image(weight, b) * now
    return total
