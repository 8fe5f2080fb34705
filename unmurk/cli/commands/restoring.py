"""What `restore` and `solve` share: the problem of a run, and the loop over files.

Picture files are processed one by one (see `io.jobs`), whatever their sizes; an array file is one
set (see `io.sets`). Images larger than those of the training are covered by tiles (see `tiling`).
"""

import json
from collections.abc import Callable, Collection
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...errors import InputError, remark
from ...io.formats.readers import holds_images, is_folder
from ...io.formats.registry import member_of
from ...io.outputs import Output
from ...io.packaged import GENERIC
from ..console import escape
from ..data import (
    Sample,
    images_of,
    list_skipped,
    note_pages,
    place,
    problem_of,
    run_frames,
    run_span,
    selection_of,
)
from ..maps import NO_MAP
from ..options import Command

if TYPE_CHECKING:
    import torch

    from ...io.axes import Selection
    from ...io.capture_set import Captures
    from ...io.frames import Frames
    from ...io.images import ImageSet
    from ...io.job_list import Job
    from ...io.jobs import Engine, Summary
    from ...io.scale import Scale, Spans
    from ...problem import Problem

__all__ = [
    "Models",
    "calibration",
    "frames_of",
    "history_of",
    "recorded",
    "restore_data",
    "restore_pictures",
    "sample_images",
    "sample_scale",
    "spans_of",
    "trained_problem",
]

ENOUGH = 512  # images from which the noise is estimated
HOT_SAMPLE = 64  # images that are searched for hot pixels
UNRECORDED = {"data", "prior", "out", "json", "skip_bad", "steps", "option", "std", "batch"}
UNRECORDED |= {"axes", "channel"}  # of the run too: see `_named`
UNRECORDED |= {"dark", "flat", "hot_pixels"}  # see `calibration`
LOUDEST = 0.7  # highest noise level of the generic posterior
DEFAULTS = ("nan", "refuse"), ("repeats", 1)  # values that leave results as they are
UNUSUAL, STRANGE = 1.25, 10.0  # ratios of a noise to the one that a flow was trained with


class Restoring(Protocol):
    """The options that `restore` and `solve` have in common."""

    data: Path
    prior: str
    samples: int
    batch: int | None
    range: Any
    axes: str | None
    channel: tuple[str, ...]
    nan: Any
    skip_bad: bool
    dark: Path | None
    flat: Path | None
    hot_pixels: Any
    repeats: int


def restore_data(
    command: Restoring,
    to: Output,
    problem: "Problem",
    engine: "Engine",
    settings: dict[str, Any],
    arrays: list[str],
    unmapped: Collection[int] = (),
) -> dict[str, Any]:
    """Restore the data of a command: pictures file by file, an array as one set.

    Args:
        command: The command.
        to: The place of the results.
        problem: The forward model and noise.
        engine: Restores a batch.
        settings: What the results depend on (see `recorded`).
        arrays: Names of the arrays that come with the images.
        unmapped: Numbers of images whose noise maps have no usable number; their files are left
            out.

    Returns:
        The result of the command.
    """
    from ...io.job_list import jobs_of, scene_jobs, without
    from ...io.jobs import ranks
    from ...io.sets import group_scenes, measurements_of, restore_set

    data, out = command.data, to.path
    pictures = is_folder(data) or holds_images(data)
    select = selection_of(command, command.prior)
    if select.lenient and select.axes:
        remark(
            f"files of {len(select.axes)} axes are read as {select.axes}, as the run was learned: "
            "--axes names others"
        )
    one_set = out.suffix.lower() in {".npy", ".npz"} or not problem.operator.pictorial
    jobs = [] if one_set or not pictures else jobs_of(data, out, command.skip_bad, select)
    lost: dict[str, str] = {}
    if jobs:
        note_pages(data, select)
        jobs, lost = without(scene_jobs(jobs, command.repeats), unmapped, NO_MAP)
    if jobs and not to.folder and jobs[0].out != out:
        raise InputError(
            f"{out}: the scenes are no whole part of an axis of {jobs[0].file.name}, and are "
            "written as TIFF: give a .tif name"
        )
    known = _known_span(command)
    files = [one.file for job in jobs for one in job.captures or (job,)]
    spans = _spans(command, files, problem.level, jobs[0].select) if jobs else known
    ledger = to.record(settings | {"range": spans or None, **_named(select)})
    if to.folder:
        ledger.alone()
    # samples of each image that are in memory at once
    copies = command.samples if "samples" in arrays else 1
    if not jobs:
        if unmapped:
            raise InputError(
                f"noise map {min(unmapped)} has no number above 0, and an array is restored as"
                " one set: remove it and its image"
            )
        if ranks()[0] > 0:
            return {"images": 0, "out": to.shown}
        pictorial, read = problem.operator.pictorial, partial(images_of, sigma=problem.level)
        measured = measurements_of(
            data, pictorial, command.skip_bad, known, command.nan, read, select
        )
        if measured.note:
            remark(f"{data}: {measured.note}")
        if command.repeats > 1:
            measured = group_scenes(measured, command.repeats)
        found = restore_set(
            measured, data, engine, to, ledger, arrays=arrays, batch=command.batch, copies=copies
        )
        return {k: to.typed(v) if isinstance(v, Path) else v for k, v in found.items()}
    to.keep()
    if ranks()[0] == 0:
        list_skipped(lost)
    done = restore_pictures(
        jobs,
        engine,
        data,
        ledger=ledger,
        arrays=arrays,
        span=spans,
        skip_bad=command.skip_bad,
        nan=command.nan,
        batch=command.batch,
        copies=copies,
        history=history_of(settings),
    )
    target = jobs[0].out if len(jobs) == 1 else out
    return {
        "images": done.images,
        "finished": done.before or None,
        "skipped": lost | done.skipped,
        "out": to.typed(target),
    }


def restore_pictures(
    jobs: "list[Job]", engine: "Engine", data: Path, *, skip_bad: bool, **options: Any
) -> "Summary":
    """Process picture files, and print what is left out and which formats change.

    Args:
        jobs, engine, skip_bad, options: See `io.jobs.process`.
        data: The folder or the file, for messages.

    Raises:
        InputError: No file is left, or see there.
    """
    from ...io.job_list import changed_formats
    from ...io.jobs import process, ranks

    if ranks()[0] == 0:
        for line in changed_formats(jobs):
            remark(line)
    done = process(jobs, engine, skip_bad=skip_bad, **options)
    if done.skipped and not done.images + done.before and ranks()[1] == 1:
        raise InputError(f"nothing is left of {data}: {next(iter(done.skipped.values()))}")
    list_skipped(done.skipped)
    return done


def history_of(settings: dict[str, Any]) -> str:
    """Return the line about their origin that results carry: command, operator, noise, method."""
    from ... import __version__

    method = settings.get("method")
    parts = [settings["command"], *([str(method)] if method else [])]
    maps = settings.get("noise maps")
    noise = f"{settings['noise']}" if maps is None else f"maps of level {maps['level']:.4g}"
    parts += [f"operator {settings['operator']}", f"noise {noise}"]
    return escape(f"unmurk {__version__}: {', '.join(parts)}")


def _named(select: "Selection") -> dict[str, Any]:
    """Return the axes and channels as the log keeps them: `recorded` has those of the options."""
    return {name: value for name, value in select.to_dict().items() if value}


def _known_span(command: Restoring) -> "Spans":
    """The numbers of black and white given by the user, or those of the run."""
    return command.range or run_span(command.prior)


def _spans(
    command: Restoring, files: list[Path], sigma: float | None, select: "Selection"
) -> list[Any]:
    """The numbers of black and white in files: given, the run's, or found by a survey."""
    return spans_of(command.data, files, _known_span(command), sigma, select)


def spans_of(
    data: Path, files: list[Path], known: "Spans", sigma: float | None, select: "Selection"
) -> list[Any]:
    """Return the numbers of black and white in files: those known, or those found by a survey.

    If the noise is known, the findings are printed, and floats are checked.

    Args:
        data: The folder or the file, for messages.
        files: The files.
        known: Numbers that are known; None: none are.
        sigma: Standard deviation of the noise; None: it is not known.
        select: Their axes and channels.
    """
    from ...io.scale import Scale, listed
    from ...io.survey import survey

    extents = survey(files, known, sigma, select).values()
    for extent in extents:
        if sigma is not None and extent.note:
            remark(f"{data}: {extent.note}")
    found = [Scale.of(e.dtype, e.span, e.bits).span for e in extents if e.bits or e.span]
    return [list(span) for span in [*listed(known), *found] if span is not None]


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
        "selection": member_of(getattr(command, "data", Path())),
        "mask or kernel": problem.operator.digests(),
        **(more or {}),
    }
    return json.loads(json.dumps(own))


class Models:
    """The model of a name, on the device of the commands.

    Args:
        load: Loads a model, such as `Prior.load`.
        name: The name.
    """

    def __init__(self, load: Callable[[str], Any], name: str) -> None:
        self.name = name
        self.model = place(load(name))[0]
        self._told = False

    def of(self, channels: int) -> Any:
        """Return the model for images of a number of channels.

        Raises:
            InputError: The model of color images is given for others.
        """
        color = GENERIC[1]
        if self.name == color and channels != 3:
            raise InputError(
                f"'{color}' is a model of color images, and these have {channels} channels: give"
                f" '{GENERIC[0]}', which takes channels one by one"
            )
        if self.name == GENERIC[0] and channels == 3 and not self._told:
            self._told = True
            remark(
                f"'{GENERIC[0]}' takes the three channels one by one; for colors of one light,"
                f" such as photographs, --prior {color} is better"
            )
        return self.model

    @property
    def error_bars(self) -> list[Any]:
        """The calibration of the standard deviations, if the model has one."""
        bars = getattr(self.model, "error_bars", None)
        return [] if bars is None else [bars]

    @property
    def weights(self) -> str:
        """The hash of the weights."""
        from ...io.weights import digest

        return digest(self.model)


def sample_images(
    command: Restoring, frames: "Callable[[], Frames] | None" = None
) -> "Callable[[], torch.Tensor | Captures]":
    """Return a function that reads the images from which the noise is estimated.

    They are the first ones, or all of a set of several sizes.

    Args:
        command: The command.
        frames: Returns calibration frames. The dark frame is subtracted from the images; they are
            not divided by the flat field, which would change the noise.
    """

    def images() -> "torch.Tensor | Captures":
        from ...io.captures import open_captures, sizes_in

        select = selection_of(command, command.prior)
        if len(set(sizes_in(command.data, select))) > 1:
            span = _span_of_all(command, select)
            found = open_captures(command.data, True, span, "mask", select=select)
            return found if frames is None else found.corrected(frames().undivided())
        y = _sample(command, ENOUGH).images
        return y if frames is None else frames().correct(y, divide=False)

    return images


def sample_maps(command: Restoring, frames: "Callable[[], Frames]") -> "Callable[[], Sample]":
    """Return a function that reads the first images, from which noise maps are scaled.

    Args:
        command: The command.
        frames: Returns calibration frames, which correct the images.
    """

    def images() -> "Sample":
        data = _sample(command, ENOUGH)
        return Sample(frames().correct(data.images), data.numbers)

    return images


def sample_scale(command: Restoring) -> "Callable[[], Scale]":
    """Return a function that reads the scale of the data, for a noise in gray levels.

    The function raises InputError if the files have numbers of several types, whose gray levels
    differ.
    """

    def scale() -> "Scale":
        from ...io.formats.pictures import has_number_type, number_type
        from ...io.images import pictures_in

        if is_folder(command.data):
            types = {number_type(f) for f in pictures_in(command.data) if has_number_type(f)}
            if len(types) > 1:
                raise InputError(
                    f"{command.data} has files of {' and '.join(sorted(map(str, types)))}, whose "
                    "gray levels differ: give the noise in units of [0, 1]"
                )
        return _sample(command, 1).scale

    return scale


def frames_of(command: Restoring) -> "Callable[[], Frames]":
    """Return a function that reads the calibration frames of a command, once."""

    @cache
    def frames() -> "Frames":
        sample = partial(_sample, command, HOT_SAMPLE)
        given = (command.dark, command.flat, command.hot_pixels)
        return run_frames(*given, sample, command.prior, selection_of(command, command.prior))

    return frames


def calibration(frames: "Frames") -> dict[str, Any]:
    """Return what a result depends on of its calibration frames."""
    return {"calibration": frames.record()} if frames else {}


def _sample(command: Restoring, limit: int) -> "ImageSet":
    """Read the first images of a command, in the scale that it restores them in.

    Missing pixels are not finite here; `--nan` applies when the images are restored.
    """
    from ...io.images import read_images

    select = selection_of(command, command.prior)
    span = _span_of_all(command, select)
    return read_images(
        command.data, skip_bad=True, limit=limit, span=span, nan="mask", select=select
    )


def _span_of_all(command: Restoring, select: "Selection") -> "Spans":
    """The numbers of black and white in all files of a command."""
    from ...io.images import pictures_in

    data = command.data
    if is_folder(data) or holds_images(data):
        return _spans(command, pictures_in(data) if is_folder(data) else [data], None, select)
    return _known_span(command)


def trained_problem(
    run: str,
    operator: str | None,
    noise: str | None,
    images: "Callable[[], torch.Tensor | Captures] | None" = None,
    scale: "Callable[[], Scale] | None" = None,
    mapped: bool = False,
    ranged: bool = False,
) -> "Problem":
    """Return the problem of a run's config.json, with the parts that are given in its place.

    A flow is trained with one noise level, so a noise of another strength causes a warning.

    Args:
        run: Run folder, or a name of the package.
        operator, noise: Text forms; None: those of the run.
        images: Returns the images from which a noise "auto" is estimated.
        scale: Returns the scale of the files, for a noise in gray levels.
        mapped: Whether noise maps hold the noise, so that `noise` is not used.
        ranged: Whether the files have a range that was given, perhaps another than the run's.

    Raises:
        InputError: Neither the run nor the options give the problem, or the noise is more than
            `STRANGE` times that of the run, or the posterior is generic and the operator is not
            the identity.
    """
    from ...diffusion.prior import locate
    from ...io.json_files import read_object
    from ...io.packaged import is_generic
    from ...problem import Problem

    folder = locate(run, "posterior", "model.safetensors")
    if is_generic(folder):
        return _generic_problem(run, operator, "0" if mapped else noise, images, scale)
    noise = None if mapped else noise
    config = folder.parent / "config.json"
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
    if noise is None and ranged and scale is not None:
        noise = _in_range_of_files(run, spec["noise"], scale())
    problem = problem_of(chosen, spec["noise"] if noise is None else noise, images, scale)
    if trained is not None and noise is not None:
        _compare_noise(run, trained.level, problem.level)
    return problem


def _in_range_of_files(run: str, noise: float | str, scale: "Scale") -> str:
    """Convert the noise of a run to the range of files, where that is not the run's own."""
    from ...io.scale import Scale
    from ...noise import as_noise, in_scale

    span = run_span(run)
    if span is None or span.dtype != scale.dtype:  # other numbers: no gray levels in common
        return str(noise)
    known = Scale.of(scale.dtype, span)
    if (known.offset, known.gain) == (scale.offset, scale.gain):
        return str(noise)
    try:
        found = in_scale(as_noise(noise), known, scale).spec
    except InputError as error:
        raise InputError(f"the noise of '{run}' is {noise}: {error}: give --noise") from error
    remark(
        f"'{run}' learned with {span}: its noise {noise} is {found} in this range, and its images"
        " had another brightness"
    )
    return found


def _generic_problem(
    run: str,
    operator: str | None,
    noise: str | None,
    images: "Callable[[], torch.Tensor | Captures] | None",
    scale: "Callable[[], Scale] | None",
) -> "Problem":
    """Return the problem of noisy images, whose noise is estimated if it is not given."""
    if operator not in (None, "identity"):
        raise InputError(
            f"the posterior of '{run}' restores images that are only noisy: use `unmurk solve"
            f" --prior {run} --operator {operator}`"
        )
    problem = problem_of("identity", "auto" if noise is None else noise, images, scale)
    if problem.level > UNUSUAL * LOUDEST:
        remark(
            f"the posterior of '{run}' was trained with noise up to {LOUDEST:g}, and this is"
            f" {problem.level:g}: its error bars are wrong there; `unmurk solve` is right"
        )
    return problem


def _compare_noise(run: str, known: float, given: float) -> None:
    """Warn if a flow was trained with another noise; raise InputError if it is far off."""
    if known <= 0 or known / UNUSUAL <= given <= known * UNUSUAL:
        return
    what = f"the posterior of '{run}' was trained with noise {known:g}, and this is {given:g}"
    if given > known * STRANGE:
        raise InputError(f"{what}: use `unmurk solve`, whose prior covers all noise, or retrain")
    remark(f"{what}: its error bars are wrong there; `unmurk solve` is right")
