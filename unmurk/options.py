"""What the options of several commands share, and what every command has."""

from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from .output import lines, plain

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
]

FILES = "a folder of PNG or JPEG pictures, or a .npy, .npz or idx file."
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
