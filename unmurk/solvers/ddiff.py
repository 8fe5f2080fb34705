"""DDiff: DiffPIR with a memory of what the denoiser and y disagree on.

Kim, Levy and Wetzstein (2025), "Dual Ascent Diffusion for Inverse Problems", arXiv 2505.17353,
eqs. 6 and 10 to 12. ADMM on min -log p(y | x) - log p(z) subject to x = z, with the denoiser in
place of the step in z, and the scaled multiplier u. From each level t to the next level s,

    z   = D(x_t, t), clipped to [0, 1]
    v   = argmin_x ||y - A(x)||^2 / (2 sigma_y^2) + ||x - (z - u)||^2 / (2 r^2),   r^2 = t^2 / lam
    e   = (x_t - v) / t
    x_s = v + u + s (sqrt(1 - zeta) e + sqrt(zeta) n),          n ~ N(0, I)
    u   <- (s / t)^rescale (u + v - z).

With u = 0 it is DiffPIR. In ADMM z would be the denoised v + u; here v + u first gets the noise of
level s, so that the network sees what it has learnt to see. Returned is the last v.

Where this differs from the released code:

- v is the exact minimum where A is linear, and the noise of y sets its weight. Released is one
  step from z - u along the gradient, of a length given for each task (2.5 to 50 in the norm of a
  whole image of 256 x 256 x 3, times 3.3, and a thirtieth of that at the last 9 % of levels).
- u is the scaled multiplier, u = r^2 mu with the multiplier mu itself, and r falls from level to
  level: rescale = 2 keeps mu, 0 keeps u. Released is 0, with which the exact v lets u grow: while
  r is far above sigma_y, u gains y - z where y sees, again and again.
- zeta = 1 is released for inpainting and super-resolution; for other linear tasks the share of
  fresh noise is 1 - (s / t)^2, and none at the last 5 to 8 % of 1000 levels.
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

__all__ = ["Ddiff"]


@dataclass(frozen=True)
class Ddiff:
    """Dual ascent diffusion, for any A. One network evaluation a step, without its gradient.

    Raises:
        InputError: An option is out of its range.
    """

    name: ClassVar[str] = "ddiff"
    claims: ClassVar[Claim] = "heuristic"
    requires: ClassVar[Requirement] = "differentiable"

    steps: int = 100
    """Noise levels. (Released: 1000.)"""
    lam: float = 1.0
    """lambda, trust in the denoised image over y, as for `diffpir`: higher fits y less. 1 believes
    the error of the denoised image to be t."""
    zeta: float = 1.0
    """Share of fresh noise in the variance, 0 to 1."""
    rescale: float = 1.0
    """What becomes of u as r falls: 0 keeps u (released), 2 keeps the multiplier (ADMM). Between
    them, 1 did best with a learned prior."""
    sigma_max: float = 20.0
    """First noise level, no higher than the prior's highest."""
    sigma_min: float = 0.005
    """Last noise level before none."""
    noise_floor: float = 1e-3
    """Least noise level that y is believed to have; 0 makes noiseless linear data exact."""
    data_steps: int = 10
    """Steps of the inner data fit where the operator is not linear."""
    init_sigma: float = 0.3
    """Where `init` is given: the level it is noised to, and the first one used."""

    def __post_init__(self) -> None:
        if not self.lam > 0:
            raise InputError(f"lam is {self.lam}: the weight of the denoised image is above 0")
        if not 0 <= self.zeta <= 1:
            raise InputError(f"zeta is {self.zeta}: a share of fresh noise is between 0 and 1")
        if not 0 <= self.rescale <= 2:
            raise InputError(f"rescale is {self.rescale}: it goes from 0 (u kept) to 2 (mu kept)")
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
        sigma_eff, u = max(problem.sigma, self.noise_floor), torch.zeros_like(x)
        for step, (t, s) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True), 1):
            z = denoise(x, t).clamp(0, 1)
            v = prox(problem, z - u, y, t / math.sqrt(self.lam), sigma_eff, self.data_steps)
            e, n = (x - v) / t, randn(noise, x)
            x = v + u + s * (math.sqrt(1 - self.zeta) * e + math.sqrt(self.zeta) * n)
            u = (s / t) ** self.rescale * (u + v - z)
            if callback(step, len(levels), t, v, z):
                break
        return v
