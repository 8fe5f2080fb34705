"""Where a reverse diffusion begins: its noise levels, and the first noisy image.

Levels fall along the grid of Karras et al. (2022), arXiv 2206.00364, eq. 5
(`unmurk.prior.karras`). The first image is grey, with noise on it that drowns any image; or it is
a given image, with noise on it of a lower level, about as large as its error.
"""

import torch
from torch import Tensor

from ..prior import karras
from ..problem import Problem
from ..seeds import Streams
from .base import Denoiser, randn

__all__ = ["begin", "grey"]


def begin(
    y: Tensor,
    problem: Problem,
    denoise: Denoiser,
    x: Tensor | None,
    noise: Streams,
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
    highest, lowest = span
    first = max(min(highest if x is None else init_sigma, denoise.sigma_max), lowest)
    levels = karras(steps, first, lowest).tolist()
    if x is None:
        x = grey(y, problem)
    return levels, x + levels[0] * randn(noise, x)


def grey(y: Tensor, problem: Problem) -> Tensor:
    """Images (B, C, H, W) of 0.5 behind measurements y (B, ...)."""
    shape = problem.operator.x_shape(y.shape)[-3:]
    return torch.full((len(y), *shape), 0.5, dtype=y.dtype, device=y.device)
