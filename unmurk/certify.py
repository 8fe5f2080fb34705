"""Certification: what a solver returns, held against a posterior known in closed form.

Priors with an exact denoiser (see `exact.py`) leave a solver no network to blame: whatever its
samples lack is its own doing. For B measurements a solver draws x_1 ... x_S each. With the exact
posterior's mean m and covariance C, the samples' mean xb and covariance Ch (divisor S - 1), and
sums over the measurements,

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

The mean is the hard part: its error falls with S sqrt(B), that of the spread with sqrt(S B). Hence
many draws of few measurements. With B = 4 nu is 55 to 250 on these problems, and 14 on two where
the mixture's components stay mixed up. S is chosen for each problem (`draws` is the most it may
be) such that mean_error^2 is known to 0.05^2 / 3.5: from 128 to 512 draws. That leaves standard
errors below 1 % in spread (threshold 10 %) and below 0.01 in coverage (threshold 0.05).

A solver is looked at after 32, 128, ... draws. If its mean or its spread misses by then what a
posterior sampler needs by more than 5 standard errors, it makes no more, and its figures are as
sure as so few draws make them: a row says how sure (`Row.square_bar`, `Row.spread_bar`). Nor does
it make more than 160,000 evaluations of the denoiser for a measurement pay for.

The solvers here draw their noise from one stream for all rows, which is quicker than the stream
for each row of `solve` and has the same distribution.
"""

import itertools
import math
import multiprocessing
import signal
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .exact import GaussianMixture, GaussianPrior, operator_matrix
from .gibbs import GibbsPosterior
from .problem import Problem
from .scale_mixture import ScaleMixture
from .seeds import Streams, generator
from .solve import METHODS, PRESETS, configure
from .solve.base import Claim, Denoiser

__all__ = [
    "PRIORS",
    "PROBLEMS",
    "ExactDenoiser",
    "Row",
    "certify",
    "default_solvers",
    "standard_errors",
]

Case = tuple[str, str, float]  # prior, operator, noise
Prior = GaussianPrior | GaussianMixture | ScaleMixture
Function = Callable[[Tensor, Problem, Any, int, int], Tensor]
Given = Mapping[str, Any] | Function  # a solver: its options, or a function

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

FEW: list[Case] = [
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
PROBLEMS += [case for case in FEW if case not in PROBLEMS]
"""Problems of the certification: (prior, operator, noise)."""

SPREAD, COVERAGE, BIAS, POINT = 0.1, 0.05, 0.05, 0.25  # what "posterior" and "point" allow
LEVEL = 0.9  # of the intervals whose coverage is measured
PRECISE = 3.5  # BIAS^2 in standard errors of mean_error^2, which says how many draws are made
EVALUATIONS = 160_000  # of the denoiser, that all draws for a measurement may cost
FIRST, GROW, SURE = 32, 4, 5  # looks after 32, 128, ... draws; SURE is in standard errors
UNSEEN = 1e-3  # singular values below this part of the largest count as zero
DIRECTIONS = 64  # of the sliced Wasserstein distance
RANK: dict[Any, int] = {"heuristic": 0, "point": 1, "posterior": 2}


@dataclass(frozen=True)
class Row:
    """One solver on one problem. All fields are numbers, texts or None: fit for JSON.

    The problem is a prior's name in `PRIORS`, an operator's text form and the noise level of y.
    Figures are None where the solver gave no samples, spreads also where A has no such directions.
    """

    solver: str
    prior: str
    operator: str
    noise: float
    claims: Claim
    """What the solver says of itself; see `solve.base.Solver`."""
    earned: Claim | None
    """"posterior": spreads within 0.9 ... 1.1, mean_error at most 0.05, coverage 0.85 ... 0.95;
    "point": mean_error at most 0.25; else "heuristic". None: the solver refused the problem."""
    mean_error: float | None = None
    """RMS of the samples' mean minus the exact one, in RMS posterior standard deviations."""
    spread_observed: float | None = None
    spread_unobserved: float | None = None
    """RMS deviation over the exact one, in the directions that y tells of and in the others."""
    coverage: float | None = None
    """How often the solver's 90 % intervals hold an exact draw."""
    swd: float | None = None
    swd_exact: float | None = None
    """Sliced Wasserstein distance to exact samples, in RMS posterior standard deviations; of the
    samples, and of as many exact ones."""
    draws: int = 0
    """Samples for each measurement that the figures rest on."""
    evaluations: int = 0
    """Calls of the denoiser, each of all samples of all measurements: the cost of one sample."""
    seconds: float = 0.0  # wall time of all draws
    error: str | None = None
    """Why there are no samples."""
    square_bar: float | None = None
    spread_bar: float | None = None
    """Standard errors of mean_error^2 and, relative, of the spreads (the larger one)."""

    @property
    def excess(self) -> float | None:
        """swd / swd_exact: 1 is the best there is."""
        return None if self.swd is None or self.swd_exact is None else self.swd / self.swd_exact

    @property
    def problem(self) -> str:
        """The problem in one text."""
        return f"{self.prior}, {self.operator}, noise {self.noise:g}"


class ExactDenoiser(Denoiser):
    """The counted denoiser that solvers are given; `prior` is the exact prior behind it."""

    def __init__(self, prior: Prior) -> None:
        super().__init__(prior)
        self.prior = prior


# -- the problems and their exact answers ---------------------------------------------------------


class _Exam:
    """One problem: measurements, and the posterior they leave."""

    def __init__(self, case: Case, images: int, seed: int) -> None:
        self.case, self.root = case, seed
        name, operator, noise = case
        self.prior = PRIORS[name]()
        self.problem = Problem(operator, noise).at(range(images), self.prior.shape)
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
        coverage = _coverage(samples, exact)
        return {
            "earned": _earned(mean_error, [observed, unobserved], coverage),
            "mean_error": mean_error,
            "spread_observed": observed,
            "spread_unobserved": unobserved,
            "coverage": coverage,
            "swd": self._swd(samples, exact),
            "swd_exact": self._swd(other, exact),
            "draws": len(samples),
            **self.bars(len(samples), mean_error),
        }

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


def _coverage(samples: Tensor, exact: Tensor) -> float:
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


# -- the run --------------------------------------------------------------------------------------


def default_solvers() -> dict[str, dict[str, Any]]:
    """Every method and every preset with its defaults.

    Names of presets are "METHOD:PRESET".
    """
    presets = {f"{name}:{preset}": {"method": name, "preset": preset} for name, preset in PRESETS}
    return {name: {} for name in METHODS} | presets


def certify(
    solvers: Mapping[str, Given] | None = None,
    *,
    seed: int = 0,
    draws: int = 512,
    images: int = 4,
    problems: Iterable[Case] | None = None,
    progress: Callable[[Row], Any] | None = None,
    processes: int = 1,
) -> list[Row]:
    """Run solvers where the posterior is known, and compare: problem by problem, each solver.

    Args:
        solvers: By name, either options of `solve` (with "method" where the name is not one), or
            a function (y, problem, denoise, samples, seed) -> (samples, B, C, H, W), float; its
            attribute `claims`, if any, says what it claims ("heuristic" else), and `denoise` is
            an `ExactDenoiser`. None: `default_solvers()`.
        seed: Of the truths, the noise, the solvers and the exact samples.
        draws: Most samples for each measurement, at least 32. Fewer where fewer settle it.
        images: Measurements for each problem.
        problems: Which ones; None: `PROBLEMS`.
        progress: Called with every row when it is done.
        processes: How many work at it. With more than one, functions have to be importable (at
            the top of a module), and a script needs its `if __name__ == "__main__"`.

    Returns:
        The rows, for each problem those of all solvers. They do not depend on `processes`.

    Raises:
        InputError: Unknown method, option or prior, or numbers out of range. One that a solver
            raises while it runs goes into its row instead.
    """
    if draws < FIRST or images < 1:
        raise InputError(f"draws is {draws} and images {images}: at least 32 and 1 are needed")
    given = default_solvers() if solvers is None else solvers
    for name, solver in given.items():
        _runner(name, solver)
    cases = list(PROBLEMS if problems is None else problems)
    for prior, _, _ in cases:
        if prior not in PRIORS:
            raise InputError(f"prior '{prior}' is unknown: choose from {', '.join(PRIORS)}")
    jobs = [(*one, case, images, seed, draws) for case in cases for one in given.items()]
    rows: dict[int, Row] = {}
    for number, row in _all(jobs, processes):
        rows[number] = row
        if progress is not None:
            progress(row)
    return [rows[number] for number in range(len(jobs))]


def _all(jobs: Sequence[Any], processes: int) -> Iterator[tuple[int, Row]]:
    """The rows of all jobs with their numbers, as they are done."""
    if processes == 1:
        yield from ((number, _row(*job)) for number, job in enumerate(jobs))
        return
    others = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_alone) as pool:
        try:
            numbers = {pool.submit(_row, *job): number for number, job in enumerate(jobs)}
            for done in as_completed(numbers):
                yield numbers[done], done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - set(others):
                child.terminate()
            raise


def _alone() -> None:
    """A process of several: one thread, and an interrupt is its parent's affair."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _row(name: str, solver: Given, case: Case, images: int, seed: int, draws: int) -> Row:
    run, claims = _runner(name, solver)
    return _examine(name, run, claims, _exam(case, images, seed), draws)


@lru_cache(maxsize=1)
def _exam(case: Case, images: int, seed: int) -> _Exam:
    return _Exam(case, images, seed)


def _runner(name: str, solver: Given) -> tuple[Function, Claim]:
    """A solver as a function, and what it claims."""
    if callable(solver):
        claims: Any = getattr(solver, "claims", "heuristic")
        if claims not in RANK:
            raise InputError(f"{name} claims '{claims}': choose from {', '.join(RANK)}")
        return solver, claims
    options = dict(solver)
    method = configure(options.pop("method", name), options)

    def run(y: Tensor, problem: Problem, denoise: Any, samples: int, seed: int) -> Tensor:
        rows = list(range(len(y))) * samples
        noise = _Shared(seed, len(rows))
        x = method.run(y[rows], problem.take(rows), denoise, None, noise, lambda *_, **__: False)
        return x.detach().reshape(samples, len(y), *x.shape[1:])

    return run, method.claims


class _Shared(Streams):
    """One stream for all rows, for speed."""

    def __init__(self, seed: int, rows: int) -> None:
        self.generators = [generator(seed)] * rows

    def _stack(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        return draw((len(self), *shape), generator=self.generators[0])


def _examine(name: str, run: Function, claims: Claim, exam: _Exam, most: int) -> Row:
    """One row, of as many draws as it takes to settle it."""
    denoise = ExactDenoiser(exam.prior)
    prior, operator, noise = exam.case
    row: Any = dict(solver=name, claims=claims, prior=prior, operator=operator, noise=noise)
    shape, wanted = exam.posterior.mean.shape, exam.draws(most)
    samples, found, evaluations, goal = torch.empty(0, *shape), None, 0, FIRST
    began = time.perf_counter()
    try:
        while True:
            more = min(goal, wanted) - len(samples)
            found = run(exam.y, exam.problem, denoise, more, exam.seed(f"draws to {goal}"))
            _check(found, (more, *shape))
            samples = torch.cat([samples, found])
            evaluations = evaluations or denoise.nfe
            wanted = min(wanted, max(FIRST, EVALUATIONS // max(evaluations, 1)))
            if len(samples) >= wanted or exam.missed(samples):
                break
            goal *= GROW
    except InputError as error:
        refused = found is None and denoise.nfe == 0
        return Row(**row, earned=None if refused else "heuristic", error=str(error))
    row |= {"evaluations": evaluations, "seconds": time.perf_counter() - began}
    return Row(**row, **exam.figures(samples))


def _check(samples: Tensor, shape: tuple[int, ...]) -> None:
    if samples.shape != shape:
        raise InputError(f"it returned samples of shape {tuple(samples.shape)} instead of {shape}")
    if not samples.isfinite().all():
        raise InputError("it returned numbers that are not finite")
