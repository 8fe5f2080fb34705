"""Solving with a prior: measurements y, a problem and a denoiser in, restored images out.

    result = unmurk.solve(y, problem, prior, method="red-diff", samples=8)

Images and samples make one flat list of rows, worked off in batches. Row (image b, sample k) draws
all its noise from the stream of (seed, b, k), so a result does not depend on the batch size. With
restarts every row is run several times, each time from a stream of its own, and the image that
fits y best is kept; where y does not tell it from others, the likeliest of them (see
`symmetries`).

Solvers take Gaussian noise of one level. Poisson noise is brought to it first; see `whiten`.

A solver is one file: a frozen dataclass of its options with `run` (see `base.Solver`) and a line
in the table of this module. This package is itself callable: `unmurk.solve(...)` is the function,
`unmurk.diffusion.schedules` a module of it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..bounds import Whole, check_memory
from ..checks import require_plausible
from ..devices import on_device
from ..errors import InputError
from ..missing import without_missing
from ..problem import Problem
from ..rng import PerImageGenerator, StreamId
from ..whitening import whiten
from .alike import SharedChannelGenerator, equal_channels
from .auto import Auto
from .base import Callback, Claim, CountingDenoiser, Monitor, Solver
from .daps import Daps
from .ddiff import Ddiff
from .ddnm import Ddnm
from .ddrm import Ddrm, DdrmPaper
from .diffpir import DiffPir
from .dps import Dps
from .fast_dips import FastDips
from .hrdis import Hrdis
from .mmps import Mmps
from .pigdm import Pigdm
from .pnp_dm import PnpDm
from .projdiff import ProjDiff
from .red_diff import RedDiff
from .red_diff_paper import RedDiffPaper
from .red_diff_spread import RedDiffSpread
from .snips import Snips
from .symmetries import likeliest
from .tds import Tds
from .tmpd import Tmpd

__all__ = ["METHODS", "PRESETS", "Result", "configure", "solve"]

METHODS: dict[str, type[Solver]] = {
    "red-diff": RedDiff,
    "dps": Dps,
    "hrdis": Hrdis,
    "ddrm": Ddrm,
    "ddnm": Ddnm,
    "diffpir": DiffPir,
    "pigdm": Pigdm,
    "tmpd": Tmpd,
    "mmps": Mmps,
    "pnp-dm": PnpDm,
    "daps": Daps,
    "snips": Snips,
    "tds": Tds,
    "projdiff": ProjDiff,
    "ddiff": Ddiff,
    "fast-dips": FastDips,
}
"""Solvers by name."""

PRESETS: dict[tuple[str, str], type[Solver]] = {
    ("red-diff", "paper"): RedDiffPaper,
    ("red-diff", "spread"): RedDiffSpread,
    ("ddrm", "paper"): DdrmPaper,
}
"""What `preset` stands for: solvers by (name, preset)."""

SAMPLES, BATCH = Whole(1, 100_000), Whole(1, 65_536)
RESTARTS = Whole(1, 10_000, optional=True)


@dataclass(frozen=True)
class Result:
    """Restored images, and how they were come by.

    Attributes:
        samples: (S, B, C, H, W), one or several for each measurement.
        mean: (B, C, H, W), their mean.
        std: (B, C, H, W), their standard deviation (divisor S - 1); zero where S = 1. It is the
            posterior's only if `claims` is "posterior".
        trace: One dict for each step: step, sigma, nfe (so far), and residual, averaged over all
            rows: chi-square per measured value, near 1 for a good fit, or without noise the root
            mean square misfit. With restarts it is that of the runs that were kept.
        nfe: Network evaluations that each sample has cost, those of all its restarts together.
        method: Name of the solver.
        claims: "posterior", "point" or "heuristic"; see `base.Solver`.
    """

    samples: Tensor
    mean: Tensor
    std: Tensor
    trace: list[dict[str, Any]]
    nfe: int
    method: str
    claims: Claim


def configure(method: str, options: dict[str, Any]) -> Solver:
    """The solver of a name with its options set.

    Raises:
        InputError: Unknown method, preset or option (the message lists those there are).
    """
    options = dict(options)
    if method not in METHODS:
        raise InputError(f"method '{method}' is unknown: choose from auto, {', '.join(METHODS)}")
    cls = METHODS[method]
    preset = options.pop("preset", "default")
    if preset != "default":
        known = [p for name, p in PRESETS if name == method]
        if preset not in known:
            raise InputError(
                f"preset '{preset}' is unknown: {method} has {', '.join(['default', *known])}"
            )
        cls = PRESETS[method, preset]
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise InputError(
            f"{method} has no option '{unknown[0]}' with preset {preset}:"
            f" it takes {', '.join(known)}"
        )
    return cls(**options)


def _work(
    y: Tensor, problem: Problem, prior: Any, method: str = "red-diff", *, batch: int = 64, **_: Any
) -> str:
    """What `solve` works on, for the message that memory has run out."""
    size = "x".join(map(str, y.shape[1:]))
    return f"method {method} on batches of {batch} rows of measurements {size}"


@on_device(_work, "give a smaller batch, or smaller images")
def solve(
    y: Tensor,
    problem: Problem,
    prior: Any,
    method: str = "red-diff",
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
        problem: How they were made; of images 0..B-1 unless it is bound to others.
        prior: An object with `denoise(x, sigma)`, or a function (x, sigma): E[clean | x].
        method: A name in `METHODS`: "red-diff", "ddrm", "pnp-dm" and so on; or "auto", which
            takes `budget` (100 network evaluations) and chooses (see `solve.auto`).
        samples: How many for each measurement, each from its own noise, a whole number from 1 to
            100000.
        restarts: Runs for each sample, a whole number from 1 to 10000, of which the one with the
            least residual is kept: against local minima. If there are several and the operator is
            ambiguous (phase retrieval), of the images that y cannot tell apart the prior then
            chooses one, for another 33 evaluations. Samples chosen so are no draws of a posterior.
            None: 1, or what "auto" thinks best.
        seed: Sample k of image b depends on (seed, b, k) alone.
        init: Where to start: None for the solver's own, images (B, C, H, W), or "posterior" for
            draws of `posterior`, a fresh one for each sample.
        posterior: An object with `sample(y, problem, n, seed)`.
        callback: Called after every step of every batch with a dict: step, steps, sigma, x,
            denoised (B', C, H, W), nfe, residual. What it returns, if true, stops this batch.
        batch: Rows (images x samples) worked on together, a whole number from 1 to 65536.
        nan: "mask" counts pixels of y with numbers that are not finite as hidden.
        options: The solver's, by name, and `preset` (red-diff: "paper" or "spread"; ddrm:
            "paper").

    Raises:
        InputError: Unknown method or option, unfit shapes, an operator that the method cannot
            handle, or a result that is not finite or far outside what prior and measurements
            allow (see `unmurk.checks`).
    """
    _check(y, samples, batch, restarts)
    if method == "auto":
        method, options, wanted = Auto.read(options).choose(problem, samples)
        restarts = restarts or wanted
    restarts = restarts or 1
    solver = configure(method, options)
    shape = _image_shape(y, problem, prior, init)
    size = 4.0 * samples * len(y) * math.prod(shape)
    check_memory(f"{samples} samples of {len(y)} images", size, "ask for fewer at a time")
    problem = _bind(y, problem, shape)
    y, problem = without_missing(y, problem, nan, shape)
    _fits(y, problem, shape, solver)
    start = _starts(y, problem, init, posterior, samples, seed, shape)
    alike = _alike(y, prior, shape, init)
    y, problem = whiten(y, problem)

    done, traces, nfe = [], [], 0
    for rows in _batches(samples * len(y), batch):
        images = [row % len(y) for row in rows]
        picked, denoise = problem.index_select(images), CountingDenoiser(prior)
        x = None if start is None else start[rows]
        runs = []
        numbers = picked.index or images
        same = alike[images]
        of = [(row // len(y), number) for row, number in zip(rows, numbers, strict=True)]
        for restart in range(restarts):
            streams = _streams(seed, of, restart, y.device, same, shape[0])
            monitor = Monitor(y[images], picked, denoise, callback)
            found = solver.run(y[images], picked, denoise, x, streams, monitor).detach()
            runs.append((found, monitor))
        found, kept = _best(runs)
        if restarts > 1 and problem.operator.ambiguous:
            streams = _streams(seed, of, restarts, y.device, same, shape[0])
            found = likeliest(found, y[images], picked, denoise, streams)
        found[same] = found[same, :1]
        with denoise.counted_as(0):
            ended = not any(monitor.stopped for _, monitor in runs)
            level = denoise.sigma_max
            require_plausible(
                found, y[images], picked, denoise, method, sigma_max=level, finished=ended
            )
        done.append(found)
        traces.extend(kept)
        nfe = max(nfe, denoise.nfe)
    found = torch.cat(done)
    found = found.reshape(samples, len(y), *shape)
    std = found.std(0) if samples > 1 else torch.zeros_like(found[0])
    return Result(found, found.mean(0), std, _merge(traces), nfe, method, solver.claims)


def _check(y: Tensor, samples: int, batch: int, restarts: int | None) -> None:
    if y.ndim < 2 or not len(y) or not y.is_floating_point():
        raise InputError(
            f"y is {y.dtype} of shape {tuple(y.shape)}: give floats (B, ...), one row an image"
        )
    SAMPLES.check("samples", samples)
    BATCH.check("batch", batch)
    RESTARTS.check("restarts", restarts)


def _image_shape(y: Tensor, problem: Problem, prior: Any, init: Any) -> tuple[int, ...]:
    """Shape (C, H, W) of the images: that of init, else what the prior or the operator says."""
    if isinstance(init, Tensor):
        return tuple(init.shape[-3:])
    known = getattr(prior, "shape", None)
    if known is not None and problem.operator.y_shape(known) == tuple(y.shape[1:]):
        return tuple(known)
    return tuple(problem.operator.x_shape(y.shape[1:]))


def _bind(y: Tensor, problem: Problem, shape: tuple[int, ...]) -> Problem:
    """The problem of the images 0..B-1, unless it is bound to others already."""
    problem = problem.to(y.device)
    if problem.index is None:
        return problem.bind(range(len(y)), shape)
    if len(problem.index) != len(y):
        raise InputError(
            f"the problem is bound to {len(problem.index)} images but y has {len(y)} rows:"
            " bind it with at() or take(), or leave it unbound"
        )
    return problem


def _fits(y: Tensor, problem: Problem, shape: tuple[int, ...], solver: Solver) -> None:
    wanted = tuple(problem.operator.y_shape(shape))
    if wanted != tuple(y.shape[1:]):
        raise InputError(
            f"y has rows of shape {tuple(y.shape[1:])} but operator '{problem.operator.spec}'"
            f" makes {wanted} of images {shape}"
        )
    lost = (~problem.operator.apply_mask(y).isfinite()).flatten(1).any(1)
    if bool(lost.any()):
        raise InputError(
            f"y holds numbers that are not finite in row {int(lost.nonzero()[0, 0])}: hide them"
            " with a mask (inpaint:file) or replace them"
        )
    if solver.requires == "linear" and not problem.operator.linear:
        able = [name for name, cls in METHODS.items() if cls.requires != "linear"]
        raise InputError(
            f"{solver.name} needs a linear operator and '{problem.operator.spec}' is not:"
            f" use {' or '.join(able)}"
        )


def _starts(
    y: Tensor,
    problem: Problem,
    init: Tensor | str | None,
    posterior: Any,
    samples: int,
    seed: int,
    shape: tuple[int, ...],
) -> Tensor | None:
    """First images of all rows (samples x B, C, H, W), or None."""
    if init is None:
        return None
    if isinstance(init, Tensor):
        if init.shape != (len(y), *shape):
            raise InputError(
                f"init has shape {tuple(init.shape)}: give one for each of the {len(y)} rows of y"
            )
        return init.to(y).repeat(samples, *[1] * len(shape))
    if init != "posterior":
        raise InputError(f"init '{init}' is unknown: give images, 'posterior' or None")
    if posterior is None:
        raise InputError("init='posterior' needs a posterior: give posterior=")
    return posterior.sample(y, problem, samples, seed=seed).to(y).flatten(0, 1)


def _batches(total: int, batch: int) -> Iterator[range]:
    for first in range(0, total, batch):
        yield range(first, min(first + batch, total))


def _alike(y: Tensor, prior: Any, shape: tuple[int, ...], init: Any) -> Tensor:
    """Images whose equal channels a prior of grey images must leave equal, (B,) bool."""
    grey = getattr(prior, "channels", None) == 1
    alike = equal_channels(y, shape[0] if grey else 0)
    return alike & equal_channels(init, shape[0]) if isinstance(init, Tensor) else alike


def _streams(
    seed: int,
    rows: list[tuple[int, int]],
    restart: int,
    device: torch.device,
    alike: Tensor,
    channels: int,
) -> PerImageGenerator:
    """The streams of a run of rows (sample, image): the first is that of one without restarts."""
    again = (restart,) if restart else ()
    streams = PerImageGenerator.join(
        PerImageGenerator(seed, [image], StreamId.SOLVER, sample, *again, device=device)
        for sample, image in rows
    )
    return (
        cast(PerImageGenerator, SharedChannelGenerator(streams, alike, channels))
        if bool(alike.any())
        else streams
    )


def _best(runs: list[tuple[Tensor, Monitor]]) -> tuple[Tensor, list[list[dict[str, Any]]]]:
    """Of every row the run with the least residual: images, and the traces of what is kept."""
    if len(runs) == 1:
        return runs[0][0], [runs[0][1].steps]
    misfit = torch.stack([monitor.misfit(x) for x, monitor in runs])
    chosen = misfit.nan_to_num(nan=torch.inf).argmin(0)
    x = torch.stack([x for x, _ in runs])[chosen, torch.arange(len(chosen), device=chosen.device)]
    traces = []
    for run, (_, monitor) in enumerate(runs):
        own = chosen == run
        if bool(own.any()):
            traces.append([at | {"chi2": at["chi2"][own]} for at in monitor.steps])
    return x, traces


def _merge(traces: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One trace of several batches: the residual is the mean over the rows that took the step."""
    merged, residuals = [], []
    for number in range(max(map(len, traces))):
        steps = [trace[number] for trace in traces if number < len(trace)]
        residuals.append(torch.cat([step["chi2"] for step in steps]).double().mean())
        merged.append(dict(steps[0]))
    # one look at the device for all steps
    for step, residual in zip(
        merged, torch.stack(residuals).tolist() if residuals else [], strict=True
    ):
        step["chi2"] = residual
    return merged
