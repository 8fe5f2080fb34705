r"""Plausibility checks: are restored images compatible with the prior and the measurements?

A sampler that diverges returns numbers like any other. An image is refused if one of its values is
not finite, or if all three of these hold:

1. It leaves the range of images:

   .. math:: \max |x - \tfrac12| > \text{BEYOND}.

2. The measurement does not support it: with the image that y alone supports,
   :math:`r = \arg\min_r \lVert y - A r\rVert^2/(2\sigma_y^2) + \lVert r - \tfrac12\rVert^2/2`
   (gray where A is not linear),

   .. math:: \max |x - \tfrac12| > \text{SLACK}\,(\tfrac12 + \max |r - \tfrac12|).

   So a hot pixel, or measurements that are bright throughout, are accepted.
3. The prior does not support it: for :math:`x_s = x + s n`,

   .. math:: \max |x_s - D(x_s, s)| > \text{MOST\_CORRECTION}\, s.

The third test makes no assumption on the prior. For an x drawn from it, :math:`x_s - D(x_s, s) =
s\,\mathbb{E}[n \mid x_s]`, and by Jensen's inequality no moment of that exceeds that of :math:`s
n`, whatever the prior: its tails are those of a normal distribution, or shorter. Unbounded and
heavy-tailed priors pass, and so do draws of a posterior, which are draws of the prior over all y.
D is evaluated only for images that fail the first two tests. Where there is no prior, the first
two decide.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .errors import InputError
from .noise import Gaussian
from .operators.weighted import Weighted
from .problem import Problem
from .rng import generator
from .whitening import whiten

__all__ = ["far_outside", "require_finite_draws", "require_plausible", "require_plausible_flow"]

BEYOND = 1.5
SLACK = 3.0
MOST_CORRECTION = 6.0
LEVEL = 0.5  # s, about the spread of the pixels of images in [0, 1], where D acts most strongly
MISFIT = 100.0  # chi-square per value above which an image does not fit y at all

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
    """Refuse images that the prior and the measurements do not support.

    Args:
        x: Restored images (B, C, H, W).
        y: Their measurements (B, ...).
        problem: Operator and Gaussian noise, bound to the images.
        denoise: The prior's denoiser D(x, sigma), sigma a float.
        method: The solver that made the images, for the message.
        sigma_max: Highest noise level that the prior knows.
        finished: Whether the solver ran to its end; if not, images only have to be finite.

    Raises:
        InputError: An image is not finite or far outside; the message names the likely cause.

    >>> problem = Problem("identity", 0.1).bind([0], (1, 4, 4))
    >>> y = torch.full((1, 1, 4, 4), 0.5)
    >>> require_plausible(y, y, problem, lambda x, sigma: 0 * x + 0.5, "pnp")
    >>> require_plausible(y + 100, y, problem, lambda x, sigma: 0 * x + 0.5, "pnp")
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: pnp diverged on 1 of 1 images (numbers up to 100): ...
    """
    finite = x.isfinite().flatten(1).all(1)
    bad = ~finite
    suspect = bad | (_deviation(x) > BEYOND) if finished else bad
    if not bool(suspect.any()):  # the only read from the device where all images are plausible
        return
    if finished:
        bad = bad | far_outside(x, y, problem, denoise, sigma_max)
    count = int(bad.sum())
    if count:
        first = int(bad.nonzero()[0, 0])
        head = f"{method} diverged on {count} of {len(x)} images"
        if bool(finite[first]):
            head += f" (numbers up to {float(x[first].abs().max()):.3g})"
        one = problem.index_select([first])
        cause = _cause(x[first : first + 1], y[first : first + 1], one, denoise, sigma_max)
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
    """Refuse posterior means of a flow that the prior and the measurements do not support.

    Args:
        mean: Restored images (B, C, H, W).
        std: Their standard deviation (B, C, H, W).
        y: Measurements (B, ...).
        problem: Operator and noise, bound to the images.
        prior: Loads the denoiser D(x, sigma) of the run and the highest noise level it knows;
            (None, _) where the run has no prior of such images. It is called only for images
            outside the range.
        run: Where the flow comes from, for the message.

    Raises:
        InputError: An image is not finite or far outside; the message names the likely cause.

    >>> problem = Problem("identity", 0.1).bind([0], (1, 4, 4))
    >>> y, std = torch.full((1, 1, 4, 4), 0.5), torch.full((1, 1, 4, 4), 0.1)
    >>> require_plausible_flow(y, std, y, problem, lambda: (None, 0.5), "cells")
    >>> require_plausible_flow(y + 100, std, y, problem, lambda: (None, 0.5), "cells")
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: the flow of 'cells' fails on 1 of 1 images (numbers up to 100): ...
    """
    bad = ~(mean.isfinite() & std.isfinite()).flatten(1).all(1)
    if not bool((bad | (_deviation(mean) > BEYOND)).any()):
        return
    given = _describe(problem)
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
    one = problem.index_select([first])
    cause = _scale_advice(y[first : first + 1], one, mean[first : first + 1])
    if cause is None:
        cause = f"it was not learned for {given}: use `unmurk solve`, or learn from such data"
    raise InputError(f"{head}: {cause}")


def require_finite_draws(
    held: Tensor, network: nn.Module | None, solver: str | None, problem: Problem | None
) -> None:
    """Refuse images drawn to learn from that are not finite. No network is evaluated.

    Args:
        held: The draws (B, C, H, W) in float16, as a buffer keeps them.
        network: The network that drew them, or that is the prior of the solver.
        solver: Name of the solver, if there was one.
        problem: The problem that it drew for.

    Raises:
        InputError: An image is not finite; the message names the likely cause.

    >>> draws = torch.tensor([0.5, torch.inf]).half().view(2, 1, 1, 1)
    >>> require_finite_draws(draws[:1], None, "mmps", None)
    >>> require_finite_draws(draws, None, "mmps", None)
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: 1 of 2 images drawn to learn from have values that are not finite...
    """
    lost = int((~held.isfinite()).flatten(1).any(1).sum())
    if not lost:
        return
    head = (
        f"{lost} of {len(held)} images drawn to learn from have values that are not finite, or"
        f" above {HALF_MAX:g}"
    )
    if network is not None and not all(bool(w.isfinite().all()) for w in network.parameters()):
        cause = "the network's weights are not finite, learning has diverged: lower Settings.rate"
    elif solver is not None:
        given = "" if problem is None else f" on {_describe(problem)}"
        cause = f"the solver {solver} diverged{given}: use another (--solver), or more noise"
    else:
        cause = "learning has diverged, or y is far from [0, 1]: lower Settings.rate, or scale y"
    raise InputError(f"{head}: {cause}")


@torch.no_grad()
def far_outside(
    x: Tensor, y: Tensor, problem: Problem, denoise: Denoise | None, sigma_max: float = LEVEL
) -> Tensor:
    """Find images far outside what the prior and the measurements support.

    Args:
        x: Restored images (B, C, H, W).
        y: Their measurements (B, ...).
        problem: Operator and Gaussian noise, bound to the images.
        denoise: The prior's denoiser D(x, sigma), or None.
        sigma_max: Highest noise level that the prior knows.

    Returns:
        (B,) bool.

    >>> problem = Problem("identity", 0.1).bind(range(2), (1, 4, 4))
    >>> x = torch.tensor([0.5, 9.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    >>> far_outside(x, torch.full((2, 1, 4, 4), 0.5), problem, None).tolist()
    [False, True]
    >>> far_outside(x, x, problem, None).tolist()  # y supports the bright image
    [False, False]
    """
    deviation = _deviation(x)
    outside = deviation > BEYOND
    if not bool(outside.any()):
        return outside
    supported = _deviation(_supported(y, problem, x))
    outside = outside & (deviation > SLACK * (0.5 + supported))
    if denoise is not None and bool(outside.any()):
        outside = outside & ~(_correction(x, denoise, min(LEVEL, sigma_max)) <= MOST_CORRECTION)
    return outside


def _deviation(x: Tensor) -> Tensor:
    """Compute the largest deviation from mid-gray, max |x - 1/2|, (B,)."""
    return (x - 0.5).abs().flatten(1).amax(1)


def _supported(y: Tensor, problem: Problem, like: Tensor) -> Tensor:
    """Compute the image r that y alone supports, (B, C, H, W)."""
    gray = torch.full_like(like, 0.5)
    return problem.prox(gray, y, 1.0) if problem.linear else gray


def _correction(x: Tensor, denoise: Denoise, s: float) -> Tensor:
    """Compute the largest correction by the denoiser, max |x_s - D(x_s, s)| / s, (B,)."""
    n = torch.randn(x.shape[1:], generator=generator(0)).to(x)
    noisy = x + s * n
    return (noisy - denoise(noisy, s)).abs().flatten(1).amax(1) / s


def _cause(x: Tensor, y: Tensor, problem: Problem, denoise: Denoise, sigma_max: float) -> str:
    """Name the likely cause for an image x that is refused, and what to do."""
    blank = torch.full_like(x, 0.5)
    if not bool(denoise(blank, min(LEVEL, sigma_max)).isfinite().all()):
        return "the prior returns values that are not finite for a gray image: load it again"
    advice = _scale_advice(y, problem, blank)
    if advice is not None:
        return advice
    given = _describe(problem)
    misfit = _misfit(x, y, problem)
    if not misfit <= MISFIT:
        return (
            f"its steps are too long for {given} (chi-square per value {misfit:.3g}, expected"
            " near 1): use another method, smaller steps or more noise"
        )
    return (
        f"it fits y, but with {given} it left the prior where y measures little: use another"
        " method or more steps"
    )


def _describe(problem: Problem) -> str:
    """Describe operator and noise as they were given; whitened noise by its level at mid-gray."""
    operator = problem.operator
    while isinstance(operator, Weighted):
        operator = operator.operator
    gaussian = isinstance(problem.noise, Gaussian)
    noise = f"{problem.sigma:g}" if gaussian else problem.noise.spec
    return f"operator '{operator.spec}' and noise {noise}"


def _scale_advice(y: Tensor, problem: Problem, like: Tensor) -> str | None:
    """Say what to do where y itself supports values far from those of images; else None."""
    support = float(_deviation(_supported(y, problem, like))) + 0.5
    if not support > SLACK:
        return None
    return (
        f"y supports values up to {support:.3g}, but images lie in [0, 1]:"
        " check the scale of y and the operator"
    )


def _misfit(x: Tensor, y: Tensor, problem: Problem) -> float:
    """Compute chi-square per measured value."""
    square = problem.residual(x, y).square().sum() / problem.measurements(y).sum().clamp_min(1)
    return float(square) / max(problem.sigma, 1e-3) ** 2
