"""RED-diff against what can be known: Gaussian priors, where the best estimate has a closed form.

Images of 16 x 16 are drawn from stationary priors with covariance std^2 exp(-distance / length),
measured, and restored with the exact denoiser. Quality is 10 log10(1 / MSE) in dB, averaged over
images; "best" is the posterior mean, which no estimate beats on average.

    python benchmarks/red_diff_gaussian.py --out red_diff_gaussian.json

Under a minute on one CPU core.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmurk.exact import GaussianPrior
from unmurk.problem import Problem
from unmurk.solve import solve

OPERATORS = (
    "inpaint:random,keep=0.4",
    "inpaint:box,size=7",
    "blur:gaussian,sigma=1.5",
    "sr:average,factor=2",
    "sr:average,factor=4",
)
NOISES = (0.01, 0.05, 0.2)
LENGTHS = (4.0, 12.0)
METHODS: dict[str, dict[str, Any]] = {
    "paper, 1000": {"preset": "paper"},
    "paper, 100": {"preset": "paper", "steps": 100},
    "default, 100": {},
    "default, 100, no pairs": {"pairs": False, "steps": 100},
    "default, 20": {"steps": 10},
}


def decibel(x: Tensor, truth: Tensor) -> float:
    """Mean over images of 10 log10(1 / MSE)."""
    return float(-10 * (x - truth).square().flatten(1).mean(1).log10().mean())


def row(length: float, operator: str, noise: float, images: int) -> dict[str, Any]:
    """Every method on one task."""
    prior = GaussianPrior.exponential((1, 16, 16), length=length)
    truth = prior.sample(images, seed=1)
    problem = Problem(operator, noise)
    y = problem.simulate(truth, seed=2)
    best = prior.posterior(y, problem).mean
    result: dict[str, Any] = {
        "length": length,
        "operator": operator,
        "noise": noise,
        "best": decibel(best, truth),
    }
    for name, options in METHODS.items():
        result[name] = decibel(solve(y, problem, prior, "red-diff", **options).mean, truth)
    return result


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the default gains over the paper preset, and how far it is from the best, in dB."""
    gains = [r["default, 100"] - r["paper, 1000"] for r in rows]
    return {
        "gain_mean": statistics.mean(gains),
        "gain_min": min(gains),
        "below_best_mean": {m: statistics.mean(r["best"] - r[m] for r in rows) for m in METHODS},
        "below_best_max": {m: max(r["best"] - r[m] for r in rows) for m in METHODS},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    names = ["best", *METHODS]
    lines = [
        "| length | operator | noise | " + " | ".join(names) + " |",
        "|" + "---|" * (3 + len(names)),
    ]
    for r in rows:
        values = " | ".join(f"{r[name]:.2f}" for name in names)
        lines.append(f"| {r['length']:g} | {r['operator']} | {r['noise']:g} | {values} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("red_diff_gaussian.json"))
    parser.add_argument("--images", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    tasks = [(length, op, noise) for length in LENGTHS for op in OPERATORS for noise in NOISES]
    rows = [row(*task, args.images) for task in tasks]
    found = {"images": args.images, "rows": rows, "summary": summary(rows)}
    found["seconds"] = round(time.perf_counter() - began, 1)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(rows))
    print(json.dumps(found["summary"], indent=1))


if __name__ == "__main__":
    main()
