"""The reverse diffusion in steps of second order, which every sampler here takes.

In variance-exploding form x_t = x + t n. With the denoised image held at x0 the reverse diffusion
from level t to level s < t is solved exactly by the Gaussian bridge

    x_s = k x_t + (1 - k) x0 + s sqrt(1 - k) n,    k = (s / t)^2,

the ancestral step of DDPM. Its error is of first order in log(t / s), and it shows as too little
spread. Drawing a line through the last two denoised images in the variable log sigma,

    x0 <- x0 + log(t / s) / (2 log(t' / t)) (x0 - x0'),    t' > t the level before, x0' its image,

makes it second-order at no further cost: the multistep stochastic solver of Lu, Zhou, Bao, Chen,
Li and Zhu (2022), arXiv 2211.01095. The step to s = 0 returns x0.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..seeds import Streams
from .base import randn

__all__ = ["Reverse", "diffuse"]


class Reverse:
    """Steps down the noise levels; it remembers the denoised image of the step before."""

    def __init__(self, noise: Streams) -> None:
        self.noise = noise
        self.before: tuple[Tensor, float] | None = None

    def step(self, x: Tensor, x0: Tensor, t: float, s: float) -> Tensor:
        """x at level s < t, (B, C, H, W), from x at level t whose denoised image is x0."""
        if s == 0:
            return x0
        mean, std = self.bridge(x, x0, t, s)
        return mean + std * randn(self.noise, x)

    def bridge(self, x: Tensor, x0: Tensor, t: float, s: float) -> tuple[Tensor, float]:
        """Mean (B, C, H, W) and standard deviation of that step, for s > 0."""
        width, ahead = math.log(t / s), x0
        if self.before is not None:
            x0_before, width_before = self.before
            ahead = x0 + width / (2 * width_before) * (x0 - x0_before)
        self.before = x0, width
        keep = (s / t) ** 2
        return keep * x + (1 - keep) * ahead, s * math.sqrt(1 - keep)

    def take(self, rows: Tensor) -> None:
        """Go on with some of the rows; they may repeat."""
        if self.before is not None:
            self.before = self.before[0][rows], self.before[1]


@torch.no_grad()
def diffuse(
    denoise: Callable[[Tensor, float], Tensor], x: Tensor, levels: Sequence[float], noise: Streams
) -> Tensor:
    """A draw from p(clean | x) where x (B, C, H, W) holds noise of levels[0].

    Args:
        levels: Falling noise levels; the last step goes to zero. One evaluation each.
    """
    reverse = Reverse(noise)
    for t, s in zip(levels, [*levels[1:], 0.0], strict=True):
        x = reverse.step(x, denoise(x, t), t, s)
    return x
