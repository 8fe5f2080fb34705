"""Certification: what a solver returns, held against a posterior known exactly.

Priors with an exact denoiser (`exact.py`, `scale_mixture.py`) leave a solver no network to blame:
whatever its samples lack is its own doing. `exam.py` has the problems and defines every figure.

A solver is looked at after 32, 128, ... draws. If its mean or its spread misses by then what a
posterior sampler needs by more than 5 standard errors, it makes no more, and its figures are as
sure as so few draws make them: a row says how sure (`Row.square_bar`, `Row.spread_bar`). Nor does
it make more than 160,000 evaluations of the denoiser for a measurement pay for.

The solvers here draw their noise from one stream for all rows, which is quicker than the stream
for each row of `solve` and has the same distribution. Everything runs on the CPU: images of 60
pixels leave an accelerator nothing to do.
"""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..problem import Problem
from ..rng import PerImageGenerator, generator
from ..solvers.base import Claim, CountingDenoiser
from ..solvers.solve import METHODS, PRESETS, configure
from .exam import (
    BIAS,
    COVERAGE,
    FIRST,
    LEVEL,
    POINT,
    PRIORS,
    PROBLEMS,
    SHORT,
    SPREAD,
    Case,
    Exam,
    Prior,
    checked,
    exam,
    standard_errors,
)

__all__ = [
    "BIAS",
    "COVERAGE",
    "LEVEL",
    "POINT",
    "PRIORS",
    "PROBLEMS",
    "SHORT",
    "SPREAD",
    "ExactDenoiser",
    "Row",
    "certify",
    "claiming_solvers",
    "default_solvers",
    "standard_errors",
]

Function = Callable[[Tensor, Problem, Any, int, int], Tensor]
Given = Mapping[str, Any] | Function  # a solver: its options, or a function

DRAWS, IMAGES, PROCESSES = (FIRST, 4096), (1, 16), (1, 64)  # bounds of certify's numbers
EVALUATIONS = 160_000  # of the denoiser, that all draws for a measurement may cost
GROW = 4  # looks after 32, 128, ... draws
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
    reference_error: float | None = None
    """Standard error of the exact mean, RMS, in RMS posterior standard deviations; this and the
    next two are None where the posterior is known in closed form."""
    rhat: float | None = None
    ess: float | None = None
    """Largest split R-hat and smallest effective sample size of the reference's Markov chains."""

    @property
    def excess(self) -> float | None:
        """swd / swd_exact: 1 is the best there is."""
        return None if self.swd is None or self.swd_exact is None else self.swd / self.swd_exact

    @property
    def problem(self) -> str:
        """The problem in one text."""
        return f"{self.prior}, {self.operator}, noise {self.noise:g}"


class ExactDenoiser(CountingDenoiser):
    """The counted denoiser that solvers are given; `prior` is the exact prior behind it."""

    def __init__(self, prior: Prior) -> None:
        super().__init__(prior)
        self.prior = prior


# -- the run --------------------------------------------------------------------------------------


def default_solvers() -> dict[str, dict[str, Any]]:
    """Every method and every preset with its defaults.

    Names of presets are "METHOD:PRESET".
    """
    presets = {f"{name}:{preset}": {"method": name, "preset": preset} for name, preset in PRESETS}
    return {name: {} for name in METHODS} | presets


def claiming_solvers() -> dict[str, dict[str, Any]]:
    """Those of `default_solvers` that claim more than "heuristic"."""
    known = default_solvers().items()
    return {name: options for name, options in known if _runner(name, options)[1] != "heuristic"}


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
        seed: Of the truths, the noise, the solvers and the exact samples; an integer >= 0.
        draws: Most samples for each measurement, 32 to 4,096. Fewer where fewer settle it.
        images: Measurements for each problem, 1 to 16.
        problems: Which ones, each (prior, operator, noise): a name in `PRIORS`, the text form of
            a linear operator and a noise level of 0.001 to 10. None: `PROBLEMS`.
        progress: Called with every row when it is done.
        processes: How many work at it, 1 to 64. With more than one, functions have to be
            importable (at the top of a module), and a script needs `if __name__ == "__main__"`.

    Returns:
        The rows, for each problem those of all solvers. They do not depend on `processes`.

    Raises:
        InputError: Unknown method, option or prior, or numbers out of range. One that a solver
            raises while it runs goes into its row instead.
    """
    _within(seed=(seed, 0, 2**63 - 1), draws=(draws, *DRAWS), images=(images, *IMAGES))
    _within(processes=(processes, *PROCESSES))
    given = default_solvers() if solvers is None else solvers
    for name, solver in given.items():
        _runner(name, solver)
    cases = checked(PROBLEMS if problems is None else problems)
    jobs = [(*one, case, images, seed, draws) for case in cases for one in given.items()]
    rows: dict[int, Row] = {}
    for number, row in _all(jobs, processes):
        rows[number] = row
        if progress is not None:
            progress(row)
    return [rows[number] for number in range(len(jobs))]


def _within(**given: tuple[Any, int, int]) -> None:
    """Raise InputError unless every value is an integer from its least to its most."""
    for name, (value, least, most) in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise InputError(f"{name} is {value!r}: give an integer from {least} to {most}")


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
    return _examine(name, run, claims, exam(case, images, seed), draws)


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
        x = method.sample(y[rows], problem.index_select(rows), denoise, noise)
        return x.reshape(samples, len(y), *x.shape[1:])

    return run, method.claims


class _Shared(PerImageGenerator):
    """One stream for all rows, for speed."""

    def __init__(self, seed: int, rows: int) -> None:
        self.generators = [generator(seed)] * rows

    def _stack(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        return draw((len(self), *shape), generator=self.generators[0])


def _examine(name: str, run: Function, claims: Claim, exam: Exam, most: int) -> Row:
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
