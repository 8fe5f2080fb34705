"""The pictures of a folder: which files they are, and their images with names and numbers."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError
from .axes import ALL, Selection
from .formats.pictures import (
    Nan,
    Pages,
    bad_pixels,
    check_finite,
    describe,
    has_reader,
    open_pages,
    page_names,
)
from .formats.readers import reader_of
from .formats.registry import member_of, real_path, suffix_of
from .ledger import LOG
from .limits import check_free_memory

__all__ = ["Page", "pictures_in", "read_files", "usual_kind"]

STD = "-std"  # ends the names of standard deviations
LOOK = 2**26  # numbers read between two checks of the free memory


def pictures_in(folder: Path) -> list[Path]:
    """List the pictures of a folder, in the order of their names; hidden files are left out.

    A picture is a file with a suffix of a registered reader, or a DICOM file of any name (see
    `formats.registry`). A selection behind the name of the folder, as in ``night[SCI]``, goes to
    the files whose readers take one. In a folder of results (with a log), the standard deviations
    ``NAME-std`` beside an image ``NAME`` are left out.

    Raises:
        InputError: There is none, or the folder cannot be read.

    >>> Path("night").mkdir()
    >>> for name in ("b.png", "a.tif", "notes.txt"):
    ...     Path("night", name).touch()
    >>> [file.name for file in pictures_in(Path("night"))]
    ['a.tif', 'b.png']
    """
    selection, folder = member_of(folder), real_path(folder)
    try:
        files = sorted(
            file for file in folder.iterdir() if not file.name.startswith(".") and has_reader(file)
        )
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror}") from error
    if (folder / LOG).exists():
        names = {_stem(file) for file in files}
        files = [
            f for f in files if not (_stem(f).endswith(STD) and _stem(f)[: -len(STD)] in names)
        ]
    if not files:
        raise InputError(f"there is no PNG, JPEG, TIFF or BMP picture in the folder {folder}")
    if not selection:
        return files
    readers = [reader_of(file) for file in files]
    named = [reader.selects or reader.member for reader in readers]
    if not any(named):
        raise InputError(f"{folder}[{selection}]: no file in it has anything to select")
    return [
        file.with_name(f"{file.name}[{selection}]") if one else file
        for file, one in zip(files, named, strict=True)
    ]


def _stem(file: Path) -> str:
    """Return the name of a file without the suffixes that name its format."""
    return file.name[: -len(suffix)] if (suffix := suffix_of(file)) else file.stem


@dataclass
class Page:
    """An image that was read: its number and its name, its pixels and which of them are bad, its
    significant bits and its numbers of black and white by the metadata.

    >>> Page(0, "a.png", np.zeros((4, 6, 3), np.uint8)).kind
    '4x6 RGB 8-bit'
    """

    number: int
    name: str
    pixels: np.ndarray
    bits: int = 0
    bad: np.ndarray | None = None
    span: tuple[float, float] | None = None

    @property
    def kind(self) -> str:
        """Size, color and type in words."""
        return describe(self.pixels.shape, self.pixels.dtype.name)


def usual_kind(kinds: Sequence[str]) -> str:
    """Return the most frequent kind; the first of several that are equally frequent.

    >>> usual_kind(["8x8 gray 8-bit", "9x9 gray 8-bit", "9x9 gray 8-bit"])
    '9x9 gray 8-bit'
    """
    return Counter(kinds).most_common(1)[0][0]


def read_files(
    files: list[Path], skip_bad: bool, limit: int | None, nan: Nan, select: Selection = ALL
) -> tuple[list[Page], list[tuple[str, str]]]:
    """Read the images of all files.

    Args:
        files: Pictures.
        skip_bad: Leave out, and list, images that cannot be read.
        limit: Stop after this number of images; None: read all.
        nan: See `formats.pictures.check_finite`.
        select: Their axes, and the channels to read.

    Returns:
        The images, and the name and reason of each that was left out.

    Raises:
        InputError: A file cannot be read (without `skip_bad`), or none can.

    >>> import torch
    >>> from unmurk.io.saving import save_images
    >>> good, bad = save_images(torch.ones(2, 1, 4, 6), "damaged", format="png")
    >>> bad.write_bytes(b"cut short")
    9
    >>> pages, skipped = read_files([good, bad], skip_bad=True, limit=None, nan="refuse")
    >>> [page.name for page in pages], skipped[0][0]
    (['00000.png'], '00001.png')
    """
    good: list[Page] = []
    skipped: list[tuple[str, str]] = []
    number, size, looked = 0, 0, 0
    for file in files:
        if not skip_bad and limit is not None and len(good) >= limit:
            break
        try:
            with open_pages(file, select) as pages:
                one, each = _size(pages)
                if (size + one * len(pages)) - looked > LOOK:
                    looked = size + one * len(pages)
                    check_free_memory(file.parent, each * one * len(pages) + 4 * looked)
                found = _read_all(pages, number, skip_bad, nan, skipped)
                number, size = number + len(pages), size + one * len(pages)
            good += found
        except InputError as error:
            if not skip_bad:
                raise
            skipped.append((file.name, str(error)))
            number += 1
    if not good:
        if len(files) == 1:
            raise InputError(skipped[0][1])
        raise InputError(f"none of the {len(files)} pictures in {files[0].parent} can be read")
    return good, skipped


def _size(pages: Pages) -> tuple[int, int]:
    """Return the numbers of an image, and the bytes of a number during its conversion."""
    return math.prod(pages.shape), 2 * np.dtype(pages.dtype).itemsize


def _read_all(
    pages: Pages, number: int, skip_bad: bool, nan: Nan, skipped: list[tuple[str, str]]
) -> list[Page]:
    """Read the images of one file; images that are not finite are added to `skipped`."""
    found = []
    for place, name in enumerate(page_names(pages.file, len(pages))):
        pixels = pages.read(place)
        where = str(pages.file) if len(pages) == 1 else f"page {place} of {pages.file}"
        try:
            pixels = check_finite(pixels, where, nan)
            bad = bad_pixels(pages, place, where, nan)
            found.append(Page(number + place, name, pixels, pages.bits, bad, pages.span))
        except InputError:
            if not skip_bad:
                raise
            marked = bool(np.isfinite(pixels).all())
            skipped.append((name, "has pixels marked as bad" if marked else "not finite"))
    return found
