"""The noise levels of the released RED-diff, from high to low, in the units of [0, 1] images.

    Ho et al. (2020), arXiv 2006.11239: beta_t linear from 1e-4 to 0.02 over 1000 times,
        abar_t = prod_{s <= t} (1 - beta_s),   sg_t = sqrt((1 - abar_t) / abar_t).

It is defined on images in [-1, 1], where a noise level is twice as large: sigma_t = sg_t / 2. (The
EDM grid of our own solvers is `unmurk.diffusion.prior.karras`.)
"""

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["linear_beta"]

_TIMES = 1000


def linear_beta(steps: int = _TIMES) -> Tensor:
    """The released DDPM grid, descending: every (1000 / steps)-th of 1000 times; (steps,) float64.

    The last level is that of time 0, sigma = 0.005; the first, with all 1000 steps, is 78.7.

    Raises:
        InputError: `steps` does not divide 1000.
    """
    if steps < 1 or _TIMES % steps:
        raise InputError(f"steps is {steps}: the released grid needs a divisor of {_TIMES}")
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, _TIMES, dtype=torch.float64), 0)
    sigma = ((1 - abar) / abar).sqrt() / 2
    return sigma[:: _TIMES // steps].flip(0)
