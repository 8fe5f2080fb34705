"""Whether restored images are ones that the prior and the measurements allow.

A sampler that diverges returns numbers, and nothing about them says so. An image is refused if one
of its numbers is not finite, or if all three of these hold:

1. it leaves the range of images: max |x - 1/2| > BEYOND;
2. y does not ask for it: max |x - 1/2| > SLACK (1/2 + max |r - 1/2|), with r the image that y
   alone supports, argmin_r ||y - A r||^2 / (2 sigma_y^2) + ||r - 1/2||^2 / 2 (grey where A is
   not linear). So a hot pixel, or measurements that are bright throughout, do not count;
3. the prior does not hold it: max |x_s - D(x_s, s)| > PULL s for x_s = x + s n.

The third needs no knowledge of the prior. For an x drawn from it, x_s - D(x_s, s) = s E[n | x_s],
and by Jensen's inequality no moment of that exceeds the one of s n, whatever the prior: its tails
are those of a normal distribution, or shorter. Priors that are unbounded or heavy-tailed pass, and
so do draws of a posterior, which are draws of the prior over all y. D is called for images that
fail the first two alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import InputError
from .problem import Problem
from .seeds import generator

__all__ = ["far_outside", "require_plausible"]

BEYOND = 1.5
SLACK = 3.0
PULL = 6.0
LEVEL = 0.5  # s, about the spread of the pixels of images in [0, 1]: there D pulls the most
MISFIT = 100.0  # chi-square per number above which an image does not fit y at all

Denoise = Callable[[Tensor, float], Tensor]


@torch.no_grad()
def require_plausible(
    x: Tensor,
    y: Tensor,
    problem: Problem,
    denoise: Denoise,
    method: str,
    *,
    sigma_max: float = LEVEL,
    finished: bool = True,
) -> None:
    """Refuse images that prior and measurements do not allow; see the head of this module.

    Args:
        x: Restored images (B, C, H, W).
        y: Their measurements (B, ...).
        problem: Operator and Gaussian noise, bound to these rows.
        denoise: The prior's D(x, sigma), sigma a float.
        method: What made the images, for the message.
        sigma_max: Highest level that the prior knows.
        finished: Whether the method was allowed to end; else images have only to be finite.

    Raises:
        InputError: An image is not finite or far outside; the message says what is to blame.
    """
    finite = x.isfinite().flatten(1).all(1)
    bad = ~finite
    suspect = bad | (_reach(x) > BEYOND) if finished else bad
    if not bool(suspect.any()):  # the one look at the device where all is well
        return
    if finished:
        bad = bad | far_outside(x, y, problem, denoise, sigma_max)
    count = int(bad.sum())
    if count:
        first = int(bad.nonzero()[0, 0])
        head = f"{method} diverged on {count} of {len(x)} images"
        if bool(finite[first]):
            head += f" (numbers up to {float(x[first].abs().max()):.3g})"
        row = slice(first, first + 1)
        cause = _cause(x[row], y[row], problem.take([first]), denoise, sigma_max)
        raise InputError(f"{head}: {cause}")


@torch.no_grad()
def far_outside(
    x: Tensor, y: Tensor, problem: Problem, denoise: Denoise, sigma_max: float = LEVEL
) -> Tensor:
    """Which images are far outside what prior and measurements allow, (B,); arguments as above."""
    reach = _reach(x)
    outside = reach > BEYOND
    if not bool(outside.any()):
        return outside
    outside = outside & (reach > SLACK * (0.5 + _reach(_supported(y, problem, x))))
    if bool(outside.any()):
        outside = outside & ~(_pull(x, denoise, min(LEVEL, sigma_max)) <= PULL)
    return outside


def _reach(x: Tensor) -> Tensor:
    return (x - 0.5).abs().flatten(1).amax(1)


def _supported(y: Tensor, problem: Problem, like: Tensor) -> Tensor:
    """r, (B, C, H, W)."""
    grey = torch.full_like(like, 0.5)
    return problem.prox(grey, y, 1.0) if problem.linear else grey


def _pull(x: Tensor, denoise: Denoise, s: float) -> Tensor:
    """max |x_s - D(x_s, s)| / s, (B,)."""
    n = torch.randn(x.shape[1:], generator=generator(0)).to(x)
    noisy = x + s * n
    return (noisy - denoise(noisy, s)).abs().flatten(1).amax(1) / s


def _cause(x: Tensor, y: Tensor, problem: Problem, denoise: Denoise, sigma_max: float) -> str:
    """What is to blame for an image x that is refused, and what to do."""
    blank = torch.full_like(x, 0.5)
    if not bool(denoise(blank, min(LEVEL, sigma_max)).isfinite().all()):
        return "the prior returns numbers that are not finite for a grey image: load it anew"
    support = float(_reach(_supported(y, problem, blank))) + 0.5
    if support > SLACK:
        return (
            f"y asks for values up to {support:.3g} where images lie in [0, 1]:"
            " check the scale of y and the operator"
        )
    where = f"operator '{problem.operator.spec}' and noise {problem.sigma:g}"
    misfit = _misfit(x, y, problem)
    if not misfit <= MISFIT:
        return (
            f"its steps are too long for {where} (chi-square per number {misfit:.3g}, should"
            " be near 1): take another method, smaller steps or more noise"
        )
    return (
        f"it fits y, but with {where} it lost the prior where y says little: take another"
        " method or more steps"
    )


def _misfit(x: Tensor, y: Tensor, problem: Problem) -> float:
    square = problem.residual(x, y).square().sum() / problem.measurements(y).sum().clamp_min(1)
    return float(square) / max(problem.sigma, 1e-3) ** 2
