"""Every solver against exact posteriors; the page docs/certification.md.

python benchmarks/certify.py            run, and write figures, picture and page
python benchmarks/certify.py --table    write the page from the figures kept
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from learn import machine, write_json

from unmurk.cli.certificate import picture, read, reference, run, summary, table
from unmurk.evaluation.certify import Row
from unmurk.io.atomic import write as write_atomically

__all__ = ["Options", "page"]

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "benchmarks" / "results" / "certify.json"
PAGE = ROOT / "docs" / "certification.md"

HEAD = """\
# Certification of the solvers

Which solvers return samples of the posterior, and which a good point estimate? On this page every
solver meets problems whose denoiser and posterior are known. There is no network to blame, so
whatever a solver's samples lack is its own doing. `unmurk/evaluation/exam.py` defines every
figure.

`unmurk certify` tests the solvers that claim something on a dozen of the problems, in minutes;
`unmurk certify --thorough` tests all solvers on all problems. `python benchmarks/certify.py` does
the same and writes this page. Both run on the CPU: the images have some 60 pixels.

"""

PRIORS = {
    "gaussian": "a Gaussian with the spectrum of photographs, 8 x 8 pixels",
    "mixture": "a mixture of three Gaussians, 8 x 8 pixels",
    "wavelet": "heavy tails (Haar coefficients with Student's t distribution, 5 degrees of\n"
    "  freedom), 8 x 8 pixels; its denoiser is an exact one-dimensional integral, its posterior\n"
    "  comes from a Gibbs sampler, whose own error the figures account for",
    "gaussian-wide": "the Gaussian, 6 x 10 pixels",
    "mixture-wide": "the mixture, 6 x 10 pixels",
    "wavelet-wide": "the heavy tails, 6 x 10 pixels",
}
"""What the priors are, in words."""

WORDS = """\

- *mean error*: distance of the samples' mean from the posterior mean, in posterior standard
  deviations. 0 is right.
- *spread*: standard deviation of the samples over that of the posterior, along the directions
  that y tells of (observed) and the others (unobserved). 1 is right; 0 is a point estimate.
- *coverage*: how often the solver's 90 % intervals hold an exact draw. 0.90 is right.
- *SWD / exact*: sliced Wasserstein distance to exact samples, over that between two sets of exact
  samples. 1 is right.
- *NFE*: network evaluations for one sample; *s*: seconds of all draws together.

On a problem a solver earns "posterior" with spreads of 0.9 to 1.1, a mean error of at most 0.05
and a coverage of 0.85 to 0.95; "point" with a mean error of at most 0.25. What it earns in all is
what it earned on its worst problem; (!) marks less than it claims.
"""

USE = """\
## What to do with it

Where the uncertainty matters (error bars, decisions, averages over samples), take a solver that
earned "posterior", and do not read a spread out of any other: the columns show by how much it
would be wrong. Where one good image is wanted, take the smallest mean error for the evaluations
that you can afford. If your problem is like one of the rows below, its column there counts for
more than the summary. All solvers run with their defaults. `dps` pulls by a length that knows
neither the noise nor the size of the image, and fits the noise of images as small as these
(docs/solvers.md). A learned prior adds its own errors, which this page does not see.

## A solver of your own

A function (y, problem, denoise, samples, seed) that returns (samples, B, C, H, W) is certified
like any other.

```python
from unmurk.cli.certificate import table
from unmurk.evaluation.certify import certify


def shrink(y, problem, denoise, samples, seed):
    x = denoise(problem.A_dagger(y), problem.sigma)
    return x.expand(samples, *x.shape)


shrink.claims = "point"
rows = certify({"shrink": shrink}, problems=[("mixture", "identity", 0.3)])
print(table(rows))
```
"""

BARS = ("square_bar", "spread_bar")
SIGNS = {"posterior": "**P**", "point": "p", "heuristic": "-", None: ""}


@dataclass(frozen=True)
class Options:
    """Hold every solver against exact posteriors."""

    seed: int = 0
    """Seed of problems and draws."""
    methods: tuple[str, ...] = ()
    """Solvers; unset: all."""
    table: bool = False
    """Write the page from the figures kept and run nothing."""


def page(figures: dict[str, Any]) -> str:
    """The page of the figures that a run has kept."""
    rows = [row for row in read(figures) if row.earned is not None]
    earned = summary(read(figures)).values()
    exact = ", ".join(one.solver for one in earned if one.earned == "posterior") or "none"
    short = ", ".join(one.solver for one in earned if not one.holds) or "none"
    drawn = [row.draws for row in rows]
    sure = [row for row in rows if row.earned == "posterior"]
    square, spread = (max((getattr(row, bar) or 0 for row in sure), default=0) for bar in BARS)
    made = figures["machine"]
    parts = [
        HEAD + posed(rows) + WORDS,
        table(read(figures)),
        f"Samples of the posterior on every problem: {exact}. Less than it claims: {short}.\n",
        "![mean error and spread of every solver](../benchmarks/results/certify.png)\n",
        f"Each figure rests on 4 measurements and {min(drawn)} to {max(drawn)} draws of each,\n"
        "few where few settle it. The largest standard errors of what earned **P** (below):\n"
        f"{spread:.3f} in a spread and {square:.4f} in the square of a mean error.\n"
        + reference(rows),
        USE,
        "## Problem by problem\n",
        "**P** posterior, p point, - neither, empty: refused. The number is the mean error.\n",
        problems(read(figures)),
        f"Seed {figures['seed']}; {made['cpu']}, a process of one thread for each core,\n"
        f"torch {made['torch']}, commit {made['commit']}; {figures['seconds']:.0f} s in all.\n",
    ]
    return "\n".join(parts)


def posed(rows: list[Row]) -> str:
    """What the problems are, as a list."""
    noises = [row.noise for row in rows]
    number = len({row.problem for row in rows})
    lines = [
        f"- {number} problems, noise from {min(noises):g} to {max(noises):g}",
        *(f"- prior `{prior}`: {PRIORS[prior]}" for prior in dict.fromkeys(r.prior for r in rows)),
        *(f"- operator `{operator}`" for operator in dict.fromkeys(r.operator for r in rows)),
    ]
    return "".join(f"{line}\n" for line in lines)


def problems(rows: list[Row]) -> str:
    """What every solver earned on every problem, a line for each problem."""
    solvers = list(dict.fromkeys(row.solver for row in rows))
    lines = [["problem", *solvers], ["---"] * (len(solvers) + 1)]
    for problem in dict.fromkeys(row.problem for row in rows):
        found = {row.solver: row for row in rows if row.problem == problem}
        lines.append([problem, *(cell(found[name]) for name in solvers)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(row: Row) -> str:
    """One solver on one problem."""
    error = "" if row.mean_error is None else f" {row.mean_error:.2f}"
    return SIGNS[row.earned] + error


def main() -> int:
    options = tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,))
    if not options.table:
        figures = run(options.methods, seed=options.seed, thorough=True) | {"machine": machine()}
        write_json(FIGURES, figures)
        picture(read(figures), FIGURES.with_suffix(".png"))
    write_atomically(PAGE, page(json.loads(FIGURES.read_text())).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
