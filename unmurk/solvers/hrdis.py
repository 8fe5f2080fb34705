"""HRDIS: RED-diff whose noise follows the network's own guess from level to level.

Dou, Li, Du, Yang, Yao and Deng (2025), "Hybrid Regularization Improves Diffusion-based Inverse
Problem Solving", ICLR, with the settings of the released code. The point mu of RED-diff
(`red_diff`) is noised, at each level sigma of the linear-beta grid, not by fresh noise alone but
by

    e        = sqrt(1 - beta) eps_before + sqrt(beta) z,      z ~ N(0, I),
    eps_hat  = (mu + sigma e - D(mu + sigma e, sigma)) / sigma,

with eps_before the eps_hat of the level before (z itself at the first level, where mu stays as it
is). One Adam step is then taken against the gradient of RED-diff's loss,

    loss(u) = v/2 mean((y_u - A(u))^2) + lambda g(sg) mean(stop[eps_hat - e] u),    u = 2 mu - 1,

in units of [-1, 1] as in `RedDiffPaper`. beta = 1 is RED-diff ("denoising regularisation", whose
draws blur mu over modes); beta = 0 walks along one path of the deterministic reverse diffusion
("consistency regularisation"); between them is the hybrid. As in RED-diff the weights know nothing
of the noise in y.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..diffusion.schedules import linear_beta
from ..errors import InputError
from ..problem import Problem
from ..rng import PerImageGenerator
from .base import Claim, CountingDenoiser, Requirement, StepCallback, randn
from .optimise import Adam
from .red_diff_paper import WEIGHTS, Weight, data_slope, prior_slope
from .start import pseudo_inverse

__all__ = ["Hrdis"]


@dataclass(frozen=True)
class Hrdis:
    """HRDIS. One network evaluation a step, without its gradient.

    Returned is, as released, the image before the last Adam step. It starts from the
    pseudo-inverse; an operator without one needs `init`.

    Raises:
        InputError: An option is out of its range, or the operator has no pseudo-inverse.
    """

    name: ClassVar[str] = "hrdis"
    claims: ClassVar[Claim] = "heuristic"
    requires: ClassVar[Requirement] = "differentiable"

    steps: int = 100
    """Levels of the linear-beta grid, a divisor of 1000."""
    beta: float = 0.2
    """Share of fresh noise in the variance, 0 to 1. Released: 0.2."""
    lam: float = 0.25
    """lambda, the weight of the prior. Released: 0.25, and 0.2 for super-resolution."""
    lr: float = 0.1
    """Adam's step, in units of [-1, 1] images. Released: 0.1, and 0.5 for super-resolution."""
    obs_weight: float = 1.0
    """v, the weight of the data. Released: 1, and 0.02 for nonlinear blur (with weight const)."""
    weight: Weight = "linear"
    """g, how the prior's term depends on the noise level; see `RedDiffPaper`."""

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise InputError(f"beta is {self.beta}: a share of fresh noise is between 0 and 1")
        if self.weight not in WEIGHTS:
            raise InputError(f"weight '{self.weight}': choose from {', '.join(WEIGHTS)}")

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
        u = 2 * pseudo_inverse(y, problem, x) - 1
        adam, guess = Adam(self.lr), randn(noise, u)
        for step, sigma in enumerate(linear_beta(self.steps).tolist(), 1):
            x0 = (u + 1) / 2
            e = guess
            if step > 1:
                e = math.sqrt(1 - self.beta) * e + math.sqrt(self.beta) * randn(noise, u)
            noisy = x0 + sigma * e
            denoised = denoise(noisy, sigma)
            guess = (noisy - denoised) / sigma
            if step > 1:
                u = adam(u, partial(self._slope, problem, y, denoised, sigma))
            if callback(step, self.steps, sigma, x0, denoised):
                break
        return x0

    def _slope(
        self, problem: Problem, y: Tensor, denoised: Tensor, sigma: float, u: Tensor
    ) -> Tensor:
        """Gradient in u of the loss of one step, whose denoised image is fixed."""
        x0 = (u + 1) / 2
        prior = prior_slope(x0, denoised, sigma, self.lam, self.weight)
        return self.obs_weight * data_slope(problem, x0, y) + prior
