r"""The scale of noise maps: one factor between the noise of images and that of their maps.

Pipelines often know the noise up to a factor: weights, or errors that are too small because pixels
were resampled. With maps :math:`\sigma_i`, the model is

.. math:: y_i = A(x)_i + f \sigma_i n_i ,

and f is estimated as in `noise_estimation`, from the power of patches of SIDE x SIDE pixels
without their slow part. The slow part is the span of the cosine functions :math:`c_k` of low
frequencies. It is removed by least squares, weighted by the maps: from
:math:`z_i = y_i/\sigma_i`, the projection onto the span of :math:`c_{ki}/\sigma_i` is subtracted.
Without texture, what is left has the power

.. math:: q \sim f^2\, \chi^2_n / n

exactly, however uneven the maps are, where n is the number of measured pixels minus that of the
functions. Dividing alone would turn an uneven map into texture. So :math:`f^2` is the lower edge
of q, found by the one-sided fit of `noise_estimation`: a reduced chi-square of the flat parts of
the images. In color under maps of one channel, the mean of z over the channels is removed too,
since most texture is shared by the channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .errors import InputError, size_text
from .noise_estimation import FREEDOM, LEAST, SLOW, envelope, gives_images, uncertainty, usable
from .operators import Operator
from .patches import SIDE, slow_span

__all__ = ["NoiseScale", "noise_scale"]

CHUNK = 2048  # patches that are projected together
MOST = 20_000  # patches


class NoiseScale(NamedTuple):
    """The noise of images over that of their maps.

    Attributes:
        factor: The ratio f of the standard deviations.
        error: Its standard error. It does not contain the error that texture makes.

    >>> str(NoiseScale(1.234, 0.012))
    '1.23 +- 0.01'
    """

    factor: float
    error: float

    def __str__(self) -> str:
        return f"{self.factor:.3g} +- {self.error:.1g}"


def noise_scale(y: Tensor, sigma: Tensor, operator: Operator) -> NoiseScale:
    """Estimate the noise of measurements in units of their noise maps.

    Args:
        y: Measurements (N, C, H, W); values that are not finite are not used.
        sigma: Standard deviations by the maps, (N or 1, C or 1, H, W); infinite where nothing is
            measured.
        operator: The operator of the measurements, which are images; what it hides is not used.

    Raises:
        InputError: The measurements are not images, or too few patches are measured and free of
            clipping.

    >>> from unmurk.operators import as_operator
    >>> draw = torch.Generator().manual_seed(0)
    >>> sigma = 0.02 + 0.08 * torch.rand(4, 1, 64, 64, generator=draw)
    >>> y = 0.5 + 1.5 * sigma * torch.randn(sigma.shape, generator=draw)
    >>> found = noise_scale(y, sigma, as_operator("identity"))
    >>> abs(found.factor - 1.5) < 3 * found.error < 0.1
    True
    """
    if not gives_images(operator) or y.ndim != 4:
        raise InputError(
            f"the scale of noise maps cannot be estimated from measurements by '{operator.spec}',"
            " which are no images: leave out --noise auto"
        )
    bound = operator.bind(range(len(y)), operator.x_shape(tuple(y.shape[1:])))
    shared = sigma.shape[1] == 1
    sigma = sigma.to(y.device).expand_as(y)
    observed = (bound.apply_mask(torch.ones_like(y)) > 0) & y.isfinite() & sigma.isfinite()
    parts = [torch.where(observed, part.double(), 1.0).cpu() for part in (y, sigma)]
    y, observed, sigma = parts[0], observed.cpu(), parts[1]
    if not shared:  # every channel is an image of its own
        y, observed, sigma = (part.flatten(0, 1)[:, None] for part in (y, observed, sigma))
    values, inside, sigma = usable(y, observed, False, sigma)
    step = max(1, len(values) // MOST)
    power, freedom = _power(*(part[::step] for part in (values, inside, sigma)))
    good = freedom >= FREEDOM * max(1, values.shape[1] - 1)
    power, freedom = power[good], freedom[good]
    if len(power) < LEAST:
        raise InputError(
            f"the scale of noise maps cannot be estimated from {len(power)} patches of"
            f" {size_text((SIDE, SIDE))} pixels that are measured and not clipped: leave out"
            " --noise auto"
        )
    ones = torch.ones_like(power)[:, None]
    line = envelope(power, freedom, ones)
    error = float(uncertainty(power, freedom, ones, line)[0, 0]) ** 0.5
    factor = float(line[0]) ** 0.5
    return NoiseScale(float(f"{factor:.4g}"), error / (2 * factor))


def _power(values: Tensor, inside: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the power q of patches in units of their maps, and its degrees of freedom n, (P,).

    Args:
        values, sigma: Patches of the measurements and the maps, (P, C, SIDE^2). The maps are the
            same for all channels.
        inside: 1 where a pixel is measured, (P, SIDE^2).
    """
    channels, found = values.shape[1], []
    for v, on, s in zip(*(part.split(CHUNK) for part in (values, inside, sigma)), strict=True):
        weights = on / s[:, 0]
        span, known = slow_span(weights / weights.mean(1, keepdim=True), SLOW)
        z = v * weights[:, None]
        fast = z - torch.einsum("ncp,nrp,nrq->ncq", z, span, span)
        freedom = on.sum(1) - known
        if channels > 1:
            fast, freedom = fast - fast.mean(1, keepdim=True), (channels - 1) * freedom
        found.append((fast.square().sum((1, 2)) / freedom.clamp_min(1), freedom))
    power, freedom = (torch.cat(parts) for parts in zip(*found, strict=True))
    return power, freedom
