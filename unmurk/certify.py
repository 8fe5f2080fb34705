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
the mixture's components stay mixed up. S = 512 draws then give standard errors below 1 % in spread
(threshold 10 %), below 0.0008 in mean_error^2 (threshold 0.05^2 = 0.0025) and below 0.006 in
coverage (threshold 0.05), and mostly half of that.

A solver is first looked at with S / 16 draws (at least 32). If its mean or its spread misses what
a posterior sampler needs by more than 5 standard errors, it makes no more, and the errors of its
figures are those of so few (see `Row.draws`); else it makes them all.
"""

import itertools
import math
import statistics
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .exact import GaussianMixture, GaussianPrior, operator_matrix
from .problem import Problem
from .seeds import generator
from .solve import METHODS, configure, solve
from .solve.base import Claim, Denoiser

__all__ = [
    "PRIORS",
    "PROBLEMS",
    "ExactDenoiser",
    "Row",
    "Summary",
    "certify",
    "default_solvers",
    "holds",
    "picture",
    "standard_errors",
    "summary",
    "table",
]

Case = tuple[str, str, float]  # prior, operator, noise
Prior = GaussianPrior | GaussianMixture
Function = Callable[[Tensor, Problem, Any, int, int], Tensor]

SHAPE = (1, 8, 8)
PRIORS: dict[str, Callable[[], Prior]] = {
    "gaussian": lambda: GaussianPrior.exponential(SHAPE),
    "mixture": lambda: GaussianMixture.example(SHAPE),
}
"""Priors of the certification by name."""

OPERATORS = (
    *("identity", "inpaint:random,keep=0.5", "inpaint:box,size=4"),
    *("blur:gaussian,sigma=1,pad=circular", "sr:average,factor=2"),
)
PROBLEMS: list[Case] = list(itertools.product(PRIORS, OPERATORS, (0.05, 0.3)))
"""Problems of the certification: (prior, operator, noise)."""

SPREAD, COVERAGE, BIAS, POINT = 0.1, 0.05, 0.05, 0.25  # what "posterior" and "point" allow
LEVEL = 0.9  # of the intervals whose coverage is measured
FIRST_LOOK, SURE = 16, 5  # draws / FIRST_LOOK come first; SURE is in standard errors
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
        if name not in PRIORS:
            raise InputError(f"prior '{name}' is unknown: choose from {', '.join(PRIORS)}")
        self.prior = PRIORS[name]()
        self.problem = Problem(operator, noise).at(range(images), SHAPE)
        truth = self.prior.sample(images, seed=self.seed("truth"))
        self.y = self.problem.simulate(truth, seed=self.seed("noise"))
        self.posterior = self.prior.posterior(self.y, self.problem)
        self.mean = self.posterior.mean.double().flatten(1)
        self.covariance = self.posterior.covariance.expand(images, -1, -1)
        self.rms = (_trace(self.covariance).mean() / self.mean.shape[1]).sqrt()
        matrix = operator_matrix(self.problem, SHAPE, self.y).expand(images, -1, -1)
        _, singular, rows = torch.linalg.svd(matrix, full_matrices=False)
        passed = (singular > UNSEEN * singular.amax(1, keepdim=True)).double()
        observed = rows.mT @ (passed[:, :, None] * rows)
        unobserved = torch.eye(observed.shape[-1], dtype=observed.dtype) - observed
        self.sides = [p if _trace(p).sum() > 0.5 else None for p in (observed, unobserved)]

    def seed(self, purpose: str) -> int:
        """A seed of its own for every problem and purpose."""
        path = zlib.crc32(repr((self.case, purpose)).encode())
        return int(torch.randint(2**31, (), generator=generator(self.root, path)))

    def moments(self, samples: Tensor) -> tuple[float, list[float | None]]:
        """Squared mean_error (may be below 0), and the spreads, of samples (S, B, C, H, W)."""
        x = samples.double().flatten(2).transpose(0, 1)  # (B, S, d)
        mean = x.mean(1, keepdim=True)
        found = (x - mean).mT @ (x - mean) / (x.shape[1] - 1)
        bias = (mean[:, 0] - self.mean).square().sum() - _trace(found).sum() / x.shape[1]
        exact = self.covariance
        spreads = [None if p is None else _ratio(p @ found, p @ exact) for p in self.sides]
        return float(bias / _trace(exact).sum()), spreads

    def missed(self, samples: Tensor) -> bool:
        """Whether mean or spread are beyond doubt not those of a posterior sampler."""
        square, spreads = self.moments(samples)
        _, bar = standard_errors(self.covariance, len(samples), max(square, 0) ** 0.5)
        if square > BIAS**2 + SURE * bar:
            return True
        for spread, p in zip(spreads, self.sides, strict=True):
            if spread is not None and p is not None:
                bar, _ = standard_errors(p @ self.covariance @ p, len(samples))
                if abs(spread - 1) > SPREAD + SURE * bar:
                    return True
        return False

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


def standard_errors(covariance: Tensor, draws: int, bias: float = 0.0) -> tuple[float, float]:
    """Standard errors of a spread (relative) and of mean_error^2; see the head of this module.

    Args:
        covariance: Of the exact posterior, of every measurement, (B, d, d).
        draws: S, the samples for each measurement, at least 2.
        bias: The mean_error around which the second is wanted.
    """
    nu = float(_trace(covariance).sum() ** 2 / covariance.square().sum())
    square = 2 / (draws * (draws - 1)) + 4 * bias**2 / draws
    return (2 * (draws - 1) * nu) ** -0.5, (square / nu) ** 0.5


# -- the run --------------------------------------------------------------------------------------


def default_solvers() -> dict[str, dict[str, Any]]:
    """Every method with its defaults, and the released RED-diff with 200 steps for its 1000."""
    paper = {"method": "red-diff", "preset": "paper", "steps": 200}
    return {name: {} for name in METHODS} | {"red-diff (paper, 200 steps)": paper}


def certify(
    solvers: Mapping[str, Mapping[str, Any] | Function] | None = None,
    *,
    seed: int = 0,
    draws: int = 512,
    images: int = 4,
    problems: Iterable[Case] | None = None,
    progress: Callable[[Row], Any] | None = None,
) -> list[Row]:
    """Run solvers where the posterior is known, and compare: problem by problem, each solver.

    Args:
        solvers: By name, either options of `solve` (with "method" where the name is not one), or
            a function (y, problem, denoise, samples, seed) -> (samples, B, C, H, W), float; its
            attribute `claims`, if any, says what it claims ("heuristic" else), and `denoise` is
            an `ExactDenoiser`. None: `default_solvers()`.
        seed: Of the truths, the noise, the solvers and the exact samples.
        draws: Samples for each measurement, at least 32. Fewer where a first look settles it.
        images: Measurements for each problem.
        problems: Which ones; None: `PROBLEMS`.
        progress: Called with every row when it is done.

    Raises:
        InputError: Unknown method, option or prior, or numbers out of range. One that a solver
            raises while it runs goes into its row instead.
    """
    if draws < 32 or images < 1:
        raise InputError(f"draws is {draws} and images {images}: at least 32 and 1 are needed")
    given = default_solvers() if solvers is None else solvers
    ready = {name: _runner(name, solver) for name, solver in given.items()}
    rows = []
    for case in PROBLEMS if problems is None else problems:
        exam = _Exam(case, images, seed)
        for name, (run, claims) in ready.items():
            rows.append(_examine(name, run, claims, exam, draws))
            if progress is not None:
                progress(rows[-1])
    return rows


def _runner(name: str, solver: Mapping[str, Any] | Function) -> tuple[Function, Claim]:
    """A solver as a function, and what it claims."""
    if callable(solver):
        claims: Any = getattr(solver, "claims", "heuristic")
        if claims not in RANK:
            raise InputError(f"{name} claims '{claims}': choose from {', '.join(RANK)}")
        return solver, claims
    options = dict(solver)
    method = options.pop("method", name)

    def run(y: Tensor, problem: Problem, denoise: Any, samples: int, seed: int) -> Tensor:
        settings = {**options, "samples": samples, "seed": seed, "batch": samples * len(y)}
        return solve(y, problem, denoise, method, **settings).samples

    return run, configure(method, options).claims


def _examine(name: str, run: Function, claims: Claim, exam: _Exam, draws: int) -> Row:
    """One row: a first look, and if that leaves it open, all draws."""
    denoise = ExactDenoiser(exam.prior)
    prior, operator, noise = exam.case
    row: Any = dict(solver=name, claims=claims, prior=prior, operator=operator, noise=noise)
    first = max(draws // FIRST_LOOK, 32)
    samples, began = None, time.perf_counter()
    try:
        samples = run(exam.y, exam.problem, denoise, first, exam.seed("first"))
        _check(samples, (first, *exam.posterior.mean.shape))
        evaluations = denoise.nfe
        if draws > first and not exam.missed(samples):
            more = run(exam.y, exam.problem, denoise, draws - first, exam.seed("more"))
            _check(more, (draws - first, *exam.posterior.mean.shape))
            samples = torch.cat([samples, more])
    except InputError as error:
        refused = samples is None and denoise.nfe == 0
        return Row(**row, earned=None if refused else "heuristic", error=str(error))
    row |= {"evaluations": evaluations, "seconds": time.perf_counter() - began}
    return Row(**row, **exam.figures(samples))


def _check(samples: Tensor, shape: tuple[int, ...]) -> None:
    if samples.shape != shape:
        raise InputError(f"it returned samples of shape {tuple(samples.shape)} instead of {shape}")
    if not samples.isfinite().all():
        raise InputError("it returned numbers that are not finite")


# -- what the rows say ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """One solver on all problems.

    `earned` is the weakest of those it did not refuse (None: it refused all); `figures` holds
    (median, worst) of mean_error, both spreads, coverage and excess (see `Row`), None where there
    is none; `evaluations` is the most that one sample has cost.
    """

    solver: str
    claims: Claim
    earned: Claim | None
    problems: int
    refused: int
    figures: dict[str, tuple[float, float] | None]
    evaluations: int
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether it earns what it claims, on every problem it takes."""
        return self.earned is not None and RANK[self.earned] >= RANK[self.claims]


def summary(rows: Sequence[Row]) -> dict[str, Summary]:
    """What every solver of these rows earns on all problems together, by name."""
    names = dict.fromkeys(row.solver for row in rows)
    return {name: _summarise([row for row in rows if row.solver == name]) for name in names}


def holds(rows: Sequence[Row]) -> dict[str, bool]:
    """By solver: whether it earns what it claims (or more) on every problem it takes."""
    return {name: found.holds for name, found in summary(rows).items()}


def _summarise(rows: list[Row]) -> Summary:
    earned = [row.earned for row in rows if row.earned is not None]
    return Summary(
        solver=rows[0].solver,
        claims=rows[0].claims,
        earned=min(earned, key=RANK.__getitem__, default=None),
        problems=len(rows),
        refused=len(rows) - len(earned),
        figures={name: _pair(rows, name) for name in WORSE},
        evaluations=max(row.evaluations for row in rows),
        seconds=sum(row.seconds for row in rows),
    )


def _off(spread: float) -> float:
    """How far a ratio is from 1, up or down alike."""
    return abs(math.log(spread)) if spread > 0 else math.inf


WORSE: dict[str, Callable[[float], float]] = {
    "mean_error": float,
    "spread_observed": _off,
    "spread_unobserved": _off,
    "coverage": lambda coverage: abs(coverage - LEVEL),
    "excess": float,
}
"""Figures of a row, and how bad a value is."""


def _pair(rows: list[Row], name: str) -> tuple[float, float] | None:
    """Median and worst of what there is."""
    found = (getattr(row, name) for row in rows)
    known = [value for value in found if value is not None]
    return (statistics.median(known), max(known, key=WORSE[name])) if known else None


def table(rows: Sequence[Row]) -> str:
    """The summary in Markdown, one line for each solver, figures as "median (worst)"."""
    head = "solver | claims | earned | problems | mean error | spread observed"
    head += " | spread unobserved | coverage of 90 % | SWD / exact | NFE | seconds"
    lines = [head, " | ".join(["---"] * len(head.split("|")))]
    for found in summary(rows).values():
        earned = (found.earned or "refused all") + ("" if found.holds else " (!)")
        taken = f"{found.problems - found.refused} of {found.problems}"
        cells = [f"{p[0]:.2f} ({p[1]:.2f})" if p else "" for p in found.figures.values()]
        cost = [str(found.evaluations), f"{found.seconds:.1f}"]
        lines.append(" | ".join([found.solver, found.claims, earned, taken, *cells, *cost]))
    return "\n".join(f"| {line} |" for line in lines) + "\n"


INKS, MARKS = dict(posterior="#1b7f4d", point="#d98a00", heuristic="#b3261e"), "osD^vPX*<>hp"
LEAST, MOST_ERROR, MOST_SPREAD = 0.01, 10.0, 2.0  # what lies beyond is drawn on the edge


def picture(rows: Sequence[Row], path: str | Path) -> None:
    """Draw every row as a dot: its spread ratio (the worse of the two) against its mean error.

    Colours tell what it earned, marks the solver; the box is where a posterior sampler belongs.
    The ending of `path` says which kind of file: .png, .svg or .pdf.

    Raises:
        InputError: The file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(7.0, 4.5), layout="constrained", dpi=150)
    axes: Any = figure.add_subplot()
    style: Any = {"linestyle": "", "markersize": 6, "clip_on": False}
    marks = dict(zip(summary(rows), itertools.cycle(MARKS), strict=False))
    for row in rows:
        spreads = [s for s in (row.spread_observed, row.spread_unobserved) if s is not None]
        if row.mean_error is not None and row.earned is not None:
            x = min(max(spreads, key=_off), MOST_SPREAD)
            y = min(max(row.mean_error, LEAST), MOST_ERROR)
            axes.plot(x, y, marks[row.solver], color=INKS[row.earned], alpha=0.7, **style)
    corner, sides = (1 - SPREAD, LEAST), (2 * SPREAD, BIAS - LEAST)
    axes.add_patch(Rectangle(corner, *sides, fill=False, edgecolor=INKS["posterior"]))
    axes.set(xlim=(-0.02, MOST_SPREAD), ylim=(LEAST, MOST_ERROR), yscale="log")
    axes.set_xlabel("spread of the samples / exact spread, the worse of observed and unobserved")
    axes.set_ylabel("error of the mean / posterior standard deviation")
    for name, ink in INKS.items():
        axes.plot([], [], "o", color=ink, label=name, **style)
    for name, mark in marks.items():
        axes.plot([], [], mark, color="#555", label=name, **style)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot draw to {path}: {str(error).splitlines()[0]}") from error
