"""Certification: samples of solvers, compared with posteriors that are known exactly.

The priors have an exact denoiser (`exact.py`, `scale_mixture.py`), so every error of the samples
is the solver's own and not a network's. `exam.py` has the problems and defines every figure.

A solver is tested after 32, 128, ... draws. If its mean or its spread then differs from that of a
posterior sampler by more than 5 standard errors, it draws no more. Its figures have the standard
errors of so few draws, which the row states (`Row.square_bar`, `Row.spread_bar`). The draws for
one measurement cost at most 160,000 evaluations of the denoiser.

The solvers draw their noise here from one random stream for all samples. This is faster than one
stream for each image, as in `solve`, and has the same distribution. Everything runs on the CPU:
images of 60 pixels gain nothing from an accelerator.
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
from ..solvers.base import Claim
from ..solvers.restoration import METHODS, PRESETS, configure
from ..solvers.state import CountingDenoiser
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
Given = Mapping[str, Any] | Function  # a solver: options of `solve`, or a function

DRAWS, IMAGES, PROCESSES = (FIRST, 4096), (1, 16), (1, 64)  # bounds of the arguments of `certify`
EVALUATIONS = 160_000  # most evaluations of the denoiser for all draws of a measurement
GROW = 4  # tests after 32, 128, ... draws
RANK: dict[Any, int] = {"heuristic": 0, "point": 1, "posterior": 2}


@dataclass(frozen=True)
class Row:
    """Figures of one solver on one problem: numbers, texts or None, which JSON can hold.

    The problem is the name of a prior in `PRIORS`, the text form of an operator and the noise
    level of y. Figures are None if the solver returned no samples; spreads also if A has no such
    directions.

    >>> row = Row("mine", "gaussian", "identity", 0.3, "point", "point", swd=0.3, swd_exact=0.2)
    >>> row.problem, round(row.excess, 4)
    ('gaussian, identity, noise 0.3', 1.5)
    """

    solver: str
    prior: str
    operator: str
    noise: float
    claims: Claim
    """What the solver claims; see `solvers.base.Solver`."""
    earned: Claim | None
    """"posterior": spreads within 0.9 ... 1.1, mean_error at most 0.05, coverage 0.85 ... 0.95;
    "point": mean_error at most 0.25; else "heuristic". None: the solver refused the problem."""
    mean_error: float | None = None
    """RMS of the samples' mean minus the exact one, in RMS posterior standard deviations."""
    spread_observed: float | None = None
    spread_unobserved: float | None = None
    """RMS deviation over the exact one, in the directions that y measures and in the others."""
    coverage: float | None = None
    """How often the 90 % intervals of the solver contain an exact draw."""
    swd: float | None = None
    swd_exact: float | None = None
    """Sliced Wasserstein distance to exact samples, in RMS posterior standard deviations: of the
    solver's samples, and of as many exact ones."""
    draws: int = 0
    """Samples for each measurement behind the figures."""
    evaluations: int = 0
    """Calls of the denoiser, each for all samples of all measurements: the cost of one sample."""
    seconds: float = 0.0  # wall time of all draws
    error: str | None = None
    """Why there are no samples."""
    square_bar: float | None = None
    spread_bar: float | None = None
    """Standard errors of mean_error^2 and, relative, of the spreads (the larger one)."""
    reference_error: float | None = None
    """Standard error of the exact mean, RMS, in RMS posterior standard deviations. This and the
    next two are None if the posterior is known in closed form."""
    rhat: float | None = None
    ess: float | None = None
    """Largest split R-hat and smallest effective sample size of the reference's Markov chains."""

    @property
    def excess(self) -> float | None:
        """swd / swd_exact; 1 is the best possible."""
        return None if self.swd is None or self.swd_exact is None else self.swd / self.swd_exact

    @property
    def problem(self) -> str:
        """The problem as one text."""
        return f"{self.prior}, {self.operator}, noise {self.noise:g}"


class ExactDenoiser(CountingDenoiser):
    """The counting denoiser that solvers receive; `prior` is the exact prior behind it.

    >>> denoise = ExactDenoiser(PRIORS["gaussian"]())
    >>> x = denoise.prior.sample(2)
    >>> torch.equal(denoise(x, 0.1), denoise.prior.denoise(x, 0.1)), denoise.nfe
    (True, 1)
    """

    def __init__(self, prior: Prior) -> None:
        super().__init__(prior)
        self.prior = prior


# -- the run --------------------------------------------------------------------------------------


def default_solvers() -> dict[str, dict[str, Any]]:
    """Return every method and every preset with its defaults.

    Names of presets are "METHOD:PRESET".

    >>> default_solvers()["red-diff"]
    {}
    """
    presets = {f"{name}:{preset}": {"method": name, "preset": preset} for name, preset in PRESETS}
    return {name: {} for name in METHODS} | presets


def claiming_solvers() -> dict[str, dict[str, Any]]:
    """Return those of `default_solvers` that claim more than "heuristic".

    >>> list(claiming_solvers())
    ['red-diff', 'snips']
    """
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
    """Run solvers on problems with a known posterior, and compare their samples with it.

    Args:
        solvers: A dict from names to solvers. A solver is a dict of options of `solve` (with
            "method" if the name is not one), or a function (y, problem, denoise, samples, seed)
            -> tensor (samples, B, C, H, W), where `denoise` is an `ExactDenoiser`. Its attribute
            `claims` states what it claims; without it that is "heuristic". None takes
            `default_solvers()`.
        seed: Seed of the truths, the noise, the solvers and the exact samples; an integer >= 0.
        draws: Most samples for each measurement, 32 to 4,096. There are fewer if they suffice.
        images: Measurements for each problem, 1 to 16.
        problems: The problems, each (prior, operator, noise): a name in `PRIORS`, the text form of
            a linear operator and a noise level from 0.001 to 10. None takes `PROBLEMS`.
        progress: A function that is called with every row when it is complete.
        processes: Number of processes, 1 to 64. With more than one, functions must be importable
            (at the top of a module), and a script needs `if __name__ == "__main__"`.

    Returns:
        The rows: for each problem those of all solvers. They do not depend on `processes`.

    Raises:
        InputError: A method, option or prior is unknown, or a number is out of range. Errors that
            a solver raises while it runs are stored in its row instead.

    >>> def shrink(y, problem, denoise, samples, seed):  # returns the posterior mean
    ...     return denoise(y, problem.sigma).expand(samples, *y.shape)
    >>> (row,) = certify({"mean": shrink}, problems=[("gaussian", "identity", 0.3)], images=1)
    >>> row.earned, row.draws
    ('point', 32)
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
    """Raise InputError unless every value is an integer within its bounds."""
    for name, (value, least, most) in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise InputError(f"{name} is {value!r}: give an integer from {least} to {most}")


def _all(jobs: Sequence[Any], processes: int) -> Iterator[tuple[int, Row]]:
    """Yield the rows of all jobs with their numbers, in the order of completion."""
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
    """Set up a worker process: one thread, and interrupts are left to the parent."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _row(name: str, solver: Given, case: Case, images: int, seed: int, draws: int) -> Row:
    run, claims = _runner(name, solver)
    return _examine(name, run, claims, exam(case, images, seed), draws)


def _runner(name: str, solver: Given) -> tuple[Function, Claim]:
    """Return a solver as a function, and what it claims."""
    if callable(solver):
        claims: Any = getattr(solver, "claims", "heuristic")
        if claims not in RANK:
            raise InputError(f"{name} claims '{claims}': choose from {', '.join(RANK)}")
        return solver, claims
    options = dict(solver)
    method = configure(options.pop("method", name), options)

    def run(y: Tensor, problem: Problem, denoise: Any, samples: int, seed: int) -> Tensor:
        indices = list(range(len(y))) * samples
        noise = _Shared(seed, len(indices))
        x = method.sample(y[indices], problem.index_select(indices), denoise, noise)
        return x.reshape(samples, len(y), *x.shape[1:])

    return run, method.claims


class _Shared(PerImageGenerator):
    """One random stream for all samples, for speed."""

    def __init__(self, seed: int, batch: int) -> None:
        self.generators = [generator(seed)] * batch

    def _stack(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        return draw((len(self), *shape), generator=self.generators[0])


def _examine(name: str, run: Function, claims: Claim, exam: Exam, most: int) -> Row:
    """Compute one row with as many draws as it needs."""
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
        raise InputError(f"expected samples of shape {shape}, got {tuple(samples.shape)}")
    if not samples.isfinite().all():
        raise InputError("the samples have values that are not finite")
