"""What a copy of a TIFF file needs of it: the order of its bytes, the tags of its pages.

`tiff_tags` adapts the tags to images of another size or number type.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from ...errors import InputError, reason
from ..limits import reading
from .registry import Pages

__all__ = ["TaggedPages", "copying"]

DESCRIPTION, SOFTWARE, DATE, WIDTHS, HEIGHTS, UNIT = 270, 305, 306, 282, 283, 296
COPIED = (
    *(271, 272, 285, 286, 287, 315, 316, 33432),  # camera, place, authors
    *(33550, 33922, 34264, 34735, 34736, 34737, 42113),  # GeoTIFF
    *(34675, 50838, 50839, 51123),  # color profile, ImageJ, Micro-Manager
)
LARGE = 2**32 - 2**25  # bytes of pixels above which offsets of 32 bits may not do
IMAGEJ = 50839
GRAY = 1
TILE = 16  # sides of tiles are multiples of it
LARGE_TILE = 1024**2  # pixels of a tile that may be larger than its page
LOSSLESS = {5, 8, 32946, 32773, 34925, 50000}  # LZW, Deflate, PackBits, LZMA, Zstandard
ZLIB = 8


class TaggedPages(Pages):
    """Base class of TIFF stacks: what a writer copies from them.

    Attributes:
        kind: The photometric interpretation of the pixels.
        planes: Whether channels are planes of a page.
        turn: The orientation of the pages, from 1 to 8.

    >>> from unmurk.io.formats.tiff import Stack
    >>> tifffile.imwrite("tagged.tif", np.zeros((3, 4), np.uint8), description="cells")
    >>> with Stack(Path("tagged.tif")) as stack:
    ...     stack.tags(0)["description"], stack.layout()["bigtiff"]
    (b'cells', False)
    """

    kind: int
    planes: bool
    turn: int
    _tiff: tifffile.TiffFile
    _series: list[Any]

    def places(self, image: int) -> list[int]:
        """Return the page numbers of an image in the written file, in the order of channels."""
        raise NotImplementedError

    def inverted(self, pixels: np.ndarray) -> np.ndarray:
        """Exchange black and white; the map is its own inverse."""
        white = 2**self.bits - 1 if self.bits else np.iinfo(pixels.dtype).max
        return np.asarray(pixels.dtype.type(white) - pixels)

    def layout(self) -> dict[str, Any]:
        """Return the byte order and the size of offsets, for `tifffile.TiffWriter`."""
        size = len(self) * int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize
        return {
            "byteorder": self._tiff.byteorder,
            "bigtiff": self._tiff.is_bigtiff or size > LARGE,
        }

    def tags(self, page: int) -> dict[str, Any]:
        """Return the tags of a page that do not describe how its pixels are stored."""
        with reading(self.file):
            return self._tags(page)

    def _tags(self, page: int) -> dict[str, Any]:
        known = page < len(self._tiff.pages)
        tags = self._tagged(page if known else 0).tags
        text = tags.get(DESCRIPTION)
        unit = tags[UNIT].value if UNIT in tags else None
        sides = [tags[code].value if code in tags else None for code in (WIDTHS, HEIGHTS)]
        return {
            "description": self._bytes(text).rstrip(b"\0") if text and known else None,
            "resolution": tuple(sides[:: -1 if self.turn > 4 else 1]) if all(sides) else None,
            "resolutionunit": unit if unit in (1, 2, 3) else None,
            "datetime": tags[DATE].value if DATE in tags else None,
            "software": self._bytes(tags[SOFTWARE]).rstrip(b"\0") if SOFTWARE in tags else False,
            "extratags": [
                (code, int(tags[code].dtype), tags[code].count, self._bytes(tags[code]), True)
                for code in COPIED
                if code in tags
            ],
        }

    def check_copy(self, image: int) -> None:
        """Check, on a page of one pixel, that the tags of an image can be written again.

        Raises:
            InputError: The tags are damaged.
        """
        self.compression(), self.predicted()
        for page in self.places(image):
            with copying(self.file), tifffile.TiffWriter(io.BytesIO(), **self.layout()) as writer:
                pixel = np.zeros((1, 1), self.dtype)
                writer.write(pixel, photometric=GRAY, metadata=None, **self.tags(page))

    def compression(self) -> int | None:
        """Return the code of the first page's compression; Deflate for one that loses numbers."""
        with reading(self.file):
            found = int(self._tiff.pages[0].compression)
        return None if found == 1 else found if found in LOSSLESS else ZLIB

    def predicted(self) -> bool:
        """Whether the first page stores differences of neighboring pixels."""
        with reading(self.file):
            return int(self._tiff.pages[0].predictor or 1) in (2, 3)

    def contiguous(self) -> bool:
        """Whether readers expect the pages to be contiguous, as in tifffile's own files."""
        plain = self.compression() is None and self.tile() is None and not self.levels()
        return self._series[0].kind == "shaped" and plain

    def tile(self) -> tuple[int, int] | None:
        """Return the height and width of the tiles that pages are stored in; None for strips."""
        page = self._series[0].keyframe
        sides = (int(page.tilelength), int(page.tilewidth)) if page.is_tiled else (0, 0)
        most = max(LARGE_TILE, int(page.imagelength) * int(page.imagewidth))
        if not 0 < sides[0] * sides[1] <= most or any(side % TILE for side in sides):
            return None
        return sides[::-1] if self.turn > 4 else sides

    def levels(self) -> list[tuple[Fraction, Fraction]]:
        """Return height and width of the smaller copies of a page, in units of its own.

        They are those of a pyramid: directories (SubIFDs) of each page, for viewers. Each has at
        most half of the pixels of the one before, so that a file cannot ask for more than two
        pages; directories that have more are no pyramid.
        """
        first, *smaller = (level.keyframe for level in self._series[0].levels)
        if len(first.subifds or ()) != len(smaller):
            return []
        found = [
            (
                Fraction(int(one.imagelength), int(first.imagelength)),
                Fraction(int(one.imagewidth), int(first.imagewidth)),
            )
            for one in smaller
        ]
        areas = [Fraction(1), *(down * across for down, across in found)]
        halved = all(0 < 2 * b <= a for a, b in zip(areas, areas[1:], strict=False))
        if not halved or any(max(pair) > 1 for pair in found):
            return []
        return [pair[::-1] for pair in found] if self.turn > 4 else found

    def imagej_tags(self) -> list[Any]:
        """Return ImageJ's tags without the limits of its display and its tables of colors.

        They belong to the numbers of the file, and not to others that are written like it.
        """
        about = self._tagged(0).tags.get(IMAGEJ)
        if about is None or not isinstance(about.value, dict):
            return []
        kept = {k: v for k, v in about.value.items() if k not in ("Ranges", "LUTs")}
        return [*tifffile.imagej_metadata_tag(kept, self._tiff.byteorder)] if kept else []

    def _tagged(self, page: int) -> Any:
        """Return a page with its own tags (`pages` keeps only the tags of the first)."""
        found = self._tiff.pages[page]
        return found.aspage() if hasattr(found, "aspage") else found

    def _bytes(self, tag: Any) -> bytes:
        """Return the bytes of a tag's value in the file."""
        handle = self._tiff.filehandle
        handle.seek(tag.valueoffset)
        return handle.read(tag.valuebytecount)


@contextmanager
def copying(file: Path) -> Iterator[None]:
    """Turn every error about the tags of a file into one line that names the file.

    >>> with copying(Path("a.tif")):
    ...     raise ValueError("bad tag")
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: cannot copy the tags of a.tif: bad tag: ...
    """
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:
        raise InputError(
            f"cannot copy the tags of {file}: {reason(error)}: give an --out that ends in .npy"
        ) from error
