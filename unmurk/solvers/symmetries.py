"""Choosing between images that the measurement cannot tell apart.

An operator may know other images with the same A(x) (`Operator.symmetries`): from magnitudes of
the Fourier transform, an image turned or moved. Solvers find any of them. What is left to go by is
the prior: wanted is the least

    E(x) = ||y - A(x)||^2 / (2 sigma_y^2) + int E_e ||D(x + s e, s) - x||^2 / s^2  d log s

the bound of -log p(y | x) - log p(x), but for constants, of Kingma et al. (2021, arXiv 2107.00630;
see `unmurk.diffusion.prior`). Of the integral only the levels tell that blur no more than parts
of the image. Each of `LEVELS` stands for a factor of 2, and e is used together with -e and goes
with the image, turned and moved as it is, so that twins differ by what they show and not by
their noise.

Where in the frame an image belongs E hardly tells: a move by one pixel changes it less than its
noise. The mean of all images does, which is nearly what D makes of grey at its highest level:
twins are moved to where that is. A few steps of the data fit mend what a move has lost.
"""

import math

import torch
from torch import Tensor

from ..problem import Problem
from ..rng import PerImageGenerator
from .base import CountingDenoiser, prox, randn
from .start import grey

__all__ = ["likeliest"]

HIGHEST = 5.0
LEVELS = (1.6, 0.8, 0.4, 0.2)
DRAWS = 2  # of noise at each level
FLOOR = 1e-3  # least noise that y is believed to have
NEAR = 0.05  # standard deviation around a twin, within which the data fit mends it


@torch.no_grad()
def likeliest(
    x: Tensor, y: Tensor, problem: Problem, denoise: CountingDenoiser, noise: PerImageGenerator
) -> Tensor:
    """Of every image and its twins the one of least E, (B, C, H, W).

    Args:
        x: Images (B, C, H, W).
        y: Measurements (B, ...).
        problem: Operator and noise, bound to these rows.
        denoise: The prior. It is evaluated 16 times for each twin.
        noise: One random stream for each row.
    """
    mean = denoise(grey(y, problem), min(HIGHEST, denoise.sigma_max))
    turn = problem.operator.symmetries(x, mean)
    sigma_eff = max(problem.sigma, FLOOR)
    symmetries = torch.stack([prox(problem, twin, y, NEAR, sigma_eff) for twin in turn(x)])
    square = [problem.residual(twin, y).square().flatten(1).sum(1) for twin in symmetries]
    energy = torch.stack(square) / (2 * sigma_eff**2)
    for s in DRAWS * LEVELS:
        for number, e in enumerate(turn(s * randn(noise, x))):
            twin = symmetries[number]
            missed = [(denoise(twin + n, s) - twin).square().flatten(1).sum(1) for n in (e, -e)]
            energy[number] += math.log(2) / (DRAWS * s**2) * (missed[0] + missed[1]) / 2
    return symmetries[energy.argmin(0), torch.arange(len(x), device=x.device)]
