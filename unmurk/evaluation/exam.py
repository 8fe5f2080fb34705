r"""The problems of the certification, and how samples are compared with their exact posteriors.

For each of B measurements a solver draws :math:`x_1, \dots, x_S`. With the exact posterior's mean
m and covariance C, the samples' mean :math:`\bar x` and covariance :math:`\hat C` (divisor S - 1),
and sums over the measurements,

.. math::
    \text{mean_error}^2 &= \frac{\sum (\lVert \bar x - m\rVert^2 - \operatorname{tr}\hat C / S)}
        {\sum \operatorname{tr} C} \\
    \text{spread}^2 &= \frac{\sum \operatorname{tr}(P \hat C)}{\sum \operatorname{tr}(P C)},
        \qquad P = P_{\mathrm{row}} \text{ or } I - P_{\mathrm{row}} \\
    \text{coverage} &= \Pr(q_l < x < q_u) \text{ for exact posterior draws x, per pixel} \\
    \text{SWD} &= \mathbb E_w \int_0^1 |F_w^{-1}(q) - G_w^{-1}(q)|\, dq
        /\, \sqrt{\textstyle\sum \operatorname{tr} C / (B d)}.

:math:`P_{\mathrm{row}}` projects on the row space of A, the directions that y measures: those that
A passes with more than 1e-3 of its largest singular value. :math:`I - P_{\mathrm{row}}` projects
on those that only the prior determines. A finite number of draws adds
:math:`\operatorname{tr}\hat C / S` to the first term of :math:`\text{mean_error}^2`, so its
expectation is the squared bias, for any S; where it is negative, mean_error is 0. :math:`q_l, q_u`
bound the central 90 % of the solver's samples. They are computed by ranks, so that the expectation
is 0.9 for exact samples and any S (as in `metrics.coverage`). :math:`F_w, G_w` are the
distributions of the solver's and of exact samples along a random unit vector w; `swd_exact` takes
a second set of exact samples in place of the solver's.

**Standard errors.** For Gaussian samples :math:`\lVert x - m\rVert^2` has the variance
:math:`2 \operatorname{tr} C^2`. With

.. math:: \nu = \Bigl(\sum \operatorname{tr} C\Bigr)^2 /\, \sum \operatorname{tr} C^2,

B times the number of directions that share the variance, the standard errors are

.. math::
    \text{spread}: &\quad 1 / \sqrt{2 (S - 1) \nu} \quad
        \text{(relative, with } C \to P C P \text{ in } \nu) \\
    \text{mean_error}^2: &\quad
        \sqrt{2 / (S (S - 1)) + 4\, \text{mean_error}^2 / S} \,/\, \sqrt\nu \\
    \text{coverage}: &\quad \text{about } \sqrt{2 \cdot 0.9 \cdot 0.1 / (S \nu)} \quad
        \text{(S draws for q, S for x)}.

The second one holds for samples of any distribution. For a posterior with heavy tails the first
one is multiplied by the square root of
:math:`\mathrm{Var}\lVert P (x - m)\rVert^2 / (2 \operatorname{tr}(P C)^2)`, which is estimated
from the draws of the reference.

The reference of the heavy-tailed prior is itself a mean of draws (`gibbs.py`). Let e be the
squared standard error of m over :math:`\operatorname{tr} C`, from the scatter of its chains. Then
e is subtracted from :math:`\text{mean_error}^2`, whose standard error becomes

.. math:: \sqrt{2 / (S (S - 1)) + 4 e / S + 2 e^2
    + 4\, \text{mean_error}^2 (1 / S + e)} \,/\, \sqrt\nu.

The reference's own error of a spread is added in quadrature to that of the samples.

The mean is the hard part: its error falls with :math:`S \sqrt B`, that of the spread with
:math:`\sqrt{S B}`. Hence the many draws of few measurements. With B = 4, nu is 55 to 250 on most
of these problems, and 14 where the components of the mixture stay ambiguous. S is chosen for each
problem such that the standard error of :math:`\text{mean_error}^2` is 0.05^2 / 3.5. This leaves
standard errors below 2 % in spread (threshold 10 %) and below 0.01 in coverage (threshold 0.05).
"""

import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..problem import Problem
from ..rng import generator
from ..solvers.base import Claim
from .exact import GaussianMixture, GaussianPrior, operator_matrix
from .gibbs import GibbsPosterior
from .metrics import share_inside
from .scale_mixture import ScaleMixture

__all__ = [
    "BIAS",
    "COVERAGE",
    "LEVEL",
    "POINT",
    "PRIORS",
    "PROBLEMS",
    "SHORT",
    "SPREAD",
    "Exam",
    "Prior",
    "checked",
    "draws_covered",
    "exam",
    "standard_errors",
]

Case = tuple[str, str, float]  # prior, operator, noise
Prior = GaussianPrior | GaussianMixture | ScaleMixture

SHAPE, WIDE = (1, 8, 8), (1, 6, 10)
PRIORS: dict[str, Callable[[], Prior]] = {
    "gaussian": lambda: GaussianPrior.exponential(SHAPE),
    "mixture": lambda: GaussianMixture.example(SHAPE),
    "wavelet": lambda: ScaleMixture.example(SHAPE),
    "gaussian-wide": lambda: GaussianPrior.exponential(WIDE),
    "mixture-wide": lambda: GaussianMixture.example(WIDE),
    "wavelet-wide": lambda: ScaleMixture.example(WIDE),
}
"""Priors of the certification by name, with 8 x 8 pixels, or 6 x 10 ("-wide")."""

MASK, BOX = "inpaint:random,keep=0.5", "inpaint:box,size=4"
BLUR, REDUCED = "blur:gaussian,sigma=1,pad=circular", "sr:average,factor=2"
OPERATORS = ("identity", MASK, BOX, BLUR, REDUCED)

SHORT: list[Case] = [
    ("gaussian", MASK, 0.005),
    ("gaussian", BOX, 0.02),
    ("gaussian", BLUR, 0.01),
    ("gaussian", REDUCED, 0.3),
    ("mixture", "identity", 0.3),
    ("mixture", BOX, 0.02),
    ("mixture", MASK, 0.3),
    ("mixture-wide", BLUR, 0.02),
    ("wavelet", BOX, 0.02),
    ("wavelet", BLUR, 0.02),
    ("wavelet", "identity", 0.5),
    ("wavelet-wide", REDUCED, 0.05),
]
"""The problems of a short certification: (prior, operator, noise)."""

MORE: list[Case] = [
    *(("gaussian", "identity", 0.005), ("gaussian", BLUR, 0.02), ("gaussian", BOX, 0.5)),
    *(("mixture", "identity", 0.005), ("mixture", BLUR, 0.01), ("mixture", REDUCED, 0.5)),
    *(("wavelet", MASK, 0.005), ("wavelet", BLUR, 0.01), ("wavelet", REDUCED, 0.01)),
    *(("gaussian-wide", BOX, 0.02), ("gaussian-wide", REDUCED, 0.3)),
    *(("mixture-wide", MASK, 0.1), ("wavelet-wide", BLUR, 0.1), ("wavelet-wide", BOX, 0.02)),
]
PROBLEMS: list[Case] = [*itertools.product(tuple(PRIORS)[:3], OPERATORS, (0.05, 0.3)), *MORE]
PROBLEMS += [case for case in SHORT if case not in PROBLEMS]
"""Problems of the certification: (prior, operator, noise)."""

SPREAD, COVERAGE, BIAS, POINT = 0.1, 0.05, 0.05, 0.25  # largest errors of "posterior" and "point"
LEVEL = 0.9  # nominal probability of the intervals
PRECISE = 3.5  # BIAS^2 in standard errors of mean_error^2; it sets the number of draws
FIRST, SURE = 32, 5  # draws before the first test; standard errors at which a test stops
UNSEEN = 1e-3  # singular values below this fraction of the largest count as zero
DIRECTIONS = 64  # of the sliced Wasserstein distance
NOISE = (1e-3, 10.0)  # bounds of the noise level of a problem


class Exam:
    """One problem: measurements, and their exact posterior.

    Args:
        case: Prior, operator and noise.
        images: Number B of measurements.
        seed: Seed of the truths, the noise and the exact samples.

    >>> found = Exam(("gaussian", "identity", 0.3), images=2, seed=0)
    >>> exact = found.posterior.sample(64, seed=1)
    >>> found.missed(exact), found.missed(0.5 * exact)
    (False, True)
    """

    def __init__(self, case: Case, images: int, seed: int) -> None:
        self.case, self.root = case, seed
        name, operator, noise = case
        self.prior = PRIORS[name]()
        self.problem = Problem(operator, noise).bind(range(images), self.prior.shape)
        truth = self.prior.sample(images, seed=self.seed("truth"))
        self.y = self.problem.simulate(truth, seed=self.seed("noise"))
        self.posterior = self.prior.posterior(self.y, self.problem)
        self.mean = self.posterior.mean.double().flatten(1)
        self.covariance = self.posterior.covariance.expand(images, -1, -1)
        self.rms = (_trace(self.covariance).mean() / self.mean.shape[1]).sqrt()
        self.mean_error, self.tails, self.spread_errors = 0.0, [1.0, 1.0], [0.0, 0.0]
        matrix = operator_matrix(self.problem, self.prior.shape, self.y).expand(images, -1, -1)
        _, singular, right = torch.linalg.svd(matrix, full_matrices=False)
        passed = (singular > UNSEEN * singular.amax(1, keepdim=True)).double()
        observed = right.mT @ (passed[:, :, None] * right)
        unobserved = torch.eye(observed.shape[-1], dtype=observed.dtype) - observed
        self.sides = [p if _trace(p).sum() > 0.5 else None for p in (observed, unobserved)]
        if isinstance(self.posterior, GibbsPosterior):
            self._sampled(self.posterior)

    def _sampled(self, posterior: GibbsPosterior) -> None:
        """Estimate what a reference that is known only by samples adds to the errors."""
        self.mean_error = float(posterior.mean_variance.sum() / _trace(self.covariance).sum())
        away = posterior.chains - self.mean[:, None]  # (T, B, K, d)
        for number, p in enumerate(self.sides):
            if p is not None:
                square = (away @ p).square().sum(-1)
                gaussian = 2 * (p @ self.covariance @ p).square().sum()
                self.tails[number] = float(square.var((0, 2)).sum() / gaussian) ** 0.5
                chains = square.mean(0).sum(0)
                bar = chains.std() / len(chains) ** 0.5 / chains.mean()
                self.spread_errors[number] = float(bar / 2)

    def seed(self, purpose: str) -> int:
        """Return a seed of its own for every problem and purpose."""
        path = zlib.crc32(repr((self.case, purpose)).encode())
        return int(torch.randint(2**31, (), generator=generator(self.root, path)))

    def draws(self, most: int) -> int:
        """Return how many draws mean_error^2 needs, from `FIRST` to `most`."""
        _, bar = standard_errors(self.covariance, 2)  # falls as 1 / sqrt(S (S - 1))
        wanted = 0.5 + math.sqrt(0.25 + 2 * (bar * PRECISE / BIAS**2) ** 2)
        return min(max(math.ceil(wanted), FIRST), most)

    def square_bar(self, draws: int, bias: float) -> float:
        """Return the standard error of mean_error^2."""
        return standard_errors(self.covariance, draws, bias, self.mean_error)[1]

    def spread_bars(self, draws: int) -> list[float | None]:
        """Return the standard errors of both spreads; None if A has no such directions."""
        bars: list[float | None] = []
        for p, tail, own in zip(self.sides, self.tails, self.spread_errors, strict=True):
            if p is None:
                bars.append(None)
                continue
            bar, _ = standard_errors(p @ self.covariance @ p, draws)
            bars.append(math.hypot(bar * tail, own))
        return bars

    def bars(self, draws: int, bias: float) -> dict[str, float]:
        """Return the standard errors of the figures of a row."""
        spread = max(bar for bar in self.spread_bars(draws) if bar is not None)
        return {"square_bar": self.square_bar(draws, bias), "spread_bar": spread}

    def moments(self, samples: Tensor) -> tuple[float, list[float | None]]:
        """Compute mean_error^2 (may be negative) and the spreads of samples (S, B, C, H, W)."""
        x = samples.double().flatten(2).transpose(0, 1)  # (B, S, d)
        mean = x.mean(1, keepdim=True)
        found = (x - mean).mT @ (x - mean) / (x.shape[1] - 1)
        bias = (mean[:, 0] - self.mean).square().sum() - _trace(found).sum() / x.shape[1]
        exact = self.covariance
        spreads = [None if p is None else _ratio(p @ found, p @ exact) for p in self.sides]
        return float(bias / _trace(exact).sum()) - self.mean_error, spreads

    def missed(self, samples: Tensor) -> bool:
        """Whether mean or spread differ significantly from those of a posterior sampler."""
        square, spreads = self.moments(samples)
        if square > BIAS**2 + SURE * self.square_bar(len(samples), max(square, 0) ** 0.5):
            return True
        bars = self.spread_bars(len(samples))
        return any(
            spread is not None and bar is not None and abs(spread - 1) > SPREAD + SURE * bar
            for spread, bar in zip(spreads, bars, strict=True)
        )

    def figures(self, samples: Tensor) -> dict[str, Any]:
        """Compute the figures of a row, and the claim that they earn."""
        square, (observed, unobserved) = self.moments(samples)
        seeds = self.seed("exact"), self.seed("other")
        exact, other = (self.posterior.sample(len(samples), seed=s) for s in seeds)
        mean_error = max(square, 0) ** 0.5
        found = draws_covered(samples, exact)
        return {
            "earned": _earned(mean_error, [observed, unobserved], found),
            "mean_error": mean_error,
            "spread_observed": observed,
            "spread_unobserved": unobserved,
            "coverage": found,
            "swd": self._swd(samples, exact),
            "swd_exact": self._swd(other, exact),
            "draws": len(samples),
            **self.bars(len(samples), mean_error),
            **self.reference(),
        }

    def reference(self) -> dict[str, float]:
        """Return the precision of the reference, where it is sampled."""
        if not isinstance(self.posterior, GibbsPosterior):
            return {}
        found = self.posterior
        return dict(reference_error=self.mean_error**0.5, rhat=found.rhat, ess=found.ess)

    def _swd(self, a: Tensor, b: Tensor) -> float:
        g = generator(self.seed("directions"))
        w = torch.randn(self.mean.shape[1], DIRECTIONS, generator=g, dtype=torch.float64)
        w = w / w.norm(dim=0)
        ranked = [(x.double().flatten(2) @ w).sort(0).values for x in (a, b)]
        return float((ranked[0] - ranked[1]).abs().mean() / self.rms)


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _ratio(found: Tensor, exact: Tensor) -> float:
    return float((_trace(found).sum() / _trace(exact).sum()).sqrt())


def draws_covered(samples: Tensor, exact: Tensor) -> float:
    """Compute the share of exact draws (M, B, ...) in the central interval of samples (S, B, ...).

    It is `metrics.coverage` for many true images of each measurement, which are ranked at once.

    >>> draws_covered(torch.linspace(0, 1, 99).view(-1, 1), torch.tensor([[0.5], [2.0]]))
    0.5
    """
    ranked = samples.double().flatten(1).T.sort(1).values.contiguous()
    truth = exact.double().flatten(1).T.contiguous()
    slots = len(samples) + 1
    start = torch.searchsorted(ranked, truth) / slots
    stop = (torch.searchsorted(ranked, truth, right=True) + 1) / slots
    return float(share_inside(start, stop, LEVEL).mean())


def _earned(mean_error: float, spreads: Sequence[float | None], coverage: float) -> Claim:
    calibrated = all(spread is None or abs(spread - 1) <= SPREAD for spread in spreads)
    if calibrated and mean_error <= BIAS and abs(coverage - LEVEL) <= COVERAGE:
        return "posterior"
    return "point" if mean_error <= POINT else "heuristic"


def standard_errors(
    covariance: Tensor, draws: int, bias: float = 0.0, reference: float = 0.0
) -> tuple[float, float]:
    """Compute the standard errors of a spread (relative) and of mean_error^2; see the module.

    Args:
        covariance: Covariances of the exact posterior of every measurement, shape (B, d, d).
        draws: Number S of samples for each measurement, at least 2.
        bias: The mean_error at which the second one is computed.
        reference: Squared standard error of the exact mean, in units of tr C (0: closed form).

    Returns:
        Both standard errors.

    >>> spread, square = standard_errors(torch.eye(50)[None], draws=101)
    >>> round(spread, 6), round(square, 6)
    (0.01, 0.00199)
    """
    nu = float(_trace(covariance).sum() ** 2 / covariance.square().sum())
    square = 2 / (draws * (draws - 1)) + 4 * reference / draws + 2 * reference**2
    square += 4 * bias**2 * (1 / draws + reference)
    return (2 * (draws - 1) * nu) ** -0.5, (square / nu) ** 0.5


@lru_cache(maxsize=1)
def exam(case: Case, images: int, seed: int) -> Exam:
    """Return the exam of a problem; the last one is cached.

    >>> found = exam(("gaussian", "sr:average,factor=2", 0.3), images=2, seed=0)
    >>> found.y.shape, found.posterior.covariance.shape
    (torch.Size([2, 1, 4, 4]), torch.Size([1, 64, 64]))
    """
    return Exam(case, images, seed)


def checked(problems: Iterable[Any]) -> list[Case]:
    """Check problems, and return them as (prior, operator, noise).

    Raises:
        InputError: An entry does not have this form, or there is no exact posterior for its prior,
            operator or noise.

    >>> checked([("gaussian", "identity", 1)])
    [('gaussian', 'identity', 1.0)]
    """
    cases = list(problems)
    for case in cases:
        if not (isinstance(case, tuple | list) and len(case) == 3):
            raise InputError(f"problem {case!r}: write it as (prior, operator, noise)")
        prior, operator, noise = case
        if prior not in PRIORS:
            raise InputError(f"prior '{prior}' is unknown: choose from {', '.join(PRIORS)}")
        number = isinstance(noise, int | float) and not isinstance(noise, bool)
        if not (isinstance(operator, str) and number and NOISE[0] <= noise <= NOISE[1]):
            raise InputError(
                f"problem {case!r}: give the operator as text and the noise as a number from"
                f" {NOISE[0]:g} to {NOISE[1]:g}"
            )
        if not Problem(operator, noise).bind([0], PRIORS[prior]().shape).linear:
            raise InputError(
                f"operator '{operator}' is not linear and has no exact posterior: give a linear"
                " one"
            )
    return [(prior, operator, float(noise)) for prior, operator, noise in cases]
