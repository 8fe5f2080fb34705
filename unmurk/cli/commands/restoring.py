"""What `restore` and `solve` share: the problem of a run, and the loop over files.

Picture files are processed one by one (see `io.jobs`), whatever their sizes; an array file is one
set (see `io.sets`). Images larger than those of the training are covered by tiles (see `tiling`).
"""

import hashlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...errors import InputError
from ...io.formats.registry import has_reader
from ...io.outputs import Output
from ..console import escape
from ..data import images_of, list_skipped, problem_of, run_span
from ..options import Command

if TYPE_CHECKING:
    import torch

    from ...io.jobs import Engine
    from ...io.scale import Spans
    from ...problem import Problem

__all__ = [
    "recorded",
    "restore_data",
    "sample_images",
    "scene_of",
    "trained_problem",
    "weights_of",
]

ENOUGH = 512  # images from which the noise is estimated
UNRECORDED = {"data", "prior", "out", "json", "skip_bad", "steps", "option", "std", "batch"}
DEFAULTS = ("nan", "refuse"), ("repeats", 1)  # values that leave results as they are
UNUSUAL, STRANGE = 1.25, 10.0  # ratios of a noise to the one that a flow was trained with


class Restoring(Protocol):
    """The options that `restore` and `solve` have in common."""

    data: Path
    prior: str
    samples: int
    batch: int | None
    range: Any
    nan: Any
    skip_bad: bool
    repeats: int


def restore_data(
    command: Restoring,
    to: Output,
    problem: "Problem",
    engine: "Engine",
    settings: dict[str, Any],
    arrays: list[str],
) -> dict[str, Any]:
    """Restore the data of a command: pictures file by file, an array as one set.

    Args:
        command: The command.
        to: The place of the results.
        problem: The forward model and noise.
        engine: Restores a batch.
        settings: What the results depend on (see `recorded`).
        arrays: Names of the arrays that come with the images.

    Returns:
        The result of the command.
    """
    from ...io.jobs import jobs_of, process, ranks, scene_jobs
    from ...io.sets import by_scene, measurements_of, restore_set

    data, out = command.data, to.path
    pictures = data.is_dir() or has_reader(data)
    one_set = out.suffix.lower() in {".npy", ".npz"} or not problem.operator.pictorial
    jobs = [] if one_set or not pictures else jobs_of(data, out, command.skip_bad)
    jobs = scene_jobs(jobs, command.repeats) if jobs else []
    known = _known_span(command)
    files = [one.file for job in jobs for one in job.captures or (job,)]
    spans = _spans(command, files, problem.level) if jobs else known
    ledger = to.record(settings | {"range": spans or None})
    if to.folder:
        ledger.alone()
    # samples of each image that are in memory at once
    copies = command.samples if "samples" in arrays else 1
    if not jobs:
        if ranks()[0] > 0:
            return {"images": 0, "out": out}
        pictorial, read = problem.operator.pictorial, partial(images_of, sigma=problem.level)
        measured = measurements_of(data, pictorial, command.skip_bad, known, command.nan, read)
        if command.repeats > 1:
            measured = by_scene(measured, command.repeats)
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
        copies=copies,
    )
    if done.skipped and not done.images + done.before and ranks()[1] == 1:
        raise InputError(f"nothing is left of {data}: {next(iter(done.skipped.values()))}")
    list_skipped(done.skipped)
    target = jobs[0].out if len(jobs) == 1 else out
    return {
        "images": done.images,
        "finished": done.before or None,
        "skipped": done.skipped,
        "out": target,
    }


def _known_span(command: Restoring) -> "Spans":
    """The numbers of black and white given by the user, or those of the run."""
    return command.range or run_span(command.prior)


def _spans(command: Restoring, files: list[Path], sigma: float | None) -> list[Any]:
    """The numbers of black and white in files: given, the run's, or found by a survey.

    If the noise is known, the findings are printed, and floats are checked.
    """
    from ...io.scale import Scale
    from ...io.survey import survey

    known = _known_span(command)
    extents = survey(files, known, sigma).values()
    for extent in extents:
        if sigma is not None and extent.note:
            print(f"{escape(command.data)}: {extent.note}", file=sys.stderr)
    found = [Scale.of(e.dtype, bits=e.bits).span for e in extents if e.bits]
    return [list(span) for span in ([known] if known else []) + found if span is not None]


def recorded(
    command: Command, problem: "Problem", more: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the settings that a result depends on, besides its input file."""
    from ...devices import default_device, device_kind

    own = {
        name: value
        for name, value in vars(command).items()
        if name not in UNRECORDED and (name, value) not in DEFAULTS
    }
    own |= {"command": type(command).__name__.lower(), **problem.to_dict()}
    own |= {"device": device_kind(default_device())}  # each kind rounds differently
    own |= {
        "std": getattr(command, "std", None),
        "mask or kernel": problem.operator.digests(),
        **(more or {}),
    }
    return json.loads(json.dumps(own))


def scene_of(
    y: "torch.Tensor", problem: "Problem", numbers: list[int], shape: tuple[int, ...], nan: Any
) -> "tuple[torch.Tensor, Problem]":
    """Return the measurement of each image or scene, without missing values, and its problem.

    Args:
        y: Measurements (B, C, H, W), or all captures of scenes (B, N, C, H, W).
        problem: How one measurement was made, not bound to images.
        numbers: Numbers of the images or scenes.
        shape: Shape (C, H, W) of the images.
        nan: See `missing.without_missing`.
    """
    from ...missing import without_missing
    from ...repeats import combined_captures, grouped

    problem = problem.to(y.device)
    if y.ndim != 5:
        return without_missing(y, problem.bind(numbers, shape), nan, shape)
    repeats = y.shape[1]
    captures = [i * repeats + j for i in numbers for j in range(repeats)]
    flat, bound = without_missing(y.flatten(0, 1), problem.bind(captures, shape), nan, shape)
    return combined_captures(grouped(flat, repeats), bound, numbers, shape)


def weights_of(model: Any) -> str:
    """Return the SHA-256 hash of a network's weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()


def sample_images(command: Restoring) -> "Callable[[], torch.Tensor]":
    """Return a function that reads the first images, from which the noise is estimated."""

    def images() -> "torch.Tensor":
        from ...io.images import load_images, pictures_in

        span, data = _known_span(command), command.data
        if data.is_dir() or has_reader(data):
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
    """Return the problem of a run's config.json, with the parts that are given in its place.

    A flow is trained with one noise level, so a noise of another strength causes a warning.

    Args:
        run: Run folder, or a name of the package.
        operator, noise: Text forms; None: those of the run.
        images: Returns the images from which a noise "auto" is estimated.

    Raises:
        InputError: Neither the run nor the options give the problem, or the noise is more than
            `STRANGE` times that of the run.
    """
    from ...diffusion.prior import locate
    from ...io.json_files import read_object
    from ...problem import Problem

    config = locate(run, "posterior", "model.safetensors").parent / "config.json"
    trained: Problem | None = None
    try:
        trained = Problem.from_dict(read_object(config).get("problem", {}))
    except InputError as error:
        if operator is None or noise is None:
            raise InputError(
                f"{config} does not give the problem that '{run}' was trained with ({error}): give"
                " --operator and --noise"
            ) from error
    spec = {} if trained is None else trained.to_dict()
    chosen = operator or spec["operator"]
    problem = problem_of(chosen, spec["noise"] if noise is None else noise, images)
    if trained is not None and noise is not None:
        _compare_noise(run, trained.level, problem.level)
    return problem


def _compare_noise(run: str, known: float, given: float) -> None:
    """Warn if a flow was trained with another noise; raise InputError if it is far off."""
    if known <= 0 or known / UNUSUAL <= given <= known * UNUSUAL:
        return
    what = f"the posterior of '{run}' was trained with noise {known:g}, and this is {given:g}"
    if given > known * STRANGE:
        raise InputError(f"{what}: use `unmurk solve`, whose prior covers all noise, or retrain")
    print(f"{what}: its error bars are wrong there; `unmurk solve` is right", file=sys.stderr)
