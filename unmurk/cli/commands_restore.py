"""The commands that restore images: `restore` in one pass, `solve` by an iterative solver.

Pictures are worked off file by file (see `files`), whatever their sizes; an array file is one set.
Images larger than a network was trained on are covered by tiles (see `tiles`).
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from ..bounds import Whole
from ..errors import InputError
from ..io.outputs import Output, files_of, output
from .console import escape
from .options import (
    AnyPrior,
    Batch,
    Command,
    Corrupted,
    Json,
    MaybeInt,
    MaybeRange,
    MaybeText,
    NanOption,
    Seed,
    SkipBad,
    Text,
    job_of,
    place,
    problem_of,
    run_span,
    solver_options,
)

if TYPE_CHECKING:
    import torch

    from ..io.jobs import Engine, Summary
    from ..io.scale import Spans
    from ..problem import Problem

__all__ = ["Restore", "Solve", "recorded", "weights_of"]

ENOUGH = 512  # images that the noise is estimated from
UNSAID = {"data", "prior", "out", "json", "skip_bad", "steps", "option", "std", "batch"}

MaybeTile = Annotated[
    int | None,
    arg(
        metavar="INT",
        help="Side in pixels of the tiles that larger images are worked on in, a whole number "
        "from 1 to 65536; unset: the side of the images that the prior was trained on.",
    ),
    Whole(1, 65536),
]
UNUSUAL, STRANGE = 1.25, 10.0  # factors between a noise and the one that a flow was trained with


@dataclass
class Restore(Command):
    """Restore corrupted images in one pass, with the posterior that was learnt with a prior.

    A folder is worked off file by file; the same command continues it.
    """

    data: Corrupted
    prior: Text
    """Run folder, or digits (in the package)."""
    out: Path
    """Where the restored images go, in the type and the range that they came in."""
    operator: MaybeText = None
    """How the images were made; unset: as those that the run was trained with."""
    noise: MaybeText = None
    """Standard deviation of the noise, in units where the image range is 1, or another noise; auto
    or poisson-gaussian,auto: estimated from DATA; unset: the run's."""
    samples: Annotated[int, Whole(2, 100_000, even=True)] = 16
    """Draws from the posterior behind every mean and standard deviation, an even number from 2 to
    100000."""
    std: bool = False
    """Also write every pixel's standard deviation (image range 1), (N, C, H, W), to NAME-std.npy
    (std.npy in a folder for an array)."""
    tile: MaybeTile = None
    batch: Batch = None
    range: MaybeRange = None
    nan: NanOption = "refuse"
    seed: Seed = 0
    skip_bad: SkipBad = False
    json: Json = False

    def run(self) -> dict[str, Any]:
        inputs = [str(self.data), *files_of(self.prior)]
        with output(self.out, inputs, folder=None, job=job_of(self)) as to:
            problem = trained_problem(self.prior, self.operator, self.noise, _some(self))
            to.reads(problem.operator.digests())
            from ..checks import require_plausible_flow
            from ..flows.posterior import Posterior
            from ..missing import without_missing
            from ..tiling import posterior_for

            posterior = place(Posterior.load(self.prior))[0]

            def engine(y: "torch.Tensor", numbers: list[int]) -> dict[str, "torch.Tensor"]:
                y = place(y)[0]
                shape = problem.operator.x_shape(y.shape[1:])
                bound = problem.to(y.device).bind(numbers, shape)
                y, bound = without_missing(y, bound, self.nan, shape)
                flow = posterior_for(posterior, shape, self.tile)
                mean, std = flow.mean_std(y, bound, self.samples, self.seed, numbers)
                prior = partial(_denoiser, self.prior, shape, self.tile)
                require_plausible_flow(mean, std, y, bound, prior, self.prior)
                return {"images": mean, "std": std} if self.std else {"images": mean}

            settings = recorded(self, problem, {"weights": weights_of(posterior)})
            return _run(self, to, problem, engine, settings, ["std"] if self.std else [])


@dataclass
class Solve(Command):
    """Restore images of any operator with a prior, by an iterative solver.

    A folder is worked off file by file; the same command continues it.
    """

    data: Corrupted
    prior: AnyPrior
    operator: Text
    """How the images were made, such as inpaint:box,size=12 or sr:average,factor=4."""
    noise: Text
    """Standard deviation of the noise in the measurements, in units where the image range is 1; or
    poisson,gain=0.01 or poisson-gaussian,gain=0.01,sigma=0.02; or auto or poisson-gaussian,auto:
    estimated from DATA (docs/data_and_files.md)."""
    out: Path
    """Folder for the restored images (the mean where there are several samples)."""
    method: Text = "red-diff"
    """Name of the solver; an unknown one lists those there are. auto: one that fits the operator,
    the number of samples and --option budget=100, network evaluations for each."""
    samples: Annotated[int, Whole(1, 100_000)] = 1
    """Solutions of every image, a whole number from 1 to 100000; with more than one,
    NAME-samples.npy and NAME-std.npy are written too (samples.npy and std.npy in a folder for an
    array)."""
    restarts: Annotated[MaybeInt, Whole(1, 10_000)] = None
    """Runs for each solution, a whole number from 1 to 10000, of which the one that fits best is
    kept (phase retrieval); unset: 1, or what --method auto chooses."""
    steps: Annotated[MaybeInt, Whole(1, 100_000)] = None
    """Steps of the solver, a whole number from 1 to 100000; unset: its own."""
    option: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...")] = ()
    """Other options of the solver; an unknown key lists those there are."""
    init: Literal["pinv", "posterior"] = "pinv"
    """Where it starts: where the solver itself starts (docs/solvers.md), or at a draw of the run's
    posterior."""
    tile: MaybeTile = None
    batch: Batch = None
    range: MaybeRange = None
    nan: NanOption = "refuse"
    seed: Seed = 0
    skip_bad: SkipBad = False
    json: Json = False

    def run(self) -> dict[str, Any]:
        inputs = [str(self.data), *files_of(self.prior)]
        with output(self.out, inputs, folder=None, job=job_of(self)) as to:
            options = solver_options(self.method, self.option, self.steps)
            problem = problem_of(self.operator, self.noise, _some(self))
            to.reads(problem.operator.digests())
            from ..diffusion.prior import Prior
            from ..flows.posterior import Posterior
            from ..solvers.solve import solve
            from ..tiling import posterior_for, prior_for

            starts = self.init == "posterior"
            posterior = place(Posterior.load(self.prior))[0] if starts else None
            prior = place(Prior.load(self.prior))[0]
            ends: list[End] = []

            def engine(y: "torch.Tensor", numbers: list[int]) -> dict[str, "torch.Tensor"]:
                y = place(y)[0]
                shape = _shape(problem, y, prior.shape)
                flow = None if posterior is None else posterior_for(posterior, shape, self.tile)
                with _progress(self.method) as callback:
                    result = solve(
                        y,
                        problem.to(y.device).bind(numbers, shape),
                        prior_for(prior, shape, self.tile),
                        method=self.method,
                        samples=self.samples,
                        restarts=self.restarts,
                        seed=self.seed,
                        init="posterior" if starts else None,
                        posterior=flow,
                        callback=callback,
                        nan=self.nan,
                        **options,
                    )
                residual = result.trace[-1]["chi2"] if result.trace else None
                ends.append((len(y), residual, result.method, result.nfe))
                several = {"samples": result.samples, "std": result.std}
                return {"images": result.mean, **(several if self.samples > 1 else {})}

            weights = {"weights": weights_of(prior)}
            if posterior is not None:
                weights["posterior"] = weights_of(posterior)
            settings = recorded(self, problem, {**weights, "options": options})
            arrays = ["samples", "std"] if self.samples > 1 else []
            written = _run(self, to, problem, engine, settings, arrays)
        return {**written, **_sum_up(ends)}


def _denoiser(run: str, shape: tuple[int, ...], tile: int | None) -> "tuple[Any, float]":
    """D(x, sigma) of a run for images (C, H, W), and its highest level; (None, 0) without one."""
    from ..diffusion.prior import Prior, locate
    from ..tiling import prior_for

    try:
        locate(run, "prior", "model_index.json")
    except InputError:  # there is none
        return None, 0.0
    prior = prior_for(place(Prior.load(run))[0], shape, tile)
    return prior.denoise, prior.sigma_max


End = tuple[int, float | None, str, int]
"""Images of a batch, their mean residual at the end, the method, network evaluations."""


def _sum_up(ends: list[End]) -> dict[str, Any]:
    """What is told of several batches together."""
    if not ends:
        return {}
    *_, (_, _, method, nfe) = ends
    weighed = [count * end for count, end, *_ in ends if end is not None]
    residual = sum(weighed) / sum(end[0] for end in ends) if weighed else None
    return {"method": method, "nfe": nfe, "chi2": residual}


# -- one run --------------------------------------------------------------------------------------


def _run(
    command: Restore | Solve,
    to: Output,
    problem: "Problem",
    engine: "Engine",
    settings: dict[str, Any],
    arrays: list[str],
) -> dict[str, Any]:
    """Restores the data of a command: pictures file by file, an array as one set."""
    from ..io.formats.pictures import ENDINGS
    from ..io.jobs import jobs_of, process, ranks
    from ..io.sets import measurements_of, restore_set

    data, out = command.data, to.path
    pictures = data.is_dir() or data.suffix.lower() in ENDINGS
    one_set = out.suffix.lower() in {".npy", ".npz"} or not problem.operator.pictorial
    jobs = [] if one_set or not pictures else jobs_of(data, out, command.skip_bad)
    known = _known_span(command)
    spans = _spans(command, [job.file for job in jobs], problem.level) if jobs else known
    ledger = to.record(settings | {"range": spans or None})
    if to.folder:
        ledger.alone()
    if not jobs:
        if ranks()[0] > 0:
            return {"images": 0, "out": out}
        pictorial, level = problem.operator.pictorial, problem.level
        measured = measurements_of(data, pictorial, command.skip_bad, known, command.nan, level)
        copies = _copies(command)
        return restore_set(
            measured, data, engine, to, ledger, arrays=arrays, batch=command.batch, copies=copies
        )
    to.keep()
    done = process(
        jobs,
        engine,
        ledger=ledger,
        arrays=arrays,
        span=spans,
        skip_bad=command.skip_bad,
        nan=command.nan,
        batch=command.batch,
        copies=_copies(command),
    )
    if done.skipped and not done.images + done.before and ranks()[1] == 1:
        raise InputError(f"nothing is left of {data}: {next(iter(done.skipped.values()))}")
    _complain(done)
    target = jobs[0].out if len(jobs) == 1 else out
    return {
        "images": done.images,
        "finished": done.before or None,
        "skipped": done.skipped,
        "out": target,
    }


def _known_span(command: Restore | Solve) -> "Spans":
    """Numbers of black and white that were given, or that the run was learnt with."""
    return command.range or run_span(command.prior)


def _spans(command: Restore | Solve, files: "list[Path]", sigma: float | None) -> list[Any]:
    """Numbers of black and white in files: given, the run's, or found by a look at all of them.

    What was found is said, and floats are checked, where the noise is known.
    """
    from ..io.scale import Scale
    from ..io.survey import survey

    known = _known_span(command)
    extents = survey(files, known, sigma).values()
    for extent in extents:
        if sigma is not None and extent.note:
            print(f"{escape(command.data)}: {extent.note}", file=sys.stderr)
    found = [Scale.of(e.dtype, bits=e.bits).span for e in extents if e.bits]
    return [list(span) for span in ([known] if known else []) + found if span is not None]


def _copies(command: Restore | Solve) -> int:
    """Versions of every image that are in memory at once."""
    return command.samples if isinstance(command, Solve) else 1


def _complain(done: "Summary") -> None:
    for name, reason in done.skipped.items():
        print(f"left out {escape(name)}: {escape(reason)}", file=sys.stderr)


def _shape(problem: "Problem", y: "torch.Tensor", known: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the images behind y: the prior's where they fit, else what the operator says."""
    try:
        fits = problem.operator.y_shape(known) == tuple(y.shape[1:])
    except InputError:
        fits = False
    shape = tuple(known) if fits else tuple(problem.operator.x_shape(y.shape[1:]))
    if shape[0] != known[0] == 1 and y.shape[1] != shape[0]:
        raise InputError(
            f"operator '{problem.operator.spec}' mixes the {shape[0]} channels of an image, which "
            "a prior of grey images cannot tell apart: take a prior of colour images"
        )
    return shape


def recorded(
    command: Command, problem: "Problem", more: dict[str, Any] | None = None
) -> dict[str, Any]:
    """All that a result depends on, but its file."""
    from ..devices import default_device, device_kind

    own = {
        name: value
        for name, value in vars(command).items()
        if name not in UNSAID and (name, value) != ("nan", "refuse")
    }
    own |= {"command": type(command).__name__.lower(), **problem.to_dict()}
    own |= {"device": device_kind(default_device())}  # each kind rounds in its own way
    own |= {
        "std": getattr(command, "std", None),
        "mask or kernel": problem.operator.digests(),
        **(more or {}),
    }
    return json.loads(json.dumps(own))


def weights_of(model: Any) -> str:
    """SHA-256 of a network's weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()


def _some(command: Restore | Solve) -> "Callable[[], torch.Tensor]":
    """What the noise is estimated from: the first images of the most frequent size."""

    def images() -> "torch.Tensor":
        from ..io.formats.pictures import ENDINGS
        from ..io.images import load_images, pictures_in

        span, data = _known_span(command), command.data
        if data.is_dir() or data.suffix.lower() in ENDINGS:
            files = pictures_in(data) if data.is_dir() else [data]
            span = _spans(command, files, None)
        return load_images(data, skip_bad=True, limit=ENOUGH, span=span).images

    return images


def trained_problem(
    run: str,
    operator: str | None,
    noise: str | None,
    images: "Callable[[], torch.Tensor] | None" = None,
) -> "Problem":
    """The problem of a run's config.json, with the parts that are given in its place.

    A flow has met one level of noise while it learnt, so a noise of another strength is named.

    Raises:
        InputError: neither the run nor the options say what the problem is, or the noise is more
            than `STRANGE` times the run's.
    """
    from ..diffusion.prior import locate
    from ..io.json_files import read_object
    from ..problem import Problem

    config = locate(run, "posterior", "model.safetensors").parent / "config.json"
    trained: Problem | None = None
    try:
        trained = Problem.from_dict(read_object(config).get("problem", {}))
    except InputError as error:
        if operator is None or noise is None:
            raise InputError(
                f"{config} does not say what '{run}' was trained with ({error}): give --operator"
                " and --noise"
            ) from error
    spec = {} if trained is None else trained.to_dict()
    chosen = operator or spec["operator"]
    problem = problem_of(chosen, spec["noise"] if noise is None else noise, images)
    if trained is not None and noise is not None:
        _compare_noise(run, trained.level, problem.level)
    return problem


def _compare_noise(run: str, known: float, given: float) -> None:
    """Says on stderr that a flow has not met this noise; raises InputError where it is far off."""
    if known <= 0 or known / UNUSUAL <= given <= known * UNUSUAL:
        return
    what = f"the posterior of '{run}' was trained with noise {known:g}, and this is {given:g}"
    if given > known * STRANGE:
        raise InputError(f"{what}: use `unmurk solve`, whose prior knows every noise, or retrain")
    print(f"{what}: its error bars do not hold there; `unmurk solve` does", file=sys.stderr)


@contextmanager
def _progress(label: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar on stderr, moved by a solver's callback."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda at: bar.update(task, completed=at["step"], total=at["steps"])
