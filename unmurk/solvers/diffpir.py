"""DiffPIR: denoise, fit to y, noise again.

Zhu, Zhang, Liang, Cao, Wen, Timofte and Van Gool (2023), arXiv 2305.08995, Algorithm 1. In
variance-exploding form, from each level t to the next level s,

    x0  = D(x_t, t)
    xh  = argmin_x ||y - A(x)||^2 + rho_t ||x - x0||^2,     rho_t = lambda sigma_y^2 / t^2
    e   = (x_t - xh) / t
    x_s = xh + s (sqrt(1 - zeta) e + sqrt(zeta) z),         z ~ N(0, I).

The second line, half-quadratic splitting's data step, is Bayes' rule for a Gaussian: divided by
2 sigma_y^2 it is the prox of the data around x0 with standard deviation t / sqrt(lambda), so that
lambda = 1 believes the error of x0 to be t. The fourth mixes the noise that xh predicts with fresh
noise.

Units: the ratio rho_t has no unit if sigma_y and t belong to the same images. The released code
divides a sigma_y of [0, 1] images by a t of [-1, 1] images, which is twice as large: its lambda is
4 times the lambda here.
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

__all__ = ["DiffPir"]


@dataclass(frozen=True)
class DiffPir:
    """DiffPIR, for any A. One network evaluation a step, without its gradient.

    Raises:
        InputError: An option is out of its range.
    """

    name: ClassVar[str] = "diffpir"
    claims: ClassVar[Claim] = "heuristic"
    requires: ClassVar[Requirement] = "differentiable"

    steps: int = 100
    """Noise levels. Released: 20 to 100."""
    lam: float = 1.75
    """lambda, trust in the denoised image over y: higher fits y less. Released: 7, here 7 / 4."""
    zeta: float = 0.3
    """Share of fresh noise in the variance, 0 to 1. Released: 0.1 for blur, 0.25 for
    super-resolution, 1 for inpainting."""
    sigma_max: float = 20.0
    """First noise level, no higher than the prior's highest."""
    sigma_min: float = 0.005
    """Last noise level before none."""
    noise_floor: float = 1e-3
    """Least noise level that y is believed to have, as released; 0 makes noiseless linear data
    exact."""
    data_steps: int = 10
    """Steps of the inner data fit where the operator is not linear."""
    init_sigma: float = 0.3
    """Where `init` is given: the level it is noised to, and the first one used."""

    def __post_init__(self) -> None:
        if not self.lam > 0:
            raise InputError(f"lam is {self.lam}: the weight of the denoised image is above 0")
        if not 0 <= self.zeta <= 1:
            raise InputError(f"zeta is {self.zeta}: a share of fresh noise is between 0 and 1")
        if self.noise_floor < 0:
            raise InputError(f"noise_floor is {self.noise_floor}: a noise level is 0 or more")

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
        sigma_eff = max(problem.sigma, self.noise_floor)
        for step, (t, s) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True), 1):
            x0 = denoise(x, t)
            fitted = prox(problem, x0, y, t / math.sqrt(self.lam), sigma_eff, self.data_steps)
            e = (x - fitted) / t
            z = randn(noise, x)
            x = fitted + s * (math.sqrt(1 - self.zeta) * e + math.sqrt(self.zeta) * z)
            if callback(step, len(levels), t, x, x0):
                break
        return x
