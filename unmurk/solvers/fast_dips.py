"""FAST-DIPS: the image nearest to the denoised one that fits y to within its noise.

Kim, Shin and Lim (2026), arXiv 2603.01591, the form in pixels. From each falling level t to the
next level s,

    x0  = D(x_t, t)
    w   = argmin_x ||x - x0||^2 / (2 t^2)   subject to   ||y - A(x)|| <= eps,  x in [0, 1]
    x_s = w + s n,                                                              n ~ N(0, I)

where the constrained fit is approached by some turns of ADMM, v = A(w) being held in the ball B of
radius eps around y and u the scaled multiplier:

    w = argmin_x ||x - x0||^2 / (2 t^2) + rho/2 ||A(x) - (v - u)||^2,    clipped to [0, 1]
    v = the point of B nearest to A(w) + u
    u = u + A(w) - v,                             from v = the point of B nearest to A(x0), u = 0.

The fit of w is exact where A is linear; else it is the paper's: steepest descent with the length
of Gauss and Newton along the gradient, halved until it does not go uphill (`base.prox`).

Here eps = radius sigma_y sqrt(m) for m measured values, so that radius = 1 fits y as well as the
truth does. Released is eps = 0.05 whatever the noise is, next to nothing: radius 0. Returned is
the last w; released is the last x0, which does not know y's last word.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from ..operators.base import per_image
from ..problem import Problem
from ..rng import PerImageGenerator
from .base import Claim, CountingDenoiser, Requirement, StepCallback, prox, randn
from .start import begin

__all__ = ["FastDips"]


@dataclass(frozen=True)
class FastDips:
    """FAST-DIPS, for any A. One network evaluation a step, without its gradient.

    Raises:
        InputError: An option is out of its range.
    """

    name: ClassVar[str] = "fast-dips"
    claims: ClassVar[Claim] = "heuristic"
    requires: ClassVar[Requirement] = "differentiable"

    steps: int = 75
    """Noise levels. Released: 75, for blur 50, for nonlinear operators 150."""
    rho: float = 200.0
    """Weight of A(x) = v. Released: 200, for clipped intensities 5."""
    radius: float = 0.0
    """eps in units of the misfit that the truth has."""
    iterations: int = 3
    """Turns of ADMM at each level. Released: 2 or 3."""
    data_steps: int = 5
    """Steps of descent in each turn where the operator is not linear. Released: 1 to 5."""
    sigma_max: float = 20.0
    """First noise level, no higher than the prior's highest. Released: 50."""
    sigma_min: float = 0.05
    """Last noise level. Released: 0.05."""
    init_sigma: float = 0.3
    """Where `init` is given: the level it is noised to, and the first one used."""

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise InputError(f"turns is {self.iterations}: at least 1 is needed")
        if not self.rho > 0:
            raise InputError(f"rho is {self.rho}: the weight of the data is above 0")
        if self.radius < 0:
            raise InputError(f"radius is {self.radius}: a radius is 0 or more")

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
        for step, (t, s) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True), 1):
            x0 = denoise(x, t)
            w = self._fit(problem, x0, y, t)
            x = w + s * randn(noise, w)
            if callback(step, len(levels), t, w, x0):
                break
        return w

    def _fit(self, problem: Problem, x0: Tensor, y: Tensor, t: float) -> Tensor:
        """w, (B, C, H, W), near x0 and with a misfit of eps or less."""
        eps = self.radius * problem.sigma * problem.measurements(y).sqrt()
        v, u = _onto(problem, problem.A(x0), y, eps), torch.zeros_like(y)
        for _ in range(self.iterations):
            w = prox(problem, x0, v - u, t, self.rho**-0.5, self.data_steps).clamp(0, 1)
            observed = problem.A(w)
            v = _onto(problem, observed + u, y, eps)
            u = problem.operator.apply_mask(u + observed - v)
        return w


def _onto(problem: Problem, v: Tensor, y: Tensor, eps: Tensor) -> Tensor:
    """The point nearest to v in the ball of radius eps (B,) around y, shape of y."""
    away = problem.operator.apply_mask(v - y)
    share = (eps / away.flatten(1).norm(dim=1).clamp_min(1e-12)).clamp_max(1)
    return y + per_image(share, y) * away
