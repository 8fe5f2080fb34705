r"""The problems of the certification, and how samples are held against their exact posteriors.

For B measurements a solver draws x_1 ... x_S each. With the exact posterior's mean m and
covariance C, the samples' mean xb and covariance Ch (divisor S - 1), and sums over the
measurements,

    mean_error^2 = sum (|xb - m|^2 - tr Ch / S) / sum tr C
    spread^2     = sum tr(P Ch) / sum tr(P C)                       P = P_row or I - P_row
    coverage     = P(q_l < x < q_u) for x drawn from the exact posterior, pixel by pixel
    SWD          = E_w int_0^1 |F_w^-1(q) - G_w^-1(q)| dq / sqrt(sum tr C / (B d))

P_row projects on the row space of A, the directions y tells of (those that A passes with more than
1e-3 of its largest singular value); I - P_row on those that only the prior knows. tr Ch / S is
what a finite number of draws adds to the first term of mean_error^2, so its expectation is the
squared bias, for any S; where it comes out below 0, mean_error is 0. q_l, q_u bound the central
90 % of the solver's samples, reckoned by ranks so that the expectation is 0.9 for exact samples
and any S (as in `metrics.coverage`). F_w, G_w are the solver's and exact samples along a random
unit vector w; `swd_exact` puts a second set of exact samples in the solver's place.

Standard errors. For Gaussian samples |x - m|^2 has the variance 2 tr C^2. With

    nu = (sum tr C)^2 / sum tr C^2,

B times the number of directions that share the variance,

    spread         1 / sqrt(2 (S - 1) nu)                           relative; C -> P C P in nu
    mean_error^2   sqrt(2 / (S (S - 1)) + 4 mean_error^2 / S) / sqrt(nu)
    coverage       about sqrt(2 * 0.9 * 0.1 / (S nu))               S draws for q, S for x

The second holds for samples of any distribution. The first is multiplied, for a posterior with
heavy tails, by the square root of Var|P (x - m)|^2 / (2 tr (P C)^2), which the reference's draws
tell.

The reference of the heavy-tailed prior is itself a mean of draws (`gibbs.py`). With e = (squared
standard error of m) / tr C, from the scatter of its chains, e is subtracted from mean_error^2,
and 1 / S becomes 1 / S + e in its standard error:

    mean_error^2   sqrt(2 / (S (S - 1)) + 4 e / S + 2 e^2 + 4 mean_error^2 (1 / S + e)) / sqrt(nu)

The reference's own error of a spread is added in quadrature to that of the samples.

The mean is the hard part: its error falls with S sqrt(B), that of the spread with sqrt(S B). Hence
many draws of few measurements. With B = 4 nu is 55 to 250 on most of these problems, and 14 where
the mixture's components stay mixed up. S is chosen for each problem such that mean_error^2 is
known to 0.05^2 / 3.5. That leaves standard errors below 2 % in spread (threshold 10 %) and below
0.01 in coverage (threshold 0.05).
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
    "coverage",
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
"""Priors of the certification by name: 8 x 8 pixels, "-wide" 6 x 10."""

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

SPREAD, COVERAGE, BIAS, POINT = 0.1, 0.05, 0.05, 0.25  # what "posterior" and "point" allow
LEVEL = 0.9  # of the intervals whose coverage is measured
PRECISE = 3.5  # BIAS^2 in standard errors of mean_error^2, which says how many draws are made
FIRST, SURE = 32, 5  # draws before the first look; standard errors beyond which it decides
UNSEEN = 1e-3  # singular values below this part of the largest count as zero
DIRECTIONS = 64  # of the sliced Wasserstein distance
NOISE = (1e-3, 10.0)  # the noise levels that a problem may have


class Exam:
    """One problem: measurements, and the posterior they leave."""

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
        _, singular, rows = torch.linalg.svd(matrix, full_matrices=False)
        passed = (singular > UNSEEN * singular.amax(1, keepdim=True)).double()
        observed = rows.mT @ (passed[:, :, None] * rows)
        unobserved = torch.eye(observed.shape[-1], dtype=observed.dtype) - observed
        self.sides = [p if _trace(p).sum() > 0.5 else None for p in (observed, unobserved)]
        if isinstance(self.posterior, GibbsPosterior):
            self._sampled(self.posterior)

    def _sampled(self, posterior: GibbsPosterior) -> None:
        """What a reference adds to the errors that is known by its samples only."""
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
        """A seed of its own for every problem and purpose."""
        path = zlib.crc32(repr((self.case, purpose)).encode())
        return int(torch.randint(2**31, (), generator=generator(self.root, path)))

    def draws(self, most: int) -> int:
        """How many draws tell mean_error^2 well enough, `FIRST` to `most`."""
        _, bar = standard_errors(self.covariance, 2)  # falls as 1 / sqrt(S (S - 1))
        wanted = 0.5 + math.sqrt(0.25 + 2 * (bar * PRECISE / BIAS**2) ** 2)
        return min(max(math.ceil(wanted), FIRST), most)

    def square_bar(self, draws: int, bias: float) -> float:
        """The standard error of mean_error^2."""
        return standard_errors(self.covariance, draws, bias, self.mean_error)[1]

    def spread_bars(self, draws: int) -> list[float | None]:
        """The standard error of both spreads; None: A has no such directions."""
        bars: list[float | None] = []
        for p, tail, own in zip(self.sides, self.tails, self.spread_errors, strict=True):
            if p is None:
                bars.append(None)
                continue
            bar, _ = standard_errors(p @ self.covariance @ p, draws)
            bars.append(math.hypot(bar * tail, own))
        return bars

    def bars(self, draws: int, bias: float) -> dict[str, float]:
        """The standard errors of a row's figures."""
        spread = max(bar for bar in self.spread_bars(draws) if bar is not None)
        return {"square_bar": self.square_bar(draws, bias), "spread_bar": spread}

    def moments(self, samples: Tensor) -> tuple[float, list[float | None]]:
        """Squared mean_error (may be below 0), and the spreads, of samples (S, B, C, H, W)."""
        x = samples.double().flatten(2).transpose(0, 1)  # (B, S, d)
        mean = x.mean(1, keepdim=True)
        found = (x - mean).mT @ (x - mean) / (x.shape[1] - 1)
        bias = (mean[:, 0] - self.mean).square().sum() - _trace(found).sum() / x.shape[1]
        exact = self.covariance
        spreads = [None if p is None else _ratio(p @ found, p @ exact) for p in self.sides]
        return float(bias / _trace(exact).sum()) - self.mean_error, spreads

    def missed(self, samples: Tensor) -> bool:
        """Whether mean or spread are beyond doubt not those of a posterior sampler."""
        square, spreads = self.moments(samples)
        if square > BIAS**2 + SURE * self.square_bar(len(samples), max(square, 0) ** 0.5):
            return True
        bars = self.spread_bars(len(samples))
        return any(
            spread is not None and bar is not None and abs(spread - 1) > SPREAD + SURE * bar
            for spread, bar in zip(spreads, bars, strict=True)
        )

    def figures(self, samples: Tensor) -> dict[str, Any]:
        """The fields of a row that hold figures, and what they earn."""
        square, (observed, unobserved) = self.moments(samples)
        seeds = self.seed("exact"), self.seed("other")
        exact, other = (self.posterior.sample(len(samples), seed=s) for s in seeds)
        mean_error = max(square, 0) ** 0.5
        found = coverage(samples, exact)
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
        """How well the reference is known, where it is sampled."""
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


def coverage(samples: Tensor, exact: Tensor) -> float:
    """Share of exact draws (M, B, ...) in the central interval of samples (S, B, ...)."""
    ranked = samples.double().flatten(1).T.sort(1).values.contiguous()
    truth = exact.double().flatten(1).T.contiguous()
    slots = len(samples) + 1
    start = torch.searchsorted(ranked, truth) / slots
    stop = (torch.searchsorted(ranked, truth, right=True) + 1) / slots
    overlap = stop.clamp(max=(1 + LEVEL) / 2) - start.clamp(min=(1 - LEVEL) / 2)
    return float((overlap.clamp(min=0) / (stop - start)).mean())


def _earned(mean_error: float, spreads: Sequence[float | None], coverage: float) -> Claim:
    calibrated = all(spread is None or abs(spread - 1) <= SPREAD for spread in spreads)
    if calibrated and mean_error <= BIAS and abs(coverage - LEVEL) <= COVERAGE:
        return "posterior"
    return "point" if mean_error <= POINT else "heuristic"


def standard_errors(
    covariance: Tensor, draws: int, bias: float = 0.0, reference: float = 0.0
) -> tuple[float, float]:
    """Standard errors of a spread (relative) and of mean_error^2; see the head of this module.

    Args:
        covariance: Of the exact posterior, of every measurement, (B, d, d).
        draws: S, the samples for each measurement, at least 2.
        bias: The mean_error around which the second is wanted.
        reference: Squared standard error of the exact mean, in units of tr C (0: closed form).
    """
    nu = float(_trace(covariance).sum() ** 2 / covariance.square().sum())
    square = 2 / (draws * (draws - 1)) + 4 * reference / draws + 2 * reference**2
    square += 4 * bias**2 * (1 / draws + reference)
    return (2 * (draws - 1) * nu) ** -0.5, (square / nu) ** 0.5


@lru_cache(maxsize=1)
def exam(case: Case, images: int, seed: int) -> Exam:
    """The exam of a problem; the last one is kept."""
    return Exam(case, images, seed)


def checked(problems: Iterable[Any]) -> list[Case]:
    """The problems, each read once: (prior, operator, noise).

    Raises:
        InputError: An entry is not of this form, or a prior, operator or noise is not one that
            has an exact posterior.
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
                f"operator '{operator}' is not linear, so its posteriors are not known: give a"
                " linear one"
            )
    return [(prior, operator, float(noise)) for prior, operator, noise in cases]
