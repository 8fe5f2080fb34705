"""TIFF stacks, read and written page by page, with what a microscope wrote beside the pixels.

A page is one image: (H, W) grey, or RGB with its three samples together or in three planes. What
says how pages make up channels, slices and times stands in the first page's description (OME-XML,
ImageJ's lines, or another program's text), so a stack of as many pages of the same shape, in the
same order, with the same description, has the same axes: a copy of the tags is all it takes.

Memory holds one page. Needs tifffile: pip install 'unmurk[tiff]'.
"""

import logging
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ...errors import InputError
from ..atomic import Partial, unwritable

__all__ = ["ENDINGS", "Stack", "StackWriter"]

ENDINGS = (".tif", ".tiff")
DESCRIPTION, SOFTWARE, DATE, WIDTHS, HEIGHTS, UNIT = 270, 305, 306, 282, 283, 296
COPIED = (
    *(271, 272, 274, 285, 286, 287, 315, 316, 33432),  # camera, orientation, place, authors
    *(33550, 33922, 34264, 34735, 34736, 34737, 42113),  # GeoTIFF
    *(34675, 50838, 50839, 51123),  # colour profile, ImageJ, Micro-Manager
)
LARGE = 2**32 - 2**25  # bytes of pixels above which offsets of 32 bits may not do
GREY, RGB = 1, 2


class Stack:
    """The pages of a TIFF file, all of one shape and type; a context manager.

    Args:
        file: The file.

    Attributes:
        shape: Height, width and channels (1 or 3) of every page.
        dtype: Name of the pages' number type.

    Raises:
        InputError: tifffile is missing, the file is damaged, or holds what is no such stack.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._tiff = _reading(file, lambda: _tifffile().TiffFile(file, _multifile=False))
        try:
            first = _reading(file, lambda: self._tiff.pages[0])
            self.planes = first.axes == "SYX"
            if first.axes not in ("YX", "YXS", "SYX") or int(first.photometric) not in (GREY, RGB):
                raise InputError(
                    f"{file} has pages of axes {first.axes} in {_word(first.photometric)}: save "
                    "them as grey or RGB"
                )
            shape = (*first.shape[1:], first.shape[0]) if self.planes else (*first.shape, 1)[:3]
            self.shape: tuple[int, int, int] = shape
            self.dtype = str(first.dtype)
            if self.shape[2] not in (1, 3) or np.dtype(first.dtype).kind not in "uif":
                raise InputError(
                    f"{file} has pages of {self.shape[2]} channels of {self.dtype}: save them as "
                    "grey or RGB numbers, without an alpha channel"
                )
            self._whole()
        except BaseException:
            self._tiff.close()
            raise

    def _whole(self) -> None:
        """Raises InputError where pages are missing."""
        # tifffile only logs that a file ends before its last page does
        said: list[logging.LogRecord] = []
        logger = logging.getLogger("tifffile")
        with _listening(logger, said):
            series = _reading(self.file, lambda: self._tiff.series)
            _reading(self.file, lambda: len(self._tiff.pages))
        if said:
            raise InputError(f"cannot read {self.file}: {said[0].getMessage().splitlines()[0]}")
        if sum(len(part.pages) for part in series) != len(self) and len(self) == 1:
            raise InputError(
                f"{self.file} has one page for all its images: save it as OME-TIFF, or as a "
                "TIFF with a page for each"
            )

    def __enter__(self) -> "Stack":
        return self

    def __exit__(self, *_: object) -> None:
        self._tiff.close()

    def __len__(self) -> int:
        return len(self._tiff.pages)

    def read(self, page: int) -> np.ndarray:
        """The pixels of a page, (H, W, C) in the file's numbers."""
        found = _reading(self.file, lambda: self._tiff.pages[page].asarray())
        if self.planes:
            found = np.moveaxis(found, 0, -1)
        found = found if found.ndim == 3 else found[..., None]
        if found.shape != self.shape or str(found.dtype) != self.dtype:
            raise InputError(
                f"the pages of {self.file} differ: the first is {_kind(self.shape, self.dtype)}, "
                f"page {page} is {_kind(found.shape, str(found.dtype))}; save them apart"
            )
        return found

    def limits(self) -> tuple[float, float]:
        """Least and largest number of all pages."""
        low, high = np.inf, -np.inf
        for page in range(len(self)):
            pixels = self.read(page)
            low, high = min(low, float(pixels.min())), max(high, float(pixels.max()))
        return low, high

    # -- what is copied ------------------------------------------------------------------------

    def layout(self) -> dict[str, Any]:
        """Byte order and size of offsets, for `tifffile.TiffWriter`."""
        size = len(self) * int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize
        return {
            "byteorder": self._tiff.byteorder,
            "bigtiff": self._tiff.is_bigtiff or size > LARGE,
        }

    def tags(self, page: int) -> dict[str, Any]:
        """The tags of a page that say something other than how pixels are kept, for `write`."""
        tags = self._page(page).tags
        text = tags.get(DESCRIPTION)
        sides = [tags[code].value if code in tags else None for code in (WIDTHS, HEIGHTS)]
        return {
            "description": self._bytes(text).rstrip(b"\0") if text else None,
            "resolution": tuple(sides) if None not in sides else None,
            "resolutionunit": tags[UNIT].value if UNIT in tags else None,
            "datetime": tags[DATE].value if DATE in tags else None,
            "software": tags[SOFTWARE].value if SOFTWARE in tags else False,
            "extratags": [
                (code, int(tags[code].dtype), tags[code].count, self._bytes(tags[code]), True)
                for code in COPIED
                if code in tags
            ],
        }

    def compressed(self) -> bool:
        """Whether the first page is."""
        return int(self._tiff.pages[0].compression) != 1

    def _page(self, page: int) -> Any:
        """A page with its own tags, of which `pages` keeps those of the first only."""
        found = self._tiff.pages[page]
        return found.aspage() if hasattr(found, "aspage") else found

    def _bytes(self, tag: Any) -> bytes:
        """A tag's value as it stands in the file."""
        handle = self._tiff.filehandle
        handle.seek(tag.valueoffset)
        return handle.read(tag.valuebytecount)


class StackWriter:
    """Writes a TIFF page by page, beside its place; `close` puts it there.

    Args:
        out: The file.
        like: The stack whose tags are copied, if it comes from one.
    """

    def __init__(self, out: Path, like: Stack | None = None) -> None:
        self.out, self.like, self.pages = out, like, 0
        layout = {} if like is None else like.layout()
        writer = _tifffile().TiffWriter
        self._part = Partial(out)
        self._writer = writer(self._part.file, **layout)

    def write(self, pixels: np.ndarray) -> None:
        """The next page, (H, W, C)."""
        grey, like = pixels.shape[-1] == 1, self.like
        planes = like is not None and like.planes
        compressed = like is not None and like.compressed()
        self._write(
            pixels[..., 0] if grey else np.moveaxis(pixels, -1, 0) if planes else pixels,
            photometric="minisblack" if grey else "rgb",
            planarconfig=None if grey else "separate" if planes else "contig",
            compression="zlib" if compressed else None,
            metadata=None,
            **({} if like is None else like.tags(self.pages)),
        )
        self.pages += 1

    def _write(self, *args: Any, **kwargs: Any) -> None:
        try:
            self._writer.write(*args, **kwargs)
        except OSError as error:
            raise unwritable(self.out, error) from error

    def close(self) -> None:
        """The file gets its name."""
        try:
            self._writer.close()
        except OSError as error:
            raise unwritable(self.out, error) from error
        self._part.finish()

    def abandon(self) -> None:
        """Nothing is left behind."""
        with suppress(OSError, ValueError):  # of a full disk: the file goes anyway
            self._writer.close()
        self._part.abandon()


@contextmanager
def _listening(logger: logging.Logger, said: list[logging.LogRecord]) -> Iterator[None]:
    """Errors that are logged go into a list, and nowhere else."""

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            said.append(record)
        return False

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _tifffile() -> ModuleType:
    try:
        import tifffile
    except ImportError as error:
        raise InputError(
            "TIFF stacks need tifffile: pip install 'unmurk[tiff]', or save pictures as PNG"
        ) from error
    return tifffile


def _reading(file: Path, read: Any) -> Any:
    """What `read` returns; what goes wrong in one line."""
    try:
        return read()
    except InputError:
        raise
    except (
        OSError,
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        EOFError,
        RuntimeError,
        struct.error,
        zlib.error,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot read {file}: {reason}") from error


def _kind(shape: tuple[int, ...], dtype: str) -> str:
    return f"{shape[0]}x{shape[1]} {'grey' if shape[2] == 1 else 'RGB'} {dtype}"


def _word(photometric: Any) -> str:
    return str(getattr(photometric, "name", photometric)).lower()
