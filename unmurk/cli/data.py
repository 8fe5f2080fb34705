"""What the commands read: images, runs and problems, with remarks for the user on stderr.

Nothing heavy is imported before a function is called.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InputError
from .console import escape

if TYPE_CHECKING:
    import torch

    from ..io.captures import Captures
    from ..io.images import ImageSet
    from ..io.scale import Span, Spans
    from ..problem import Problem

__all__ = [
    "captures_of",
    "images_of",
    "list_skipped",
    "measured",
    "place",
    "problem_of",
    "run_span",
]


def problem_of(
    operator: str,
    noise: str,
    images: "Callable[[], torch.Tensor] | None" = None,
    captures: "Captures | None" = None,
) -> "Problem":
    """Return the problem of two text forms.

    Args:
        operator, noise: The text forms.
        images: Returns the images from which a noise "auto" is estimated.
        captures: Captures that it is estimated from, in place of images.
    """
    from ..problem import Problem

    if captures is not None and "auto" in str(noise):
        from ..io.crops import tiles
        from ..noise_estimation import known_noise
        from ..operators import as_operator

        noise = known_noise(noise, *tiles(captures, as_operator(operator)), captures.text)
    elif images is not None and "auto" in str(noise):
        from ..noise_estimation import known_noise

        noise = known_noise(noise, images(), operator)
    return Problem(operator, noise)


def images_of(
    path: Path,
    skip_bad: bool = False,
    span: "Spans" = None,
    nan: Literal["refuse", "mask"] = "refuse",
    sigma: float | None = None,
) -> "ImageSet":
    """Read the images of a path, and print remarks about them to stderr.

    Args:
        path: A folder or a file.
        skip_bad, nan: See `load_images`.
        span: Numbers of black and white, if they are known.
        sigma: Standard deviation of the noise, for `scale.check_units`; None: no check.
    """
    from ..io.images import load_images
    from ..io.scale import check_units, span_for

    data = load_images(path, skip_bad=skip_bad, span=span, nan=nan)
    list_skipped(dict(data.skipped))
    if data.note:
        print(f"{escape(path)}: {data.note}", file=sys.stderr)
    floats = data.scale.dtype.startswith("float") and span_for(span, data.scale.dtype) is None
    if floats and sigma is not None:
        check_units(path, data.images[:: max(1, len(data) // 128)], sigma)
    return data


def measured(
    path: Path,
    skip_bad: bool,
    span: "Spans" = None,
    nan: Literal["refuse", "mask"] = "refuse",
) -> Any:
    """Return the images to learn from: in memory or, if they are large, as a source."""
    from ..io.source import large, open_source

    if not large(path):
        return images_of(path, skip_bad, span, nan)
    source = open_source(path, skip_bad, span, nan)
    list_skipped(dict(source.skipped))
    if source.note:
        print(source.note, file=sys.stderr)
    return source


def captures_of(
    path: Path,
    operator: str,
    crop: int | None,
    skip_bad: bool,
    span: "Spans" = None,
    nan: Literal["refuse", "mask"] = "refuse",
    scratch: Path | None = None,
) -> "Captures | None":
    """Return the images to cut crops out of; None if whole images are learned from.

    Args:
        path: A folder or a file.
        operator: How the images were made.
        crop: Side of the crops; 0: whole images; None: see `crops.cut_by_default`.
        skip_bad, span, nan, scratch: See `captures.open_captures`.
    """
    from ..io.captures import open_captures, sizes_in
    from ..io.crops import croppable, cut_by_default
    from ..operators import as_operator

    if crop == 0:
        return None
    if crop is None and not (croppable(as_operator(operator)) and cut_by_default(sizes_in(path))):
        return None
    found = open_captures(path, skip_bad, span, nan, scratch)
    list_skipped(dict(found.skipped))
    if found.note:
        print(f"{escape(path)}: {found.note}", file=sys.stderr)
    return found


def list_skipped(skipped: dict[str, str]) -> None:
    """Print the names and reasons of images that were left out."""
    for name, reason in skipped.items():
        print(f"left out {escape(name)}: {escape(reason)}", file=sys.stderr)


def run_span(run: str | Path) -> "Span | None":
    """Return the numbers of black and white that a run was trained with.

    Args:
        run: The run folder, or the folder of its prior; other priors have no such numbers.

    Raises:
        InputError: The run's config.json is damaged there.
    """
    from ..io.scale import Span

    for config in (Path(run) / "config.json", Path(run).parent / "config.json"):
        try:
            kept = json.loads(config.read_text())
        except (OSError, ValueError, RecursionError):
            continue
        if not isinstance(kept, dict) or "problem" not in kept or kept.get("range") is None:
            continue
        try:
            black, white = map(float, kept["range"])
            return Span(black, white, str(kept["file_type"]))
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise InputError(
                f"{config} has no range of two numbers and a type: give --range BLACK WHITE"
            ) from error
    return None


def place(*things: Any) -> list[Any]:
    """Move models and tensors to the device that the commands use; see `unmurk.devices`."""
    from ..devices import default_device

    device = default_device()
    return [thing.to(device) for thing in things]
