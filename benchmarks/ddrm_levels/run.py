"""Compare the noise levels of ddrm: its own, those of Karras, and equal steps from 1 to 0.01.

Each grid has 20 levels. The figures are PSNR in dB, means over images and seeds, of five operators
at noise 0.05: test digits with the packaged prior, and images of 16 x 16 pixels from a Gaussian
and a mixture with their exact denoisers. docs/experiments.md shows the table.

    python benchmarks/ddrm_levels/run.py --out OUT        # two minutes on one core
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.common import CommonOptions, Row, Suite, markdown
from benchmarks.solve.tasks import images
from unmurk.diffusion.prior import Prior
from unmurk.evaluation.exact import GaussianMixture, GaussianPrior
from unmurk.evaluation.metrics import psnr
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


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Compare the noise levels of ddrm."""

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


def mean_psnr(prior: Any, truth: torch.Tensor, operator: str, how: Options, grid: str) -> float:
    """Mean PSNR over images and seeds, in dB."""
    found = []
    for seed in range(how.seed, how.seed + how.seeds):
        problem = Problem(operator, NOISE)
        y = problem.simulate(truth, seed=seed)
        x = solve(y, problem, prior, "ddrm", seed=seed, steps=how.steps, **GRIDS[grid]).mean
        found.append(psnr(x, truth.clamp(0, 1)))
    return float(torch.cat(found).mean())


def measure(options: Options) -> Row:
    """All rows; writes OUT/ddrm_levels.json."""
    shape = (1, 16, 16)
    torch.set_num_threads(1)
    sets: dict[str, tuple[Any, torch.Tensor, int]] = {
        name: (prior, prior.sample(options.images, seed=1), 7)
        for name, prior in (
            ("gaussian", GaussianPrior.exponential(shape)),
            ("mixture", GaussianMixture.example(shape)),
        )
    }
    sets["digits"] = (Prior.load("digits"), images("digits", "test")[: options.images], 10)
    rows: list[Row] = []
    for name, (prior, truth, hole) in sets.items():
        for operator in operators(hole):
            values = {grid: mean_psnr(prior, truth, operator, options, grid) for grid in GRIDS}
            rows.append({"prior": name, "operator": operator, "psnr": values})
            print(rows[-1], file=sys.stderr, flush=True)
    settings = {"images": options.images, "seeds": options.seeds, "steps": options.steps}
    return SUITE.store(options, settings | {"noise": NOISE}, rows=rows)


def view(result: Row) -> Row:
    """What the page shows: every task, and the mean over the tasks."""
    rows = result["rows"]
    lines = [["prior", "operator", *GRIDS]]
    for row in rows:
        lines.append([row["prior"], row["operator"], *(f"{row['psnr'][g]:.2f}" for g in GRIDS)])
    means = (statistics.mean(row["psnr"][grid] for row in rows) for grid in GRIDS)
    return {"table": markdown([*lines, ["mean", "", *(f"{v:.2f}" for v in means)]])}


SUITE = Suite("ddrm_levels", view)

if __name__ == "__main__":
    sys.exit(SUITE.main(Options, measure))
