"""The pictures of a folder or of one file, read with their names and numbers."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError
from .formats.pictures import (
    ENDINGS,
    Nan,
    Pages,
    check_finite,
    describe,
    open_pages,
    page_names,
)
from .limits import check_memory

__all__ = ["Page", "pictures_in", "read_files", "usual_kind"]

LOOK = 2**26  # numbers read between two looks at the free memory


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder, in the order of their names. Raises InputError for none."""
    try:
        files = sorted(
            f
            for f in folder.iterdir()
            if f.suffix.lower() in ENDINGS and not f.name.startswith(".")
        )
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror}") from error
    if not files:
        raise InputError(f"there is no PNG, JPEG, TIFF or BMP picture in the folder {folder}")
    return files


@dataclass
class Page:
    """An image that was read, its number and name, and the bits that metadata say it has."""

    number: int
    name: str
    pixels: np.ndarray
    bits: int

    @property
    def kind(self) -> str:
        return describe(self.pixels.shape, self.pixels.dtype.name)


def usual_kind(kinds: Sequence[str]) -> str:
    """What most are; of several that are as frequent, the first."""
    return Counter(kinds).most_common(1)[0][0]


def read_files(
    files: list[Path], skip_bad: bool, limit: int | None, nan: Nan
) -> tuple[list[Page], list[tuple[str, str]]]:
    """The images of all files; name and reason of each that was left out."""
    good: list[Page] = []
    skipped: list[tuple[str, str]] = []
    number, size, looked = 0, 0, 0
    for file in files:
        if not skip_bad and limit is not None and len(good) >= limit:
            break
        try:
            with open_pages(file) as pages:
                one, each = _size(pages)
                if (size + one * len(pages)) - looked > LOOK:
                    looked = size + one * len(pages)
                    check_memory(file.parent, each * one * len(pages) + 4 * looked)
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
    """Numbers of an image, and bytes of a number while it is made a float."""
    return math.prod(pages.shape), 2 * np.dtype(pages.dtype).itemsize


def _read_all(
    pages: Pages, number: int, skip_bad: bool, nan: Nan, skipped: list[tuple[str, str]]
) -> list[Page]:
    """The images of one file; those that are not finite are put into `skipped`."""
    found = []
    for place, name in enumerate(page_names(pages.file, len(pages))):
        pixels = pages.read(place)
        where = str(pages.file) if len(pages) == 1 else f"page {place} of {pages.file}"
        try:
            found.append(Page(number + place, name, check_finite(pixels, where, nan), pages.bits))
        except InputError:
            if not skip_bad:
                raise
            skipped.append((name, "not finite"))
    return found
