"""What the commands read: images, runs and problems, with remarks for the user on stderr.

Nothing heavy is imported before a function is called.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..errors import InputError, remark, size_text
from ..io.json_files import read_object

if TYPE_CHECKING:
    import torch

    from ..io.axes import Selection
    from ..io.capture_set import Captures
    from ..io.frames import Frames
    from ..io.images import ImageSet
    from ..io.scale import Scale, Span, Spans
    from ..operators import Operator
    from ..problem import Problem

__all__ = [
    "EVEN",
    "Sample",
    "captures_of",
    "check_floats",
    "hide_missing",
    "images_of",
    "is_even",
    "list_skipped",
    "measured",
    "note_even",
    "note_channels",
    "note_pages",
    "note_run",
    "place",
    "problem_of",
    "run_config",
    "run_frames",
    "run_scale",
    "run_selection",
    "run_span",
    "selection_of",
    "warn_of_noise",
]


LARGEST = 1.0
"""Standard deviation of the strongest noise that is expected before it is known."""


class Sample(NamedTuple):
    """Images that the scale of noise maps is measured on.

    Attributes:
        y: Images (N, C, H, W), or captures.
        numbers: Their numbers; None: 0, 1, ..., or those of the captures.
    """

    y: "torch.Tensor | Captures"
    numbers: "Sequence[int] | None" = None


def problem_of(
    operator: str,
    noise: str,
    images: "Callable[[], torch.Tensor | Captures] | None" = None,
    scale: "Callable[[], Scale | None] | None" = None,
    check: bool = False,
) -> "Problem":
    """Return the problem of two text forms.

    Args:
        operator, noise: The text forms.
        images: Returns the images, or captures of any sizes, from which a noise "auto" is
            estimated. Noise in them that no model fits is printed.
        scale: Returns the scale of the files, for a noise in gray levels ("12dn").
        check: Whether floats far from [0, 1] are refused whatever the noise.
    """
    from ..noise_units import has_units, in_units
    from ..problem import Problem

    if images is not None:
        images = cache(images)  # they are read once
    if scale is not None and (check or "auto" in str(noise) or has_units(str(noise))):
        check_floats(images, scale())
    if images is not None and "auto" in str(noise):
        from ..io.capture_set import Captures
        from ..io.crops import tiles
        from ..noise_estimation import known_noise
        from ..operators import as_operator

        found = images()
        if isinstance(found, Captures):
            y, observed = tiles(found, as_operator(operator))
        else:
            y, observed = hide_missing(found, operator)
        noise = known_noise(noise, y, observed, getattr(found, "text", ""))
        warn_of_noise(y, observed)
    elif scale is not None and has_units(str(noise)):
        given, noise = noise, in_units(noise, scale())
        remark(f"noise {given} is {noise} in units of [0, 1]")
    return Problem(operator, noise)


def check_floats(
    images: "Callable[[], torch.Tensor | Captures] | None", scale: "Scale | None"
) -> None:
    """Refuse floats so far from [0, 1] that no noise of the bounds explains it.

    Numbers with a range are refused if their median lies more than the range away from it. Without
    this check, the message would be about the noise, not about the range.
    """
    from ..io.capture_set import Captures
    from ..io.scale import SIGMAS, Scale, check_units

    if images is None or scale is None:
        return
    units = scale.dtype.startswith("float") and scale.gain == 1
    if not units and scale.gain == Scale.of(scale.dtype, bits=scale.bits).gain:
        return
    found = images()
    first = found.first() if isinstance(found, Captures) else found
    if units:
        check_units("the set", first, LARGEST)
    else:
        check_units("the set", first, 1 / SIGMAS, scale)


def hide_missing(y: "torch.Tensor", operator: str) -> "tuple[torch.Tensor, Operator]":
    """Return measurements with zeros where they are not finite, and an operator hiding these."""
    from ..io.gaps import gaps
    from ..missing import with_missing
    from ..operators import as_operator

    known = as_operator(operator)
    if bool(y.isfinite().all()):
        return y, known
    filled, pixels = gaps(y, "mask")
    return filled, with_missing(known, pixels)  # type: ignore[return-value]


def warn_of_noise(y: "torch.Tensor", operator: "str | Operator" = "identity") -> list[str]:
    """Print, and return, how the noise of images differs from every model."""
    import torch

    from ..noise_checks import check_noise
    from ..operators import as_operator

    bound = as_operator(operator)
    bound = bound.bind(range(len(y)), bound.x_shape(tuple(y.shape[1:])))
    observed = bound.apply_mask(torch.ones_like(y)) > 0
    found = [finding.text for finding in check_noise(y, observed)]
    for text in found:
        remark(f"warning: {text}")
    return found


def images_of(
    path: Path,
    skip_bad: bool = False,
    span: "Spans" = None,
    nan: Literal["refuse", "mask"] = "refuse",
    sigma: float | None = None,
    select: "Selection | None" = None,
) -> "ImageSet":
    """Read the images of a path, and print remarks about them to stderr.

    Args:
        path: A folder or a file.
        skip_bad, nan: See `load_images`.
        span: Numbers of black and white, if they are known.
        sigma: Standard deviation of the noise, for `scale.check_units`; None: no check.
        select: The axes of the files, and the channels to read; None: all.
    """
    from ..io.axes import ALL
    from ..io.images import read_images
    from ..io.scale import check_units, span_for

    note_pages(path, select)
    data = read_images(path, skip_bad=skip_bad, span=span, nan=nan, select=select or ALL)
    list_skipped(dict(data.skipped))
    if data.note:
        remark(f"{path}: {data.note}")
    floats = data.scale.dtype.startswith("float") and span_for(span, data.scale.dtype) is None
    if floats and sigma is not None:
        check_units(path, data.images[:: max(1, len(data) // 128)], sigma)
    return data


def note_pages(path: Path, select: "Selection | None" = None) -> None:
    """Print how the first picture of a path is read, if its format leaves a doubt."""
    from ..io.axes import ALL
    from ..io.folders import pictures_in
    from ..io.formats.pictures import holds_images, open_pages
    from ..io.formats.readers import is_folder

    if not is_folder(path) and not holds_images(path):
        return
    try:
        first = pictures_in(path)[0] if is_folder(path) else path
        with open_pages(first, select or ALL) as pages:
            note = pages.note
    except InputError:  # reported, or left out, when it is read
        return
    if note:
        remark(note)


def note_channels(images: "torch.Tensor", scale: "Scale") -> None:
    """Print which channel of images (N, C, H, W) fills far less of the range than another."""
    from ..io.scale import channel_note

    note = channel_note(images, scale)
    if note:
        remark(note)


def measured(
    path: Path,
    skip_bad: bool,
    span: "Spans" = None,
    nan: Literal["refuse", "mask"] = "refuse",
    select: "Selection | None" = None,
) -> Any:
    """Return the images to learn from: in memory or, if they are large, as a source."""
    from ..io.axes import ALL
    from ..io.source import large, open_source

    if not large(path):
        return images_of(path, skip_bad, span, nan, select=select)
    note_pages(path, select)
    source = open_source(path, skip_bad, span, nan, select or ALL)
    list_skipped(dict(source.skipped))
    if source.note:
        remark(source.note)
    return source


def captures_of(
    path: Path,
    operator: str,
    crop: int | None,
    skip_bad: bool,
    span: "Spans" = None,
    nan: Literal["refuse", "mask"] = "refuse",
    scratch: Path | None = None,
    select: "Selection | None" = None,
) -> "Captures | None":
    """Return the images to cut crops out of; None if whole images are learned from.

    Args:
        path: A folder or a file.
        operator: How the images were made.
        crop: Side of the crops; 0: whole images; None: see `crops.cut_by_default`.
        skip_bad, span, nan, scratch, select: See `captures.open_captures`.
    """
    from ..io.axes import ALL
    from ..io.captures import open_captures, sizes_in
    from ..io.crops import croppable, cut_by_default
    from ..operators import as_operator

    select = select or ALL
    if crop == 0:
        return None
    if crop is None:
        local = croppable(as_operator(operator))
        if not (local and cut_by_default(sizes_in(path, select))):
            return None
    note_pages(path, select)
    found = open_captures(path, skip_bad, span, nan, scratch, select)
    list_skipped(dict(found.skipped))
    if found.note:
        remark(f"{path}: {found.note}")
    return found


def list_skipped(skipped: dict[str, str]) -> None:
    """Print the names and reasons of images that were left out."""
    for name, reason in skipped.items():
        remark(f"left out {name}: {reason}")


def run_scale(run: str | Path) -> "Scale | None":
    """Return the scale that images of a run are written with; None: the run does not say it.

    Args:
        run: The run folder, or the folder of its prior; other priors have no scale.

    Raises:
        InputError: The run's config.json is damaged there.
    """
    from dataclasses import replace

    from ..io.saving import FORMATS
    from ..io.scale import Scale

    for config, kept in _configs(run):
        kind, form = kept.get("file_type"), kept.get("file_format")
        if kind is None or form not in FORMATS:
            continue
        try:
            return replace(Scale.of(str(kind), run_span(run)), format=form)
        except (TypeError, ValueError) as error:
            raise InputError(f"{config} has no number type of files: {error}") from error
    return None


def selection_of(command: Any, run: str | Path | None = None) -> "Selection":
    """Return the axes, channels and repeats that a command was given, else axes of a run.

    Args:
        command: The command, with the options `axes` and `channel`.
        run: The run folder, or the folder of its prior; None: there is none.

    Raises:
        InputError: The axes or channels are not usable.
    """
    from ..io.axes import ALL, Selection

    known = ALL if run is None else run_selection(run)
    channels, more = command.channel or known.channels, not command.channel and known.more
    repeats = getattr(command, "repeats", None) or 1
    if command.axes:
        return Selection(command.axes, channels, more=more, repeats=repeats)
    lenient = bool(known.axes)
    return Selection(known.axes, channels, lenient=lenient, more=more, repeats=repeats)


def run_selection(run: str | Path) -> "Selection":
    """Return the axes and channels that a run was learned with; those of no run are all.

    The axes count for files with as many axes, others are read by their own.
    """
    from ..io.axes import ALL, Selection

    for config, kept in _configs(run):
        axes, channels = kept.get("axes", ""), kept.get("channels", [])
        if not isinstance(axes, str) or not isinstance(channels, list):
            raise InputError(f"{config} has no readable axes: give --axes and --channel")
        return Selection(axes, tuple(map(str, channels)), lenient=True, more=bool(channels))
    return ALL


def _configs(run: str | Path) -> "Iterator[tuple[Path, dict[str, Any]]]":
    """Return the settings of a run, which lie in its folder or in that above its prior."""
    for config in (Path(run) / "config.json", Path(run).parent / "config.json"):
        try:
            kept = read_object(config)
        except InputError:
            continue
        if "problem" in kept:
            yield config, kept


def run_config(run: str | Path) -> dict[str, Any]:
    """Return what config.json says of a run, or of the run around a prior's folder; else {}."""
    return next((kept for _, kept in _configs(run)), {})


MOST_HIDDEN = 1_000_000  # positions of hot pixels that are read from a run


def run_frames(
    dark: Path | None,
    flat: Path | None,
    hot: str,
    sample: "Callable[[], ImageSet]",
    run: str | Path | None = None,
    select: "Selection | None" = None,
) -> "Frames":
    """Read the calibration frames of a command, and check them against those of a run.

    Args:
        dark, flat: Files of frames; None: no such frame.
        hot: "auto" finds hot pixels in the sample, unless the run has them; "off" finds none.
        sample: Returns images of the set with their scale.
        run: The run that restores the images, or None.
        select: The channels of the images; None: all.

    Raises:
        InputError: A frame cannot be read, or the run was learned with another.
    """
    from ..io.axes import ALL
    from ..io.frames import Frames, hot_pixels, read_frames

    kept = run_config(run).get("calibration") if run is not None else None
    kept = kept if isinstance(kept, dict) else {}
    if dark is None and flat is None and hot == "off" and not kept:
        return Frames()
    for name, path in (("dark", dark), ("flat", flat)):
        if name in kept and path is None:
            raise InputError(
                f"'{run}' was learned from images corrected by a {name} frame: give the same file "
                f"with --{name}"
            )
    data = sample()
    shape = tuple(data.images.shape[1:])
    positions = _hidden(kept.get("hidden"), shape)
    if positions is None and hot == "auto":
        positions = hot_pixels(data.images)
        count = int(positions.sum())
        remark(f"{count} hot pixel{' is' if count == 1 else 's are'} hidden")
    frames = read_frames(dark, flat, data.scale, shape, hot=positions, select=select or ALL)
    for name, digest in frames.digests.items():
        if kept and kept.get(name) != digest:
            what = "another" if name in kept else "no"
            raise InputError(
                f"'{run}' was learned with {what} {name} frame: give the file that it was learned "
                "with, or learn again"
            )
    return frames


EVEN = {"flat noise": "even"}
"""What a run keeps of calibration frames whose noise it took as even."""


def is_even(run: str | Path) -> bool:
    """Whether a run took the noise of images that a flat field divided as the same everywhere."""
    kept = run_config(run).get("calibration")
    return isinstance(kept, dict) and kept.get("flat noise") == "even"


def note_even(frames: "Frames", why: str) -> None:
    """Say that the noise of divided images is taken as even, if the flat field varies much."""
    from ..io.frames import VARIES

    spread = 0.0 if frames.sensitivity is None else float(frames.sensitivity.std())
    if spread > VARIES:
        remark(
            f"the flat field varies by {spread:.0%}, and so does the noise after the division: one"
            f" noise model for all pixels is an average ({why})"
        )


def _hidden(kept: Any, shape: tuple[int, ...]) -> "torch.Tensor | None":
    """Return the hidden pixels (H, W) that a run keeps; None if it keeps none of this size."""
    import torch

    if not isinstance(kept, list) or len(kept) > MOST_HIDDEN:
        return None
    height, width = shape[-2:]
    found = torch.zeros(height, width, dtype=torch.bool)
    for pair in kept:
        fits = isinstance(pair, list) and len(pair) == 2 and all(type(p) is int for p in pair)
        if not fits or not (0 <= pair[0] < height and 0 <= pair[1] < width):
            raise InputError(
                "the run keeps hot pixels of images of another size than"
                f" {size_text((height, width))}: give "
                "images of the size that it was learned with"
            )
        found[pair[0], pair[1]] = True
    return found


def note_run(run: str | Path) -> None:
    """Print what speaks against the models of a run: it is unfinished, or its verdict is not good.

    Raises:
        InputError: The run's verdict cannot be read.
    """
    from ..evaluation.verdict import Verdict

    if (Path(run) / "progress.json").is_file():
        from ..training.preview import progress_of

        share = progress_of(run)
        if share is not None:
            remark(
                f"{run} is unfinished: these are its models after {100 * share:.0f} % of"
                " its training; the command that began it goes on"
            )
    verdict = Verdict.load(run)
    if verdict is not None and not verdict.trusted:
        remark(f"the verdict on {run}: {verdict.text}")


def run_span(run: str | Path) -> "Span | None":
    """Return the numbers of black and white that a run was trained with.

    Args:
        run: The run folder, or the folder of its prior; other priors have no such numbers.

    Raises:
        InputError: The run's config.json is damaged there.
    """
    from ..io.scale import Span

    for config, kept in _configs(run):
        if kept.get("range") is None:
            continue
        try:
            kind, ends = str(kept["file_type"]), list(kept["range"])
            if not isinstance(ends[0], list):
                return Span(float(ends[0]), float(ends[1]), kind)
            pairs = [(float(black), float(white)) for black, white in ends]
            return Span(tuple(b for b, _ in pairs), tuple(w for _, w in pairs), kind)
        except (TypeError, ValueError, LookupError, OverflowError) as error:
            raise InputError(
                f"{config} has no range of two numbers and a type: give --range BLACK WHITE"
            ) from error
    return None


def place(*things: Any) -> list[Any]:
    """Move models and tensors to the device that the commands use; see `unmurk.devices`."""
    from ..devices import default_device

    device = default_device()
    return [thing.to(device) for thing in things]
