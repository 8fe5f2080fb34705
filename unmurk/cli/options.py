"""What the options of several commands share, and what every command has."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from tyro.conf import Positional, arg

from ..bounds import SEED, Real, Whole, check_fields
from ..errors import InputError
from .console import escape, lines, plain

if TYPE_CHECKING:
    from torch import Tensor

    from ..io.images import ImageSet
    from ..io.scale import Span, Spans
    from ..problem import Problem

__all__ = [
    "FILES",
    "AnyPrior",
    "Batch",
    "Clean",
    "Command",
    "Corrupted",
    "Json",
    "MaybeFloat",
    "MaybeInt",
    "MaybePath",
    "MaybeRange",
    "MaybeText",
    "NanOption",
    "Seed",
    "SkipBad",
    "Text",
    "images_of",
    "job_of",
    "place",
    "problem_of",
    "run_span",
    "solver_options",
]

FILES = "a folder of PNG, JPEG or TIFF pictures, one picture, or a .npy, .npz or idx file."
Corrupted = Annotated[Positional[Path], arg(metavar="DATA", help=f"The corrupted images: {FILES}")]
Clean = Annotated[Positional[Path], arg(metavar="DATA", help=f"Clean images: {FILES}")]
Text = Annotated[str, arg(metavar="TEXT")]
MaybeText = Annotated[str | None, arg(metavar="TEXT")]
MaybeFloat = Annotated[float | None, arg(metavar="FLOAT")]
MaybeInt = Annotated[int | None, arg(metavar="INT")]
MaybePath = Annotated[Path | None, arg(metavar="PATH")]
AnyPrior = Annotated[
    str,
    arg(
        metavar="TEXT",
        help="Run folder, folder or Hub name (owner/name) of an unconditional diffusers pipeline, "
        "guided-diffusion checkpoint (adm:ffhq256:FILE, adm:imagenet256:FILE), or digits (in the "
        "package).",
    ),
]
Seed = Annotated[
    int,
    arg(help="Seed of every random draw, a whole number from 0 to 9223372036854775807."),
    SEED,
]
Batch = Annotated[
    int | None,
    arg(
        metavar="INT",
        help="Images that are worked on at once, a whole number from 1 to 4096; unset: up to 256 "
        "images and a million pixels. Less takes less memory; results are the same up to "
        "rounding.",
    ),
    Whole(1, 4096),
]
STEPS = Whole(1, 100_000, optional=True)
SkipBad = Annotated[
    bool,
    arg(help="Leave out files that cannot be read or differ in size from most, and list them."),
]
MaybeRange = Annotated[
    tuple[float, float] | None,
    arg(
        metavar="BLACK WHITE",
        help="Numbers of black and of white in the files, such as 0 4095 for a 12-bit camera; "
        "unset: those of the run, or what the type of the numbers says "
        "(docs/data_and_files.md).",
    ),
]
NanOption = Annotated[
    Literal["refuse", "mask"],
    arg(
        help="Pixels that are not finite (NaN, infinite): refuse, or leave out the image with "
        "--skip-bad; mask: count them as hidden."
    ),
]
Json = Annotated[
    bool, arg(help="Print one JSON object on stdout; a number that is not finite is null.")
]


class Command:
    """What every command has: `check` looks at its options, `run` does the work, `show` prints its
    result for a person."""

    json: bool

    def check(self) -> None:
        """Raises InputError for an option out of the bounds that it is declared with."""
        check_fields(self, {name: f"--{name.replace('_', '-')}" for name in vars(self)})

    def run(self) -> dict[str, Any]:
        raise NotImplementedError

    def show(self, result: dict[str, Any]) -> None:
        print("\n".join(lines(plain(result))))


def job_of(command: Command) -> dict[str, str]:
    """What the processes of one job have in common: the command and its options."""
    given = {name: str(value) for name, value in vars(command).items() if name != "json"}
    return {"command": type(command).__name__.lower(), **given}


def problem_of(
    operator: str, noise: str, images: "Callable[[], Tensor] | None" = None
) -> "Problem":
    """The problem of two text forms; a noise that they leave open is estimated from images."""
    from ..problem import Problem

    if images is not None and "auto" in str(noise):
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
    """The images of a path; what a person should know of them goes to stderr.

    Args:
        path: A folder or a file.
        skip_bad: See `load_images`.
        span: Numbers of black and white, where they are known.
        nan: See `load_images`.
        sigma: Standard deviation of the noise, for `scale.check_units`; None: no check.
    """
    from ..io.images import load_images
    from ..io.scale import check_units, span_for

    data = load_images(path, skip_bad=skip_bad, span=span, nan=nan)
    for name, reason in data.skipped:
        print(f"left out {escape(name)}: {escape(reason)}", file=sys.stderr)
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
) -> tuple[Any, dict[str, str]]:
    """What is learnt from, in memory or, if it is large, read when it is wanted; what is not."""
    from ..io.datasets import large, open_source

    if not large(path):
        data = images_of(path, skip_bad, span, nan)
        return data, dict(data.skipped)
    source = open_source(path, skip_bad, span, nan)
    for name, reason in source.skipped:
        print(f"left out {escape(name)}: {escape(reason)}", file=sys.stderr)
    if source.note:
        print(source.note, file=sys.stderr)
    return source, dict(source.skipped)


def run_span(run: str | Path) -> "Span | None":
    """The numbers of black and white that a run was learnt with, for files of the same type.

    Args:
        run: Its folder, or the folder of its prior; of another prior there are none.

    Raises:
        InputError: the run's config.json holds no such numbers where they should be.
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
                f"{config} holds no range of two numbers and a type: give --range BLACK WHITE"
            ) from error
    return None


def place(*things: Any) -> list[Any]:
    """Models and tensors on the device that commands use; see `unmurk.devices`."""
    from ..devices import default_device

    device = default_device()
    return [thing.to(device) for thing in things]


def solver_options(method: str, pairs: Sequence[str], steps: int | None) -> dict[str, Any]:
    """The options of a solver from key=value pairs, read as the type that each has there."""
    from ..solvers.auto import Auto
    from ..solvers.solve import configure

    texts = dict(_pair(pair) for pair in pairs)
    options: dict[str, Any] = {} if steps is None else {"steps": steps}
    if "preset" in texts:
        options["preset"] = texts.pop("preset")
    auto = method == "auto"
    solver: Any = Auto() if auto else configure(method, options)
    for key, text in texts.items():
        kind = _kind(solver, key)
        try:
            options[key] = READ[kind](text)
        except (ValueError, KeyError) as error:
            raise InputError(f"--option {key}={text}: write it as {kind.__name__}") from error
    STEPS.check("--steps", options.get("steps"))
    if auto:
        Auto.read(options)
    else:
        configure(method, options)
    return options


def _kind(solver: Any, key: str) -> type:
    """The type that an option is declared with, None aside; str for a Literal or no option."""
    declared = get_type_hints(type(solver)).get(key, str)
    if get_origin(declared) is UnionType:
        declared = next(kind for kind in get_args(declared) if kind is not NoneType)
    return declared if declared in READ else str


def _pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise InputError(f"--option {text}: write it as key=value")
    return key, value


READ: dict[type, Callable[[str], Any]] = {
    bool: {"true": True, "false": False}.__getitem__,
    int: Whole(0, 0).read,
    float: Real(0, 0).read,
    str: str,
}
