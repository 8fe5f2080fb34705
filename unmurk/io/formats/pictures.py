"""Picture files to pixels, for every registered format.

`open_pages` is how everything in unmurk reads a picture file. It returns an object with a length,
a shape, a number type and `read(page)` (see `registry.Pages`). Pixels are turned the way the
camera was held, a palette becomes RGB, an opaque alpha channel is dropped, and nothing is rounded:
what cannot be read exactly is refused. The declared size is checked before anything is decoded.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...errors import InputError, size_text
from ..axes import ALL, Selection, by_scene
from ..limits import check_file, check_pixels, reading
from ..scale import finite
from . import dicom, fits, hdf5_writer, microscopy, nifti, raster, tiff
from .raster import encode_picture
from .readers import holds_images, reader_of
from .registry import (
    ENDINGS,
    Pages,
    has_reader,
    real_path,
    split_member,
    suffix_of,
    without_suffix,
)

__all__ = [
    "ENDINGS",
    "Nan",
    "Pages",
    "are_finite",
    "bad_pixels",
    "check_finite",
    "declared",
    "describe",
    "encode_picture",
    "has_number_type",
    "has_reader",
    "holds_images",
    "number_type",
    "open_pages",
    "page_names",
    "single",
    "split_member",
    "suffix_of",
    "without_suffix",
]

Nan = Literal["refuse", "mask"]
"""What to do with numbers that are not finite: refuse them, or treat their pixels as hidden."""

OWN = (raster.Picture, tiff.Stack)  # readers that check sizes and shapes themselves
FOREIGN = (fits.Fits, nifti.Nifti, dicom.Dicom)  # readers whose libraries are extras
OPTIONAL = (hdf5_writer, microscopy)  # imported because they register readers


@contextmanager
def open_pages(file: Path, select: Selection = ALL) -> Iterator[Pages]:
    """Open the images of a picture file.

    Args:
        file: A file with a suffix of a registered reader; the name of an array or image in it may
            follow, as in scan.h5:images.
        select: The axes of the file, the channels to read, and how many images show one scene.

    Raises:
        InputError: The file is unreadable, too large, partly transparent, or of a kind that is not
            read. `Pages.read` raises it too.

    >>> import tifffile
    >>> tifffile.imwrite("a.tif", np.zeros((2, 6, 8), np.uint16), photometric="minisblack")
    >>> with open_pages(Path("a.tif")) as pages:
    ...     len(pages), pages.shape, pages.dtype, pages.read(1).shape
    (2, (6, 8, 1), 'uint16', (6, 8, 1))
    """
    real, member = split_member(file)
    reader = reader_of(real)
    if member and not (reader.selects or reader.member):
        raise InputError(f"{file}: {reader.name} files have no parts with names")
    select = select.of(member) if member else select
    if not (reader.folder and real.is_dir()):
        check_file(real)
    more = (select,) if reader.selects else (select.member,) if reader.member else ()
    opened: Callable[[], Pages] = partial(reader.open, real, *more)
    pages: Pages
    if reader.open in OWN:
        pages = opened()
    else:
        with reading(real):
            pages = _Checked(real, opened())
    with pages:
        if not reader.selects and replace(select, repeats=1) != ALL:
            pages = _Chosen(pages, select)
        order = None if select.repeats == 1 else _scene_order(pages, select.repeats)
        yield pages if order is None else _Reordered(pages, order)


def _scene_order(pages: Pages, repeats: int) -> np.ndarray | None:
    """Return the images of a file in the order of their scenes; None where it is that order."""
    letters = "".join(a for a in pages.axes if a not in "YXCS").rjust(len(pages.lead), "P")
    if not pages.lead or len(letters) != len(pages.lead):
        return None
    numbers = np.arange(len(pages)).reshape(pages.lead)
    found = by_scene(pages.file, numbers, letters, repeats)
    return None if found is numbers else found.ravel()


class _Reordered(Pages):
    """The pages of a file in another order."""

    def __init__(self, pages: Pages, order: np.ndarray) -> None:
        self._pages, self._order = pages, [int(number) for number in order]
        self.file, self.shape, self.dtype = pages.file, pages.shape, pages.dtype
        self.bits, self.axes, self.span = pages.bits, pages.axes, pages.span
        self.masked = pages.masked
        self.lead, self.note, self.metadata = pages.lead, pages.note, pages.metadata

    def __len__(self) -> int:
        return len(self._order)

    @property
    def stored_dtype(self) -> np.dtype | str:
        """See `Pages`."""
        return self._pages.stored_dtype

    def read(self, page: int) -> np.ndarray:
        """See `Pages`."""
        return self._pages.read(self._order[page])

    def offsets(self, page: int) -> tuple[int, ...]:
        """See `Pages`."""
        return self._pages.offsets(self._order[page])

    def bad(self, page: int) -> np.ndarray | None:
        """See `Pages`."""
        return self._pages.bad(self._order[page])


class _Checked(Pages):
    """The pages of a reader from elsewhere: its errors name the file, its sizes are checked."""

    def __init__(self, file: Path, pages: Pages) -> None:
        self.file, self._pages = file, pages
        try:
            self._count = len(pages)
            height, width, channels = (int(side) for side in pages.shape)
            self.shape, self.bits = (height, width, channels), int(pages.bits)
            self.dtype, self.axes = np.dtype(pages.dtype).name, str(pages.axes)
            self.lead = tuple(int(length) for length in pages.lead)
            self.note = str(pages.note)
            self.masked = bool(pages.masked)
            if pages.span is not None:
                black, white = map(float, pages.span)
                self.span = (black, white)
            check_pixels(file, *self.shape)
            if np.dtype(self.dtype).kind not in "uif" or self._count < 1:
                raise InputError(
                    f"cannot read {file}: it holds {self._count} images of {self.dtype}"
                )
        except BaseException:
            pages.close()
            raise

    @property
    def metadata(self) -> Mapping[str, Any]:  # type: ignore[override]
        """See `Pages`."""
        with reading(self.file):
            return self._pages.metadata

    def __len__(self) -> int:
        return self._count

    def bad(self, page: int) -> np.ndarray | None:
        """See `Pages`."""
        with reading(self.file):
            found = self._pages.bad(page)
        if found is not None and found.shape != self.shape[:2]:
            raise InputError(f"cannot read {self.file}: its mask has the shape {found.shape}")
        return found

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


def declared(file: Path, select: Selection = ALL) -> tuple[int, int, int, int, int]:
    """Return height, width, channels, bytes of a number, and images of a file, by its header.

    Raises:
        InputError: It cannot be read.

    >>> import tifffile
    >>> tifffile.imwrite("a.tif", np.zeros((2, 6, 8), np.uint16), photometric="minisblack")
    >>> declared(Path("a.tif"))
    (6, 8, 1, 2, 2)
    """
    if reader_of(file).open is raster.Picture:
        check_file(file)
        return raster.declared(file)
    with open_pages(file, select) as pages:
        return (*pages.shape, np.dtype(pages.dtype).itemsize, len(pages))


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
        self.span, self.masked, self.lead = pages.span, pages.masked, pages.lead
        self.note = pages.note
        if names:
            self.metadata["channels"] = [names[c] for c in self.chosen]

    def __len__(self) -> int:
        return len(self._pages)

    def read(self, page: int) -> np.ndarray:
        """See `Pages`."""
        return np.ascontiguousarray(self._pages.read(page)[..., self.chosen])

    def bad(self, page: int) -> np.ndarray | None:
        """See `Pages`."""
        return self._pages.bad(page)


def single(file: Path) -> bool:
    """Whether files of this format hold exactly one image (and fit a PNG file).

    >>> single(Path("a.png")), single(Path("a.tif"))
    (True, False)
    """
    return reader_of(split_member(file)[0]).single


def has_number_type(file: Path) -> bool:
    """Whether the header of a picture names its number type, so that it need not be opened.

    >>> has_number_type(Path("a.png")), has_number_type(Path("a.tif"))
    (True, False)
    """
    return reader_of(split_member(file)[0]).number_type is not None


def number_type(file: Path) -> str:
    """Name of the number type of a picture, from its header.

    Raises:
        InputError: The file is not readable, or its header alone does not say: see
            `has_number_type`.

    >>> Path("gray.png").write_bytes(encode_picture(np.zeros((4, 6, 1), np.uint16))) > 0
    True
    >>> number_type(Path("gray.png"))
    'uint16'
    """
    file, _ = split_member(file)
    reader = reader_of(file)
    if reader.number_type is None:
        raise InputError(f"{file} has to be opened: the header of {reader.name} names no type")
    check_file(real_path(file))
    return reader.number_type(real_path(file))


def page_names(file: Path, pages: int) -> list[str]:
    """Names of the images of a file: the file's own for one image, else stem-00000.tif etc.

    >>> page_names(Path("a.ome.tif"), 2), page_names(Path("a.png"), 1)
    (['a.ome-00000.tif', 'a.ome-00001.tif'], ['a.png'])
    """
    if pages == 1:
        return [file.name]
    stem = without_suffix(file.name)
    return [f"{stem}-{page:05d}{file.name[len(stem) :]}" for page in range(pages)]


def bad_pixels(pages: Pages, page: int, where: str, nan: Nan) -> np.ndarray | None:
    """Return which pixels of an image its file marks as bad, (H, W) bool; None: none.

    Raises:
        InputError: There are bad pixels, and `nan` is "refuse".

    >>> class Marked(Pages):
    ...     masked = True
    ...     def bad(self, page):
    ...         return np.array([[False, True]])
    >>> bad_pixels(Marked(), 0, "a.fits", "mask").tolist()
    [[False, True]]
    """
    found = pages.bad(page) if pages.masked else None
    if found is None or not found.any():
        return None
    if found.all():
        raise InputError(f"{where} marks all pixels as bad: leave it out with --skip-bad")
    if nan == "refuse":
        raise InputError(
            f"{where} marks {int(found.sum())} pixels as bad: treat them as hidden with "
            "--nan mask, or leave the image out with --skip-bad"
        )
    return found


def are_finite(images: np.ndarray, nan: Nan) -> np.ndarray:
    """Return which images (N, ...) have the numbers that `check_finite` wants, (N,) bool.

    >>> are_finite(np.array([[0.0, np.nan], [np.nan, np.nan]]), "mask").tolist()
    [True, False]
    """
    if images.dtype.kind != "f":
        return np.ones(len(images), bool)
    enough = np.any if nan == "mask" else np.all
    return np.array([bool(enough(finite(image))) for image in images], bool)


def check_finite(pixels: np.ndarray, where: str, nan: Nan = "refuse") -> np.ndarray:
    """Return the numbers if all are finite (see `scale.finite`), or if `nan` is "mask".

    Raises:
        InputError: Some are not finite or are beyond float32, or with "mask" all of them; `where`
            names the file and the page.

    >>> check_finite(np.array([0.0, np.nan]), "a.tif", "mask")
    array([ 0., nan])
    """
    if nan == "mask" and pixels.dtype.kind == "f" and pixels.size and not finite(pixels).any():
        raise InputError(f"{where} has no finite value: leave it out with --skip-bad")
    if nan == "refuse" and pixels.dtype.kind == "f" and not finite(pixels).all():
        what = "not finite" if not np.isfinite(pixels).all() else "beyond float32 (3.4e38)"
        raise InputError(
            f"{where} has values that are {what}: correct it, leave it out with --skip-bad, or "
            "treat such pixels as hidden with --nan mask"
        )
    return pixels


def describe(shape: tuple[int, ...], dtype: str) -> str:
    """Describe a picture (H, W, C) in words: its size, color and type.

    >>> describe((480, 640, 3), "uint8")
    '480x640 RGB 8-bit'
    """
    height, width, channels = shape
    color = {1: "gray", 3: "RGB"}.get(channels, f"{channels}-channel")
    kind = np.dtype(dtype)
    word = {"f": " float", "i": " signed"}.get(kind.kind, "")
    return f"{size_text((height, width))} {color} {8 * kind.itemsize}-bit{word}"
