"""Noise that depends on the brightness, made Gaussian and of one level: what all solvers take.

With an estimate v of var(y | x), number by number, and one level s,

    y' = w y,    A' = w A,    w = s / sqrt(v):    y' = A'(x) + noise of standard deviation s,

so that a solver that minimises ||y' - A'(x)||^2 / (2 s^2) weighs every number of y by what it is
worth: weighted least squares. It puts a normal distribution of variance v in the place of the
Poisson distribution, which is good to the extent that there are several counts behind each v.

v = gain^2 r + sigma^2 needs the rate r of the counts. Taking it from the number itself (r = k, or
k + 1) is a known trap: too low a count is then trusted most, and the fit comes out too dark
(K. J. Mighell 1999, "Parameter estimation in astronomy with Poisson-distributed data",
Astrophys. J. 518, 380). So it is taken from the neighbours: a weight that knows nothing of its
number's own noise leaves the weighted residual with the mean 0. The counts K of the n measured
numbers in a window of WINDOW x WINDOW around it, itself left out, are summed up. If all rates in
it were one r, and r exponentially distributed with the mean R of the image,

    E[r | K] = (K + 1) / (n + 1 / R),    R = (all counts + 1) / (all numbers),

which is near K / n where there are many counts, near R where there are few, and never 0. Where
Gaussian noise takes counts below 0, K is taken for 0. Measurements that are no images (not of
shape (B, C, H, W)) have no neighbours: there r = R.

s is what the noise would be at mid-grey, c = 1/2. It cancels in the fit; but solvers know floors
and first steps in units of images, and with this s A' is about as large as A.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .noise import PoissonGaussian
from .operators.weighted import Weighted
from .problem import Problem

__all__ = ["WINDOW", "rates", "whiten"]

WINDOW = 5


def whiten(y: Tensor, problem: Problem) -> tuple[Tensor, Problem]:
    """Measurements and problem with Gaussian noise of one level, number by number the same news.

    Args:
        y: Measurements (B, ...).
        problem: Operator and noise, bound to these rows. Gaussian noise comes back as it is.
    """
    noise = problem.noise
    if not isinstance(noise, PoissonGaussian):
        return y, problem
    y = problem.operator.apply_mask(y)
    variance = noise.variance(noise.offset + noise.gain * rates(y, problem))
    level = float(noise.variance(torch.tensor(0.5))) ** 0.5
    weights = level / variance.sqrt()
    white = Problem(Weighted(problem.operator, weights), level)
    white.index = problem.index
    return weights * y, white


def rates(y: Tensor, problem: Problem) -> Tensor:
    """r, the counts expected in each number of y, (B, ...) like y.

    Args:
        y: Measurements (B, ...), zero where nothing is measured.
        problem: Operator and Poisson or Poisson-Gaussian noise.
    """
    assert isinstance(problem.noise, PoissonGaussian)
    counts = problem.operator.apply_mask(y - problem.noise.offset) / problem.noise.gain
    numbers = problem.operator.apply_mask(torch.ones_like(y))
    every = tuple(range(1, y.ndim))
    full = counts.sum(every, keepdim=True).clamp_min(0) + 1
    mean = full / numbers.sum(every, keepdim=True).clamp_min(1)
    if y.ndim != 4:
        return mean.expand_as(y)
    return (_window(counts).clamp_min(0) + 1) / (_window(numbers).round() + 1 / mean)


def _window(values: Tensor) -> Tensor:
    """Sums over the window around each number, itself left out; outside there is nothing."""
    return WINDOW**2 * F.avg_pool2d(values, WINDOW, stride=1, padding=WINDOW // 2) - values
