r"""Selection between images that the measurement cannot tell apart.

An operator may know other images with the same A(x) (`Operator.symmetries`): for the magnitudes of
the Fourier transform these are the shifted and the point-reflected image. A solver finds any of
them, and only the prior can tell which one is likely. Selected is the image of least energy

.. math::
    E(x) = \frac{\lVert y - A(x)\rVert^2}{2\sigma_y^2}
           + \int \mathbb{E}_e \frac{\lVert D(x + s e, s) - x\rVert^2}{s^2}\; d\log s,

the bound on :math:`-\log p(y \mid x) - \log p(x)`, up to constants, of Kingma et al. (2021, arXiv
2107.00630; see `unmurk.diffusion.prior`). The integral uses only those levels that discriminate
between the images, which blur no more than parts of an image. Each of `LEVELS` stands for a factor
of 2. The noise :math:`e` is used together with :math:`-e`, and it is transformed like the image,
so that the energies of two symmetric images differ by their content and not by their noise.

E hardly depends on the position of an image in the frame: a shift by one pixel changes it less
than its noise. The position is that of the mean of all images, which the denoised gray image at
the highest level approximates: the images are shifted to it. A few steps of the data fit then
correct what a shift has lost.
"""

import math

import torch
from torch import Tensor

from ..problem import Problem
from ..rng import PerImageGenerator
from .base import CountingDenoiser, gray, randn
from .data_term import prox

__all__ = ["most_likely"]

HIGHEST = 5.0
LEVELS = (1.6, 0.8, 0.4, 0.2)
DRAWS = 2  # of noise at each level
FLOOR = 1e-3  # least noise that y is taken to have
NEAR = 0.05  # standard deviation around a shifted image, within which the data fit corrects it


@torch.no_grad()
def most_likely(
    x: Tensor, y: Tensor, problem: Problem, denoise: CountingDenoiser, generator: PerImageGenerator
) -> Tensor:
    """Select for every image the symmetric one of least energy E.

    Args:
        x: Images (B, C, H, W).
        y: Measurements (B, ...).
        problem: Operator and noise, bound to the images of y.
        denoise: The prior's denoiser. It is evaluated 16 times for each symmetric image.
        generator: One random stream for each image.

    Returns:
        Images (B, C, H, W).
    """
    mean = denoise(gray(y, problem), min(HIGHEST, denoise.sigma_max))
    transform = problem.operator.symmetries(x, mean)
    sigma_eff = max(problem.sigma, FLOOR)
    images = torch.stack([prox(problem, z, y, NEAR, sigma_eff) for z in transform(x)])
    square = [problem.residual(z, y).square().flatten(1).sum(1) for z in images]
    energy = torch.stack(square) / (2 * sigma_eff**2)
    for s in DRAWS * LEVELS:
        for number, e in enumerate(transform(s * randn(generator, x))):
            z = images[number]
            missed = [(denoise(z + n, s) - z).square().flatten(1).sum(1) for n in (e, -e)]
            energy[number] += math.log(2) / (DRAWS * s**2) * (missed[0] + missed[1]) / 2
    return images[energy.argmin(0), torch.arange(len(x), device=x.device)]
