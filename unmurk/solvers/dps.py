"""Diffusion posterior sampling: the reverse diffusion, pulled toward y at every step.

Chung, Kim, Mccann, Klasky and Ye (2023), arXiv 2209.14687, Algorithm 1 (Gaussian noise), for
images u in [-1, 1] under the variance-preserving process u_t = a_t u + b_t n:

    u_{t-1} = (ancestral step from u_t given u0)  -  zeta grad_{u_t} ||y_u - A(u0)||,
    u0      = D(u_t) clipped to [-1, 1],

the norm, not its square, and of each image alone. Here x_t = (u_t / a_t + 1) / 2 is the
variance-exploding image, at the level sigma_t = b_t / (2 a_t). In x the ancestral step is

    x_s = x0 + (s/t)^2 (x_t - x0) + s sqrt(1 - (s/t)^2) z,      t > s the two levels,

and the chain rule, with y_u - A(u0) = 2 (y - A(x0)), turns the pull into

    - zeta / (2 a_t a_s) grad_{x_t} ||y - A(x0)||,     a = (1 + 4 sigma^2)^(-1/2).

The gradient goes through the network. What comes out follows no known distribution: zeta is a step
found by trial, without the noise level of y in it.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..diffusion.schedules import linear_beta
from ..errors import InputError
from ..problem import Problem
from ..rng import PerImageGenerator
from .base import Claim, CountingDenoiser, Requirement, StepCallback, randn

__all__ = ["Dps", "norm_gradient"]


@dataclass(frozen=True)
class Dps:
    """Diffusion posterior sampling in its ancestral form. One evaluation and its gradient a step.

    Raises:
        InputError: An option is out of its range, or the prior cannot be differentiated.
    """

    name: ClassVar[str] = "dps"
    claims: ClassVar[Claim] = "heuristic"
    requires: ClassVar[Requirement] = "differentiable"

    steps: int = 1000
    """Levels of the linear-beta grid, a divisor of 1000."""
    zeta: float = 0.3
    """Length of the pull. Released: 0.3 for super-resolution and blur, 0.5 for inpainting, 1 for
    phase retrieval, all with 256 x 256 x 3 images. It acts on the norm of the whole image."""
    clip: bool = True
    """Whether the denoised image is clipped to [0, 1], as released."""
    init_sigma: float = 0.3
    """Where `init` is given: the level it is noised to, and the first one used."""

    def __post_init__(self) -> None:
        if self.zeta < 0:
            raise InputError(f"zeta is {self.zeta}: a step toward y is 0 or more")

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
        levels, x = self._start(y, problem, x, noise)
        for step, (t, s) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True), 1):
            likelihood_grad, x0 = norm_gradient(problem, denoise, x, y, t, self.clip)
            keep = (s / t) ** 2
            ahead = x0 + keep * (x - x0)
            if s > 0:
                ahead = ahead + s * math.sqrt(1 - keep) * randn(noise, x)
            scale = math.sqrt((1 + 4 * t**2) * (1 + 4 * s**2))  # 1 / (a_t a_s)
            x = ahead - self.zeta / 2 * scale * likelihood_grad
            if callback(step, len(levels), t, x, x0):
                break
        return x

    def _start(
        self, y: Tensor, problem: Problem, x: Tensor | None, noise: PerImageGenerator
    ) -> tuple[list[float], Tensor]:
        """The levels, and the first image: noise, or `init` with noise on it."""
        levels = linear_beta(self.steps).tolist()
        if x is not None:
            levels = [level for level in levels if level <= self.init_sigma] or levels[-1:]
            return levels, x + levels[0] * randn(noise, x)
        shape = problem.operator.x_shape(y.shape)[-3:]
        z = noise.randn(*shape).to(y)
        return levels, 0.5 + math.sqrt(0.25 + levels[0] ** 2) * z  # u_T ~ N(0, 1), as released


def norm_gradient(
    problem: Problem,
    denoise: CountingDenoiser,
    x: Tensor,
    y: Tensor,
    sigma: float,
    clip: bool = True,
) -> tuple[Tensor, Tensor]:
    """grad_x ||y - A(x0)||, image by image, and x0 = D(x, sigma), clipped if asked.

    Args:
        x: Noisy images (B, C, H, W) at level sigma.

    Raises:
        InputError: No gradient comes through the prior.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x0 = denoise(x, sigma)
        if not x0.requires_grad:
            raise InputError("dps needs a prior that autograd can differentiate: use red-diff")
        x0 = x0.clamp(0, 1) if clip else x0
        norms = problem.residual(x0, y).flatten(1).norm(dim=1)
        gradient = torch.autograd.grad(norms.sum(), x)[0]
    return gradient, x0.detach()
