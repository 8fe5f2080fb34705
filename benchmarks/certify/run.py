"""Certify every solver against exact posteriors.

python benchmarks/certify/run.py --out OUT      # writes OUT/certify.json and OUT/certify.png
python benchmarks/certify/run.py --table
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import common
from benchmarks.common import CommonOptions, Suite, markdown
from unmurk.cli.certificate import picture, read, reference, run, summary, table
from unmurk.evaluation.certify import Row

__all__: list[str] = []

PRIORS = {
    "gaussian": "a Gaussian with the power spectrum of photographs, 8 x 8 pixels",
    "mixture": "a mixture of three Gaussians, 8 x 8 pixels",
    "wavelet": "heavy tails (Haar coefficients with Student's t distribution, 5 degrees of "
    "freedom), 8 x 8 pixels; its denoiser is an exact one-dimensional integral, and a Gibbs "
    "sampler, whose own error the figures account for, gives its posterior",
    "gaussian-wide": "the Gaussian, 6 x 10 pixels",
    "mixture-wide": "the mixture, 6 x 10 pixels",
    "wavelet-wide": "the heavy tails, 6 x 10 pixels",
}
"""Descriptions of the priors."""
SIGNS = {"posterior": "**P**", "point": "p", "heuristic": "-", None: ""}


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Certify every solver against exact posteriors."""

    methods: tuple[str, ...] = ()
    """Solvers; default: all."""


def measure(options: Options) -> common.Row:
    """Certify, and write OUT/certify.json and OUT/certify.png."""
    file = SUITE.file(options, ".png")
    found = run(options.methods, seed=options.seed, thorough=True)
    settings = {"thorough": found.pop("thorough")}
    del found["seed"]
    result = SUITE.store(options, settings, **found)
    picture(read(result), file)
    return result


def view(result: common.Row) -> common.Row:
    """What the page shows: the problems, the summary, and every solver on every problem."""
    every = read(result)
    rows = [row for row in every if row.earned is not None]
    earned = summary(every).values()
    certified = [row for row in rows if row.earned == "posterior"]
    noises = [row.noise for row in rows]
    draws = [row.draws for row in rows]
    return {
        "problems": len({row.problem for row in rows}),
        "noises": (min(noises), max(noises)),
        "priors": {p: PRIORS[p] for p in dict.fromkeys(row.prior for row in rows)},
        "operators": list(dict.fromkeys(row.operator for row in rows)),
        "summary": table(every),
        "exact": [one.solver for one in earned if one.earned == "posterior"],
        "short": [one.solver for one in earned if not one.holds],
        "draws": (min(draws), max(draws)),
        "spread_bar": max((row.spread_bar or 0 for row in certified), default=0),
        "square_bar": max((row.square_bar or 0 for row in certified), default=0),
        "reference": reference(rows),
        "table": problems(every),
    }


def problems(rows: list[Row]) -> str:
    """What every solver earned on every problem, a line for each problem."""
    solvers = list(dict.fromkeys(row.solver for row in rows))
    lines = [["problem", *solvers]]
    for problem in dict.fromkeys(row.problem for row in rows):
        found = {row.solver: row for row in rows if row.problem == problem}
        lines.append([problem, *(cell(found[name]) for name in solvers)])
    return markdown(lines)


def cell(row: Row) -> str:
    """One solver on one problem."""
    error = "" if row.mean_error is None else f" {row.mean_error:.2f}"
    return SIGNS[row.earned] + error


SUITE = Suite("certify", view, "certification")

if __name__ == "__main__":
    sys.exit(SUITE.main(Options, measure))
