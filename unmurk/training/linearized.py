r"""Draws around the posterior mean by the derivative of the denoiser (A = I, Gaussian noise).

With :math:`D = D(y, \sigma_y)`, :math:`J = \partial D / \partial y` and
:math:`n \sim \mathcal N(0, I)`,

.. math::

    x = D + \sigma_y J n, \qquad J n \approx \frac{D(y + h n, \sigma_y) - D}{h},
    \qquad h = \sigma_y / 10

This is the denoiser, linearized at y, of the image y with as much noise again. For small h the
mean of x is that of the posterior, :math:`D = \mathbb E[x \mid y]`, and its covariance is
:math:`\sigma_y^2 J J^T`. That of the posterior is :math:`\sigma_y^2 J` (Tweedie's formula of
second order, for example Rozet et al., 2024, arXiv 2405.13712, section 4.2). So x is as wide as
the posterior in directions in which the prior says nothing (:math:`J = 1`), narrower where
:math:`J < 1`, and wider where :math:`J > 1`. If clean images are Gaussian with the variance v
along an eigenvector of their covariance, and :math:`\lambda = v / (v + \sigma_y^2)`, the variance
over all y is

.. math::

    \operatorname{Var} x = v \bigl(1 - (1 - \lambda)^2\bigr), \qquad
    \operatorname{Var} D = v \bigl(1 - (1 - \lambda)\bigr)

so the part of the variance that posterior means lack is squared. An exact draw would lack nothing,
but it needs a prior that is right at all levels below :math:`\sigma_y`. This one needs what the
prior knows at :math:`\sigma_y`, where R2R trains it from just above
(`losses.recorrupted_matching`), and takes one evaluation beside D. Draws with a covariance closer
to :math:`\sigma_y^2 J` have more noise on flat backgrounds: noise that D lets through with a small
gain g has the derivative g, but the variance :math:`g^2 \sigma_y^2` (docs/experiments.md).

Limits: given y, x is Gaussian. Of a posterior with several maxima it has the mean, not the maxima;
between them J exceeds 1, and x can lie far outside of the range of clean images. The quotient of
one side moves the mean of x by some :math:`\tfrac{1}{20} \sigma_y^2 \Delta D`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..devices import network_precision
from ..diffusion.losses import gaussian

__all__ = ["linearized_draw"]

STEP = 0.1  # h, in units of sigma_y


@torch.no_grad()
def linearized_draw(
    y: Tensor,
    sigma: float,
    denoise: Callable[[Tensor, float], Tensor],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draw an image for each measurement, by two evaluations of the denoiser.

    Networks run in float32, also in a run in bfloat16, in which the difference of two values of D
    would be rounding.

    Args:
        y: Measurements (B, C, H, W), images with Gaussian noise.
        sigma: Their noise level.
        denoise: The denoiser D(y, sigma).
        generator: Source of n.

    Returns:
        The draws x, and the posterior means D(y, sigma), each (B, C, H, W), without gradients.

    >>> y = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> noise = torch.Generator().manual_seed(1)
    >>> x, mean = linearized_draw(y, 1.0, lambda y, sigma: 0.5 * y, noise)
    >>> torch.equal(mean, 0.5 * y), round(float((x - mean).var()), 2)  # J = 0.5
    (True, 0.25)
    """
    noise, step = gaussian(y, generator), STEP * sigma
    with network_precision(None):
        mean = denoise(y, sigma)
        change = (denoise(y + step * noise, sigma) - mean) / step
    return mean + sigma * change, mean
