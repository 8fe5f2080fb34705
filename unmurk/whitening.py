r"""Whitening: noise that depends on the brightness, rescaled to Gaussian noise of one level.

With an estimate :math:`v` of :math:`\operatorname{var}(y \mid x)`, value by value, and one level
:math:`s`,

.. math::
    y' = w y,\qquad A' = w A,\qquad w = s/\sqrt v
    \quad\Longrightarrow\quad y' = A'(x) + \text{noise of standard deviation } s.

A solver that minimizes :math:`\lVert y' - A'(x)\rVert^2/(2 s^2)` then weights every value of y by
its precision: weighted least squares. This replaces the Poisson distribution by a normal
distribution of variance v, which is accurate where several counts are behind each v.

:math:`v = \text{gain}^2 r + \sigma^2` needs the rate r of the counts. Taking it from the value
itself (:math:`r = k`, or :math:`k + 1`) is a known trap: too low a count is then trusted most, and
the fit is too dark (K. J. Mighell 1999, "Parameter estimation in astronomy with
Poisson-distributed data", Astrophys. J. 518, 380). So it is taken from the neighbors: a weight
that does not depend on the noise of its own value leaves the weighted residual with the mean 0. K
is the sum of the counts of the n measured values in a window of WINDOW x WINDOW around a value,
itself left out. If all rates in the window were one r, and r exponentially distributed with the
mean R of the image,

.. math::
    \mathbb{E}[r \mid K] = \frac{K + 1}{n + 1/R},\qquad
    R = \frac{\text{all counts} + 1}{\text{all values}},

which is near K / n where there are many counts, near R where there are few, and never 0. Where
Gaussian noise makes the sum negative, K is taken as 0. Measurements that are not images (not of
shape (B, C, H, W)) have no neighbors: there r = R.

s is the standard deviation of the noise at mid-gray, :math:`c = 1/2`. It cancels in the fit; but
solvers have floors and first steps in units of images, and with this s, A' is about as large as A.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .noise import PerChannel, PoissonGaussian
from .operators.weighted import Weighted
from .problem import Problem

__all__ = ["WINDOW", "rates", "whiten"]

WINDOW = 5


def whiten(y: Tensor, problem: Problem) -> tuple[Tensor, Problem]:
    """Rescale the measurements so that the noise has one standard deviation.

    Args:
        y: Measurements (B, ...).
        problem: Operator and noise, bound to the images of y.

    Returns:
        Measurements (B, ...) and their problem with Gaussian noise. Measurements with Gaussian
        noise are returned unchanged.

    >>> problem = Problem("identity", "poisson,gain=0.01").bind([0], (1, 8, 8))
    >>> scaled, white = whiten(torch.full((1, 1, 8, 8), 0.25), problem)
    >>> round(white.sigma, 4), round(float(scaled[0, 0, 4, 4]), 4)
    (0.0707, 0.3536)
    """
    noise = problem.noise
    if not isinstance(noise, PoissonGaussian | PerChannel):
        return y, problem
    y = problem.operator.apply_mask(y)
    gain, offset = _gains(problem, y)
    variance = problem.noise.variance(offset + gain * rates(y, problem))
    level = float(noise.variance(torch.tensor(0.5))) ** 0.5
    weights = level / variance.sqrt()
    white = Problem(Weighted(problem.operator, weights), level)
    white.index = problem.index
    return weights * y, white


def rates(y: Tensor, problem: Problem) -> Tensor:
    """Estimate the expected counts r in each value of y.

    Args:
        y: Measurements (B, ...), zero where nothing is measured.
        problem: Operator and Poisson or Poisson-Gaussian noise, or noise per channel.

    Returns:
        Counts (B, ...), > 0.

    >>> found = rates(torch.full((1, 1, 8, 8), 0.5), Problem("identity", "poisson,gain=0.1"))
    >>> found.round(decimals=1).unique()
    tensor([5.])
    """
    gain, offset = _gains(problem, y)
    counts = problem.operator.apply_mask(y - offset) / gain
    numbers = problem.operator.apply_mask(torch.ones_like(y))
    channels = isinstance(problem.noise, PerChannel)
    every = tuple(range(2 if channels else 1, y.ndim))
    full = counts.sum(every, keepdim=True).clamp_min(0) + 1
    mean = full / numbers.sum(every, keepdim=True).clamp_min(1)
    if y.ndim != 4:
        return mean.expand_as(y)
    return (_window(counts).clamp_min(0) + 1) / (_window(numbers).round() + 1 / mean)


def _gains(problem: Problem, y: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Return gain and offset of the noise, which broadcast to y; 1 and 0 for Gaussian channels."""
    noise = problem.noise
    if isinstance(noise, PoissonGaussian):
        return noise.gain, noise.offset
    assert isinstance(noise, PerChannel)
    noise.check(y)
    pairs = [(getattr(m, "gain", 1.0), getattr(m, "offset", 0.0)) for m in noise.models]
    gain, offset = torch.tensor(pairs, dtype=y.dtype, device=y.device).T
    shape = (1, -1, *[1] * (y.ndim - 2))
    return gain.reshape(shape), offset.reshape(shape)


def _window(values: Tensor) -> Tensor:
    """Sum over the window around each value, itself left out, with zeros outside the image."""
    return WINDOW**2 * F.avg_pool2d(values, WINDOW, stride=1, padding=WINDOW // 2) - values
