"""Measure what a solver costs beside its network: the time of a run over its network time.

16 packaged nuclei of 64 x 64, inpainting of random pixels and a Gaussian blur, noise 0.05, the
packaged prior `generic` (an untrained one makes some solvers diverge). The ratio of a run is
(total time) / (time inside the denoiser); the page shows the median of several runs. Solvers that
differentiate the network spend time in its backward pass, which counts as their own.

    python benchmarks/overhead/run.py --out OUT       # two CPU threads, or a GPU
    python benchmarks/overhead/run.py --table
"""

import statistics
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.common import CommonOptions, Row, Suite, markdown, read_row, synchronized_time
from unmurk.devices import default_device
from unmurk.diffusion.prior import Prior
from unmurk.errors import InputError
from unmurk.io.images import load_images
from unmurk.problem import Problem
from unmurk.solvers import METHODS, solve

__all__: list[str] = []

OPERATORS = ("inpaint:random,keep=0.4", "blur:gaussian,sigma=1.5")
STEPS, NOISE, PRIOR = 20, 0.05, "generic"
STEPS_OF = {"pnp-dm": 2, "tds": 4}  # they evaluate the network several times in a step
COUNT = 16


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Measure what solvers cost beside their network."""

    methods: tuple[str, ...] = ()
    """Solvers to measure; default: all."""
    repeats: int = 5
    """Runs of every solver on every operator; their median counts."""


class Timed:
    """A prior that adds up the time spent in it, in seconds."""

    def __init__(self, prior: Prior) -> None:
        self.prior, self.shape, self.sigma_max = prior, prior.shape, prior.sigma_max
        self.seconds = 0.0

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        """D(x, sigma)."""
        began = synchronized_time()
        denoised = self.prior.denoise(x, sigma)
        self.seconds += synchronized_time() - began
        return denoised


def packaged_prior() -> Prior:
    """The prior of all runs, on the device."""
    return Prior.load(PRIOR).to(default_device()).eval()


def ratio(method: str, operator: str, prior: Prior, seed: int) -> float:
    """The time of a run over that of its network calls."""
    device = next(prior.parameters()).device
    problem, timed = Problem(operator, NOISE), Timed(prior)
    x = load_images("nuclei:val", limit=COUNT).images
    y = problem.simulate(x, seed).to(device)
    names = {field.name for field in fields(METHODS[method])}  # type: ignore[arg-type]
    options = {"steps": STEPS_OF.get(method, STEPS)} if "steps" in names else {}
    began = synchronized_time()
    solve(y, problem, timed, method, **options)
    return (synchronized_time() - began) / timed.seconds


def ratios(method: str, prior: Prior, seeds: range) -> dict[str, float | None]:
    """The median ratio of a solver on each operator; None where the solver refuses it."""
    found: dict[str, float | None] = {}
    for operator in OPERATORS:
        try:
            found[operator] = statistics.median(ratio(method, operator, prior, s) for s in seeds)
        except InputError as error:
            print(f"{method}: {error}", file=sys.stderr)
            found[operator] = None
    return found


def measure(options: Options) -> Row:
    """The ratios of all solvers, {solver: {operator: ratio}}.

    Each is stored when it is known; the same command goes on from there.
    """
    prior = packaged_prior()
    seeds = range(options.seed, options.seed + options.repeats)
    settings = {"repeats": options.repeats, "steps": STEPS, "images": COUNT}
    settings |= {"noise": NOISE, "prior": PRIOR, "steps_of": STEPS_OF}
    result = read_row(SUITE.file(options), settings) or {}
    found = result.get("ratios", {})
    for method in [name for name in options.methods or METHODS if name not in found]:
        found[method] = ratios(method, prior, seeds)
        print(method, found[method], file=sys.stderr, flush=True)
        result = SUITE.store(options, settings, ratios=found)
    return result


def view(result: Row) -> Row:
    """What the page shows: the ratios as a table."""
    lines = [["solver", *OPERATORS]]
    for method, row in result["ratios"].items():
        lines.append([method, *("" if row[o] is None else f"{row[o]:.3f}" for o in OPERATORS)])
    return {"table": markdown(lines)}


SUITE = Suite("overhead", view, "overhead")

if __name__ == "__main__":
    sys.exit(SUITE.main(Options, measure))
