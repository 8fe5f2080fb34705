"""RED-diff whose samples spread as the posterior does, at no further cost.

Where all is Gaussian a posterior can be sampled by optimising (the randomize-then-optimize of
Bardsley, Solonen, Haario and Laine, 2014; Papandreou and Yuille, 2010): with the data at
y + sigma_y n' and a random force of covariance H, the prior's precision, added to the gradient of
-log p, the minimiser is an exact draw. A denoiser gives neither H nor its root, but the pairs
mu + sg e, mu - sg e of RED-diff hold them. For a prior N(m, S) their odd half is

    d = sg e - (D(mu + sg e) - D(mu - sg e)) / 2 = sg^2 (S + sg^2)^-1 sg e,

and since 2 int_s^inf t (S + t^2)^-2 dt = (S + s^2)^-1, the sum over the levels passed so far,

    f = sum_k sqrt(2 log(s_{k-1} / s_k)) d_k / s_k^2,      Cov f = (S + s^2)^-1,

is at every level a force of just the precision of the prior blurred by that level. (Above the
first level s_1 the prior counts for nothing, and n / s_1 stands for what is missing of the sum.)
So each sample keeps its n' and its f, and takes the steps of RED-diff,

    z  = mu + h - mu + s^2 f
    mu = argmin_x ||y + sigma_y n' - A x||^2 / (2 sigma_y^2) + ||x - z||^2 / (2 s^2),

the first of them begun at momentum times the last change beyond mu, which halves how far mu lags
behind the falling levels. With any other prior S is local: the covariance that the denoiser sees
around mu. The spread is then that of a Gaussian fitted at each level, from wide to narrow; modes
are chosen with nearly, not exactly, their weights.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..diffusion.prior import karras
from ..errors import InputError
from ..problem import Problem
from ..rng import PerImageGenerator
from .base import Claim, CountingDenoiser, Requirement, StepCallback, prox, randn
from .start import grey

__all__ = ["RedDiffSpread"]


@dataclass(frozen=True)
class RedDiffSpread:
    """Perturbed RED-diff: every sample from its own data and prior. Two evaluations a step.

    The mean of many samples takes the place of the default's point. `init` replaces the grey start
    alone: the levels begin at the highest all the same, since the force has to.

    Raises:
        InputError: An option is out of its range.
    """

    name: ClassVar[str] = "red-diff"
    claims: ClassVar[Claim] = "heuristic"
    requires: ClassVar[Requirement] = "differentiable"

    steps: int = 50
    """Noise levels. Each costs two network evaluations."""
    sigma_max: float = 5.0
    """First noise level, no higher than the prior's highest; well above the prior's spread."""
    sigma_min: float = 0.01
    """Last noise level."""
    momentum: float = 0.5
    """How much of the last change of mu is added before a step, 0 to below 1."""
    noise_floor: float = 1e-3
    """Least noise level that y is believed to have."""
    data_steps: int = 10
    """Steps of the inner data fit where the operator is not linear."""

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum is {self.momentum}: it is stable from 0 to below 1")
        if self.noise_floor <= 0:
            raise InputError(f"noise_floor is {self.noise_floor}: it must be > 0")

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
        first = max(min(self.sigma_max, denoise.sigma_max), self.sigma_min)
        levels = karras(self.steps, first, self.sigma_min).tolist()
        y = y + sigma_eff * randn(noise, y)
        mu = grey(y, problem) if x is None else x
        before, force = mu, randn(noise, mu) / first
        for step, (last, s) in enumerate(zip([first, *levels], levels, strict=False), 1):
            ahead = mu + (self.momentum if step > 2 else 0.0) * (mu - before)
            before, e = mu, s * randn(noise, mu)
            plus, minus = denoise(ahead + e, s), denoise(ahead - e, s)
            h, odd = (plus + minus) / 2, e - (plus - minus) / 2
            force = force + math.sqrt(2 * math.log(last / s)) * odd / s**2
            mu = prox(problem, h + s**2 * force, y, s, sigma_eff, self.data_steps)
            if callback(step, self.steps, s, mu, h):
                break
        return mu
