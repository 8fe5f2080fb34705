"""Where a reverse diffusion begins: its noise levels, and the first noisy image.

Levels fall along the grid of Karras et al. (2022), arXiv 2206.00364, eq. 5
(`unmurk.diffusion.samplers.karras`). The first image is grey, with noise on it that drowns any
image; or it is a given image, with noise on it of a lower level, about as large as its error.
"""

import torch
from torch import Tensor

from ..diffusion.prior import karras
from ..errors import InputError
from ..problem import Problem
from ..rng import PerImageGenerator
from .base import CountingDenoiser, randn

__all__ = ["begin", "centre", "grey", "ladder", "pseudo_inverse"]


def begin(
    y: Tensor,
    problem: Problem,
    denoise: CountingDenoiser,
    x: Tensor | None,
    noise: PerImageGenerator,
    steps: int,
    span: tuple[float, float],
    init_sigma: float,
) -> tuple[list[float], Tensor]:
    """The levels, falling, and images (B, C, H, W) at the first of them, from one draw of noise.

    Args:
        y: Measurements (B, ...), whose type and device are taken.
        x: Images to start from (B, C, H, W), or None for grey.
        steps: How many levels.
        span: Highest level, no higher used than the prior knows, and lowest.
        init_sigma: Highest level where x is given.

    Raises:
        InputError: steps < 1, or the levels are not positive.
    """
    levels = ladder(denoise, steps, span, None if x is None else init_sigma)
    x = centre(y, problem, x)
    return levels, x + levels[0] * randn(noise, x)


def ladder(
    denoise: CountingDenoiser, steps: int, span: tuple[float, float], init_sigma: float | None
) -> list[float]:
    """The levels alone; `init_sigma` is None where no image is given."""
    highest, lowest = span
    first = highest if init_sigma is None else init_sigma
    first = max(min(first, denoise.sigma_max), lowest)
    return karras(steps, first, lowest).tolist()


def centre(y: Tensor, problem: Problem, x: Tensor | None) -> Tensor:
    """The image that the first noise is put on: x, or grey where it is None."""
    return grey(y, problem) if x is None else x


def grey(y: Tensor, problem: Problem) -> Tensor:
    """Images (B, C, H, W) of 0.5 behind measurements y (B, ...)."""
    shape = problem.operator.x_shape(y.shape)[-3:]
    return torch.full((len(y), *shape), 0.5, dtype=y.dtype, device=y.device)


def pseudo_inverse(y: Tensor, problem: Problem, x: Tensor | None) -> Tensor:
    """Where the released algorithms start: x, or where it is None g + A^+ (y - A g), g grey.

    In their units, u = 2 x - 1, that is A^+ of the measurement: what A does not see is 0, which is
    mid-grey.

    Raises:
        InputError: A has no pseudo-inverse.
    """
    if x is None and not problem.operator.linear:
        raise InputError(
            f"operator '{problem.operator.spec}' is not linear and has no pseudo-inverse to"
            " start from: give init, or take red-diff without preset='paper'"
        )
    if x is not None:
        return x
    middle = grey(y, problem)
    return middle + problem.A_dagger(problem.residual(middle, y))
