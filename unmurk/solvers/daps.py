"""DAPS: decoupled annealing, in which one level's image is not a step away from the last one's.

Zhang, Chu, Berner, Meng, Anandkumar and Song (2024), arXiv 2407.01521, Algorithm 1. At each of the
falling noise levels t, with s the next one,

    x0hat  <-  the probability flow from x_t to zero noise, a few steps of it
    x0     ~   N(x0; x0hat, r^2 I) N(y; A(x0), sigma_y^2 I),    r = spread * t
    x_s    =   x0 + s n

so that x_t and x_s share no noise, and errors of early levels can be undone. A Gaussian around
x0hat stands for p(x0 | x_t), and its width knows nothing of the prior. With a flow of one step,
x0hat = D(x_t), a pixel that y does not see moves by x_s = x_t + t^2 score + (t^2 + s^2)^1/2 n,
which is Langevin dynamics on the diffused prior: Gaussian posteriors get nearly the right spread.
With longer flows they come out too wide, by up to a half where the prior is narrow.

x0 is drawn by perturbing and optimising, x0 = prox(x0hat + r n, y + sigma_y n'). For a linear A
this is exact. For any other it is the randomize-then-optimize of Bardsley, Solonen, Haario and
Laine (2014), without its correcting weights, where the paper runs Langevin dynamics: A is called
as often, and there is no step size to be found for each task.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..diffusion.prior import karras
from ..errors import InputError
from ..problem import Problem
from ..rng import PerImageGenerator
from .base import Claim, CountingDenoiser, Requirement, StepCallback, prox, randn
from .start import begin

__all__ = ["Daps", "flow"]


@dataclass(frozen=True)
class Daps:
    """Decoupled annealing posterior sampling. No gradient goes through the network.

    Raises:
        InputError: An option is out of its range.
    """

    name: ClassVar[str] = "daps"
    claims: ClassVar[Claim] = "heuristic"
    requires: ClassVar[Requirement] = "differentiable"

    steps: int = 100
    """Noise levels of the annealing. (Paper: 200.)"""
    flow_steps: int = 1
    """Network evaluations of each probability flow; 1 takes the denoised image. (Paper: 5.)"""
    data_steps: int = 20
    """Steps of the inner data fit where the operator is not linear."""
    spread: float = 1.0
    """r in units of the noise level, how far x0hat is trusted."""
    sigma_max: float = 5.0
    """First noise level, no higher than the prior's highest."""
    sigma_min: float = 0.01
    """Last noise level."""
    noise_floor: float = 1e-3
    """Least noise level that y is believed to have."""
    init_sigma: float = 0.3
    """Where `init` is given: the level it is noised to, and the first one used."""

    def __post_init__(self) -> None:
        if self.flow_steps < 1:
            raise InputError(f"flow_steps is {self.flow_steps}: at least 1 is needed")
        if self.spread <= 0 or self.noise_floor <= 0:
            raise InputError(
                f"spread is {self.spread}, noise_floor {self.noise_floor}: both must be > 0"
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
        span = self.sigma_max, self.sigma_min
        levels, x = begin(y, problem, denoise, x, noise, self.steps, span, self.init_sigma)
        for step, (t, s) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True), 1):
            x0hat, r = flow(denoise, x, t, self.flow_steps), self.spread * t
            around = x0hat + r * randn(noise, x)
            x0 = prox(
                problem, around, y + sigma_eff * randn(noise, y), r, sigma_eff, self.data_steps
            )
            x = x0 + s * randn(noise, x) if s > 0 else x0
            if callback(step, len(levels), t, x0, x0hat):
                break
        return x0


def flow(denoise: Callable[[Tensor, float], Tensor], x: Tensor, t: float, steps: int) -> Tensor:
    """The probability flow from level t to zero, (B, C, H, W), by Euler steps in the level.

    dx/dt = (x - D(x, t)) / t (Karras et al. 2022, arXiv 2206.00364, eqs. 1 and 3).
    """
    levels = karras(steps, t, t / 10).tolist()
    for high, low in zip(levels, [*levels[1:], 0.0], strict=True):
        x = x + (low - high) / high * (x - denoise(x, high))
    return x
