"""ProjDiff: RED-diff's descent with a projection, and y as an image of its own noise level.

Zhang, Zhuang, Jin, Li and Gu (2024), "Unleashing the Denoising Capability of Diffusion Prior for
Solving Inverse Problems", arXiv 2406.06959. A clean image x0 is moved toward its denoised self
along the falling levels t,

    x0  <-  x0 + rate (D(x_t, t) - x0),     x_t = x0 + t n,

RED-diff's gradient with its linear weight, and after each move is projected on A x = y.

With noise in y the paper adds a second image, x_a, that holds noise: along the right singular
vectors of A it is x0 plus noise of level r_i = sigma_y / s_i (0 where s_i = 0). Where A sees, y
fixes x_a: its coefficients are those of A^+ y. As x_a is a noisy image already, x_t is made from
it by adding what noise is missing or, at lower levels, by going back from x_a to x0:

    t >= r_i:   x_t = x_a + sqrt(t^2 - r_i^2) n            (of the noise of y, all is used)
    t <  r_i:   x_t = x0 + (t / r_i) (x_a - x0)            (a share of it, and no other noise)

Both are one formula. With w_i = min(1, t / r_i), along the directions that A sees,

    x_t = x0 + w_i (A^+ y - x0) + sqrt(t^2 - w_i^2 r_i^2) n,

which is what DDNM+ makes of x0 at total noise t (`ddnm.ddnm_correction`, Sigma_i = w_i), so that
no SVD is needed: exactly this where all s_i that are not 0 are equal, else with a smooth filter
below w_i. Where A sees nothing, x_t = x0 + t n. There the released code keeps one n for all
levels t < r in one of its two forms, and draws it anew in the other; here it is drawn anew.

The rate: while t >= r, x_t does not depend on x0 where A sees, and x0 is replaced by D(x_t), as
released (rate = 1); below r, and at all levels where y has no noise, the option counts. With
rate = 1 the whole is DDNM+ with eta = 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from ..operators.base import per_image
from ..problem import Problem
from ..rng import PerImageGenerator
from .base import Claim, CountingDenoiser, Requirement, StepCallback, randn
from .ddnm import ddnm_correction
from .start import begin

__all__ = ["ProjDiff"]


@dataclass(frozen=True)
class ProjDiff:
    """ProjDiff, with or without noise in y. One network evaluation a step, without its gradient.

    Raises:
        InputError: An option is out of its range.
    """

    name: ClassVar[str] = "projdiff"
    claims: ClassVar[Claim] = "heuristic"
    requires: ClassVar[Requirement] = "linear"

    steps: int = 100
    """Noise levels."""
    rate: float = 0.5
    """Length of a move toward the denoised image, between 0 and 2. Released, with noise: 1 for
    inpainting, 0.5 for super-resolution, 0.1 for blur; without: 1.1, 1.7 and 0.9."""
    sigma_max: float = 20.0
    """First noise level, no higher than the prior's highest."""
    sigma_min: float = 0.005
    """Last noise level."""
    init_sigma: float = 0.3
    """Where `init` is given: the level it is noised to, and the first one used."""

    def __post_init__(self) -> None:
        if not 0 < self.rate < 2:
            raise InputError(f"rate is {self.rate}: the step is stable between 0 and 2")

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
        x0 = x
        for step, t in enumerate(levels, 1):
            if step > 1:
                x = self._noised(problem, x0, y, randn(noise, x0), t, operator_norm)
            denoised = denoise(x, t)
            free = (t * operator_norm >= problem.sigma) & (problem.sigma > 0)
            rate = (
                torch.where(free, 1.0, self.rate) if step > 1 else torch.ones_like(operator_norm)
            )
            x0 = x0 + per_image(rate, x0) * (denoised - x0)
            if problem.sigma == 0:
                x0 = x0 + problem.A_dagger(problem.residual(x0, y))
            if callback(step, len(levels), t, x0, denoised):
                break
        return x0

    def _noised(
        self, problem: Problem, x0: Tensor, y: Tensor, n: Tensor, t: float, operator_norm: Tensor
    ) -> Tensor:
        """x_t (B, C, H, W) from x0 and standard normal noise n."""
        if problem.sigma == 0:
            return x0 + t * n
        mended, fresh = ddnm_correction(problem, x0, y, n, t, operator_norm)
        return mended + fresh
