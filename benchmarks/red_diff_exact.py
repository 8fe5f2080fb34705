"""RED-diff where the best estimate is known: Gaussian and Gaussian-mixture priors.

Images of 16 x 16 are drawn from priors whose denoiser and posterior have closed forms, measured
by six operators at three noise levels, and restored with the exact denoiser: by red-diff, by its
paper preset with 1,000 evaluations, and by every other solver of at most 100. Quality is
10 log10(1 / MSE) in dB, averaged over images; "best" is the posterior mean, which no estimate
beats on average.

    python benchmarks/red_diff_exact.py             run what rows are missing, and write the page
    python benchmarks/red_diff_exact.py --table     write the page from the figures kept

Figures are kept in benchmarks/results/red_diff_exact.json, row by row; delete it to begin anew.
Some minutes on one CPU core. The page is docs/benchmark_exact.md.
"""

import itertools
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from provenance import ROOT, command, machine, markdown, write_json
from torch import Tensor

from unmurk.errors import InputError
from unmurk.evaluation.exact import GaussianMixture, GaussianPrior
from unmurk.io.atomic import write as write_atomically
from unmurk.problem import Problem
from unmurk.solvers import METHODS, solve

__all__: list[str] = []

FIGURES = ROOT / "benchmarks" / "results" / "red_diff_exact.json"
PAGE = ROOT / "docs" / "benchmark_exact.md"
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
PAPER, OURS, BEST = "red-diff paper", "red-diff", "best"
SLOW = ("dps", "pnp-dm", "snips", "tds")  # more than 100 evaluations by default
SOLVERS = (PAPER, *(name for name in METHODS if name not in SLOW))


@dataclass(frozen=True)
class Options:
    """Compare red-diff with what is best."""

    figures: Path = FIGURES
    """Where the rows are kept."""
    images: int = 16
    """Images of each row."""
    table: bool = False
    """Write the page and run nothing."""


def chosen(name: str, operator: str, noise: float) -> dict[str, Any]:
    """Method and options: defaults, but the released settings by task for the paper preset.

    As in solve.py: lr 0.25 for inpainting and denoising, with lam 1 where there is noise to speak
    of, lr 0.5 for blur and 0.1 for averages, lam 0.25.
    """
    if name != PAPER:
        return {"method": name}
    family = operator.split(":")[0]
    lr = {"blur": 0.5, "sr": 0.1}.get(family, 0.25)
    lam = 1.0 if family in ("inpaint", "identity") and noise >= 0.05 else 0.25
    return {"method": OURS, "preset": "paper", "lr": lr, "lam": lam}


def decibel(x: Tensor, truth: Tensor) -> float:
    """Mean over images of 10 log10(1 / MSE)."""
    return float(-10 * (x - truth).square().flatten(1).mean(1).log10().mean())


def row(name: str, operator: str, noise: float, images: int) -> dict[str, Any]:
    """Every solver on one task; null for one that refuses it."""
    prior, problem = PRIORS[name](), Problem(operator, noise)
    truth = prior.sample(images, seed=1)
    y = problem.simulate(truth, seed=2)
    found: dict[str, float | None] = {BEST: decibel(prior.posterior(y, problem).mean, truth)}
    evaluations = {}
    for solver in SOLVERS:
        try:
            result = solve(y, problem, prior, **chosen(solver, operator, noise))
        except InputError:
            found[solver] = None
        else:
            found[solver], evaluations[solver] = decibel(result.mean, truth), result.nfe
    task = {"prior": name, "operator": operator, "noise": noise, "images": images}
    return task | {"psnr": found, "evaluations": evaluations}


def run(options: Options) -> None:
    """Adds the rows that are missing."""
    torch.set_num_threads(1)
    rows = json.loads(options.figures.read_text())["rows"] if options.figures.exists() else []
    done = {(r["prior"], r["operator"], r["noise"]) for r in rows}
    for noise, name, operator in itertools.product(NOISES, PRIORS, OPERATORS):
        if (name, operator, noise) not in done:
            rows.append(row(name, operator, noise, options.images))
            write_json(options.figures, {"machine": machine(), "rows": rows})
            print(f"{name}, {operator}, noise {noise:g}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------- the page


def gains(rows: list[dict[str, Any]], other: str) -> list[float]:
    """What red-diff has more than another, dB, on the tasks that the other treats."""
    found = [r["psnr"] for r in rows]
    return [p[OURS] - p[other] for p in found if p[other] is not None]


def summary(rows: list[dict[str, Any]]) -> str:
    """Every solver against the best and against red-diff, best first."""
    lines = []
    for solver in SOLVERS:
        own = [r for r in rows if r["psnr"][solver] is not None]
        if own:
            below = [r["psnr"][BEST] - r["psnr"][solver] for r in own]
            ahead = gains(rows, solver)
            cells = [
                solver,
                statistics.median_low(r["evaluations"][solver] for r in own),
                len(own),
            ]
            values = [statistics.mean(below), max(below), statistics.mean(ahead), min(ahead)]
            lines.append((values[0], [*cells, *(f"{v:.2f}" for v in values)]))
    lines.sort(key=lambda line: line[0])
    head = ["solver", "evaluations", "tasks", "below best, dB", "at most"]
    head += ["red-diff is ahead by, dB", "at least"]
    return markdown([head, *(cells for _, cells in lines)])


def details(rows: list[dict[str, Any]]) -> str:
    """Every solver on every task, dB."""
    lines: list[list[Any]] = [["operator", "noise", BEST, *SOLVERS]]
    for r in rows:
        values = [r["psnr"][name] for name in (BEST, *SOLVERS)]
        cells = ["" if v is None else f"{v:.2f}" for v in values]
        lines.append([r["operator"], f"{r['noise']:g}", *cells])
    return markdown(lines)


def page(figures: Path = FIGURES) -> str:
    """The page, from the figures kept; raises InputError if there are none."""
    if not figures.exists():
        raise InputError(f"no figures at {figures}: run without --table first")
    kept = json.loads(figures.read_text())
    rows, made = kept["rows"], kept["machine"]
    parts = [
        "# Benchmark: red-diff where the best is known",
        "Written by `python benchmarks/red_diff_exact.py` from "
        "`benchmarks/results/red_diff_exact.json`.",
        READING,
        f"{rows[0]['images']} images a task; {made['cpu']}, torch {made['torch']}, "
        f"commit {made['commit']}.",
    ]
    for name in dict.fromkeys(r["prior"] for r in rows):
        own = [r for r in rows if r["prior"] == name]
        parts += [f"## {name}", summary(own), details(own)]
    return "\n\n".join(parts) + "\n"


READING = """\
Images of 16 x 16 from a mixture of three Gaussians (`GaussianMixture.example`) and from a Gaussian
with covariance `0.2^2 exp(-distance / 4)`, restored with the exact denoiser: no network is to
blame. Figures are 10 log10(1 / MSE) in dB, means over images; "best" is the posterior mean in
closed form. *red-diff* is the default; "red-diff paper" the released algorithm with its 1,000
evaluations and its settings for the task; the others are all solvers of at most 100 evaluations,
with their defaults. *Below best*: mean and maximum over the tasks. *Ahead*: red-diff minus the
solver, mean and minimum, so that a negative minimum is a task where the solver is better. For
solvers that draw samples this is the error of one draw, which has the posterior's spread in it.
Tasks are added as they are run: what is not in the tables has not been."""


@command
def main() -> None:
    options = tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,))
    if not options.table:
        run(options)
    write_atomically(PAGE, page(options.figures).encode())


if __name__ == "__main__":
    sys.exit(main())
