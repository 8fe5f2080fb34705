"""Captures: images of any sizes, out of which rectangles are read.

Learning reads small rectangles of large captures, millions of times. So a set is opened once:

====================================  =========================================================
up to `HELD_CAPTURES` bytes           all captures are held in memory, in the numbers of the file
more, in files with uncompressed      the rows of a rectangle are read from the file
numbers (.npy, uncompressed TIFF)
more, in other files                  each file is decoded once, into a scratch file that has no
                                      name and ends with the process; its rows are read
====================================  =========================================================

Every capture of a set has the same channels, the same number type and one scale. Their sizes may
differ.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import InputError
from ..problem import Problem
from .axes import ALL, Selection
from .capture_set import Captures, Gaps
from .datasets import as_source
from .folders import pictures_in, usual_kind
from .formats.arrays import map_array, read_array, split_key
from .formats.pictures import (
    Nan,
    Pages,
    bad_pixels,
    declared,
    describe,
    holds_images,
    open_pages,
    page_names,
    single,
)
from .formats.readers import is_folder
from .images import ImageSet
from .layouts import images_in
from .limits import check_free_memory
from .parts import Cache, InFile, InMemory, InSource, Part, Scratch
from .scale import Extent, Scale, Spans, span_for
from .source import Array, of_array

__all__ = [
    "HELD_CAPTURES",
    "as_captures",
    "open_captures",
    "simulated_captures",
    "sizes_in",
]

HELD_CAPTURES = 2**29  # bytes of a set that is held in memory


class Store:
    """Where the captures of a set go: into memory or, above `HELD_CAPTURES`, to the disk.

    Args:
        what: The file or the folder, for messages.
        size: Bytes of all captures.
        scratch: Folder of the scratch file.
    """

    def __init__(self, what: Path, size: int, scratch: Path) -> None:
        self.held, self.size, self.folder = size <= HELD_CAPTURES, size, scratch
        self._scratch: Scratch | None = None
        if self.held:
            check_free_memory(what, size)

    def add(self, pixels: np.ndarray) -> Part:
        """Keep a capture (H, W, C)."""
        if self.held:
            return InMemory(np.ascontiguousarray(pixels))
        if self._scratch is None:
            self._scratch = Scratch(self.folder, self.size)
        return self._scratch.add(pixels)


# -- files ----------------------------------------------------------------------------------------


def sizes_in(path: Path, select: Selection = ALL) -> list[tuple[int, int]]:
    """Return height and width of the images of a path, in no order; those of one file once.

    Headers are read, and images only where a format has none. Files that cannot be read are left
    out.

    Args:
        path: A folder or a file, as for `load_images`.
        select: Its axes and channels.

    >>> np.save("set.npy", np.zeros((7, 30, 40), np.uint8))
    >>> sizes_in(Path("set.npy"))
    [(30, 40)]
    """
    file, key = split_key(str(path))
    if is_folder(file) or (file.exists() and holds_images(file)):
        files = pictures_in(file) if is_folder(file) else [file]
        shapes = (_shape(each, select.of(key or "")) for each in files)
        return [(shape[0], shape[1]) for shape in shapes if shape]
    try:
        array = map_array(file) if file.suffix.lower() == ".npy" else read_array(file, key)[0]
        array, layout = images_in(file, array, select)
    except InputError:
        return []
    if not len(array):
        return []
    height, width = _pixels(array[0], layout).shape[:2]
    return [(height, width)]


def _shape(file: Path, select: Selection = ALL) -> tuple[int, ...] | None:
    """Return what the header of a file declares; None if it cannot be read."""
    try:
        return declared(file, select)
    except InputError:
        return None


def open_captures(
    path: Path,
    skip_bad: bool = False,
    span: Spans = None,
    nan: Nan = "refuse",
    scratch: Path | None = None,
    select: Selection = ALL,
) -> Captures:
    """Open images of any sizes.

    Args:
        path: A folder of pictures, a picture file, or an array file, as for `load_images`.
        skip_bad: Leave out, and list, images that cannot be read, have another number type or
            other channels than most, or are not finite.
        span: Numbers of black and white; None: see `scale`. The whole set has one scale.
        nan: See `load_images`.
        scratch: Folder for decoded captures that memory is too small for; None: that of temporary
            files.
        select: Axes and channels; see `load_images`.

    Raises:
        InputError: There is nothing at the path, or the images cannot be read or differ in number
            type or channels.

    >>> np.save("set.npy", np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    >>> captures = open_captures(Path("set.npy"), span=(0, 1))
    >>> captures.sizes, captures.region(1, 2, 1, 1, 3).tolist()  # rows, columns of image 1
    ([(3, 4), (3, 4)], [[[21.0, 22.0, 23.0]]])
    """
    scratch = Path(tempfile.gettempdir()) if scratch is None else scratch
    file, key = split_key(str(path))
    if not file.exists() and not file.is_symlink():
        raise InputError(f"there is nothing at {file}")
    if is_folder(file) or holds_images(file):
        files, chosen = pictures_in(file) if is_folder(file) else [file], select.of(key or "")
        found = _Opening(file, files, skip_bad, span, nan, scratch, chosen).captures()
    else:
        array = map_array(file) if file.suffix.lower() == ".npy" else read_array(file, key)[0]
        found = _of_array(file, of_array(file, array, span, select=select), skip_bad, nan)
    return replace(found, select=select)


@dataclass
class _Opened:
    """A page that was read: its place in the set and in the file, and where its numbers are."""

    number: int
    name: str
    part: Part
    dtype: str
    bits: int
    bad: np.ndarray | None

    @property
    def kind(self) -> str:
        """Channels and number type in words."""
        return describe((0, 0, self.part.shape[2]), self.dtype).removeprefix("0x0 ")


class _Opening:
    """Reads the pictures of a set once."""

    def __init__(
        self,
        path: Path,
        files: list[Path],
        skip_bad: bool,
        span: Spans,
        nan: Nan,
        scratch: Path,
        select: Selection,
    ) -> None:
        self.path, self.files, self.skip_bad, self.span = path, files, skip_bad, span
        self.nan: Nan = nan
        self.select = select
        shapes = (_shape(file, select) for file in files)
        size = sum(math.prod(shape) for shape in shapes if shape)
        self.store = Store(path, size, scratch)
        self.extents: dict[str, Extent] = {}
        self.good: list[_Opened] = []
        self.skipped: list[tuple[str, str]] = []
        self.seconds: list[tuple[str, int, int, int]] = []
        number = 0
        for file in files:
            number += self._file(file, number)
        self.total = number

    def _file(self, file: Path, number: int) -> int:
        """Read the images of a file, and return how many there are."""
        try:
            with open_pages(file, self.select) as pages:
                for place, name in enumerate(page_names(file, len(pages))):
                    self._page(pages, place, name, number + place)
                stat = file.stat()
                self.seconds.append((file.name, len(pages), stat.st_size, stat.st_mtime_ns))
                return len(pages)
        except InputError as error:
            if not self.skip_bad:
                raise
            self.skipped.append((file.name, str(error)))
            self.good = [page for page in self.good if page.number < number]
            return 1

    def _page(self, pages: Pages, place: int, name: str, number: int) -> None:
        """Read an image and keep it, or note why it is left out."""
        file, dtype = pages.file, np.dtype(pages.dtype)
        offsets = () if self.store.held else pages.offsets(place)
        extent = self.extents.setdefault(dtype.name, Extent(dtype))
        if pages.span is not None:
            extent.declare(pages.span)
        given = pages.bits or pages.span is not None or span_for(self.span, dtype) is not None
        known = given or extent.full
        pixels = None
        if not offsets or dtype.kind == "f" or not known or pages.masked:
            pixels = pages.read(place)
            extent.add(pixels)
        bad = None
        if pixels is not None:
            where = str(file) if len(pages) == 1 else f"page {place} of {file}"
            try:
                gaps = Gaps(self.nan)
                gaps.look(0, pixels, where)
                bad = gaps.missing.get(0)
                marked = bad_pixels(pages, place, where, self.nan)
                if marked is not None:
                    packed = np.packbits(marked, axis=1)
                    bad = packed if bad is None else bad | packed
            except InputError:
                if not self.skip_bad:
                    raise
                self.skipped.append((name, "not finite"))
                return
        if not offsets:
            assert pixels is not None
            part = self.store.add(pixels)
        else:
            height, width, channels = pages.shape
            kind = np.dtype(pages.stored_dtype)
            part = InFile(file, offsets, (height, width, channels // len(offsets)), kind)
        self.good.append(_Opened(number, name, part, dtype.name, pages.bits, bad))

    def captures(self) -> Captures:
        """Return the captures of the most frequent kind; the others are left out or refused."""
        good, skipped = self.good, self.skipped
        if not good:
            if len(self.files) == 1:
                raise InputError(skipped[0][1])
            raise InputError(f"none of the {len(self.files)} pictures in {self.path} can be read")
        usual = usual_kind([page.kind for page in good])
        others = [page for page in good if page.kind != usual]
        if others and not self.skip_bad:
            first, other = good[0], next(p for p in good if p.kind != good[0].kind)
            raise InputError(
                f"the pictures in {self.path} differ: {first.name} is {first.kind} but "
                f"{other.name} is {other.kind}: make them alike, or leave"
                " out those that differ with --skip-bad"
            )
        skipped = skipped + [(p.name, f"{p.kind}, others are {usual}") for p in others]
        kept = [page for page in good if page.kind == usual]
        extent, bits = self.extents[kept[0].dtype], max(page.bits for page in kept)
        span = span_for(self.span, kept[0].dtype) or extent.span
        known = bits or span is not None
        names = hashlib.sha256(json.dumps(self.seconds).encode()).hexdigest()
        scale = Scale.of(kept[0].dtype, span, bits or (0 if known else extent.bits))
        return Captures(
            [page.part for page in kept],
            replace(scale, format="png" if any(map(single, self.files)) else "tif"),
            [page.number for page in kept],
            {"sha256": names, "of": "names, sizes and times"},
            sorted(skipped),
            "" if known else extent.note,
            {i: page.bad for i, page in enumerate(kept) if page.bad is not None},
            total=self.total,
        )


# -- arrays, tensors, sources ---------------------------------------------------------------------


def _of_array(what: Any, source: Array, skip_bad: bool, nan: Nan) -> Captures:
    """Return the images of an array, in memory or in its file."""
    array, layout = source.array, source.scale.layout
    numbers = list(range(len(array))) if source.kept is None else source.kept.tolist()
    channels_first = layout == "NCHW"
    parts: list[Part] = []
    held = source.file is None or array[0].nbytes * len(numbers) <= HELD_CAPTURES
    if source.file is not None and held:
        check_free_memory(Path(str(what)), array[0].nbytes * len(numbers))
    gaps, skipped, kept = Gaps(nan), list(source.skipped), []
    for number in numbers:
        part: Part
        if held:
            image = array[number] if source.file is None else source.raw([number])[0]
            part = InMemory(_pixels(image, layout))
        else:
            assert source.file is not None
            path, start = source.file
            size = array[0].nbytes
            c, h, w = source.shape[1:]
            count = c if channels_first else 1
            offsets = tuple(start + number * size + k * size // count for k in range(count))
            part = InFile(path, offsets, (h, w, c // count), array.dtype)
        if array.dtype.kind == "f":
            try:
                gaps.look(
                    len(parts), part.region(0, 0, *part.shape[:2]), f"image {number} of {what}"
                )
            except InputError:
                if not skip_bad:
                    raise
                skipped.append((f"{number:05d}", "not finite"))
                continue
        parts.append(part)
        kept.append(number)
    if not parts:
        raise InputError(f"none of the {len(numbers)} images in {what} is finite")
    found = Captures(parts, source.scale, kept, source.fingerprint(), skipped, source.note)
    return replace(found, missing=gaps.missing, total=len(array))


def _pixels(image: np.ndarray, layout: str) -> np.ndarray:
    """Return an image of an array as pixels (H, W, C)."""
    if layout in ("NHW", "HW"):
        return image[..., None]
    return np.moveaxis(image, 0, -1) if layout == "NCHW" else image


def as_captures(
    data: Any,
    span: Spans = None,
    nan: Nan = "refuse",
    scratch: Path | None = None,
    select: Selection = ALL,
) -> Captures:
    """Return measurements as captures.

    Args:
        data: What `datasets.as_source` takes; or a list of tensors or arrays (C, H, W) of any
            sizes, of integers or in units of [0, 1]; or captures.
        span, nan, scratch, select: See `open_captures`.

    Raises:
        InputError: The data are none of these, or cannot be read.

    >>> captures = as_captures([np.zeros((1, 30, 40)), np.zeros((1, 50, 20))])
    >>> captures.sizes, captures.channels
    ([(30, 40), (50, 20)], 1)
    """
    if isinstance(data, Captures):
        return data
    if isinstance(data, str | Path):
        return open_captures(Path(data), False, span, nan, scratch, select)
    if isinstance(data, list | tuple):
        return _of_list(data, span, nan)
    if isinstance(data, ImageSet):
        return replace(_of_tensor(data.images, nan), units=data.scale, select=data.select)
    y = as_source(data, span, nan, select)
    if isinstance(y, Tensor):
        return _of_tensor(y, nan)
    if isinstance(y, Array):
        return _of_array("the array", y, False, nan)
    cache = Cache(y)
    parts: list[Part] = [InSource(cache, number) for number in range(len(y))]
    found = Captures(parts, None, [], y.fingerprint(), y.skipped, y.note, {}, y.device)
    if not y.floats:
        return found
    gaps = Gaps(nan)
    for number, part in enumerate(parts):
        gaps.look(number, part.region(0, 0, *part.shape[:2]), f"measurement {number}")
    return replace(found, missing=gaps.missing)


def _of_tensor(y: Tensor, nan: Nan) -> Captures:
    """Return the images of a tensor (N, C, H, W) of floats."""
    found = _of_list(list(y), None, nan)
    return replace(found, device=y.device)


def _of_list(images: Sequence[Any], span: Spans, nan: Nan) -> Captures:
    """Return images (C, H, W) of any sizes."""
    arrays = [_array(image) for image in images]
    if not arrays or any(a.ndim != 3 or not a.size for a in arrays):
        raise InputError("expected a list of images (C, H, W), of any height and width")
    kinds = {(len(a), a.dtype.name) for a in arrays}
    if len(kinds) > 1:
        few, more = sorted(kinds)[:2]
        raise InputError(
            f"the images differ: some have {few[0]} channels of {few[1]}, others {more[0]} of "
            f"{more[1]}: make them alike"
        )
    extent, gaps = Extent(arrays[0].dtype), Gaps(nan)
    digest = hashlib.sha256()
    for number, array in enumerate(arrays):
        extent.add(array)
        gaps.look(number, np.moveaxis(array, 0, -1), f"measurement {number}")
        digest.update(np.ascontiguousarray(array).data)
    known = span_for(span, arrays[0].dtype) is not None
    return Captures(
        [InMemory(np.moveaxis(array, 0, -1)) for array in arrays],
        Scale.of(arrays[0].dtype, span, 0 if known else extent.bits),
        identity={"sha256": digest.hexdigest()},
        note="" if known else extent.note,
        missing=gaps.missing,
    )


def _array(image: Any) -> np.ndarray:
    """Return an image as an array; floats as float32."""
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.dtype.kind not in "buif":
        raise InputError(f"expected images of real numbers, got {array.dtype}")
    return array.astype(np.float32, copy=False) if array.dtype.kind == "f" else array


def simulated_captures(
    clean: Captures, problem: Problem, seed: int, scratch: Path | None = None
) -> Captures:
    """Simulate measurements of clean captures, whole.

    Args:
        clean: The clean captures.
        problem: The forward model and noise; a capture is corrupted by its number.
        seed: Seed of the noise.
        scratch: See `open_captures`.

    >>> clean = as_captures([np.zeros((1, 30, 40)), np.zeros((1, 50, 20))])
    >>> y = simulated_captures(clean, Problem("identity", 0.1), seed=0)
    >>> round(float(y.region(1, 0, 0, 50, 20).std()), 2)
    0.1
    """
    scratch = Path(tempfile.gettempdir()) if scratch is None else scratch
    if clean.missing:
        raise InputError(
            f"{len(clean.missing)} clean images have pixels that are not finite: correct them, or "
            "leave them out (--skip-bad)"
        )
    size = 4 * sum(math.prod(part.shape) for part in clean.parts)
    store = Store(Path("simulating measurements"), size, scratch)
    parts = []
    for image, number in zip(_walk(clean), clean.numbers, strict=True):
        y = problem.simulate(image[None], seed, [number])[0]
        if y.ndim != 3:
            raise InputError(
                f"measurements of '{problem.operator.spec}' are no images, of which no crops can "
                "be cut: learn from whole images (--crop 0)"
            )
        parts.append(store.add(np.moveaxis(y.numpy(), 0, -1)))
    identity = clean.fingerprint() | {"simulated": seed}
    units = clean.scale if clean.units is None else clean.units
    return replace(clean, parts=parts, scale=None, units=units, identity=identity, missing={})


def _walk(captures: Captures) -> Iterator[Tensor]:
    """Iterate over the images (C, H, W)."""
    for position, (height, width) in enumerate(captures.sizes):
        yield captures.region(position, 0, 0, height, width)
