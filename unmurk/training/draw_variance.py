r"""Posterior draws with the variance that the denoiser at the noise of y implies (A = I).

The reverse diffusion that draws :math:`x \sim p(x \mid y)` passes the levels below
:math:`\sigma_y`. There the prior learns from posterior means and from earlier draws, which are too
smooth at edges, and expectation maximization corrects that only slowly (equation 5.6 of
docs/theory/learning.md). Near :math:`\sigma_y` the prior learns mostly by R2R, from
:math:`\sigma_y \sqrt{1 + \alpha^2}` on (`Recipe.alpha`), whose targets are no draws. By Tweedie's
formulas the moments of the posterior are

.. math::

    \mathbb E[x \mid y] = D(y, \sigma_y), \qquad
    \operatorname{Cov}[x \mid y] = \sigma_y^2 J, \qquad J = \partial D / \partial y

(for example Rozet et al., 2024, arXiv 2405.13712, section 4.2). So the deviation of a draw is
divided into a coarse part (a binomial filter of 3 x 3 pixels) and the rest, by matrices
:math:`B_1 + B_2 = I`, and each is scaled:

.. math::

    x' = D + \sum_b c_b B_b (x - D), \qquad
    c_b^2 = \frac{\sum_i \sigma_y^2\, (B_b n)_i (B_b J n)_i}{\sum_i (B_b (x - D))_i^2},
    \qquad n_i = \pm 1

The sums run over all pixels i of many images in one of ten classes. The numerator has the
expectation :math:`\sigma_y^2 \sum_i (B_b J B_b^T)_{ii}` (Hutchinson, 1990, Commun. Stat. Simul.
19). For one pixel it is mostly noise, so c depends on the class alone. The class is that of the
deviation :math:`(\sigma_y^2 n_i (J n)_i)^{1/2}`, from the mean over two further n and 5 x 5 pixels
of the channel. (Classes made by the deviation of the draw itself would move draws that are exact
already.)

The ratio is shrunk to 1 by its squared standard error over images (Cochran, 1977, Sampling
Techniques, chapter 6). c lies between 0.5 and 2 and is interpolated between the classes; a class
of fewer than 16 images takes that of the nearest one. Where the deviation by the denoiser is below
:math:`\sigma_y / 10`, c is at most 1: noise that D lets through with a small gain g has the
derivative g too, although its variance is :math:`g^2 \sigma_y^2`, and noise that is in the draws
hardly leaves them.

Limits: the channels of an image share c. Beside an edge the square of pixels that decides the
class holds both sides. So the two faint pixels there can become wider than before, and the filter
carries deviation across the edge. The two parts overlap, so neither has exactly the variance that
is wanted, nor has their sum. If draws lack half of the deviation in the fine part of white noise,
the two parts have 0.88 and 1.28 of their variance afterwards, and the sum has it within 6 %.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad

from ..devices import network_precision
from ..rng import PerImageGenerator

__all__ = ["EVALUATIONS", "decayed", "match_variance", "new_sums", "scales", "split"]

CLASSES = 10
LEAST, MOST = 0.02, 0.8  # deviations that the classes divide, in units of sigma_y
FAINT = 5  # classes whose c is at most 1; the last one has its center at 0.1 sigma_y
SIDE = 5  # pixels to a side of the square that decides the class
CONTEXT = 2  # probes that decide the class
SMALLEST, LARGEST = 0.5, 2.0  # c
FEWEST = 16  # images of a class whose c is estimated
IMAGES = 2560  # the sums are those of about so many
STEP = 0.1  # of the difference quotient, in units of sigma_y
EVALUATIONS = 2 + CONTEXT  # of the denoiser for each image
BINOMIAL = (0.25, 0.5, 0.25)


def new_sums() -> Tensor:
    """Return the sums of no images, shape (2, 6, classes): see `scales`.

    >>> new_sums().shape
    torch.Size([2, 6, 10])
    """
    return torch.zeros(2, 6, CLASSES, dtype=torch.float64)


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
        The draws, scaled, (B, C, H, W), and the sums with these images. If a draw or a value of
        the denoiser is not finite, all draws are NaN, and the sums are the given ones.

    >>> from unmurk.rng import PerImageGenerator
    >>> y = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> draws = 0.5 * y + 0.5 * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    >>> streams, denoise = PerImageGenerator(0, range(64)), lambda y, sigma: 0.5 * y
    >>> x, sums = match_variance(draws, y, 1.0, denoise, streams, new_sums())
    >>> round(float((draws - 0.5 * y).var()), 2), round(float((x - 0.5 * y).var()), 1)
    (0.25, 0.5)
    """
    mean, variances, around = _moments(y, sigma, denoise, streams)
    place = _place(around, sigma)
    parts = split(x - mean)
    found = decayed(sums, len(x)) + _sums(place.round(), variances, parts.square())
    if not (found.isfinite().all() and around.isfinite().all()):
        return torch.full_like(x, torch.nan), sums
    c = scales(found).to(x)
    below = place.floor().clamp(max=CLASSES - 2).long()
    between = torch.lerp(c[:, below], c[:, below + 1], place - below)
    return mean + (between * parts).sum(0), found


def decayed(sums: Tensor, images: int) -> Tensor:
    """Return sums of earlier images with less weight, before those of so many are added.

    The weights of squares are squared, so that the standard error is that of the weighted ratio.

    >>> decayed(new_sums() + 1, 1280)[0, :, 0].tolist()
    [0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
    """
    kept = max(0.0, 1 - images / IMAGES)
    return sums * torch.tensor([kept] * 3 + [kept**2] * 3, dtype=sums.dtype)[:, None]


def split(change: Tensor) -> Tensor:
    """Split images (B, C, H, W) into the fine and the coarse part, shape (2, B, C, H, W).

    >>> fine, coarse = split(torch.eye(3)[None, None])
    >>> float(fine[0, 0, 1, 1]), float(coarse[0, 0, 1, 1])
    (0.625, 0.375)
    """
    line = torch.tensor(BINOMIAL, dtype=change.dtype, device=change.device)
    single = change.reshape(-1, 1, *change.shape[-2:])
    wide = pad(single, (1, 1, 1, 1), mode="replicate")
    coarse = conv2d(wide, (line[:, None] * line)[None, None]).reshape(change.shape)
    return torch.stack([change - coarse, coarse])


def _moments(
    y: Tensor, sigma: float, denoise: Callable[[Tensor, float], Tensor], streams: PerImageGenerator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return D(y), estimates of the variance of both parts of each pixel, and that around it.

    The quotient of one side has the expectation of the central one, since n and -n have the same
    distribution.
    """

    def denoised(z: Tensor) -> Tensor:
        return torch.cat([denoise(part, sigma) for part in z.chunk(2)])

    # In bfloat16 the difference would be rounding. float32 takes twice the memory: two halves.
    with network_precision(None):
        mean = denoised(y)
        probes = [streams.randn(*y.shape[1:]).sign() for _ in range(1 + CONTEXT)]
        changes = [(denoised(y + STEP * sigma * n) - mean) / (STEP * sigma) for n in probes]
    variances = sigma**2 * split(probes[0]) * split(changes[0])
    products = [n * change for n, change in zip(probes[1:], changes[1:], strict=True)]
    around = sigma**2 * torch.stack(products).mean(0)
    return mean, variances, avg_pool2d(around, SIDE, 1, SIDE // 2, count_include_pad=False)


def _place(variance: Tensor, sigma: float) -> Tensor:
    """Return the place of variances on the scale of the classes, a number from 0 to their last.

    Class k from 1 on begins at the deviation LEAST (MOST / LEAST)^((k - 1) / (CLASSES - 2)) sigma.
    """
    deviation = (variance / sigma**2).clamp_min(1e-12).sqrt()
    place = (deviation / LEAST).log() * ((CLASSES - 2) / math.log(MOST / LEAST)) + 0.5
    return place.clamp(0, CLASSES - 1).nan_to_num(0)


def _sums(classes: Tensor, variances: Tensor, squares: Tensor) -> Tensor:
    """Return the sums of some images, shape (2, 6, classes)."""
    zero = torch.zeros((), dtype=squares.dtype, device=squares.device)
    found = []
    for k in range(CLASSES):
        member = classes == k
        values = [
            torch.where(member, value, zero).sum((2, 3, 4)) for value in (variances, squares)
        ]
        images = member.any(3).any(2).any(1).to(zero).expand(2, -1)
        found.append(torch.stack([images, *values]))
    images, t, s = torch.stack(found, -1).cpu().double()  # each (2, B, classes)
    return torch.stack([images, t, s, t * t, t * s, s * s], 1).sum(2)


def scales(sums: Tensor) -> Tensor:
    """Return c of each part and class, shape (2, classes).

    A class of too few images has that of the nearest one with enough; without any, c is 1. In the
    lowest classes c is at most 1.

    Args:
        sums: Sums over images, (2, 6, classes): their number, and with t and s the sums over the
            pixels of the class in one image, of the variance by the denoiser and of the squared
            deviation of the draw: t, s, t^2, t s, s^2.

    >>> scales(new_sums()).unique().tolist()  # without images
    [1.0]
    """
    images, t, s, tt, ts, ss = sums.unbind(1)
    known = (images >= FEWEST) & (s > 0)
    total = s.clamp_min(1e-300)
    ratio = t / total
    spread = (tt - 2 * ratio * ts + ratio**2 * ss).clamp_min(0)
    error = spread / total**2 * images / (images - 1).clamp_min(1)
    far = (ratio - 1) ** 2
    squared = 1 + far / (far + error).clamp_min(1e-300) * (ratio - 1)
    most = torch.where(torch.arange(CLASSES) < FAINT, 1.0, LARGEST)
    c = torch.minimum(squared.clamp_min(SMALLEST**2).sqrt(), most)
    c = torch.where(known, c, torch.ones_like(c))
    return torch.minimum(_from_nearest(c, known), most)


def _from_nearest(c: Tensor, known: Tensor) -> Tensor:
    """Give classes that are not known the c of the nearest one that is, if there is one."""
    number = torch.arange(CLASSES)
    far = (number[:, None] - number).abs() + CLASSES * ~known[:, None]
    return c.gather(1, far.argmin(-1))
