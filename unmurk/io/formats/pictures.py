"""Picture files to pixels, for every registered format.

`open_pages` is how everything in unmurk reads a picture file. It returns an object with a length,
a shape, a number type and `read(page)` (see `registry.Pages`). Pixels are turned the way the
camera was held, a palette becomes RGB, an opaque alpha channel is dropped, and nothing is rounded:
what cannot be read exactly is refused. The declared size is checked before anything is decoded.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from ...errors import InputError
from ..axes import ALL, Selection
from ..limits import check_file, check_pixels, reading
from ..scale import finite
from . import hdf5, microscopy, raster, tiff
from .raster import encode_picture
from .registry import ENDINGS, Pages, has_reader, reader_of, split_member, without_suffix

__all__ = [
    "ENDINGS",
    "Nan",
    "Pages",
    "check_finite",
    "describe",
    "encode_picture",
    "holds_images",
    "has_reader",
    "number_type",
    "open_pages",
    "page_names",
    "single",
    "split_member",
    "without_suffix",
]

Nan = Literal["refuse", "mask"]
"""What to do with numbers that are not finite: refuse them, or treat their pixels as hidden."""

OWN = (raster.Picture, tiff.Stack)  # readers that check sizes and shapes themselves
OPTIONAL = (hdf5.Dataset, microscopy.Nd2)  # modules of readers that are registered on import


@contextmanager
def open_pages(file: Path, select: Selection = ALL) -> Iterator[Pages]:
    """Open the images of a picture file.

    Args:
        file: A file with a suffix of a registered reader; the name of an array or image in it may
            follow, as in scan.h5:images.
        select: The axes of the file, and the channels to read.

    Raises:
        InputError: The file is unreadable, too large, partly transparent, or of a kind that is not
            read. `Pages.read` raises it too.
    """
    file, member = split_member(file)
    select = select.of(member) if member else select
    reader = reader_of(file)
    if not (reader.folder and file.is_dir()):
        check_file(file)
    arguments = (file, select) if reader.selects else (file,)
    opened: Callable[[], Pages] = partial(reader.open, *arguments)
    pages: Pages
    if reader.open in OWN:
        pages = opened()
    else:
        with reading(file):
            pages = _Checked(file, opened())
    with pages:
        yield pages if reader.selects or select == ALL else _Chosen(pages, select)


def holds_images(path: Path) -> bool:
    """Whether a path names one file of images, or a folder that is one (OME-Zarr).

    Files that do not exist count by their name.
    """
    file, _ = split_member(path)
    return has_reader(file) and (not file.is_dir() or reader_of(file).folder)


class _Checked(Pages):
    """The pages of a reader from elsewhere: its errors name the file, its sizes are checked."""

    def __init__(self, file: Path, pages: Pages) -> None:
        self.file, self._pages = file, pages
        try:
            self._count = len(pages)
            height, width, channels = (int(side) for side in pages.shape)
            self.shape, self.bits = (height, width, channels), int(pages.bits)
            self.dtype, self.axes = np.dtype(pages.dtype).name, str(pages.axes)
            self.metadata = pages.metadata
            check_pixels(file, *self.shape)
            if np.dtype(self.dtype).kind not in "uif" or self._count < 1:
                raise InputError(
                    f"cannot read {file}: it holds {self._count} images of {self.dtype}"
                )
        except BaseException:
            pages.close()
            raise

    def __len__(self) -> int:
        return self._count

    def read(self, page: int) -> np.ndarray:
        """See `Pages`."""
        with reading(self.file):
            pixels = np.asarray(self._pages.read(page))
        if pixels.shape != self.shape or pixels.dtype.name != self.dtype:
            raise InputError(
                f"cannot read {self.file}: image {page} is {pixels.dtype} {pixels.shape}, "
                f"declared are {self.dtype} {self.shape}"
            )
        return np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("="))

    def close(self) -> None:
        """Close the file."""
        self._pages.close()


class _Chosen(Pages):
    """Some channels of the pages of a reader that reads all of them."""

    def __init__(self, pages: Pages, select: Selection) -> None:
        if select.axes and not select.lenient and select.axes != pages.axes:
            named = f"the axes {pages.axes}" if pages.axes else "axes that its reader knows"
            raise InputError(f"{pages.file} has {named}, which --axes cannot change: leave it out")
        names = list(pages.metadata.get("channels", []))
        self.chosen = select.chosen(pages.file, pages.shape[2], names)
        self.file, self.dtype, self.bits = pages.file, pages.dtype, pages.bits
        self.shape = (*pages.shape[:2], len(self.chosen))
        self.axes, self.metadata, self._pages = pages.axes, dict(pages.metadata), pages
        if names:
            self.metadata["channels"] = [names[c] for c in self.chosen]

    def __len__(self) -> int:
        return len(self._pages)

    def read(self, page: int) -> np.ndarray:
        """See `Pages`."""
        return np.ascontiguousarray(self._pages.read(page)[..., self.chosen])


def single(file: Path) -> bool:
    """Whether files of this format hold exactly one image (and fit a PNG file)."""
    return reader_of(split_member(file)[0]).single


def number_type(file: Path) -> str | None:
    """Name of the number type of a picture, from its header; None: the file has to be opened."""
    file, _ = split_member(file)
    reader = reader_of(file)
    if reader.number_type is None:
        return None
    check_file(file)
    return reader.number_type(file)


def page_names(file: Path, pages: int) -> list[str]:
    """Names of the images of a file: the file's own for one image, else stem-00000.tif etc."""
    if pages == 1:
        return [file.name]
    stem = without_suffix(file.name)
    return [f"{stem}-{page:05d}{file.name[len(stem) :]}" for page in range(pages)]


def check_finite(pixels: np.ndarray, where: str, nan: Nan = "refuse") -> np.ndarray:
    """Return the numbers if all are finite (see `scale.finite`), or if `nan` is "mask".

    Raises:
        InputError: Some are not finite or are beyond float32; `where` names the file and the page.
    """
    if nan == "refuse" and pixels.dtype.kind == "f" and not finite(pixels).all():
        what = "not finite" if not np.isfinite(pixels).all() else "beyond float32 (3.4e38)"
        raise InputError(
            f"{where} has values that are {what}: correct it, leave it out with --skip-bad, or "
            "treat such pixels as hidden with --nan mask"
        )
    return pixels


def describe(shape: tuple[int, ...], dtype: str) -> str:
    """Describe a picture (H, W, C) in words: its size, color and type."""
    height, width, channels = shape
    color = {1: "gray", 3: "RGB"}.get(channels, f"{channels}-channel")
    kind = np.dtype(dtype)
    word = {"f": " float", "i": " signed"}.get(kind.kind, "")
    return f"{height}x{width} {color} {8 * kind.itemsize}-bit{word}"
