"""Compare the solvers with the best estimate, for Gaussian and Gaussian-mixture priors.

Images of 16 x 16 are drawn from priors whose denoiser and posterior have closed forms. Six
operators measure them at three noise levels. They are restored with the exact denoiser: by
red-diff, by its paper preset with 1,000 evaluations, and by every other solver of at most 100.
Quality is :math:`10 \\log_{10}(1 / \\mathrm{MSE})` in dB, averaged over images. "best" is the
posterior mean, which no estimate beats on average.

    python benchmarks/exact/run.py --out OUT        # some minutes on one core
    python benchmarks/exact/run.py --table

The rows are stored in OUT/rows; the same command runs those that are missing. OUT/exact.json has
all figures.
"""

import itertools
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import common
from benchmarks.common import CommonOptions, Row, Suite, markdown
from benchmarks.solve.tasks import PAPER, solver_options
from unmurk.errors import InputError
from unmurk.evaluation.exact import GaussianMixture, GaussianPrior
from unmurk.problem import Problem
from unmurk.solvers import METHODS, solve

__all__: list[str] = []

SHAPE = (1, 16, 16)
PRIORS = {
    "mixture": lambda: GaussianMixture.example(SHAPE),
    "gaussian": lambda: GaussianPrior.exponential(SHAPE),
}
OPERATORS = (
    "identity",
    "inpaint:box,size=7",
    "inpaint:random,keep=0.4",
    "sr:average,factor=4",
    "blur:gaussian,sigma=1.5",
    "blur:motion,length=5,angle=30",
)
NOISES = (0.05, 0.2, 0.01)
OURS, BEST = "red-diff", "best"
SLOW = ("dps", "pnp-dm", "snips", "tds")  # more than 100 evaluations by default
SOLVERS = (PAPER, *(name for name in METHODS if name not in SLOW))
Task = tuple[str, str, float]  # prior, operator, noise


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Compare the solvers with the exact posterior mean."""

    images: int = 16
    """Images of each row."""


def _decibel(x: Tensor, truth: Tensor) -> float:
    """Mean over images of 10 log10(1 / MSE)."""
    return float(-10 * (x - truth).square().flatten(1).mean(1).log10().mean())


def run_row(task: Task, images: int, seed: int = 0) -> Row:
    """Every solver on one task; None for a solver that refuses it."""
    name, operator, noise = task
    prior, problem = PRIORS[name](), Problem(operator, noise)
    truth = prior.sample(images, seed=seed + 1)
    y = problem.simulate(truth, seed=seed + 2)
    found: dict[str, float | None] = {BEST: _decibel(prior.posterior(y, problem).mean, truth)}
    evaluations = {}
    for solver in SOLVERS:
        try:
            how = solver_options(solver, operator, noise)
            result = solve(y, problem, prior, seed=seed, **how)
        except InputError:
            found[solver] = None
        else:
            found[solver], evaluations[solver] = _decibel(result.mean, truth), result.nfe
    row = {"prior": name, "operator": operator, "noise": noise, "images": images}
    return row | {"psnr": found, "evaluations": evaluations}


def row_file(task: Task, options: Options) -> Path:
    """The file of a row."""
    name, operator, noise = task
    return options.folder / "rows" / f"{name}-{operator.replace(':', '-')}-{noise:g}.json"


def do(task: Task, options: Options) -> Row:
    """The row of a task, which is run if it is missing."""
    settings = {"images": options.images, "seed": options.seed}
    make = partial(run_row, task, options.images, options.seed)
    return common.stored_row(row_file(task, options), make, settings)


def measure(options: Options) -> Row:
    """Run the rows that are missing and write OUT/exact.json."""
    tasks = [(name, o, noise) for noise, name, o in itertools.product(NOISES, PRIORS, OPERATORS)]
    rows = common.run_rows(do, tasks, options, 1)
    settings = {"images": options.images, "shape": list(SHAPE)}
    return SUITE.store(options, settings, rows=rows)


# -- tables ---------------------------------------------------------------------------------------


def differences(rows: list[Row], other: str) -> list[float]:
    """The PSNR of red-diff above another solver, in dB, on the tasks that the other treats."""
    found = [r["psnr"] for r in rows]
    return [p[OURS] - p[other] for p in found if p[other] is not None]


def summary(rows: list[Row]) -> str:
    """Every solver against the best and against red-diff, best first."""
    lines = []
    for solver in SOLVERS:
        own = [r for r in rows if r["psnr"].get(solver) is not None]
        if own:
            below = [r["psnr"][BEST] - r["psnr"][solver] for r in own]
            ahead = differences(own, solver)
            evaluations = statistics.median_low(r["evaluations"][solver] for r in own)
            values = [statistics.mean(below), max(below), statistics.mean(ahead), min(ahead)]
            line = [solver, evaluations, len(own), *(f"{v:.2f}" for v in values)]
            lines.append((values[0], line))
    lines.sort(key=lambda line: line[0])
    heads = ["solver", "evaluations", "tasks", "below best, dB", "at most"]
    heads += ["red-diff is ahead by, dB", "at least"]
    return markdown([heads, *(line for _, line in lines)])


def details(rows: list[Row]) -> str:
    """Every solver on every task, in dB."""
    lines: list[list[Any]] = [["operator", "noise", BEST, *SOLVERS]]
    for r in rows:
        values = [r["psnr"].get(name) for name in (BEST, *SOLVERS)]
        texts = ["" if v is None else f"{v:.2f}" for v in values]
        lines.append([r["operator"], f"{r['noise']:g}", *texts])
    return markdown(lines)


def view(result: Row) -> Row:
    """What the page shows: both tables for each prior."""
    rows = result["rows"]
    of = {p: [r for r in rows if r["prior"] == p] for p in dict.fromkeys(r["prior"] for r in rows)}
    return {"priors": {name: (summary(own), details(own)) for name, own in of.items()}}


SUITE = Suite("exact", view, "exact_priors")

if __name__ == "__main__":
    sys.exit(SUITE.main(Options, measure))
