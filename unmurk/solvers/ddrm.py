"""DDRM: the reverse diffusion, direction by direction of what A passes.

Kawar, Elad, Ermon and Song (2022), arXiv 2201.11793, eqs. 4, 7 and 8. With A = U diag(s) V^T, a
bar for coordinates (x_bar = V^T x for images, y_bar_i = (U^T y)_i / s_i), and x0 = D(x_t, t), a
direction goes from level t to the next level t' by one of three rules:

    s = 0                 x_bar' = x0_bar + sqrt(1 - eta^2) t' (x_bar - x0_bar) / t + eta t' z
    t' < sigma_y / s      x_bar' = x0_bar + sqrt(1 - eta^2) t' (y_bar - x0_bar) / (sigma_y / s)
                                   + eta t' z
    t' >= sigma_y / s     x_bar' = (1 - eta_b) x0_bar + eta_b y_bar
                                   + sqrt(t'^2 - (eta_b sigma_y / s)^2) z

The first two are one rule with two guesses of the noise: that in x_t, and, where y knows better,
that in y, (U^T y - s x0_bar) / sigma_y. The third is for levels above the noise that y brings with
it: y itself takes the place of x0. It also makes the first image (with eta_b = 1 on a blank one).

Without noise in y the third holds wherever s > 0, and A x = y in the end; directions that pass
with less than CUTOFF of the strongest count as unseen then, as they do in A^+.

Where it meets DDNM (`ddnm`): without noise, eta = eta_b = 1, the steps are the same. With noise
and all s that are not 0 equal, DDNM+ takes the third rule as it is and the second with eta = 0.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..diffusion.schedules import linear_beta
from ..errors import InputError
from ..operators.base import per_image
from ..operators.blur import CUTOFF
from ..operators.linalg import Spectrum
from ..problem import Problem
from ..rng import PerImageGenerator
from .base import Claim, CountingDenoiser, Requirement, StepCallback, randn
from .start import centre, ladder

__all__ = ["Ddrm", "DdrmPaper", "ddrm_step"]

GRIDS = ("linear", "karras", "linear-beta")


@dataclass(frozen=True)
class Ddrm:
    """DDRM. One network evaluation a step, without its gradient.

    It needs the singular value decomposition of A (`Operator.svd`), which chains, kernels that
    are no product of a column and a row, and users' own operators have for small images only.

    Raises:
        InputError: An option is out of its range, or the operator has no decomposition at hand.
    """

    name: ClassVar[str] = "ddrm"
    claims: ClassVar[Claim] = "heuristic"
    requires: ClassVar[Requirement] = "linear"

    steps: int = 20
    """Noise levels, as published."""
    eta: float = 0.85
    """Share of fresh noise, 0 to 1, where y is of no use or noisier than the level. Published."""
    eta_b: float = 1.0
    """Share of y in the mean, 0 to 1, where the level is above the noise of y. Published."""
    grid: Literal["linear", "karras", "linear-beta"] = "linear"
    """Levels in equal steps, on the grid of Karras et al. (2022, arXiv 2206.00364, eq. 5), or the
    released ones, every (1000 / steps)-th of the DDPM schedule, whatever `sigma_max` and
    `sigma_min` are (there `steps` is a divisor of 1000)."""
    sigma_max: float = 1.0
    """First noise level, no higher than the prior's highest."""
    sigma_min: float = 0.01
    """Last noise level before none."""
    init_sigma: float = 0.3
    """Where `init` is given: the level it is noised to, and the first one used."""

    def __post_init__(self) -> None:
        for name in ("eta", "eta_b"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}: it is between 0 and 1")
        if self.grid not in GRIDS:
            raise InputError(f"grid '{self.grid}': choose from {', '.join(GRIDS)}")

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
        levels = self._levels(denoise, None if x is None else self.init_sigma)
        x = centre(y, problem, x)
        spectrum = problem.operator.svd(x)
        y_bar = spectrum.measured(problem.operator.apply_mask(y))

        def go(x: Tensor, x0: Tensor, t: float, s: float, eta: float, eta_b: float) -> Tensor:
            z = randn(noise, x)
            return ddrm_step(spectrum, y_bar, problem.sigma, x, x0, t, s, z, eta, eta_b)

        x = go(x, x, levels[0], levels[0], 1.0, 1.0)
        for step, (t, s) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True), 1):
            x0 = denoise(x, t)
            x = go(x, x0, t, s, self.eta, self.eta_b)
            if callback(step, len(levels), t, x, x0):
                break
        return x

    def _levels(self, denoise: CountingDenoiser, init_sigma: float | None) -> list[float]:
        """Falling noise levels; from `init_sigma` on where an image is given."""
        if self.grid == "linear-beta":
            most = min(init_sigma or math.inf, denoise.sigma_max)
            levels = linear_beta(self.steps).tolist()
            return [level for level in levels if level <= most] or levels[-1:]
        span = (self.sigma_max, self.sigma_min)
        levels = ladder(denoise, self.steps, span, init_sigma)
        if self.grid == "linear":
            return torch.linspace(levels[0], levels[-1], self.steps).tolist()
        return levels


@dataclass(frozen=True)
class DdrmPaper(Ddrm):
    """DDRM on the released levels."""

    grid: Literal["linear", "karras", "linear-beta"] = "linear-beta"


def ddrm_step(
    spectrum: Spectrum,
    y_bar: Tensor,
    sigma_y: float,
    x: Tensor,
    x0: Tensor,
    t: float,
    s: float,
    z: Tensor,
    eta: float,
    eta_b: float,
) -> Tensor:
    """x at level s, (B, C, H, W).

    Args:
        spectrum: A = U diag(gain) V^T.
        y_bar: U^T y, not divided by the singular values.
        sigma_y: Noise level of y.
        x: Images (B, C, H, W) at level t.
        x0: D(x, t).
        z: Standard normal noise (B, C, H, W).
    """
    gain = spectrum.s
    weakest = 0.0 if sigma_y > 0 else CUTOFF * gain.flatten(1).amax(1)
    observed = gain > per_image(weakest, gain)
    clean, e, z = (spectrum.into(image) for image in (x0, (x - x0) / t, z))
    if sigma_y > 0:
        e = torch.where(observed, (y_bar - gain * clean) / sigma_y, e)
    follow = clean + s * (math.sqrt(1 - eta**2) * e + eta * z)

    inverse = torch.where(observed, 1 / torch.where(observed, gain, 1.0), 0.0)
    fresh = (s**2 - (eta_b * sigma_y * inverse).square()).clamp_min(0).sqrt()
    replace = (1 - eta_b) * clean + eta_b * inverse * y_bar + fresh * z
    return spectrum.out(torch.where(observed & (s * gain >= sigma_y), replace, follow))
