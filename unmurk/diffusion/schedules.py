r"""Noise schedules: falling lists of noise levels sigma, in units of images in [0, 1].

Every schedule is a float64 tensor of shape (steps,), from the highest level to the lowest. A
solver or a sampler takes any falling list of positive levels; the functions here build the usual
ones:

- `karras`: even in :math:`\sigma^{1/\rho}`, the EDM schedule;
- `log_linear`: even in :math:`\log\sigma`, the limit of the EDM schedule for
  :math:`\rho\to\infty`;
- `linear_beta`: the levels of DDPM, on which the published code of RED-diff runs;
- `scheduler_levels`: the levels at which the scheduler of a diffusers pipeline was trained.
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["karras", "linear_beta", "log_linear", "scheduler_levels"]

_TIMES = 1000  # training times of DDPM


def karras(steps: int, sigma_max: float, sigma_min: float, rho: float = 7.0) -> Tensor:
    r"""Build the EDM schedule, which is even in :math:`\sigma^{1/\rho}`.

    .. math::
        \sigma_i = \Bigl(\sigma_{\max}^{1/\rho} + \frac{i}{K - 1}
            \bigl(\sigma_{\min}^{1/\rho} - \sigma_{\max}^{1/\rho}\bigr)\Bigr)^{\rho},
        \qquad i = 0, \dots, K - 1.

    Args:
        steps: Number of levels K, at least 1.
        sigma_max: The first level.
        sigma_min: The last level, above 0 and at most `sigma_max`.
        rho: Exponent of the warp. A larger one puts more levels at the low end.

    Returns:
        Falling noise levels, shape (steps,), float64.

    Raises:
        InputError: `steps` is below 1, or not sigma_max >= sigma_min > 0.

    Source: Karras et al. (2022), arXiv 2206.00364, eq. 5.

    >>> [round(sigma, 3) for sigma in karras(4, sigma_max=10.0, sigma_min=0.01).tolist()]
    [10.0, 1.936, 0.226, 0.01]
    """
    _check_levels(steps, sigma_max, sigma_min)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


def log_linear(steps: int, sigma_max: float, sigma_min: float) -> Tensor:
    r"""Build the schedule that is even in :math:`\log\sigma`: every step has the same ratio.

    .. math::
        \sigma_i = \sigma_{\max}\,(\sigma_{\min} / \sigma_{\max})^{i / (K - 1)},
        \qquad i = 0, \dots, K - 1.

    Args:
        steps: Number of levels K, at least 1.
        sigma_max: The first level.
        sigma_min: The last level, above 0 and at most `sigma_max`.

    Returns:
        Falling noise levels, shape (steps,), float64.

    Raises:
        InputError: `steps` is below 1, or not sigma_max >= sigma_min > 0.

    Source: Song and Ermon (2019), arXiv 1907.05600, section 4.1 (a geometric sequence).

    >>> log_linear(4, sigma_max=10.0, sigma_min=0.01)
    tensor([10.0000,  1.0000,  0.1000,  0.0100], dtype=torch.float64)
    """
    _check_levels(steps, sigma_max, sigma_min)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return sigma_max * (sigma_min / sigma_max) ** ramp


def linear_beta(steps: int = _TIMES) -> Tensor:
    r"""Build the schedule of DDPM, on which the published code of RED-diff runs.

    With :math:`\beta_t` linear from 1e-4 to 0.02 over 1,000 times,

    .. math::
        \bar\alpha_t = \prod_{s \le t} (1 - \beta_s), \qquad
        \sigma_t = \frac12 \sqrt{\frac{1 - \bar\alpha_t}{\bar\alpha_t}}.

    The factor 1/2 turns the levels of images in [-1, 1], on which DDPM is defined, into those of
    images in [0, 1]. The last level is that of time 0, sigma = 0.005. The first one, with all
    1,000 steps, is 78.7.

    Args:
        steps: Number of levels, a divisor of 1,000: every (1000 / steps)-th time is taken.

    Returns:
        Falling noise levels, shape (steps,), float64.

    Raises:
        InputError: `steps` does not divide 1,000.

    Source: Ho et al. (2020), arXiv 2006.11239, section 4; Mardani et al. (2023), arXiv 2305.04391.

    >>> [round(sigma, 3) for sigma in linear_beta(4).tolist()]
    [8.689, 1.721, 0.479, 0.005]
    """
    if steps < 1 or _TIMES % steps:
        raise InputError(
            f"steps is {steps}: the DDPM schedule needs a divisor of {_TIMES}, such as 100"
        )
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, _TIMES, dtype=torch.float64), 0)
    sigma = ((1 - abar) / abar).sqrt() / 2
    return sigma[:: _TIMES // steps].flip(0)


def scheduler_levels(scheduler: Any) -> Tensor:
    r"""Return the noise levels of a diffusers scheduler, rising with its time index.

    .. math:: \sigma_t = \tfrac12 \sqrt{(1 - \bar\alpha_t) / \bar\alpha_t}

    Levels at which :math:`\bar\alpha_t` is zero are left out: the network sees pure noise there.

    Args:
        scheduler: An object with `alphas_cumprod`, such as a `DDPMScheduler`.

    Returns:
        Rising noise levels in units of images in [0, 1], shape (T,), float64.

    Raises:
        InputError: Fewer than two levels, or levels that do not rise.

    >>> from types import SimpleNamespace
    >>> scheduler_levels(SimpleNamespace(alphas_cumprod=torch.tensor([0.8, 0.5, 0.2, 0.0])))
    tensor([0.2500, 0.5000, 1.0000], dtype=torch.float64)
    """
    abar = scheduler.alphas_cumprod.double()
    levels = ((1 - abar) / abar).sqrt() / 2
    levels = levels[levels.isfinite()]
    if len(levels) < 2 or float(levels[0]) <= 0 or not bool((levels.diff() > 0).all()):
        raise InputError(
            "the noise levels of the scheduler do not rise: give a scheduler whose"
            " alphas_cumprod falls from below 1"
        )
    return levels


def _check_levels(steps: int, sigma_max: float, sigma_min: float) -> None:
    """Raise InputError unless there is a step and the levels fall and stay positive."""
    if steps < 1:
        raise InputError(f"steps is {steps}: give at least 1")
    if not sigma_max >= sigma_min > 0:
        raise InputError(
            f"noise levels from {sigma_max} down to {sigma_min}: give sigma_max >= sigma_min > 0"
        )
