"""TIFF stacks, read and written page by page, with the metadata beside the pixels.

`tiff_copy` holds what a copy takes from a stack, and `tiff_writer` writes it.

The axes that tifffile reads from the descriptions (OME-XML, ImageJ's lines, its own JSON) define
an image: C and the samples S of a pixel are channels, all other axes before Y and X number the
images. `axes.Selection` overrides these axes and chooses channels. Where Y and X are then no
longer the axes of a page, an image is put together from parts of several pages.

The description of the first page holds the axes. A stack with the same number of pages, the same
shape, order and description therefore has the same axes, so the writer only copies the tags.

A palette becomes RGB. Pixels whose lowest number is white (MinIsWhite) are inverted, an opaque
alpha channel is dropped, and pixels are turned as the orientation tag says. Memory holds one
image.
"""

import itertools
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from ...errors import InputError, size_text
from ..axes import ALL, CHANNELS, NUMBERED, AxisMap, Planes, Selection
from ..limits import check_file, check_numbers, check_pixels, reading
from .directories import check_chain
from .metadata import collect, from_imagej, from_ome, micrometers
from .registry import register
from .tiff_copy import DATE, HEIGHTS, UNIT, WIDTHS, TaggedPages
from .tiff_tags import turn_of, turned

__all__ = ["ENDINGS", "Stack", "without_alpha"]

ENDINGS = (".tif", ".tiff")
WHITE_IS_ZERO, GRAY, RGB, PALETTE, YCBCR = 0, 1, 2, 3, 6
RATIO = 2**14  # what compressed bytes may grow to
ALPHA = (1, 2)  # kinds of extra samples
JPEGS = (6, 7, 34892)  # compressions that decode YCbCr to RGB


@register("TIFF", ENDINGS, selects=True)
class Stack(TaggedPages):
    """The images of a TIFF file, all of one shape and type; a context manager.

    Args:
        file: The file.
        select: Its axes, and the channels to read.

    Attributes:
        native: Whether the images are the pages of the file with all of their channels, so that
            `StackWriter` can write others in their places.

    Raises:
        InputError: The file is damaged or too large, or has axes or pixels that are not read.

    >>> numbers = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    >>> tifffile.imwrite("t.tif", numbers, photometric="minisblack")
    >>> with Stack(Path("t.tif")) as stack:
    ...     len(stack), stack.shape, stack.dtype, int(stack.read(1).max())
    (2, (3, 4, 1), 'uint16', 23)
    """

    def __init__(self, file: Path, select: Selection = ALL) -> None:
        check_file(file)
        if select.member:
            raise InputError(f"{file}: TIFF files have no parts with names ({select.member})")
        self.file, self._select = file, select
        with reading(file):
            self._tiff = tifffile.TiffFile(file, _multifile=False)
        try:
            with reading(file):
                check_chain(file, self._tiff)
            with reading(file, strict=True):
                series = list(self._tiff.series)
                len(self._tiff.pages)
            with reading(file):
                self._look(series)
        except BaseException:
            self._tiff.close()
            raise

    def _look(self, series: list[Any]) -> None:
        """Read what all images have in common. Raises InputError for axes or pixels not read."""
        if not series:
            raise InputError(f"cannot read {self.file}: it holds no image")
        first = self._first = series[0].keyframe
        self.planes = first.axes == "SYX"
        self.kind = int(first.photometric)
        self._check_kind(first)
        kinds = [_kind(part.keyframe) for part in series]
        for part, kind in zip(series, kinds, strict=True):
            if kind != kinds[0]:
                raise InputError(
                    f"the pages of {self.file} differ: the first is {kinds[0]}, page "
                    f"{part.keyframe.index} is {kind}: save them in separate files"
                )
        self._series = series
        self.axes = self._axes(0)
        if (self.axes, series[0].kind) == ("SYX", "shaped"):  # tifffile's guess for (3, H, W)
            self.note = (
                f"the {series[0].shape[0]} planes of {self.file} are read as the colors of one"
                " image, as the file says: --axes NYX reads each as an image"
            )
        sides = series[0].shape
        if self.axes == "QYX" and sides[-1] <= CHANNELS < min(sides[:2]):  # (H, W, C), unnamed
            self.note = (
                f"{self.file} is read as {sides[0]} images of {size_text(sides[1:])} pixels:"
                f" --axes YXC reads one image of {sides[-1]} channels"
            )
        self.turn = turn_of(first)
        self._maps: list[AxisMap] = []
        self._check_size(first)
        if self._of_pages(first):
            self._look_at_pages(first)
        else:
            self._look_across_pages(first)
        self.lead = self._lead()
        check_pixels(self.file, *self.shape)
        depth = first.bitspersample
        self._depth = int(depth if isinstance(depth, int) else max(depth))
        self.dtype = self._type(np.dtype(first.dtype))
        self.bits = self._bits()

    def _axes(self, part: int) -> str:
        """Return the axes of a series: those given, else those of the file."""
        series = self._series[part]
        return self._select.axes_for(self.file, str(series.axes), series.shape)

    def _lead(self) -> tuple[int, ...]:
        """Return the lengths of the axes that number the images; see `Pages.lead`."""
        found = {
            tuple(
                int(length)
                for axis, length in zip(self._axes(part), series.shape, strict=True)
                if axis not in "YXCS"
            )
            for part, series in enumerate(self._series)
        }
        if len(found) > 1:
            return ()
        count = len(self._series)
        return (*([count] if count > 1 else []), *found.pop())

    def _of_pages(self, first: Any) -> bool:
        """Whether Y and X are the rows and columns of a page, and S or C its samples."""
        tail = self.axes[-len(first.axes) :]
        return tail == first.axes or (
            "C" not in self.axes[: -len(tail)] and tail.replace("C", "S") == first.axes
        )

    def _look_at_pages(self, first: Any) -> None:
        """Find the pages of each image, one for each channel or one for all of its samples."""
        parts = range(len(self._series))
        self._images = list(itertools.chain(*(self._numbered(part) for part in parts)))
        if len({len(image) for image in self._images}) != 1:
            raise InputError(
                f"the images of {self.file} differ in channels: save them in separate files"
            )
        height, width, samples = _sides(first)
        if self.turn > 4:
            height, width = width, height
        several = len(self._images[0]) > 1
        count = len(self._images[0]) if several else self._channels(samples)
        self._chosen = self._select.chosen(self.file, count, self._names)
        if len(self._chosen) > CHANNELS:
            raise InputError(
                f"{self.file} has {count} channels, and an image has at most {CHANNELS}: choose "
                "some with --channel, or name its axes with --axes"
            )
        self.native = self._chosen == list(range(count))
        if several:
            self._images = [tuple(image[c] for c in self._chosen) for image in self._images]
        self._samples = [] if several or self.native else self._chosen
        self.shape = (height, width, len(self._chosen))

    def _look_across_pages(self, first: Any) -> None:
        """Map images whose rows, columns or channels lie in several pages."""
        named = {"Y", "X"} <= {*self.axes} <= {*"YXCS", *NUMBERED}
        if self._select.axes != self.axes and not (named and first.axes == "SYX"):
            raise InputError(
                f"{self.file} has the axes {self.axes}, which are not pages of Y and X: name them "
                "with --axes, such as TZCYX"
            )
        if self.kind not in (GRAY, RGB) or self.turn != 1:
            raise InputError(
                f"{self.file} has a palette, an orientation or white as its lowest number: save "
                "it as plain gray pages before its axes are named with --axes"
            )
        tail = len(first.shape)
        self._maps = [
            AxisMap(self.file, self._axes(part), series.shape, self._select, self._names)
            for part, series in enumerate(self._series)
        ]
        if any(tuple(s.shape[-tail:]) != tuple(first.shape) for s in self._series):
            raise InputError(f"cannot read {self.file}: its axes are not those of its pages")
        if len({images.shape for images in self._maps}) != 1:
            raise InputError(f"the images of {self.file} differ: save them in separate files")
        self._chosen, self._samples, self.native = self._maps[0].channels, [], False
        self.shape = self._maps[0].shape
        self._images = [((part, i),) for part, m in enumerate(self._maps) for i in range(len(m))]

    @cached_property
    def _names(self) -> list[str]:
        """The names of all channels, as far as OME-XML tells them."""
        return list(from_ome(self._tiff.ome_metadata or "").get("channels", []))

    @cached_property
    def metadata(self) -> dict[str, Any]:  # type: ignore[override]
        """See `metadata`; `source` is the description of the first page."""
        with reading(self.file):
            return self._metadata()

    def _metadata(self) -> dict[str, Any]:
        tags, imagej = self._first.tags, self._tiff.imagej_metadata
        date = tags[DATE].value if DATE in tags else None
        found = collect(source=str(self._first.description), datetime=date)
        sides = [_ratio(tags[code].value) if code in tags else 0.0 for code in (WIDTHS, HEIGHTS)]
        # inches are the resolution of a print, not the size of a pixel
        unit = "cm" if UNIT in tags and int(tags[UNIT].value) == 3 else ""
        if self._tiff.is_ome:
            found |= from_ome(self._tiff.ome_metadata or "")
        elif imagej:
            found |= from_imagej(imagej, (sides[0], sides[1]))
        elif unit and min(sides) > 0:
            found |= collect(micrometers(1 / sides[1], unit), micrometers(1 / sides[0], unit))
        if len(found.get("channels", [])) > max(self._chosen):
            found["channels"] = [found["channels"][c] for c in self._chosen]
        return found

    def _check_kind(self, first: Any) -> None:
        kind, numbers = self.kind, np.dtype(first.dtype).kind
        jpeg = int(first.compression) in JPEGS
        known = kind in (WHITE_IS_ZERO, GRAY, RGB, PALETTE) or (kind == YCBCR and jpeg)
        if first.axes not in ("YX", "YXS", "SYX") or not known:
            raise InputError(
                f"{self.file} has pages of axes {first.axes} in {_word(first.photometric)}: save "
                "them as gray or RGB"
            )
        if numbers not in "buif":
            raise InputError(
                f"{self.file} holds {first.dtype}: save real numbers (complex ones as two "
                "channels, real and imaginary part)"
            )
        if kind == WHITE_IS_ZERO and numbers not in "bu":
            raise InputError(
                f"{self.file} has {first.dtype} pixels whose lowest number is white (MinIsWhite): "
                "save it with black as the lowest number"
            )

    def _check_size(self, page: Any) -> None:
        """Compare what a page declares with the limits and with the length of the file."""
        height, width, samples = _sides(page)
        check_pixels(self.file, height, width, samples)
        size = height * width * samples * np.dtype(page.dtype).itemsize
        check_numbers(self.file, size, 1)
        kind = page.keyframe  # a frame has no tags of its own
        if kind.is_tiled:
            check_pixels(self.file, kind.tilelength, kind.tilewidth)
        stored = min(sum(map(int, page.databytecounts)), int(self._tiff.filehandle.size))
        bits = kind.bitspersample
        packed = -(-width * samples * (bits if isinstance(bits, int) else max(bits)) // 8) * height
        least = packed if int(kind.compression) == 1 and self.kind != YCBCR else size / RATIO
        if stored < least:
            raise InputError(
                f"cannot read {self.file}: it declares {size_text((height, width))} pixels and"
                " is cut short"
            )

    def _numbered(self, part: int) -> list[tuple[tuple[int, int], ...]]:
        """Return the planes (series, plane) of every image of a series, one for each channel."""
        axes, shape = self._axes(part), self._series[part].shape
        tail = len(self._first.axes)
        if tuple(shape[-tail:]) != self._first.shape:
            raise InputError(
                f"{self.file} has the axes {axes}, which are not pages of Y and X: name them with "
                "--axes, such as TZCYX"
            )
        lead, sizes = axes[:-tail], shape[:-tail]
        lead = lead if "C" in lead or tail == 3 else lead.replace("S", "C")
        wrong = [a for a in lead if a not in NUMBERED + "C"]
        if wrong or lead.count("C") > 1 or ("C" in lead and tail == 3):
            raise InputError(
                f"{self.file} has the axes {axes}, which do not say which axis holds the "
                "channels: name them with --axes, C for channels and T or Z for images"
            )
        planes = np.arange(int(np.prod(sizes, dtype=np.int64))).reshape(sizes)
        channels = 1
        if "C" in lead:
            planes = np.moveaxis(planes, lead.index("C"), -1)
            channels = planes.shape[-1]
        return [tuple((part, int(p)) for p in row) for row in planes.reshape(-1, channels)]

    def _channels(self, samples: int) -> int:
        """Channels of an image with this number of samples; a palette has 3, alpha is dropped."""
        if self.kind == PALETTE:
            return 3
        return samples - 1 if self._alpha(samples) else samples

    def _alpha(self, samples: int) -> bool:
        extra = [int(kind) for kind in self._first.extrasamples]
        return samples in (2, 4) and (
            extra in ([1], [2]) or (samples == 4 and self.kind in (RGB, YCBCR))
        )

    def _type(self, found: np.dtype) -> str:
        """Name of the number type that `read` returns."""
        if self.kind == PALETTE:
            return "uint8" if (self._palette() % 257 == 0).all() else "uint16"
        return "uint8" if found.kind == "b" else found.name

    def _palette(self) -> np.ndarray:
        return np.asarray(self._first.colormap).reshape(3, -1)

    def _bits(self) -> int:
        """Significant bits by OME-XML or by the page's tag, if fewer than the type has; else 0."""
        if self.kind == PALETTE or np.dtype(self.dtype).kind not in "iu":
            return 0
        most = 8 * np.dtype(self.dtype).itemsize
        text = self._tiff.ome_metadata or ""
        found = {int(bits) for bits in re.findall(r'SignificantBits="(\d{1,2})"', text)}
        if len(found) == 1 and 1 < min(found) < most:
            return min(found)
        return self._depth if self._depth < most and self._depth not in (1, 2, 4) else 0

    def __enter__(self) -> "Stack":
        return self

    def close(self) -> None:
        """Close the file."""
        self._tiff.close()

    def __len__(self) -> int:
        return len(self._images)

    def read(self, page: int) -> np.ndarray:
        """Return the pixels of an image, (H, W, C), in the numbers of the file."""
        if self._maps:
            with reading(self.file, strict=True):
                return self._across_pages(*self._images[page][0])
        with reading(self.file, strict=True):
            found = [self._plane(*place) for place in self._images[page]]
            pixels = found[0] if len(found) == 1 else np.concatenate(found, -1)
        samples = pixels.shape[-1]
        if len(found) == 1 and self._alpha(samples) and self._channels(samples) != samples:
            pixels = without_alpha(self.file, pixels)
        if self._samples:
            pixels = pixels[..., self._samples]
        return turned(pixels, self.turn)

    def _across_pages(self, part: int, image: int) -> np.ndarray:
        """Return an image of which each page holds a part."""
        series, tail = self._series[part], len(self._first.shape)

        def read(plane: int) -> np.ndarray:
            found = self._stored(part, plane)
            return found.astype(np.uint8) * np.uint8(255) if found.dtype.kind == "b" else found

        planes = Planes(series.shape[:-tail], self._first.shape, read)
        pixels = self._maps[part].image(planes, image)
        return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)

    def _plane(self, part: int, plane: int) -> np.ndarray:
        """Return the samples of a page, (H, W, S)."""
        found = self._stored(part, plane)
        found = np.moveaxis(found, 0, -1) if self.planes else found
        return self._plain(found if found.ndim == 3 else found[..., None])

    def _stored(self, part: int, plane: int) -> np.ndarray:
        """Return the numbers of a page, with the axes of the file."""
        page = self._page(part, plane)
        if page is None:
            found = self._raw(part, plane)
        else:
            if tuple(page.shape) != tuple(self._first.shape) or page.dtype != self._first.dtype:
                raise InputError(
                    f"the pages of {self.file} differ: the first is {_kind(self._first)}, page "
                    f"{page.index} is {_kind(page)}: save them in separate files"
                )
            self._check_size(page)
            found = page.asarray()
        if found.shape != tuple(self._first.shape):
            raise InputError(f"cannot read {self.file}: page {plane} has the shape {found.shape}")
        return np.asarray(found)

    def _plain(self, found: np.ndarray) -> np.ndarray:
        """Return pixels whose largest number is white, in whole bytes, without a palette."""
        if self.kind == PALETTE:
            colors = self._palette().T
            if found.max() >= len(colors):
                raise InputError(f"cannot read {self.file}: its palette is too short")
            return (colors // 257 if self.dtype == "uint8" else colors).astype(self.dtype)[
                found[..., 0]
            ]
        if found.dtype.kind == "b":
            found = found.astype(np.uint8) * np.uint8(255)
        elif self._depth in (2, 4) and found.dtype == np.uint8:
            found = found * np.uint8(255 // (2**self._depth - 1))
        found = found.astype(found.dtype.newbyteorder("="), copy=False)
        return self.inverted(found) if self.kind == WHITE_IS_ZERO else found

    def _page(self, part: int, plane: int) -> Any:
        """Return a page of a series; None where one page describes all of them."""
        pages = self._series[part].pages
        if plane < len(pages):
            if pages[plane] is None:
                raise InputError(f"cannot read {self.file}: page {plane} is missing")
            return pages[plane]
        return None

    def _raw(self, part: int, plane: int) -> np.ndarray:
        """Read a plane without a page of its own: ImageJ writes one page for a large stack."""
        offset, page = self._series[part].dataoffset, self._first
        if offset is None or int(page.compression) != 1:
            raise InputError(f"cannot read {self.file}: page {plane} is missing")
        kind = np.dtype(page.dtype).newbyteorder(self._tiff.byteorder)
        count = int(np.prod(page.shape))
        handle = self._tiff.filehandle
        handle.seek(offset + plane * count * kind.itemsize)
        data = handle.read(count * kind.itemsize)
        if len(data) != count * kind.itemsize:
            raise InputError(f"cannot read {self.file}: it is cut short")
        return np.frombuffer(data, kind).reshape(page.shape)

    @property
    def stored_dtype(self) -> np.dtype:
        """The number type of the file, with its byte order."""
        return np.dtype(self._first.dtype).newbyteorder(self._tiff.byteorder)

    def offsets(self, page: int) -> tuple[int, ...]:
        """Return where the numbers of an image begin in the file; see `Pages.offsets`."""
        with reading(self.file):
            first, kind = self._first, np.dtype(self._first.dtype)
            plain = self.kind in (GRAY, RGB) and kind.kind in "uif" and not self.planes
            if self._maps or not plain or self.turn != 1 or self._depth != 8 * kind.itemsize:
                return ()
            if self.shape[2] != len(self._images[page]) * _sides(first)[2]:
                return ()
            planes = [self._offset(*place) for place in self._images[page]]
        return tuple(itertools.chain(*planes)) if all(planes) else ()

    def _offset(self, part: int, plane: int) -> tuple[int, ...]:
        """Return where a plane begins; empty where it is compressed, tiled or scattered."""
        size = self._size() * np.dtype(self._first.dtype).itemsize
        page = self._page(part, plane)
        kind = self._first if page is None else page.keyframe
        if int(kind.compression) != 1 or kind.predictor != 1 or kind.fillorder != 1:
            return ()
        if page is None:
            start = self._series[part].dataoffset
            return () if start is None else (int(start) + plane * size,)
        if tuple(page.shape) != tuple(self._first.shape) or page.dtype != self._first.dtype:
            return ()
        self._check_size(page)
        starts, counts = list(page.dataoffsets), list(page.databytecounts)
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        joined = all(end == start for end, start in zip(ends, starts[1:], strict=False))
        if kind.is_tiled or not joined or sum(counts) != size:
            return ()
        return (int(starts[0]),)

    def places(self, image: int) -> list[int]:
        """Return the page numbers of an image in the written file, in the order of channels."""
        starts = np.cumsum([0, *(int(np.prod(s.shape)) // self._size() for s in self._series)])
        return [int(starts[part]) + plane for part, plane in self._images[image]]

    def _size(self) -> int:
        return int(np.prod(self._first.shape))


def without_alpha(file: Path, pixels: np.ndarray) -> np.ndarray:
    """Return pixels (H, W, C) without their last channel, the alpha channel.

    Raises:
        InputError: Some pixels are not opaque.

    >>> without_alpha(Path("a.tif"), np.full((4, 6, 4), 255, np.uint8)).shape
    (4, 6, 3)
    """
    kind = pixels.dtype
    full = 1 if kind.kind == "f" else np.iinfo(kind).max
    if (pixels[..., -1] != full).any():
        raise InputError(
            f"{file} is partly transparent: save it without an alpha channel or, if its samples "
            "are separate images, give --axes NYX"
        )
    return pixels[..., :-1]


def _ratio(value: Any) -> float:
    """Return the value of a resolution tag, a fraction; 0 for a damaged one."""
    try:
        return float(value[0]) / float(value[1])
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        return 0.0


def _sides(page: Any) -> tuple[int, int, int]:
    """Return the height, width and samples of a page."""
    shape = tuple(int(n) for n in page.shape)
    if page.axes == "SYX":
        return shape[1], shape[2], shape[0]
    return shape[0], shape[1], shape[2] if len(shape) == 3 else 1


def _kind(page: Any) -> str:
    height, width, samples = _sides(page)
    return f"{size_text((height, width))} {'gray' if samples == 1 else 'RGB'} {page.dtype}"


def _word(photometric: Any) -> str:
    return str(getattr(photometric, "name", photometric)).lower()
