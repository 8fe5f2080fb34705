r"""DDRM: the reverse diffusion in the singular directions of A.

Kawar, Elad, Ermon and Song (2022), arXiv 2201.11793, eqs. 4, 7 and 8. With :math:`A = U
\operatorname{diag}(s) V^\top`, a bar for coordinates (:math:`\bar x = V^\top x` for images,
:math:`\bar y_i = (U^\top y)_i/s_i`), and :math:`x_0 = D(x_t, t)`, a direction goes from level t to
the next level t' by one of three rules:

.. math::
    s = 0:\quad & \bar x' = \bar x_0 + \sqrt{1-\eta^2}\,t'\,(\bar x - \bar x_0)/t + \eta t' z \\
    t' < \sigma_y/s:\quad & \bar x' = \bar x_0
        + \sqrt{1-\eta^2}\,t'\,(\bar y - \bar x_0)/(\sigma_y/s) + \eta t' z \\
    t' \ge \sigma_y/s:\quad & \bar x' = (1-\eta_b)\,\bar x_0 + \eta_b\,\bar y
        + \sqrt{t'^2 - (\eta_b \sigma_y/s)^2}\,z

The first two are one rule with two estimates of the noise: that in :math:`x_t`, and, where y is
more accurate, that in y, :math:`(U^\top y - s \bar x_0)/\sigma_y`. The third is for levels above
the noise of y: y itself replaces :math:`x_0`. It also makes the first image (with :math:`\eta_b =
1` on a gray one).

Without noise in y the third rule holds wherever s > 0, and finally A x = y. Directions with less
than CUTOFF of the largest singular value then count as unmeasured, as they do in :math:`A^+`.

Relation to DDNM (`ddnm`): without noise and with :math:`\eta = \eta_b = 1`, the steps are equal.
With noise and all nonzero s equal, DDNM+ takes the third rule as it is and the second with
:math:`\eta = 0`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..diffusion.schedules import linear_beta
from ..operators.base import per_image
from ..operators.blur import CUTOFF
from ..operators.linalg import Spectrum
from .base import AnnealedSolver, Fraction, Level, Requirement, Steps
from .state import State, gray

__all__ = ["Ddrm", "DdrmPaper", "ddrm_step"]


@dataclass(frozen=True, kw_only=True)
class Ddrm(AnnealedSolver):
    """DDRM. A step takes one network evaluation and no gradient.

    It needs the singular value decomposition of A (`Operator.svd`), which compositions, kernels
    that are not separable, and users' own operators have for small images only.

    Raises:
        InputError: An option is out of its bounds, or the operator has no decomposition.

    >>> Ddrm(grid="karras").steps
    20
    """

    name: ClassVar[str] = "ddrm"
    requires: ClassVar[Requirement] = "linear"
    citation: ClassVar[str] = """@inproceedings{kawar2022ddrm,
  title = {Denoising Diffusion Restoration Models},
  author = {Kawar, Bahjat and Elad, Michael and Ermon, Stefano and Song, Jiaming},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2022},
  eprint = {2201.11793},
  archiveprefix = {arXiv}
}"""

    steps: Steps = 20
    """Noise levels, as published."""
    eta: Fraction = 0.85
    """Fraction of fresh noise, 0 to 1, where y is unused or noisier than the level. Published."""
    eta_b: Fraction = 1.0
    """Weight of y in the mean, 0 to 1, where the level is above the noise of y. Published."""
    grid: Literal["linear", "karras", "linear-beta"] = "linear"
    """Levels in equal steps, on the grid of Karras et al. (2022, arXiv 2206.00364, eq. 5), or the
    released ones: every (1000 / steps)-th level of the DDPM schedule, whatever `sigma_max` and
    `sigma_min` are (there `steps` is a divisor of 1000)."""
    sigma_max: Level = 1.0
    """First noise level, no higher than the prior's highest."""
    sigma_min: Level = 0.01
    """Last noise level before 0."""

    def schedule(self, state: State, init: bool) -> list[float]:
        """See `Solver.schedule`."""
        if self.grid == "linear-beta":
            most = min(self.init_sigma if init else math.inf, state.denoise.sigma_max)
            levels = linear_beta(self.steps).tolist()
            return [level for level in levels if level <= most] or levels[-1:]
        levels = super().schedule(state, init)
        if self.grid == "linear":
            return torch.linspace(levels[0], levels[-1], self.steps).tolist()
        return levels

    def start(self, state: State, init: Tensor | None) -> None:
        """See `Solver.start`."""
        state.levels = self.noise_levels(state, init is not None)
        x = gray(state.y, state.problem) if init is None else init
        operator = state.problem.operator
        spectrum = state.memory.spectrum = operator.svd(x)
        state.memory.y_bar = spectrum.measured(operator.apply_mask(state.y))
        first = state.levels[0]
        state.x = state.x_t = self._move(state, x, x, first, first, 1.0, 1.0)

    def step(self, state: State) -> None:
        """See the equations of this module."""
        t, s = state.sigma, state.sigma_next
        x0 = state.denoised = state.denoise(state.x_t, t)
        state.x = state.x_t = self._move(state, state.x_t, x0, t, s, self.eta, self.eta_b)

    def _move(
        self, state: State, x: Tensor, x0: Tensor, t: float, s: float, eta: float, eta_b: float
    ) -> Tensor:
        spectrum, y_bar, sigma_y = state.memory.spectrum, state.memory.y_bar, state.problem.sigma
        return ddrm_step(spectrum, y_bar, sigma_y, x, x0, t, s, state.randn(x), eta, eta_b)


@dataclass(frozen=True, kw_only=True)
class DdrmPaper(Ddrm):
    """DDRM on the released levels.

    >>> from unmurk import Problem, solve
    >>> y, problem = torch.full((1, 1, 2, 2), 0.5), Problem("identity", 0.1)
    >>> result = solve(y, problem, lambda x, sigma: x / (1 + sigma**2), DdrmPaper(steps=4))
    >>> [round(step["sigma"], 3) for step in result.trace]  # those of `linear_beta`
    [8.689, 1.721, 0.479, 0.005]
    """

    name: ClassVar[str] = "ddrm"

    grid: Literal["linear", "karras", "linear-beta"] = "linear-beta"
    """See `Ddrm`."""


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
    r"""Take the step of DDRM from level t to level s.

    Args:
        spectrum: :math:`A = U \operatorname{diag}(\text{gain}) V^\top`.
        y_bar: :math:`U^\top y`, not divided by the singular values.
        sigma_y: Noise level of y.
        x: Images (B, C, H, W) at level t.
        x0: Denoised images D(x, t).
        t: Noise level of x.
        s: Next noise level.
        z: Standard normal noise (B, C, H, W).
        eta: Fraction of fresh noise, 0 to 1.
        eta_b: Weight of y in the mean, 0 to 1.

    Returns:
        Images (B, C, H, W) at level s.

    >>> from unmurk.operators import parse
    >>> zero, one = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
    >>> spectrum = parse("identity").svd(zero)
    >>> y_bar = spectrum.measured(one)
    >>> # 1 + (0.5^2 - 0.3^2)^0.5
    >>> ddrm_step(spectrum, y_bar, 0.3, zero, zero, 1.0, 0.5, one, eta=0.85, eta_b=1.0)
    tensor([[[[1.4000, 1.4000]]]])
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
