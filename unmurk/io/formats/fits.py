"""FITS images, read and written with astropy (extra `astro`).

Format: IAU FITS Working Group, "Definition of the Flexible Image Transport System (FITS)",
version 4.0.

The selection ``scan.fits[SCI,2]`` names an extension (EXTNAME, EXTVER), ``scan.fits[1]`` gives its
number. Without one, the extension SCI is read, or else the first image of the file. The axes 1 and
2 are the columns and rows of an image; all further axes number the images. Rows keep their order.

``scan.fits[SCI,dq=DQ,bits=3]`` marks pixels as bad where the extension DQ, bit by bit "and" 3, is
not 0; without `bits`, where it is not 0. The value BLANK marks bad pixels too.

BSCALE and BZERO give the physical numbers. BZERO alone, as it stands for unsigned integers, keeps
them integers; any other scaling gives floats, and a result is written with the same scaling.

The chain of headers is walked before astropy sees it: every declared size is compared with the
limits and, without compression, with the length of the file.
"""

import io
import math
import re
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from ... import __version__
from ...errors import InputError
from ..atomic import unwritable
from ..limits import check_free_memory, check_numbers, check_pixels, reading
from .fits_header import (
    BLOCK,
    TYPES,
    Hdu,
    HduSelection,
    astropy_header,
    find,
    read_bytes,
    text_of,
    tile_sides,
    walk,
)
from .optional import library
from .registry import FITS, Pages, member_of, real_path, register
from .scaled import HeaderWriter, open_stream, physical, stored

__all__ = ["Fits", "FitsWriter"]

STALE = ("CHECKSUM", "DATASUM", "BLANK", "DATAMIN", "DATAMAX")  # of the source's own numbers
LINEAR = re.compile(r"(CRPIX|CDELT|CD|PC)(\d+)(?:_(\d+))?([A-Z]?)")
DISTORTION = re.compile(r"(?:A|B|AP|BP)_(\d+)_(\d+)")


class _Image:
    """The image of one unit, read plane by plane, in stored and physical numbers.

    astropy reads the header and decompresses tiles. It gets the bytes of this unit alone, so no
    other part of a damaged file can lead it astray.
    """

    def __init__(self, file: Path, stream: IO[bytes], unit: Hdu) -> None:
        self.file, self.stream, self.unit, self.shape = file, stream, unit, unit.shape
        check_pixels(file, *self.shape[-2:])
        if unit.packed:
            check_numbers(file, math.prod(tile_sides(unit.cards, self.shape)), 8)
        self._open = ExitStack()
        self._tiles: Any = None
        header = self.header = self._header()
        bits = int(unit.cards.get("ZBITPIX" if unit.packed else "BITPIX", "0"))
        self.stored = TYPES[bits]
        self.scale, self.zero = (float(header.get(n, v)) for n, v in (("BSCALE", 1), ("BZERO", 0)))
        if not (math.isfinite(self.scale) and math.isfinite(self.zero)) or self.scale == 0:
            raise InputError(
                f"cannot read {file}: its BSCALE is {self.scale:g}, its BZERO {self.zero:g}"
            )
        kind = np.dtype(self.stored)
        shift = 2.0 ** (8 * kind.itemsize - 1) if kind.kind in "iu" else 0.0
        self.shift = int(shift) if self.scale == 1 and abs(self.zero) == shift > 0 else 0
        self.scaled = not self.shift and (self.scale, self.zero) != (1.0, 0.0)
        if self.shift:
            self.dtype = f"uint{8 * kind.itemsize}" if kind.kind == "i" else "int8"
        elif self.scaled:
            self.dtype = "float64" if kind.itemsize > 2 and self.stored != "float32" else "float32"
        else:
            self.dtype = self.stored
        blank = header.get("BLANK") if kind.kind in "iu" else None
        self.blank = blank if isinstance(blank, int) else None

    def __len__(self) -> int:
        return math.prod(self.shape[:-2])

    def plane(self, page: int) -> np.ndarray:
        """Return the stored numbers of a plane, (H, W)."""
        if self._tiles is not None:
            place = np.unravel_index(page, self.shape[:-2]) if len(self.shape) > 2 else ()
            found = np.asarray(self._tiles.section[(*map(int, place), slice(None), slice(None))])
            return found.astype(self.stored)
        kind = np.dtype(self.stored).newbyteorder(">")
        size = math.prod(self.shape[-2:]) * kind.itemsize
        data = read_bytes(self.file, self.stream, self.unit.data + page * size, size)
        return np.frombuffer(data, kind).reshape(self.shape[-2:]).astype(self.stored)

    def _header(self) -> Any:
        from astropy.io import fits

        unit = self.unit
        if not unit.packed:
            return astropy_header(self.file, self.stream, unit)
        check_free_memory(self.file, unit.end - unit.start)
        data = read_bytes(self.file, self.stream, unit.start, unit.end - unit.start)
        first = fits.PrimaryHDU().header.tostring().encode("ascii")
        whole_file = io.BytesIO(first + data + bytes(-len(data) % BLOCK))
        opened = fits.open(whole_file, memmap=False, do_not_scale_image_data=True)
        self._tiles = self._open.enter_context(opened)[1]
        return self._tiles.header

    def close(self) -> None:
        """Close what decompresses tiles."""
        self._open.close()

    def physical(self, values: np.ndarray) -> np.ndarray:
        """Return the physical numbers of stored ones."""
        if self.shift:  # adding half of the range is the same as flipping the highest bit
            kind = np.dtype(self.dtype)
            flip = kind.type(-(2**7)) if kind.kind == "i" else kind.type(self.shift)
            return values.view(kind) ^ flip
        if self.scaled:
            return physical(values, self.scale, self.zero, self.dtype)
        return values

    def back(self, values: np.ndarray) -> np.ndarray:
        """Return the stored numbers of physical ones, rounded and clipped for integers."""
        if self.shift:
            kind = np.dtype(self.stored)
            flip = kind.type(-self.shift) if kind.kind == "i" else kind.type(2**7)
            return values.astype(self.dtype).view(kind) ^ flip
        if self.scaled:
            return stored(values, self.scale, self.zero, np.dtype(self.stored))
        return values.astype(self.stored)


class Fits(Pages):
    """The images of one extension of a FITS file; `selection`: see the module.

    Args:
        file: The file.
        selection: What is written in brackets behind its name.

    Raises:
        InputError: The file is damaged or too large, has no such extension, or astropy is missing.

    >>> from astropy.io import fits
    >>> fits.PrimaryHDU(np.arange(24, dtype=np.uint16).reshape(2, 3, 4)).writeto("cube.fits")
    >>> scan = Fits(Path("cube.fits"))
    >>> len(scan), scan.shape, scan.dtype, int(scan.read(1).max())
    (2, (3, 4, 1), 'uint16', 23)
    >>> scan.close()
    """

    def __init__(self, file: Path, selection: str = "") -> None:
        self.file, chosen = file, HduSelection.parse(file, selection)
        self._open = ExitStack()
        try:
            with reading(file):
                self._start(file, chosen)
        except BaseException:
            self.close()
            raise

    def _start(self, file: Path, chosen: HduSelection) -> None:
        library(file, "astropy.io.fits", "astro")
        self._stream, length = open_stream(file, self._open)
        self.units = walk(file, self._stream, length)
        self.number = find(file, self.units, chosen.name, chosen.version)
        self.image = self._image(self.number)
        height, width = self.image.shape[-2:]
        self.shape = (height, width, 1)
        self.dtype = self.image.dtype
        self.axes = "".join("ZNIQ"[min(n, 3)] for n in range(len(self.image.shape) - 3, -1, -1))
        self.axes += "YX"
        self.lead = self.image.shape[:-2]
        self._mask: _Image | None = None
        self._bits = chosen.bits
        if chosen.dq:
            self._mask = self._flags(file, chosen)
        self.masked = self._mask is not None or self.image.blank is not None

    def _image(self, number: int) -> _Image:
        found = _Image(self.file, self._stream, self.units[number])
        self._open.callback(found.close)
        return found

    def primary(self) -> Any:
        """Return the primary header."""
        return astropy_header(self.file, self._stream, self.units[0])

    def _flags(self, file: Path, chosen: HduSelection) -> _Image:
        """Return the plane of flags of the image: by name, of the same version, or by number."""
        version = self.units[self.number].version if not chosen.dq.isdecimal() else None
        found = self._image(find(file, self.units, chosen.dq.upper(), version))
        if np.dtype(found.dtype).kind not in "iu" or found.shape[-2:] != self.image.shape[-2:]:
            raise InputError(
                f"{file}: [{chosen.dq}] holds {found.dtype} {found.shape}, which are no flags of "
                f"images {self.image.shape}"
            )
        if len(found) not in (1, len(self.image)):
            raise InputError(
                f"{file}: [{chosen.dq}] holds {len(found)} planes of flags for "
                f"{len(self.image)} images"
            )
        return found

    @cached_property
    def metadata(self) -> dict[str, Any]:  # type: ignore[override]
        """The header as text, the unit of the numbers, and the extension."""
        header = self.image.header
        with reading(self.file):
            return {
                "source": header.tostring(sep="\n"),
                "units": str(header.get("BUNIT", "")),
                "extension": self.units[self.number].name or str(self.number),
            }

    def __len__(self) -> int:
        return len(self.image)

    def read(self, page: int) -> np.ndarray:
        """Return the physical numbers of an image, (H, W, 1)."""
        return self.image.physical(self.image.plane(page))[..., None]

    def bad(self, page: int) -> np.ndarray | None:
        """See `Pages`."""
        if not self.masked:
            return None
        found = np.zeros(self.shape[:2], bool)
        if self.image.blank is not None:
            found |= self.image.plane(page) == self.image.blank
        if self._mask is not None:
            flags = self._mask.physical(self._mask.plane(page if len(self._mask) > 1 else 0))
            found |= (flags if self._bits is None else flags & flags.dtype.type(self._bits)) != 0
        return found

    def close(self) -> None:
        """Close the file."""
        self._open.close()


class FitsWriter(HeaderWriter):
    """Write images into a FITS file with the header of the file that they came from.

    The file holds the image in its number type and, if it was in an extension, the primary header
    before it. Other extensions are left out, because errors and flags of the source do not hold
    for the result. A line HISTORY is added. Checksums and the extreme values of the source are
    removed. If the images have another size, or stand for several images of the source, the world
    coordinates are scaled: WCS in the linear forms CDELT, CD and PC, and distortions of the SIP
    convention. The place of a scene is the center of those of its captures.

    Args:
        out: The file. The suffix .gz compresses all of it, .fz the image (without loss).
        source: The file that the images came from.
        history: A line that says how they were made.
        floats: Whether the numbers are written as float32.
        repeats: Number of captures of each scene; see `registry.Writer`.

    >>> from astropy.io import fits
    >>> header = fits.Header({"TELESCOP": "Hale"})
    >>> fits.PrimaryHDU(np.zeros((3, 4), np.float32), header).writeto("raw.fits")
    >>> writer = FitsWriter(Path("result.fits"), Path("raw.fits"), history="restored")
    >>> writer.write(np.ones((3, 4, 1), np.float32))
    >>> writer.close()
    >>> header = fits.getheader("result.fits")
    >>> header["TELESCOP"], str(header["HISTORY"]), float(fits.getdata("result.fits").mean())
    ('Hale', 'restored', 1.0)
    """

    def __init__(
        self,
        out: Path,
        source: Path,
        history: str = "",
        floats: bool = False,
        repeats: int = 1,
    ) -> None:
        self._like = Fits(real_path(source), member_of(source))
        self._planes: list[np.ndarray] = []
        self._written = 0
        super().__init__(out, self._like, history, floats, repeats)

    def write(self, pixels: np.ndarray) -> None:
        """Write the next image, (H, W, C)."""
        image, packed = self._like.image, self.out.name.lower().endswith(".fz")
        if self.floats:
            plane = pixels.astype(np.float32)
        elif packed and image.shift:  # astropy stores unsigned integers itself
            plane = pixels.astype(image.dtype)
        else:
            plane = image.back(pixels)
        plane = np.moveaxis(plane, -1, 0)
        try:
            if packed:
                if not self._planes:
                    check_free_memory(self.out, 2 * plane.nbytes * len(image))
                self._planes.append(plane)
            else:
                self._write_plane(plane)
        except OSError as error:
            raise unwritable(self.out, error) from error

    def _write_plane(self, plane: np.ndarray) -> None:
        if self._file is None:
            self._file = self._begin()
            for header in self._headers(plane):
                self._file.write(header.tostring().encode("ascii"))
        data = np.ascontiguousarray(plane, plane.dtype.newbyteorder(">")).tobytes()
        self._file.write(data)
        self._written += len(data)

    def _headers(self, plane: np.ndarray) -> list[Any]:
        """Return the headers of the file, with the number type and the size of the images."""
        with reading(self._like.file):
            header = self._header(plane)
            return [self._primary(), header] if self._like.number else [header]

    def _primary(self) -> Any:
        """Return the primary header, which has no image."""
        found = self._like.primary()
        for name in [n for n in found if re.fullmatch(r"NAXIS\d+|BSCALE|BZERO", n)]:
            found.remove(name, ignore_missing=True, remove_all=True)
        for name in STALE:
            found.remove(name, ignore_missing=True, remove_all=True)
        found["BITPIX"], found["NAXIS"] = 8, 0
        found.set("EXTEND", True, after="NAXIS")
        return found

    def _header(self, plane: np.ndarray) -> Any:
        image = self._like.image
        header = image.header.copy()
        for name in STALE:
            header.remove(name, ignore_missing=True, remove_all=True)
        if self.floats or (image.shift and self._planes):
            for name in ("BSCALE", "BZERO"):
                header.remove(name, ignore_missing=True)
        kind = "float32" if self.floats else image.stored
        header["BITPIX"] = next(bits for bits, name in TYPES.items() if name == kind)
        channels, height, width = plane.shape
        shape = (*self.lead, *([channels] if channels > 1 else []), height, width)
        if channels > 1:
            header["NAXIS"] = len(shape)
            header.set(f"NAXIS{len(shape)}", 1, after=f"NAXIS{len(shape) - 1}")
        for axis, side in enumerate(reversed(shape), 1):
            header[f"NAXIS{axis}"] = side
        sides = zip((*self.lead, height, width), image.shape, strict=True)
        factors = [new / old for new, old in sides][::-1]
        _rescale(header, dict(enumerate(factors, 1)))
        header.add_history(self.history or f"written by unmurk {__version__}")
        return header

    def _finish(self) -> None:
        if self._planes:
            self._close_packed()
        elif self._file is not None:
            self._file.write(bytes(-self._written % BLOCK))

    def _close_packed(self) -> None:
        """Compress the image tile by tile: integers as the source is, floats without loss."""
        from astropy.io import fits

        like = self._like
        header = self._header(self._planes[0])
        shape = tuple(header[f"NAXIS{n}"] for n in range(header["NAXIS"], 0, -1))
        data = np.concatenate(self._planes).reshape(shape)
        how = text_of(like.units[like.number].cards.get("ZCMPTYPE", "'RICE_1'"))
        how = "GZIP_2" if data.dtype.kind == "f" or how == "HCOMPRESS_1" else how
        first = fits.PrimaryHDU(header=self._primary() if like.number else None)
        unit = fits.CompImageHDU(
            data,
            header,
            compression_type=how,
            quantize_level=0.0,
            do_not_scale_image_data=True,
        )
        if like.image.scaled and not self.floats:
            unit.header["BSCALE"], unit.header["BZERO"] = like.image.scale, like.image.zero
        with reading(like.file):
            fits.HDUList([first, unit]).writeto(self._part.file, output_verify="silentfix+ignore")


def _rescale(header: Any, factors: dict[int, float]) -> None:
    """Scale the world coordinates of a header to pixels that are smaller by these factors.

    Args:
        header: The header.
        factors: The factor of each axis, counted from 1: the new number of pixels over the old.
    """
    changed = {axis: factor for axis, factor in factors.items() if factor != 1}
    if not changed:
        return
    across, down = (factors.get(axis, 1.0) for axis in (1, 2))
    entries = (re.fullmatch(r"(?:CD|PC)\d+_(\d+)[A-Z]?", name) for name in header)
    matrix = {int(entry[1]) for entry in entries if entry is not None}
    for axis in changed:  # what a header leaves out has a default, which is scaled as well
        if any(f"{name}{axis}" in header for name in ("CTYPE", "CRVAL", "CRPIX", "CDELT")):
            header.setdefault(f"CRPIX{axis}", 0.0)
            if axis not in matrix:
                header.setdefault(f"CDELT{axis}", 1.0)
    for name in list(header):
        linear, distortion = LINEAR.fullmatch(name), DISTORTION.fullmatch(name)
        if linear is not None:
            kind, first, second = linear[1], int(linear[2]), int(linear[3] or 0)
            factor = factors.get(second or first, 1.0)
            if kind == "CRPIX" and not second:
                header[name] = (header[name] - 0.5) * factor + 0.5
            elif second and kind in ("CD", "PC") or (kind == "CDELT" and first not in matrix):
                header[name] = header[name] / factor
        elif distortion is not None and (across, down) != (1, 1):
            if across != down:
                raise InputError(
                    "distorted world coordinates (SIP) cannot be scaled by two factors: give an "
                    "--out that ends in .npy"
                )
            header[name] *= across ** (1 - int(distortion[1]) - int(distortion[2]))


register("FITS", FITS, member=True, writer=FitsWriter, floats=True, scenes=True)(Fits)
