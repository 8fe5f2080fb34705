r"""Posterior predictive checks: what a draw says about the noise, the operator and the learning.

Let x be one draw from the learned posterior :math:`q(x \mid y)`. If q is the posterior of the true
prior, operator and noise, then (x, y) has the law of a clean image and its measurement. So the
residual of a *draw*,

.. math:: r = \frac{y - A(x)}{\sqrt{\operatorname{var}(y \mid x)}},

is distributed exactly as the noise: it has variance 1, it is white, and it is independent of x.
This is the posterior predictive check of Gelman, Meng and Stern (1996, Statistica Sinica 6), and
it holds for every operator. (The residual of a posterior *mean* has neither property: its variance
is smaller, and it depends on the image.) Counts in the dark have hardly any variance, and a draw
that misses black by a little would have a residual without bound there. So r is divided by the
root of at least 2 % of the mean variance, and :math:`r^2` has a smaller expectation there. The
figures are

=============  ===================================================================================
`noise`        noise found in the flat parts of y over the noise that was stated (see
               `noise_estimation`). A learner that is told too little noise learns images with the
               rest of it, and fits y perfectly; only this figure tells.
`chi2`         sum of :math:`r^2` over its expectation. Above 1, the restoration does not explain
               y. Below 1, it follows the noise, or the noise is weaker than stated.
`whiteness`    largest autocorrelation of r at the lags of `unbiased.LAGS`. Structure that was
               removed with the noise, a wrong operator and correlated noise show here.
`detail`       correlation of r with the detail of the restoration, A(x) minus its mean over 3 x 3
               pixels. Above 0, detail is too weak: the restoration is too smooth.
`gain`         unbiased PSNR of the restoration minus that of a filter without learning
               (`reference.cosine_filter`), in dB. Below 0, the run is too short.
`range`        brightness between the 0.1 and the 99.9 percentile of the restoration, where black
               is 0 and white 1.
`black`        the 0.1 percentile itself. Far below 0, the restoration rings: it makes up for a
               stated blur that is wider than the true one.
=============  ===================================================================================
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..noise import Gaussian, Noise, PerChannel, PoissonGaussian
from ..noise_checks import check_noise
from ..noise_estimation import LEAST, envelope, gives_images, powers
from ..patches import SIDE
from ..problem import Problem
from ..rng import StreamId, generator
from .reference import cosine_filter
from .unbiased import Map, noise_variance, stein_error, tells_whiteness, whiteness

__all__ = ["NAMES", "decibels", "has_unbiased_psnr", "measure", "unbiased_psnr_of"]

NAMES = ("noise", "chi2", "whiteness", "detail", "gain", "range", "black")
FLOOR = 0.02  # least variance by which a residual is divided, in units of the mean variance
PERCENT = 0.001  # quantile of the darkest and the brightest values
SAMPLE = 2**20  # most values of a quantile


@torch.no_grad()
def measure(
    y: Tensor, x: Tensor, problem: Problem, *, unbiased_psnr: float | None = None
) -> dict[str, Any]:
    """Measure what the verdict is made from.

    Args:
        y: Measurements (B, ...).
        x: One draw from the posterior for each of them (B, C, H, W). Not the mean.
        problem: How the measurements were made; bound to these images if its operator has masks.
        unbiased_psnr: Unbiased PSNR of the posterior mean, in dB; None or NaN: not known.

    Returns:
        For each figure of the table above a pair of value and standard error, or None where it
        does not apply. Further "values", the number of measured values; "kind", the first finding
        of `check_noise`, or ""; for noise per channel "channel", the number of the channel that
        `noise` is about, and "channel level", the standard deviation that was stated there;
        "psnr", the unbiased PSNR of y, of the restoration and of the reference, each a number or
        None.

    >>> x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> x = F.interpolate(x, scale_factor=8, mode="bilinear")
    >>> problem = Problem("identity", 0.1)
    >>> value, error = measure(problem.simulate(x), x, problem)["chi2"]
    >>> abs(value - 1) < 4 * error < 0.05
    True
    """
    operator, noise = problem.operator, problem.noise
    if unbiased_psnr is not None and math.isnan(unbiased_psnr):
        unbiased_psnr = None  # JSON has no NaN
    observed = operator.apply_mask(torch.ones_like(y)) > 0
    mean = operator.A(x)
    count = int(observed.sum())
    true = torch.where(observed, noise.variance(mean), 0.0)
    variance = true.clamp_min(max(FLOOR * float(true.double().sum()) / max(count, 1), 1e-12))
    r = torch.where(observed, (y - mean) / variance.sqrt(), 0.0).double().cpu()
    expected = float((true / variance).double().sum())  # of the sum of r^2; count without a floor
    found: dict[str, Any] = dict.fromkeys(NAMES)
    found |= {"values": count, "kind": "", "level": problem.level, "stated": noise.spec}
    found["psnr"] = {"before": None, "after": unbiased_psnr, "reference": None}
    if not count or problem.level <= 0:
        return found
    power = float(r.square().sum()) / expected
    spread = max(float(r.pow(4).sum()) / expected - power**2, 0.0)
    found["chi2"] = power, math.sqrt(spread / expected)
    low, high = _ends(x)
    found["range"], found["black"] = (high - low, 0.0), (low, 0.0)
    if y.ndim != 4:
        return found
    observed = observed.cpu()
    if tells_whiteness(observed):
        white = whiteness(r, observed)
        found["whiteness"] = white["largest"], max(white["standard_error"])
    found |= _detail(r, mean.cpu(), variance.cpu(), observed)
    if operator.pictorial:
        found |= _level(y, observed, problem)
        findings = check_noise(y, observed)
        found["kind"] = findings[0].text if findings else ""
    if operator.spec == "identity" and unbiased_psnr is not None:
        before = decibels(float(noise_variance(y, problem).double().mean()))
        after = _reference(y, problem) if min(y.shape[-2:]) >= SIDE else math.nan
        found["psnr"]["before"] = before if math.isfinite(before) else None
        if math.isfinite(after):
            found["psnr"]["reference"], found["gain"] = after, (unbiased_psnr - after, 0.0)
    return found


def decibels(square: float) -> float:
    """Compute the PSNR in dB of a mean squared error, for a peak of 1; NaN if it is not positive.

    >>> decibels(0.01)
    20.0
    """
    return -10 * math.log10(square) if square > 0 else math.nan


def _ends(x: Tensor) -> tuple[float, float]:
    """Return the brightness of the darkest and the brightest thousandth of images."""
    flat = x.flatten()
    flat = flat[:: max(1, len(flat) // SAMPLE)].double().sort().values
    last = len(flat) - 1
    return float(flat[round(PERCENT * last)]), float(flat[round((1 - PERCENT) * last)])


def _detail(
    r: Tensor, mean: Tensor, variance: Tensor, observed: Tensor
) -> dict[str, tuple[float, float]]:
    """Measure the correlation of the residual with the detail of the restoration, if any."""
    if min(mean.shape[-2:]) < 3:
        return {}
    smooth = F.avg_pool2d(mean, 3, 1, 1, count_include_pad=False)
    detail = torch.where(observed, (mean - smooth) / variance.sqrt(), 0.0).double()
    scale = float((r.square().sum() * detail.square().sum()).sqrt())
    if scale == 0:
        return {}
    error = float((r * detail).square().sum().sqrt()) / scale
    return {"detail": (float((r * detail).sum()) / scale, error)}


def _level(y: Tensor, observed: Tensor, problem: Problem) -> dict[str, Any]:
    """Measure the noise in flat parts over the noise stated, if there are flat parts.

    Channels with a noise of their own are measured one by one, and the one that is farthest off
    counts.
    """
    if not gives_images(problem.operator) or min(y.shape[-2:]) < SIDE:
        return {}
    if not isinstance(problem.noise, PerChannel):
        return _ratio(y, observed, problem.noise)
    worst: dict[str, Any] = {}
    for i, model in enumerate(problem.noise.models):
        found: dict[str, Any] = _ratio(y[:, i : i + 1], observed[:, i : i + 1], model)
        if found and (not worst or _off(found) > _off(worst)):
            level = Problem("identity", model).level
            worst = found | {"channel": i, "channel level": level}
    return worst


def _off(found: dict[str, Any]) -> float:
    """How far a noise is from the one that was stated, as a factor, in standard errors."""
    value, error = found["noise"]
    return abs(math.log(value)) * value / max(error, 1e-12)


def _ratio(y: Tensor, observed: Tensor, noise: Noise) -> dict[str, tuple[float, float]]:
    """Measure the noise in flat parts over the noise stated; see `_level`."""
    held = torch.where(observed, y.double().cpu(), 0.0)
    patches = powers(held, observed, counts=isinstance(noise, PoissonGaussian))
    if len(patches.power) < LEAST:
        return {}
    stated = noise.variance(patches.mean).clamp_min(1e-12)[:, None]
    (ratio,) = envelope(patches.power, patches.freedom, stated).tolist()
    if ratio <= 0:
        return {}
    ratio = math.sqrt(ratio)
    return {"noise": (ratio, 1.5 * ratio / math.sqrt(float(patches.freedom.sum())))}


def has_unbiased_psnr(problem: Problem) -> bool:
    """Tell whether `unbiased_psnr_of` takes a problem: Gaussian or photon noise, and nothing else.

    >>> [has_unbiased_psnr(Problem(name, 0.1)) for name in ("identity", "sr:average,factor=2")]
    [True, False]
    """
    known = isinstance(problem.noise, Gaussian | PoissonGaussian | PerChannel)
    return known and problem.level > 0 and problem.operator.spec == "identity"


def unbiased_psnr_of(restore: Map, y: Tensor, problem: Problem, seed: int = 0) -> float:
    """Estimate the PSNR of a restoration without truth, for measurements that are only noisy.

    Args:
        restore: The restoration of measurements (B, C, H, W).
        y: Measurements (B, C, H, W).
        problem: Operator and noise.
        seed: Seed of the probe of `unbiased.stein_error`.

    Returns:
        The PSNR in dB for a peak of 1; NaN if the estimated squared error is not positive.

    Raises:
        InputError: The operator is not the identity, or the noise is 0 or neither Gaussian nor
            Poisson-Gaussian, for all channels or for each.

    >>> y = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> round(unbiased_psnr_of(lambda y: y, y, Problem("identity", 0.1)), 2)  # an error of 0.1^2
    20.0
    """
    if not has_unbiased_psnr(problem):
        raise InputError(
            f"operator '{problem.operator.spec}' with noise {problem.noise.spec} has no estimate"
            " of the PSNR: it needs the identity, and Gaussian or Poisson-Gaussian noise above 0"
        )
    noise = generator(seed, StreamId.CALIBRATION, len(y))
    return decibels(float(stein_error(restore, y, problem, noise)[1].double().mean()))


def _reference(y: Tensor, problem: Problem) -> float:
    """Return the unbiased PSNR of the reference filter, in dB."""

    def restore(z: Tensor) -> Tensor:
        level = F.avg_pool2d(z, 3, 1, 1, count_include_pad=False)
        return cosine_filter(z, problem.noise.variance(level))

    return unbiased_psnr_of(restore, y, problem)
