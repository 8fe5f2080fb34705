"""What a solver costs beside its network: the time of a step over that of its network calls.

16 images of 1 x 64 x 64, inpainting of random pixels and a Gaussian blur, noise 0.05, an untrained
network of the `tiny` preset (its time does not depend on its weights). The ratio of every run is
(time in all) / (time inside the denoiser); the median of several runs is shown. Solvers that
differentiate the network spend time in it that is counted as their own.

    python benchmarks/overhead.py             two threads of a CPU, or a GPU
    python benchmarks/overhead.py --table     write docs/benchmark_overhead.md again
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import tyro
from provenance import ROOT, machine, write_json
from torch import Tensor

from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.io.atomic import write as write_atomically
from unmurk.problem import Problem
from unmurk.solvers import METHODS, solve

__all__: list[str] = []

OPERATORS = ("inpaint:random,keep=0.4", "blur:gaussian,sigma=1.5")
STEPS = 20
SHAPE = (16, 1, 64, 64)
FIGURES = ROOT / "benchmarks" / "results" / "overhead.json"
PAGE = ROOT / "docs" / "benchmark_overhead.md"


@dataclass(frozen=True)
class Options:
    """Measure what solvers cost beside their network."""

    methods: tuple[str, ...] = ()
    """Solvers to measure; none named: all."""
    repeats: int = 5
    """Runs of every solver on every operator; their median counts."""
    out: Path = FIGURES
    """File for the figures."""
    table: bool = False
    """Write the page from the figures kept and run nothing."""


class Timed:
    """A prior that adds up the time spent in it, in seconds."""

    def __init__(self, prior: Prior) -> None:
        self.prior, self.shape, self.sigma_max = prior, prior.shape, prior.sigma_max
        self.seconds = 0.0

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        """D(x, sigma)."""
        began = now(x)
        denoised = self.prior.denoise(x, sigma)
        self.seconds += now(x) - began
        return denoised


def now(x: Tensor) -> float:
    """The time, when all that was asked of the device is done."""
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def ratio(method: str, operator: str, prior: Prior, seed: int) -> float:
    """Time of a run over that of its network calls."""
    device = next(prior.parameters()).device
    problem, timed = Problem(operator, 0.05), Timed(prior)
    generator = torch.Generator().manual_seed(seed)
    y = problem.simulate(torch.rand(SHAPE, generator=generator), seed).to(device)
    options = {"steps": STEPS} if any(f.name == "steps" for f in fields(METHODS[method])) else {}  # type: ignore[arg-type]
    began = now(y)
    solve(y, problem, timed, method, **options)
    return (now(y) - began) / timed.seconds


def table(found: dict[str, Any]) -> str:
    """Ratios as Markdown."""
    lines = ["| solver | " + " | ".join(OPERATORS) + " |", "|---|" + "---:|" * len(OPERATORS)]
    for method, row in found["ratios"].items():
        cells = ("" if row[o] is None else f"{row[o]:.3f}" for o in OPERATORS)
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page() -> str:
    """The page of the figures kept."""
    found = json.loads(FIGURES.read_text())
    made = found["machine"]
    parts = [
        "# Benchmark: what a solver costs beside its network",
        "Written by `python benchmarks/overhead.py --table`. Time of a run over the time of its "
        "network calls: 1 is a solver that costs nothing itself. 16 images of 1 x 64 x 64, "
        f"network `tiny`, {STEPS} steps, median of {found['repeats']} runs. Solvers that "
        "differentiate the network (dps, pigdm, mmps and others) spend time in it that is counted "
        "as theirs.",
        table(found),
        f"{made['cpu']}, {made['threads']} threads, {made['gpu'] or 'no GPU'}, torch "
        f"{made['torch']}, commit {made['commit']}.",
    ]
    return "\n\n".join(parts) + "\n"


def measure(options: Options) -> dict[str, Any]:
    """Ratios of all solvers, {solver: {operator: ratio, None where it cannot}}."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    prior = Prior.create("tiny", SHAPE[1:]).to(device).eval()
    ratios: dict[str, dict[str, float | None]] = {}
    for method in options.methods or METHODS:
        ratios[method] = {}
        for operator in OPERATORS:
            try:
                runs = [ratio(method, operator, prior, seed) for seed in range(options.repeats)]
                ratios[method][operator] = statistics.median(runs)
            except InputError as error:
                print(f"{method}: {error}", file=sys.stderr)
                ratios[method][operator] = None
        print(method, ratios[method], file=sys.stderr, flush=True)
    return {"repeats": options.repeats, "machine": machine(), "ratios": ratios}


def main() -> int:
    options = tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,))
    if options.table:
        write_atomically(PAGE, page().encode())
        return 0
    found = measure(options)
    write_json(options.out, found)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
