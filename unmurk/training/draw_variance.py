r"""Posterior draws with the variance that the denoiser at the noise level of y implies (A = I).

The reverse diffusion that draws :math:`x \sim p(x \mid y)` passes the levels below
:math:`\sigma_y`. There the prior learns from posterior means and from earlier draws, which are too
smooth at edges, and expectation maximization corrects that only slowly (equation 5.6 of
docs/theory/learning.md). At :math:`\sigma_y` the prior is trained by R2R, without bias but for the
noise that R2R adds (the lowest level of that training is 1.08 :math:`\sigma_y`). By Tweedie's
formulas the moments of the posterior there are

.. math::

    \mathbb E[x \mid y] = D(y, \sigma_y), \qquad
    \operatorname{Cov}[x \mid y] = \sigma_y^2 J, \qquad J = \partial D / \partial y

(for example Rozet et al., 2024, arXiv 2405.13712, section 4.2). So each draw is moved to

.. math::

    x' = D + c\,(x - D), \qquad
    c^2 = \frac{\sum_i \sigma_y^2\, n_i (J n)_i}{\sum_i (x_i - D_i)^2},
    \qquad n \sim \mathcal N(0, I)

The sums run over all pixels i of many images in one of ten classes. The numerator has the
expectation :math:`\sigma_y^2 \sum_i J_{ii}` (Hutchinson, 1990, Commun. Stat. Simul. 19). For one
pixel it is mostly noise, so c depends on the class alone. The class is that of the same variance
around the pixel, estimated with further n. (Classes made by the deviation of the draw itself would
move draws that are exact already.) c is shrunk to 1 by the standard error of the ratio over images
(Cochran, 1977, Sampling Techniques, section 6.4), and interpolated between the classes.

For a Gaussian whose draws have the right mean, the variance is right at once (equation 5.6a).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ..devices import network_precision
from ..rng import PerImageGenerator

__all__ = ["EVALUATIONS", "match_variance", "new_sums", "scales"]

CLASSES = 10
LEAST, MOST = 0.02, 0.8  # deviations that the classes divide, in units of sigma_y
SIDE = 5  # pixels to a side of the square that decides the class
CONTEXT = 2  # probes that decide the class
SMALLEST, LARGEST = 0.5, 2.0  # c
FEWEST = 16  # images of a class whose c is estimated
IMAGES = 2560  # the sums forget at this rate
STEP = 0.1  # of the difference quotient, in units of sigma_y
EVALUATIONS = 2 + CONTEXT  # of the denoiser for each image


def new_sums() -> Tensor:
    """Return the sums of no images, shape (6, classes): see `scales`."""
    return torch.zeros(6, CLASSES, dtype=torch.float64)


@torch.no_grad()
def match_variance(
    x: Tensor,
    y: Tensor,
    sigma: float,
    denoise: Callable[[Tensor, float], Tensor],
    streams: PerImageGenerator,
    sums: Tensor,
) -> tuple[Tensor, Tensor]:
    """Give draws the variance of the posterior.

    Args:
        x: A draw for each measurement, shape (B, C, H, W).
        y: Measurements (B, C, H, W).
        sigma: Their noise level.
        denoise: The denoiser D(y, sigma).
        streams: Source of n, one random stream for each measurement.
        sums: The sums of earlier images, on the CPU; `new_sums` at first. They do not change.

    Returns:
        The draws, scaled, (B, C, H, W), and the sums with these images.

    >>> from unmurk.rng import PerImageGenerator
    >>> y = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> draws = 0.5 * y + 0.5 * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    >>> streams, denoise = PerImageGenerator(0, range(64)), lambda y, sigma: 0.5 * y
    >>> x, sums = match_variance(draws, y, 1.0, denoise, streams, new_sums())
    >>> round(float((draws - 0.5 * y).var()), 2), round(float((x - 0.5 * y).var()), 1)
    (0.25, 0.5)
    """
    mean, variance, around = _moments(y, sigma, denoise, streams)
    ends = LEAST * sigma, MOST * sigma
    deviation = around.clamp_min(1e-12 * sigma**2).sqrt()
    place = (deviation / ends[0]).log() * ((CLASSES - 2) / math.log(MOST / LEAST)) + 0.5
    place = place.clamp(0, CLASSES - 1)
    change = x - mean
    sums = sums * max(0.0, 1 - len(x) / IMAGES)
    sums = sums + _sums(place.round(), variance, change.square())
    c = scales(sums).to(x)
    below = place.floor().clamp(max=CLASSES - 2).long()
    return mean + torch.lerp(c[below], c[below + 1], place - below) * change, sums


def _moments(
    y: Tensor, sigma: float, denoise: Callable[[Tensor, float], Tensor], streams: PerImageGenerator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return D(y), an estimate of the variance of each pixel, and another one of that around it.

    A difference on one side has the expectation of a central one to second order in its step,
    because the third moments of n vanish.
    """

    def denoised(z: Tensor) -> Tensor:
        return torch.cat([denoise(part, sigma) for part in z.chunk(2)])

    # In bfloat16 the difference would be rounding. float32 takes twice the memory: two halves.
    with network_precision(None):
        mean = denoised(y)
        found = []
        for _ in range(1 + CONTEXT):
            n = streams.randn(*y.shape[1:])
            change = denoised(y + STEP * sigma * n) - mean
            found.append(sigma / STEP * n * change)
    around = torch.stack(found[1:]).mean(0)
    around = avg_pool2d(around, SIDE, 1, SIDE // 2, count_include_pad=False)
    return mean, found[0], around


def _sums(classes: Tensor, variance: Tensor, squares: Tensor) -> Tensor:
    """Return the sums of some images, shape (6, classes)."""
    zero = torch.zeros((), dtype=squares.dtype, device=squares.device)
    parts = []
    for k in range(CLASSES):
        member = classes == k
        values = [torch.where(member, value, zero) for value in (variance, squares)]
        values = [member.any((1, 2, 3)).to(zero), *(value.sum((1, 2, 3)) for value in values)]
        parts.append(torch.stack(values))
    images, t, s = torch.stack(parts, -1).cpu().double()  # each (B, classes)
    return torch.stack([images, t, s, t * t, t * s, s * s]).sum(1)


def scales(sums: Tensor) -> Tensor:
    """Return c of each class, shape (classes,); 1 where there are too few images.

    Args:
        sums: Sums over images, (6, classes): their number, and with t and s the sums over the
            pixels of the class in one image, of its variance by the denoiser and of the squared
            deviation of its draw: t, s, t^2, t s, s^2.
    """
    images, t, s, tt, ts, ss = sums
    known = (images >= FEWEST) & (s > 0)
    ratio = t / s.clamp_min(1e-300)
    spread = (tt - 2 * ratio * ts + ratio**2 * ss).clamp_min(0)
    error = spread / s.clamp_min(1e-300) ** 2 * images / (images - 1).clamp_min(1)
    far = (ratio - 1) ** 2
    squared = 1 + far / (far + error).clamp_min(1e-300) * (ratio - 1)
    c = squared.clamp(SMALLEST**2, LARGEST**2).sqrt()
    return torch.where(known, c, torch.ones_like(c))
