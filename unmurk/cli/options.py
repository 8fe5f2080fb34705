"""Options that several commands share, and the base class of the commands."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from tyro.conf import Positional, UseAppendAction, arg

from ..bounds import SEED, Real, Whole, check_fields
from ..bounds import Text as Named
from ..errors import InputError, remark
from ..io.packaged import SETS, packaged
from .console import lines, plain

__all__ = [
    "FILES",
    "AnyPrior",
    "Axes",
    "Batch",
    "Channel",
    "Clean",
    "Command",
    "Corrupted",
    "Dark",
    "Flat",
    "FlatNoise",
    "HotPixels",
    "Json",
    "MaybeInt",
    "MaybePath",
    "Ranges",
    "MaybeText",
    "MaybeTile",
    "NanOption",
    "NoiseMaps",
    "Options",
    "Repeats",
    "Seed",
    "SkipBad",
    "Text",
    "job_of",
    "pairs",
    "solver_options",
]

FILES = (
    "a folder of pictures (PNG, JPEG, TIFF, FITS, NIfTI, DICOM, files of microscopes), one such "
    "file, an extension of a FITS file (file.fits[SCI]), a data set of an HDF5 file (a.h5:NAME), "
    f"a .npy, .npz or idx file, or the name of a set in the package ({', '.join(SETS)})."
)
Corrupted = Annotated[Positional[Path], arg(metavar="DATA", help=f"The corrupted images: {FILES}")]
Clean = Annotated[Positional[Path], arg(metavar="DATA", help=f"Clean images: {FILES}")]
Text = Annotated[str, arg(metavar="TEXT")]
MaybeText = Annotated[str | None, arg(metavar="TEXT")]
MaybeInt = Annotated[int | None, arg(metavar="INT")]
MaybePath = Annotated[Path | None, arg(metavar="PATH")]
Options = Annotated[tuple[str, ...], arg(metavar="KEY=VALUE ...")]
AnyPrior = Annotated[
    str,
    arg(
        metavar="TEXT",
        help="A run folder; a folder or the Hub name (owner/name) of an unconditional diffusers "
        "pipeline; a guided-diffusion checkpoint (adm:ffhq256:FILE, adm:imagenet256:FILE); or "
        "in the package: generic (images of any kind), digits, nuclei.",
    ),
]
Seed = Annotated[
    int,
    arg(help="Seed of all random draws, a whole number from 0 to 9223372036854775807."),
    SEED,
]
Batch = Annotated[
    int | None,
    arg(
        metavar="INT",
        help="Batch size, a whole number from 1 to 4096; unset: up to 256 images and a million "
        "pixels. A smaller batch takes less memory; the results agree up to rounding.",
    ),
    Whole(1, 4096),
]
MaybeTile = Annotated[
    int | None,
    arg(
        metavar="INT",
        help="Side in pixels of the tiles for larger images, a whole number from 1 to 65536; "
        "unset: the side of the images that the prior was trained on.",
    ),
    Whole(1, 65536),
]
STEPS = Whole(1, 100_000, optional=True)
SkipBad = Annotated[
    bool,
    arg(help="Leave out, and list, files that cannot be read or differ in size from most."),
]
Ranges = Annotated[
    tuple[tuple[float, float], ...],
    UseAppendAction,
    arg(
        metavar="BLACK WHITE",
        help="Numbers of black and white in the files, such as 0 4095 for a 12-bit camera; "
        "repeated: those of each channel; unset: those of the run, if there is one, or of the "
        "number type (page My images).",
    ),
]
Axes = Annotated[
    str | None,
    arg(
        metavar="TEXT",
        help="Axes of the files in their own order, such as TZCYX: Y and X rows and columns, C "
        "channels (or S), all others number the images, a text of 1 to 16 characters; unset: "
        "those of the run, if there is one, or those that the files name (page My images).",
    ),
    Named(16),
]
Channel = Annotated[
    tuple[str, ...],
    arg(
        metavar="CHANNEL ...",
        help="Channels to read, by number (from 0) or by name; unset: those of the run, if there "
        "is one, or all.",
    ),
]
Repeats = Annotated[
    int,
    arg(
        help="Number of captures of each scene, a whole number from 1 to 1000: so many files, "
        "pages or array images in a row show one scene, which gets one result from all of them."
    ),
    Whole(1, 1000),
]
NanOption = Annotated[
    Literal["refuse", "mask"],
    arg(
        help="What to do with pixels that are not finite (NaN, infinite). refuse: stop, or leave "
        "out the image with --skip-bad; mask: treat them as hidden."
    ),
]
NoiseMaps = Annotated[
    str | None,
    arg(
        metavar="PATH",
        help="Noise maps: a standard deviation for every pixel, in the numbers of DATA, a map for"
        " each image in the same order, or one for all; a folder or a file as for DATA, such as"
        " night[ERR]. variance:, ivar: or weights: before the path name another kind (ivar:maps);"
        " weights come with --noise at their mean. --noise auto scales the maps by one factor (see"
        " the page Noise).",
    ),
]
Dark = Annotated[
    Path | None,
    arg(
        metavar="FILE",
        help="Dark frame: captures without light, whose mean is subtracted from every image. A run"
        " keeps its digest, and refuses another.",
    ),
]
Flat = Annotated[
    Path | None,
    arg(
        metavar="FILE",
        help="Flat field: captures of even light. Images are divided by their mean over them, less"
        " the dark frame, with the mean 1. The noise that is given or estimated is that of the"
        " images as recorded.",
    ),
]
FlatNoise = Annotated[
    Literal["map", "even"],
    arg(
        help="Noise of images that --flat divides. map: that of the images as recorded, over the"
        " sensitivity of each pixel; even: one noise for all pixels of the divided images."
    ),
]
HotPixels = Annotated[
    Literal["off", "auto"],
    arg(
        help="auto: pixels that stand out in all images of the set count as hidden, as NaN do with"
        " --nan mask. A run keeps their positions."
    ),
]
Json = Annotated[
    bool, arg(help="Print one JSON object on stdout; a number that is not finite becomes null.")
]
DATA = ("data", "restored", "reference", "clean")  # fields that may name a set in the package


class Command:
    """Base class of the commands: a dataclass whose fields are the options.

    `check` validates the options, `run` does the work, and `show` prints the result for a person.
    """

    json: bool

    def check(self) -> None:
        """Check the bounds of the options, and replace names of packaged sets by their files.

        Raises:
            InputError: An option is outside of the bounds that it is declared with.
        """
        check_fields(self, {name: f"--{name.replace('_', '-')}" for name in vars(self)})
        for name in DATA:
            path = getattr(self, name, None)
            if path is not None and str(path) in SETS:
                found = packaged(path)
                what = f"the file or folder {Path(path).absolute()}"
                if found is not None:
                    what = "the images in the package"
                    setattr(self, name, found)
                remark(f"{path}: {what}")

    def run(self) -> dict[str, Any]:
        """Do the work and return the results by name; empty: another process has them."""
        raise NotImplementedError

    def show(self, result: dict[str, Any]) -> None:
        """Print the results as lines."""
        print("\n".join(lines(plain(result))))


def job_of(command: Command) -> dict[str, str]:
    """Return what the processes of one job have in common: the command and its options."""
    given = {name: str(value) for name, value in vars(command).items() if name != "json"}
    return {"command": type(command).__name__.lower(), **given}


def pairs(texts: Sequence[str]) -> dict[str, str]:
    """Split the texts "key=value" of --option.

    Raises:
        InputError: A text has another form, or a key is given twice.

    >>> pairs(["steps=5", "preset=paper"])
    {'steps': '5', 'preset': 'paper'}
    """
    found: dict[str, str] = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise InputError(f"--option {text}: write it as key=value")
        if key in found:
            raise InputError(f"--option {text}: {key} is given twice, give it once")
        found[key] = value
    return found


def solver_options(method: str, texts: Sequence[str], steps: int | None) -> dict[str, Any]:
    """Parse the options of a solver, each as the type that it is declared with.

    Args:
        method: Name of the solver, or "auto".
        texts: The texts "key=value" of --option.
        steps: The value of --steps; None: the solver's default.

    Raises:
        InputError: An option is unknown, given twice, of another type or out of its bounds.
    """
    from ..solvers import Auto, configure

    given = pairs(texts)
    options: dict[str, Any] = {} if steps is None else {"steps": steps}
    if "preset" in given:
        options["preset"] = given.pop("preset")
    auto = method == "auto"
    solver: Any = Auto() if auto else configure(method, options)
    for key, text in given.items():
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
    """The type that an option is declared with, without None; str for a Literal or no option."""
    declared = get_type_hints(type(solver)).get(key, str)
    if get_origin(declared) is UnionType:
        declared = next(kind for kind in get_args(declared) if kind is not NoneType)
    return declared if declared in READ else str


READ: dict[type, Callable[[str], Any]] = {
    bool: {"true": True, "false": False}.__getitem__,
    int: Whole(0, 0).read,
    float: Real(0, 0).read,
    str: str,
}
"""Parsers of option values, by type."""
