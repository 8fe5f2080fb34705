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
fail the first two alone. Where there is no prior the first two decide.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .errors import InputError
from .noise import Gaussian
from .operators.weighted import Weighted
from .problem import Problem
from .rng import generator

__all__ = ["far_outside", "require_finite_draws", "require_plausible", "require_plausible_flow"]

BEYOND = 1.5
SLACK = 3.0
PULL = 6.0
LEVEL = 0.5  # s, about the spread of the pixels of images in [0, 1]: there D pulls the most
MISFIT = 100.0  # chi-square per number above which an image does not fit y at all

HALF_MAX = 65504.0  # the largest number of float16, in which draws are kept

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
        cause = _cause(x[row], y[row], problem.index_select([first]), denoise, sigma_max)
        raise InputError(f"{head}: {cause}")


@torch.no_grad()
def require_plausible_flow(
    mean: Tensor,
    std: Tensor,
    y: Tensor,
    problem: Problem,
    prior: Callable[[], tuple[Denoise | None, float]],
    run: str,
) -> None:
    """The same for mean and standard deviation (B, C, H, W) of what a flow restores.

    Args:
        mean: Restored images (B, C, H, W).
        std: Their standard deviation.
        y: Measurements (B, ...).
        problem: Operator and noise, bound to these rows.
        prior: Loads D(x, sigma) of the run, and the highest level it knows; (None, _) where the
            run has no prior of such images. Called for images that are not in the range alone.
        run: Where the flow comes from, for the message.

    Raises:
        InputError: An image is not finite or far outside; the message says what is to blame.
    """
    bad = ~(mean.isfinite() & std.isfinite()).flatten(1).all(1)
    if not bool((bad | (_reach(mean) > BEYOND)).any()):
        return
    from .whitening import whiten

    where = _where(problem)
    y, problem = whiten(y, problem)
    denoise, sigma_max = prior()
    bad = bad | far_outside(mean, y, problem, denoise, sigma_max)
    count = int(bad.sum())
    if not count:
        return
    first = int(bad.nonzero()[0, 0])
    head = f"the flow of '{run}' fails on {count} of {len(mean)} images"
    if bool(mean[first].isfinite().all()):
        head += f" (numbers up to {float(mean[first].abs().max()):.3g})"
    asked = _asked(y[first : first + 1], problem.index_select([first]), mean[first : first + 1])
    cause = asked or (
        f"it does not hold for {where}: use `unmurk solve`, or learn from such measurements"
    )
    raise InputError(f"{head}: {cause}")


def require_finite_draws(
    held: Tensor, network: nn.Module | None, solver: str | None, problem: Problem | None
) -> None:
    """Refuse images drawn to learn from that are not finite; no network is called.

    Args:
        held: The draws (B, C, H, W) in float16, as a buffer keeps them.
        network: What drew them, or whose prior the solver drew under.
        solver: Name of the solver, if there was one.
        problem: What it drew for.

    Raises:
        InputError: One is not finite; the message says what is to blame.
    """
    lost = int((~held.isfinite()).flatten(1).any(1).sum())
    if not lost:
        return
    head = (
        f"{lost} of {len(held)} images drawn to learn from hold numbers that are not finite, or"
        f" above {HALF_MAX:g}"
    )
    if network is not None and not all(bool(w.isfinite().all()) for w in network.parameters()):
        cause = "the network's weights are not finite, learning has diverged: lower Settings.rate"
    elif solver is not None:
        where = "" if problem is None else f" on {_where(problem)}"
        cause = f"the solver {solver} diverged{where}: take another (--solver), or more noise"
    else:
        cause = "learning has diverged, or y is far from [0, 1]: lower Settings.rate, or scale y"
    raise InputError(f"{head}: {cause}")


@torch.no_grad()
def far_outside(
    x: Tensor, y: Tensor, problem: Problem, denoise: Denoise | None, sigma_max: float = LEVEL
) -> Tensor:
    """Which images are far outside what prior and measurements allow, (B,); arguments as above."""
    reach = _reach(x)
    outside = reach > BEYOND
    if not bool(outside.any()):
        return outside
    outside = outside & (reach > SLACK * (0.5 + _reach(_supported(y, problem, x))))
    if denoise is not None and bool(outside.any()):
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
    asked = _asked(y, problem, blank)
    if asked:
        return asked
    where = _where(problem)
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


def _where(problem: Problem) -> str:
    """Operator and noise as they were given, or, of whitened noise, its level at mid-grey."""
    operator = problem.operator
    while isinstance(operator, Weighted):
        operator = operator.operator
    gaussian = isinstance(problem.noise, Gaussian)
    noise = f"{problem.sigma:g}" if gaussian else problem.noise.spec
    return f"operator '{operator.spec}' and noise {noise}"


def _asked(y: Tensor, problem: Problem, like: Tensor) -> str | None:
    """What to do where y itself asks for values far from those of images; else None."""
    support = float(_reach(_supported(y, problem, like))) + 0.5
    if not support > SLACK:
        return None
    return (
        f"y asks for values up to {support:.3g} where images lie in [0, 1]:"
        " check the scale of y and the operator"
    )


def _misfit(x: Tensor, y: Tensor, problem: Problem) -> float:
    square = problem.residual(x, y).square().sum() / problem.measurements(y).sum().clamp_min(1)
    return float(square) / max(problem.sigma, 1e-3) ** 2
