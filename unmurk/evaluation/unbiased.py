r"""Unbiased estimates of the error of a restoration, from measurements alone, and residuals.

The equations are those of `calibration`, which applies them: Stein's estimate at the noise itself,
the error between two independent halves of a measurement, and that of withheld pixels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..noise import Gaussian, PerChannel, PoissonGaussian
from ..operators.masks import Inpaint
from ..problem import Problem
from ..rng import uniform

__all__ = [
    "has_varied_masks",
    "noise_variance",
    "split_error",
    "stein_error",
    "tells_whiteness",
    "whiteness",
    "withhold",
]

STEP = 0.1  # of the probe, in standard deviations of the noise
WITHHELD = 0.1  # of the measured pixels
FEW_HIDDEN = 0.25  # hidden fraction up to which whole masks are withheld
LAGS = ((0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0))
FEWEST = 1000  # pairs of pixels of an autocorrelation

Restore = Callable[[Tensor], Tensor]
Map = Callable[[Tensor], Tensor]


# -- unbiased squared errors ----------------------------------------------------------------------


def noise_variance(y: Tensor, problem: Problem) -> Tensor:
    """Estimate the variance of the noise of every value without bias.

    Args:
        y: Measurements (B, ...).
        problem: The noise model: Gaussian, Poisson-Gaussian, or one of these for each channel.

    Returns:
        Shape of y. For counts it is linear in y and may be negative, so that its mean is right.

    Raises:
        InputError: The noise model is another one.

    >>> noise_variance(torch.tensor([0.0, 0.5]), Problem("identity", "poisson,gain=0.1"))
    tensor([0.0000, 0.0500])
    """
    noise = problem.noise
    if isinstance(noise, PerChannel):
        noise.check(y)
        models = enumerate(noise.models)
        parts = [noise_variance(y[:, i : i + 1], Problem("identity", one)) for i, one in models]
        return torch.cat(parts, 1)
    if isinstance(noise, Gaussian):
        return torch.full_like(y, noise.sigma**2)
    if isinstance(noise, PoissonGaussian):
        return noise.gain * (y - noise.offset) + noise.sigma**2
    raise InputError(f"noise '{noise.spec}' is neither Gaussian nor Poisson-Gaussian")


@torch.no_grad()
def stein_error(
    restore: Restore,
    y: Tensor,
    problem: Problem,
    generator: torch.Generator,
    *,
    image: Map | None = None,
    data: Map | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Estimate the squared error of a restoration, value by value, without truth.

    Args:
        restore: The restoration f of measurements (B, ...).
        y: Measurements (B, ...).
        problem: The noise model. Without the maps below, A is the identity or a mask.
        generator: Source of the probe.
        image: The map P of images to the values whose error is estimated; None: the image itself.
        data: The map R of measurements to the same values, P = R A; None: y itself.

    Returns:
        The values P f(y), and unbiased estimates of :math:`(P f(y) - P x)^2`, in the same shape.

    >>> y = torch.full((1, 1, 1, 2), 0.5)
    >>> noise = torch.Generator().manual_seed(0)
    >>> mean, error = stein_error(lambda y: 0.5 * y, y, Problem("identity", 0.1), noise)
    >>> error  # (0.25 - 0.5)^2 - 0.01 + 2 * 0.01 * 0.5
    tensor([[[[0.0625, 0.0625]]]])
    """
    image, data = image or _same, data or _same
    variance = noise_variance(y, problem)
    signs = torch.where(uniform(y.shape, generator) < 0.5, -1.0, 1.0).to(y)
    probe = signs * variance.abs().sqrt()
    plain, signed = data(probe), data(probe * variance.sign())
    values = image(restore(y))
    change = (image(restore(y + STEP * probe)) - values) / STEP
    return values, (values - data(y)).square() - signed * plain + 2 * signed * change


@torch.no_grad()
def split_error(
    restore: Restore, y: Tensor, problem: Problem, alpha: float, generator: torch.Generator
) -> Tensor:
    r"""Estimate the squared error of a restoration from two independent halves of y.

    With :math:`y_1 = y + \alpha \sigma n` and :math:`y_2 = y - \sigma n / \alpha`, whose noises
    are independent,

    .. math:: E\,(f(y_1) - y_2)^2 - \operatorname{var} y_2 = E\,(f(y_1) - x)^2

    (Pang et al., 2021, CVPR, "Recorrupted-to-Recorrupted"; for counts the halves are those of
    `PoissonGaussian.split`). It is exact for any f, but the noise of :math:`y_1` is
    :math:`\sqrt{1 + \alpha^2}` times that of y, and its own variance is larger than Stein's.

    Args:
        restore: The restoration f of measurements (B, C, H, W), for A = I.
        y: Measurements (B, C, H, W).
        problem: The noise model.
        alpha: Noise added to y_1, in units of its own; > 0.
        generator: Source of the split.

    Returns:
        Unbiased estimates of :math:`(f(y_1) - x)^2`, shape of y.

    >>> y, noise = torch.zeros(1, 1, 1, 1), torch.Generator().manual_seed(0)
    >>> split_error(torch.zeros_like, y, Problem("identity", 0.0), 1.0, noise)
    tensor([[[[0.]]]])
    """
    part = 1 / (1 + alpha**2)
    first, second = problem.split(y, part, generator)
    variance = noise_variance(second, problem) / (1 - part)
    return (restore(first) - second).square() - variance


def has_varied_masks(problem: Problem) -> bool:
    """Tell whether images hide different pixels, so that some stand for those hidden in others.

    >>> problem = Problem("inpaint:random,keep=0.5", 0.1)
    >>> has_varied_masks(problem.bind(range(4), (1, 8, 8)))
    True
    """
    operator = problem.operator
    if not isinstance(operator, Inpaint) or operator.mask is None:
        return False
    return not torch.equal(operator.mask, operator.mask[:1].expand_as(operator.mask))


def withhold(problem: Problem, generator: torch.Generator) -> tuple[Problem, Tensor]:
    """Withhold measured pixels from a restoration, which then stand for hidden ones.

    If at most a quarter of the pixels is hidden, the shifted mask is hidden too, so that holes
    stay holes. Otherwise a tenth of the measured pixels is hidden at random.

    Args:
        problem: A problem bound to images, whose masks differ.
        generator: Source of the choice.

    Returns:
        The problem with further pixels hidden, and 1 where they are, (B, 1, H, W).

    Raises:
        InputError: There is no mask, or the same one for all images, whose hidden pixels no image
            measures.

    >>> problem = Problem("inpaint:random,keep=0.5", 0.1).bind(range(4), (1, 8, 8))
    >>> hidden, withheld = withhold(problem, torch.Generator().manual_seed(0))
    >>> torch.equal(hidden.operator.mask, problem.operator.mask - withheld)
    True
    >>> int(withheld.sum()) > 0
    True
    """
    operator = problem.operator
    mask = operator.mask
    if mask is None or not isinstance(operator, Inpaint) or not has_varied_masks(problem):
        raise InputError(f"operator '{operator.spec}' does not hide other pixels of each image")
    if float((mask == 0).float().mean()) <= FEW_HIDDEN:
        height, width = mask.shape[-2:]
        shift = [int(torch.randint(1, n, (), generator=generator)) for n in (height, width)]
        more = 1 - mask.roll(shift, (-2, -1))
    else:
        more = (uniform(mask.shape, generator).to(mask) < WITHHELD).to(mask)
    hidden = Problem(operator.hiding(more), problem.noise)
    hidden.index = problem.index
    return hidden, more * mask


# -- residuals ------------------------------------------------------------------------------------


def _pairs(first: Tensor, second: Tensor, down: int, right: int) -> tuple[Tensor, Tensor]:
    """Return the values of the first and the second map at pixels that are a lag apart."""
    height, width = first.shape[-2:]
    ahead = first[..., : height - down, max(0, -right) : width - max(0, right)]
    return ahead, second[..., down:, max(0, right) : width + min(0, right)]


def tells_whiteness(quiet: Tensor) -> bool:
    """Tell whether 1,000 pairs of pixels count at every lag of `whiteness`.

    >>> tells_whiteness(torch.ones(1, 1, 64, 64, dtype=torch.bool))
    True
    """
    return all(int(torch.mul(*_pairs(quiet, quiet, *lag)).sum()) >= FEWEST for lag in LAGS)


def whiteness(residual: Tensor, quiet: Tensor) -> dict[str, Any]:
    r"""Compute the autocorrelation of residuals at small lags.

    .. math:: \rho_k = \frac{\sum r_i r_{i + k}}{\sqrt{\sum r_i^2 \sum r_{i+k}^2}}, \qquad
        Q = \sum_k N_k \rho_k^2,

    over the :math:`N_k` pairs of counted pixels. For white noise :math:`\rho_k` has the mean 0 and
    the standard error :math:`N_k^{-1/2}`, and Q is chi-square with one degree of freedom for each
    lag (Box and Pierce, 1970, J. Am. Stat. Assoc. 65; Ljung and Box, 1978, Biometrika 65).

    Args:
        residual: Residuals in units of the noise, shape (B, C, H, W).
        quiet: Whether a pixel counts, same shape: where the restoration is nearly certain, the
            residual is the noise.

    Returns:
        "lags" (rows, columns), "autocorrelation" (0 of a residual that is 0), "standard_error",
        "statistic", "degrees", "largest" and "power", the mean of r^2.

    Raises:
        InputError: Fewer than 1,000 pairs of pixels count at a lag.

    >>> r = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    >>> found = whiteness(r, torch.ones_like(r, dtype=torch.bool))
    >>> found["largest"] < 0.05
    True
    """
    held = torch.where(quiet, residual, 0.0).double()
    found, errors, statistic = [], [], 0.0
    for down, right in LAGS:
        both = torch.mul(*_pairs(quiet, quiet, down, right))
        count = int(both.sum())
        if count < FEWEST:
            raise InputError(f"an autocorrelation needs {FEWEST} pairs of pixels that count")
        first, second = (both * part for part in _pairs(held, held, down, right))
        scale = float((first.square().sum() * second.square().sum()).sqrt())
        found.append(float((first * second).sum()) / scale if scale > 0 else 0.0)
        errors.append(count**-0.5)
        statistic += count * found[-1] ** 2
    return {
        "lags": [list(lag) for lag in LAGS],
        "autocorrelation": found,
        "standard_error": errors,
        "statistic": statistic,
        "degrees": len(LAGS),
        "largest": max(map(abs, found)),
        "power": float(held.square().sum() / quiet.sum()),
    }


def _same(value: Tensor) -> Tensor:
    return value
