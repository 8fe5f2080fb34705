r"""Solve inverse problems with a diffusion prior: `solve`, its result, and the table of solvers.

    result = unmurk.solve(y, problem, prior, method="red-diff", samples=8)

Images and samples form one flat batch (see `inputs`), which is worked on in parts. With restarts
every sample is run several times, each time from a random stream of its own, and the image that
fits y best is kept.

**Selection between images that the measurement cannot tell apart.** An operator may know other
images with the same A(x) (`Operator.symmetries`): for the magnitudes of the Fourier transform
these are the shifted and the point-reflected image. A solver finds any of them, and only the prior
can tell which one is likely. Selected is the image of least energy

.. math::
    E(x) = \frac{\lVert y - A(x)\rVert^2}{2\sigma_y^2}
           + \int \mathbb{E}_e \frac{\lVert D(x + s e, s) - x\rVert^2}{s^2}\; d\log s,

the bound on :math:`-\log p(y \mid x) - \log p(x)`, up to constants, of Kingma et al. (2021, arXiv
2107.00630; see `unmurk.diffusion.prior`). The integral uses only those levels that discriminate
between the images, which blur no more than parts of an image. Each of `SYMMETRY_LEVELS` stands for
a factor of 2. The noise :math:`e` is used together with :math:`-e`, and it is transformed like the
image, so that the energies of two symmetric images differ by their content and not by their noise.

E hardly depends on the position of an image in the frame: a shift by one pixel changes it less
than its noise. The position is that of the mean of all images, which the denoised gray image at
the highest level approximates: the images are shifted to it. A few steps of the data fit then
correct what a shift has lost.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..bounds import Whole
from ..checks import require_plausible
from ..devices import on_device
from ..errors import size_text
from ..operators.linalg import squared_norm
from ..problem import Problem
from ..progress import each
from ..rng import PerImageGenerator
from .auto import Auto
from .base import METHODS, PRESETS, Callback, Claim, Solver
from .daps import Daps
from .data_term import prox
from .ddiff import Ddiff
from .ddnm import Ddnm
from .ddrm import Ddrm, DdrmPaper
from .diffpir import DiffPir
from .dps import Dps
from .fast_dips import FastDips
from .hrdis import Hrdis
from .inputs import Inputs, prepare
from .mmps import Mmps
from .pigdm import Pigdm
from .pnp_dm import PnpDm
from .projdiff import ProjDiff
from .red_diff import RedDiff
from .red_diff_paper import RedDiffPaper
from .red_diff_spread import RedDiffSpread
from .registry import configure, register, resolve
from .snips import Snips
from .state import CountingDenoiser, State, gray, randn
from .tds import Tds
from .tmpd import Tmpd

__all__ = ["METHODS", "PRESETS", "Result", "configure", "most_likely", "solve"]

BATCH = Whole(1, 65_536)
RESTARTS = Whole(1, 10_000, optional=True)

HIGHEST = 5.0
SYMMETRY_LEVELS = (1.6, 0.8, 0.4, 0.2)
DRAWS = 2  # of noise at each level
FLOOR = 1e-3  # least noise that y is taken to have
NEAR = 0.05  # standard deviation around a shifted image, within which the data fit corrects it

_SOLVERS: list[type[Solver]] = [
    *(RedDiff, Dps, Hrdis, Ddrm, Ddnm, DiffPir, Pigdm, Tmpd, Mmps, PnpDm, Daps, Snips, Tds),
    *(ProjDiff, Ddiff, FastDips),
]
_PRESETS: list[tuple[str, type[Solver]]] = [
    *(("paper", RedDiffPaper), ("spread", RedDiffSpread), ("paper", DdrmPaper))
]
for _solver in _SOLVERS:
    register(_solver.name)(_solver)
for _preset, _solver in _PRESETS:
    register(_solver.name, preset=_preset)(_solver)


@dataclass(frozen=True)
class Result:
    """Restored images and a trace of the run.

    Attributes:
        samples: (S, B, C, H, W), one or several for each measurement.
        mean: (B, C, H, W), their mean.
        std: (B, C, H, W), their standard deviation (divisor S - 1); zero where S = 1. It is the
            posterior's only if `claims` is "posterior".
        trace: One dict for each step: step, sigma, nfe (so far), and chi2, averaged over the
            batch: chi-square per measured value, near 1 for a good fit, or without noise the root
            mean square misfit (see `State.chi2`). With restarts it is that of the runs that were
            kept.
        nfe: Network function evaluations for each sample, those of all its restarts together.
        method: Name of the solver.
        claims: "posterior", "point" or "heuristic"; see `Solver`.
        solver: The solver that ran, with its options.

    >>> y, problem = torch.full((2, 1, 4, 4), 0.5), Problem("identity", 0.1)
    >>> prior = lambda x, sigma: x / (1 + sigma**2)
    >>> result = solve(y, problem, prior, "ddrm", samples=5, steps=3)
    >>> result.samples.shape, result.mean.shape, [step["nfe"] for step in result.trace]
    (torch.Size([5, 2, 1, 4, 4]), torch.Size([2, 1, 4, 4]), [1, 2, 3])
    """

    samples: Tensor
    mean: Tensor
    std: Tensor
    trace: list[dict[str, Any]]
    nfe: int
    method: str
    claims: Claim
    solver: Solver


def _work(
    y: Tensor,
    problem: Problem,
    prior: Any,
    method: str | type[Solver] | Solver = "red-diff",
    *,
    batch: int = 64,
    **_: Any,
) -> str:
    """Describe what `solve` works on, for the message that memory has run out."""
    size = size_text(y.shape[1:])
    name = method if isinstance(method, str) else method.name
    return f"method {name} on batches of {batch} samples of measurements {size}"


@on_device(_work, "give a smaller batch, or smaller images")
def solve(
    y: Tensor,
    problem: Problem,
    prior: Any,
    method: str | type[Solver] | Solver = "red-diff",
    *,
    samples: int = 1,
    restarts: int | None = None,
    seed: int = 0,
    init: Tensor | Literal["posterior"] | None = None,
    posterior: Any = None,
    callback: Callback | None = None,
    batch: int = 64,
    nan: Literal["refuse", "mask"] = "refuse",
    **options: Any,
) -> Result:
    """Restore images from measurements with a prior.

    Args:
        y: Measurements (B, ...), in units of [0, 1] images.
        problem: Operator and noise; of images 0..B-1 unless it is bound to others.
        prior: An object with `denoise(x, sigma)`, or a function (x, sigma) that returns
            E[clean | x].
        method: A name in `METHODS` ("red-diff", "ddrm", "pnp-dm" and so on) or of a registered
            solver; a solver class; or a solver with its options set, such as
            `solvers.RedDiff(steps=30)`. "auto" takes `budget` (100 network evaluations) and
            selects a solver (see `solvers.auto`).
        samples: Samples for each measurement, each from its own noise, a whole number from 1 to
            100000.
        restarts: Runs for each sample, a whole number from 1 to 10000, of which the one with the
            least chi-square is kept: against local minima. With several restarts and an ambiguous
            operator (phase retrieval) the prior then selects one of the images that y cannot tell
            apart, for another 33 evaluations. Samples selected so do not follow a posterior.
            None: 1, or what "auto" recommends.
        seed: Sample k of image b depends on (seed, b, k) alone.
        init: Where to start: None for the solver's own start, images (B, C, H, W), or "posterior"
            for draws of `posterior`, a new one for each sample.
        posterior: An object with `sample(y, problem, n, seed)`.
        callback: Called after every step of every batch with a dict: step, steps, sigma, x,
            denoised (B', C, H, W), nfe, chi2. If it returns a true value, this batch stops.
        batch: Images x samples that are worked on together, a whole number from 1 to 65536.
        nan: "mask" treats pixels of y that are not finite as hidden.
        options: The solver's options by name, and `preset` (red-diff: "paper" or "spread"; ddrm:
            "paper").

    Returns:
        The restored images and a trace of the run.

    Raises:
        InputError: Unknown method or option, shapes that do not fit, an operator that the method
            cannot handle, or a result that is not finite or far outside what the prior and the
            measurements allow (see `unmurk.checks`).

    >>> from unmurk.evaluation.exact import GaussianPrior
    >>> prior = GaussianPrior(torch.full((1, 4, 4), 0.5), torch.full((1, 4, 4), 0.04))
    >>> problem = Problem("inpaint:box,size=2", noise=0.1)
    >>> y = problem.simulate(prior.sample(3, seed=1), seed=2)
    >>> result = solve(y, problem, prior, "ddrm", samples=2, steps=10)
    >>> result.mean.shape, result.nfe, result.claims
    (torch.Size([3, 1, 4, 4]), 10, 'heuristic')
    """
    BATCH.check("batch", batch)
    RESTARTS.check("restarts", restarts)
    if method == "auto":
        method, options, advised = Auto.read(options).choose(problem, samples)
        restarts = restarts or advised
    solver = resolve(method, options)
    inputs = prepare(
        *(y, problem, prior, solver.check),
        samples=samples,
        seed=seed,
        init=init,
        posterior=posterior,
        nan=nan,
    )
    name = method if isinstance(method, str) else solver.name
    parts = [
        _solve_part(inputs, entries, solver, prior, restarts or 1, callback, name)
        for entries in each(list(_batches(len(inputs), batch)))
    ]
    found = torch.cat([x for x, _, _ in parts]).reshape(samples, len(y), *inputs.shape)
    std = found.std(0) if samples > 1 else torch.zeros_like(found[0])
    trace = _merge([trace for _, traces, _ in parts for trace in traces])
    nfe = max(nfe for _, _, nfe in parts)
    return Result(found, found.mean(0), std, trace, nfe, name, solver.claims, solver)


@dataclass
class _Run:
    """One run of a part of the batch: its images (N, C, H, W) and its trace."""

    x: Tensor
    trace: list[dict[str, Any]]
    stopped: bool = False


def _solve_part(
    inputs: Inputs,
    entries: range,
    solver: Solver,
    prior: Any,
    restarts: int,
    callback: Callback | None,
    name: str,
) -> tuple[Tensor, list[list[dict[str, Any]]], int]:
    """Restore some entries of the batch: images (N, C, H, W), traces and evaluations."""
    y, problem, init = inputs.select(entries)
    denoise, runs = CountingDenoiser(prior), []
    for restart in each(range(restarts)):
        states = solver.run(y, problem, denoise, inputs.generator(entries, restart), init)
        runs.append(_follow(states, callback))
    x, traces = _best(runs)
    if restarts > 1 and problem.operator.ambiguous:
        generator = inputs.generator(entries, restarts)
        x = most_likely(x, y, problem, denoise, generator)
    x = inputs.equalize(x, entries)
    with denoise.counted_as(0):
        finished = not any(run.stopped for run in runs)
        level = denoise.sigma_max
        require_plausible(x, y, problem, denoise, name, sigma_max=level, finished=finished)
    return x, traces, denoise.nfe


def _follow(states: Iterator[State], callback: Callback | None) -> _Run:
    """Take the steps of a run until it ends, or until the callback stops it."""
    trace: list[dict[str, Any]] = []
    for state in states:
        chi2 = state.chi2  # stays on the device: reading it would stall the queue
        trace.append({"step": state.step, "sigma": state.sigma, "nfe": state.nfe, "chi2": chi2})
        x = state.x.detach()
        if callback is not None:
            now = {"steps": state.steps, "x": state.x, "denoised": state.denoised}
            if callback(trace[-1] | now | {"chi2": float(chi2.mean())}):
                return _Run(x, trace, stopped=True)
        del state  # its images: the next step may need the memory
    return _Run(x, trace)


def _batches(total: int, batch: int) -> Iterator[range]:
    for first in range(0, total, batch):
        yield range(first, min(first + batch, total))


def _best(runs: list[_Run]) -> tuple[Tensor, list[list[dict[str, Any]]]]:
    """Select for each image the run with the least chi-square: images, and traces of these."""
    if len(runs) == 1:
        return runs[0].x, [runs[0].trace]
    chi2 = torch.stack([run.trace[-1]["chi2"] for run in runs])
    chosen = chi2.nan_to_num(nan=torch.inf).argmin(0)
    images = torch.stack([run.x for run in runs])
    traces = []
    for number, run in enumerate(runs):
        own = chosen == number
        if bool(own.any()):
            traces.append([entry | {"chi2": entry["chi2"][own]} for entry in run.trace])
    return images[chosen, torch.arange(len(chosen), device=chosen.device)], traces


def _merge(traces: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Merge the traces of several batches: chi2 is the mean over the images that took the step."""
    merged, means = [], []
    for number in range(max(map(len, traces))):
        steps = [trace[number] for trace in traces if number < len(trace)]
        means.append(torch.cat([step["chi2"] for step in steps]).double().mean())
        merged.append(dict(steps[0]))
    # one read from the device for all steps
    for step, mean in zip(merged, torch.stack(means).tolist(), strict=True):
        step["chi2"] = mean
    return merged


@torch.no_grad()
def most_likely(
    x: Tensor, y: Tensor, problem: Problem, denoise: CountingDenoiser, generator: PerImageGenerator
) -> Tensor:
    """Select for every image the symmetric one of least energy E.

    Args:
        x: Images (B, C, H, W).
        y: Measurements (B, ...).
        problem: Operator and noise, bound to the images of y.
        denoise: The prior's denoiser. It is evaluated 16 times for each symmetric image.
        generator: One random stream for each image.

    Returns:
        Images (B, C, H, W).

    >>> truth = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
    >>> problem = Problem("phase:fourier", 0.01).bind([0], (1, 8, 8))
    >>> denoise = CountingDenoiser(lambda x, sigma: truth.expand_as(x))  # it knows the image
    >>> turned = truth.flip(-2, -1)  # with the same magnitudes
    >>> found = most_likely(turned, problem.A(truth), problem, denoise, PerImageGenerator(0, [0]))
    >>> bool((found - truth).abs().max() < 0.01)
    True
    """
    mean = denoise(gray(y, problem), min(HIGHEST, denoise.sigma_max))
    transform = problem.operator.symmetries(x, mean)
    sigma_eff = max(problem.sigma, FLOOR)
    images = torch.stack([prox(problem, z, y, NEAR, sigma_eff) for z in transform(x)])
    square = [squared_norm(problem.residual(z, y)) for z in images]
    energy = torch.stack(square) / (2 * sigma_eff**2)
    for s in DRAWS * SYMMETRY_LEVELS:
        for number, e in enumerate(transform(s * randn(generator, x))):
            z = images[number]
            missed = [squared_norm(denoise(z + n, s) - z) for n in (e, -e)]
            energy[number] += math.log(2) / (DRAWS * s**2) * (missed[0] + missed[1]) / 2
    return images[energy.argmin(0), torch.arange(len(x), device=x.device)]
