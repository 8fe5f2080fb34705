"""DDNM: what y fixes is taken from y, the rest (the null space of A) from the prior.

Wang, Yu and Zhang (2022), arXiv 2212.00490. At every level t the denoised image x0 = D(x_t, t) is
mended, and noised again to the next level s (eqs. 17 and 18):

    xh  = x0 + Sigma A^+ (y - A x0),
    x_s = xh + s sqrt(1 - eta^2) e + fresh noise of covariance Phi,     e = (x_t - x0) / t.

Images are variance-exploding here: the paper's divided by sqrt(abar). Its sampler in the
experiments is DDIM with this eta; in its eq. 19 that makes the weight a_t of xh 1, and the
standard deviation sigma_t of the noise c = eta s.

Without noise in y, Sigma = I and Phi = c^2 I: DDNM. With it, y carries Sigma A^+ sigma_y n into
x_s, and DDNM+ asks that this and the fresh noise add up to c^2 in every direction, and that Sigma
is as near to I as can be. On the right singular vectors of A, with singular values s_i (paper's
Appendix on DDNM+; s_i = 0 has Phi_i = c^2),

    Sigma_i = min(1, r_i),    Phi_i = c^2 - (Sigma_i sigma_y / s_i)^2,    r_i = c s_i / sigma_y.

That takes the SVD of A. Here its place is taken by what any linear A has, the prox

    P(z, y) = argmin_x gamma ||A x - y||^2 + ||x - z||^2,    u_i = 1 / (1 + gamma s_i^2),
    xh      = x0 + w (P(x0, y) - x0)       that is   Sigma_i = w (1 - u_i),
    fresh   = c (2 P(n, 0) - n)            that is   Phi_i = c^2 (1 - 2 u_i)^2.

The first demand, (Sigma_i sigma_y / s_i)^2 + Phi_i = c^2, holds for every i exactly when
w sqrt(gamma) = 2 c / sigma_y, as (1 - u)^2 / s^2 = gamma u (1 - u). One parameter is left, and is
set by the largest singular value, S, with r = c S / sigma_y:

    rho = max(1, r + sqrt(r^2 - 1)),    gamma = (rho / S)^2,    w = 2 r / rho.

Then Sigma = min(1, r) at s_i = S. So where all s_i that are not 0 are equal (A A^T = S^2 I on the
range: masks, block averages, the identity) this is DDNM+ itself. Elsewhere, as
Sigma_i = w gamma s_i^2 / (1 + gamma s_i^2) rises with s_i and sqrt(gamma) s_i / (1 + gamma s_i^2)
is 1/2 at most, Sigma_i <= min(1, r_i): the total noise is exactly what DDNM+ asks for, and Sigma
is a smooth filter below its sharp one. As sigma_y falls to 0 it becomes DDNM.

In the last step c = 0: with noise in y the result is the last denoised image as it is.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from ..operators.base import per_image
from ..problem import Problem
from ..rng import PerImageGenerator
from .base import Claim, CountingDenoiser, Requirement, StepCallback, randn
from .start import begin

__all__ = ["Ddnm", "ddnm_correction"]


@dataclass(frozen=True)
class Ddnm:
    """DDNM, and with noise DDNM+. One network evaluation a step, without its gradient.

    Raises:
        InputError: An option is out of its range.
    """

    name: ClassVar[str] = "ddnm"
    claims: ClassVar[Claim] = "heuristic"
    requires: ClassVar[Requirement] = "linear"

    steps: int = 100
    """Noise levels."""
    eta: float = 1.0
    """Share of fresh noise, 0 to 1. Released: 0.85. Less than 1 keeps noise from level to level,
    that of y included, which is then counted more than once: with noise in y leave it at 1."""
    sigma_max: float = 20.0
    """First noise level, no higher than the prior's highest."""
    sigma_min: float = 0.005
    """Last noise level before none."""
    init_sigma: float = 0.3
    """Where `init` is given: the level it is noised to, and the first one used."""

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise InputError(f"eta is {self.eta}: a share of fresh noise is between 0 and 1")

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
        operator_norm = problem.operator.norm(x)
        for step, (t, s) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True), 1):
            x0 = denoise(x, t)
            mended, fresh = ddnm_correction(
                problem, x0, y, randn(noise, x), self.eta * s, operator_norm
            )
            x = mended + s * math.sqrt(1 - self.eta**2) * (x - x0) / t + fresh
            if callback(step, len(levels), t, x, x0):
                break
        return x


def ddnm_correction(
    problem: Problem, x0: Tensor, y: Tensor, n: Tensor, c: float, operator_norm: Tensor
) -> tuple[Tensor, Tensor]:
    """xh and the fresh noise, (B, C, H, W) both; what they are is in this module's docstring.

    Args:
        x0: Denoised images (B, C, H, W).
        y: Measurements (B, ...).
        n: Standard normal noise (B, C, H, W).
        c: Standard deviation that the noise of y and the fresh noise shall have together.
        top: Largest singular value of A, shape (B,).
    """
    if problem.sigma == 0:
        return x0 + problem.A_dagger(problem.residual(x0, y)), c * n
    r = c * operator_norm / problem.sigma
    rho = (r + (r.square() - 1).clamp_min(0).sqrt()).clamp_min(1)
    gamma, weight = (rho / operator_norm).square(), per_image(2 * r / rho, x0)
    mended = x0 + weight * (problem.operator.prox_l2(x0, y, gamma) - x0)
    fresh = 2 * problem.operator.prox_l2(n, torch.zeros_like(y), gamma) - n
    return mended, c * fresh
