"""What the options of several commands share, and what every command has."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

from tyro.conf import Positional, arg

from .console import lines, plain
from .errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from .io.images import ImageSet
    from .problem import Problem

__all__ = [
    "FILES",
    "AnyPrior",
    "Clean",
    "Command",
    "Corrupted",
    "Json",
    "MaybeFloat",
    "MaybeInt",
    "MaybePath",
    "MaybeText",
    "Seed",
    "SkipBad",
    "Text",
    "at_least",
    "images_of",
    "place",
    "problem_of",
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
Seed = Annotated[int, arg(help="Seed of every random draw.")]
SkipBad = Annotated[
    bool,
    arg(help="Leave out files that cannot be read or differ in size from most, and list them."),
]
Json = Annotated[
    bool, arg(help="Print one JSON object on stdout; a number that is not finite is null.")
]


class Command:
    """What every command has: `run` does the work, `show` prints its result for a person."""

    json: bool

    def run(self) -> dict[str, Any]:
        raise NotImplementedError

    def show(self, result: dict[str, Any]) -> None:
        print("\n".join(lines(plain(result))))


def at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise InputError(f"--{name} {value}: give a number of {least} or more")


def problem_of(
    operator: str, noise: str, images: "Callable[[], Tensor] | None" = None
) -> "Problem":
    """The problem of two text forms; a noise that they leave open is estimated from images."""
    from .problem import Problem

    if images is not None and "auto" in str(noise):
        from .noise_estimate import known_noise

        noise = known_noise(noise, images(), operator)
    return Problem(operator, noise)


def images_of(
    path: Path, skip_bad: bool = False, span: tuple[float, float] | None = None
) -> "ImageSet":
    """The images of a path; what a person should know of them goes to stderr."""
    from .io.images import load_images
    from .io.scale import UNIT

    data = load_images(path, skip_bad=skip_bad, span=span)
    for name, reason in data.skipped:
        print(f"left out {name}: {reason}", file=sys.stderr)
    scale = data.scale
    if span is None and scale.dtype not in ("uint8", "uint16") and scale.gain not in (1.0, 255.0):
        low, high = scale.offset, scale.offset + scale.gain
        print(
            f"{path}: read as images from black {low:g} to white {high:g}, the least and the "
            f"largest number, as some are beyond [{UNIT[0]:g}, {UNIT[1]:g}] and [0, 255]",
            file=sys.stderr,
        )
    return data


def measured(path: Path, skip_bad: bool) -> tuple[Any, dict[str, str]]:
    """What is learnt from, in memory or, if it is large, read when it is wanted; what is not."""
    from .io.datasets import large, open_source

    if not large(path):
        data = images_of(path, skip_bad)
        return data.images, dict(data.skipped)
    source = open_source(path, skip_bad)
    for name, reason in source.skipped:
        print(f"left out {name}: {reason}", file=sys.stderr)
    return source, dict(source.skipped)


def place(*things: Any) -> list[Any]:
    """Models and tensors on the device that commands use; see `unmurk.devices`."""
    from .devices import default_device

    device = default_device()
    return [thing.to(device) for thing in things]


def solver_options(method: str, pairs: Sequence[str], steps: int | None) -> dict[str, Any]:
    """The options of a solver from key=value pairs, read as the type that each has there."""
    from .solve import configure
    from .solve.auto import Auto

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
    at_least(1, steps=options.get("steps", 1))
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
    int: int,
    float: float,
    str: str,
}
