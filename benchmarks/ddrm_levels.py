"""Which noise levels ddrm does best with: its own, those of Karras, or equal steps from 1 to 0.01.

Each grid has 20 levels. PSNR in dB, the mean over images and seeds, of five operators at noise
0.05: test digits with the packaged prior, and images of 16 x 16 pixels of a Gaussian and a mixture
with their exact denoisers.

    python benchmarks/ddrm_levels.py        prints the table of docs/experiments.md

About two minutes on one CPU core.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from provenance import command, markdown
from solve_tasks import images

from unmurk.diffusion.prior import Prior
from unmurk.evaluation.exact import GaussianMixture, GaussianPrior
from unmurk.problem import Problem
from unmurk.solvers import solve

__all__: list[str] = []

GRIDS: dict[str, dict[str, Any]] = {
    "the paper's": {"preset": "paper"},
    "Karras, 20 to 0.005": {"grid": "karras", "sigma_max": 20.0, "sigma_min": 0.005},
    "Karras, 1 to 0.01": {"grid": "karras", "sigma_max": 1.0, "sigma_min": 0.01},
    "equal steps, 1 to 0.01": {"grid": "linear", "sigma_max": 1.0, "sigma_min": 0.01},
}
NOISE = 0.05


@dataclass(frozen=True)
class Options:
    """Measure the levels of ddrm."""

    images: int = 8
    """Images of each task."""
    seeds: int = 3
    """Runs of each image; noise and solver have the same seed."""
    steps: int = 20
    """Noise levels, a divisor of 1000."""


def operators(hole: int) -> tuple[str, ...]:
    """Five linear operators with a decomposition."""
    return (
        *("identity", f"inpaint:box,size={hole}", "inpaint:random,keep=0.4"),
        *("sr:average,factor=4", "blur:gaussian,sigma=1.5"),
    )


def psnr(prior: Any, truth: torch.Tensor, operator: str, options: Options, grid: str) -> float:
    """Mean over images and seeds, dB."""
    found = []
    for seed in range(options.seeds):
        problem = Problem(operator, NOISE)
        y = problem.simulate(truth, seed=seed)
        x = solve(y, problem, prior, "ddrm", seed=seed, steps=options.steps, **GRIDS[grid]).mean
        found.append(-10 * (x.clamp(0, 1) - truth.clamp(0, 1)).square().flatten(1).mean(1).log10())
    return float(torch.cat(found).mean())


def run(options: Options) -> list[list[Any]]:
    """The table, row by row as it is made."""
    torch.set_num_threads(1)
    shape = (1, 16, 16)
    exact = {
        "gaussian": GaussianPrior.exponential(shape),
        "mixture": GaussianMixture.example(shape),
    }
    sets: dict[str, tuple[Any, torch.Tensor, int]] = {
        name: (prior, prior.sample(options.images, seed=1), 7) for name, prior in exact.items()
    }
    sets["digits"] = (Prior.load("digits"), images("digits", "test")[: options.images], 10)
    rows: list[list[Any]] = [["prior", "operator", *GRIDS]]
    sums = torch.zeros(len(GRIDS), dtype=torch.float64)
    for name, (prior, truth, hole) in sets.items():
        for operator in operators(hole):
            values = [psnr(prior, truth, operator, options, grid) for grid in GRIDS]
            sums += torch.tensor(values)
            rows.append([name, operator, *(f"{v:.2f}" for v in values)])
            print(rows[-1], file=sys.stderr, flush=True)
    rows.append(["mean", "", *(f"{v:.2f}" for v in sums / (len(rows) - 1))])
    return rows


@command
def main() -> None:
    print(markdown(run(tyro.cli(Options))))


if __name__ == "__main__":
    sys.exit(main())
