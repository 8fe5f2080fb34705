"""Measurements that stay in a file or a folder and are read when they are needed.

A `Source` is used like the tensor (N, C, H, W) that it stands for: it has a length, a shape and a
device, and `source[rows]` returns these images as float32. Integers are converted only then (8
bits: 0 .. 255 become 0 .. 1). Files are read, not mapped: the file cache of the system does not
count as memory of the process.
"""

import copy
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..problem import Problem
from .axes import ALL, Selection
from .folders import pictures_in, usual_kind
from .formats.arrays import map_array
from .formats.hdf5 import Kspace
from .formats.pictures import (
    Nan,
    are_finite,
    bad_pixels,
    check_finite,
    describe,
    has_number_type,
    holds_images,
    open_pages,
    page_names,
    split_member,
)
from .formats.readers import is_folder
from .images import hidden, measured_white
from .layouts import images_in, to_images
from .scale import Extent, Scale, Spans, span_for
from .survey import survey

__all__ = [
    "CHUNK",
    "HELD",
    "SAMPLE",
    "Array",
    "Measured",
    "PictureFolder",
    "Simulated",
    "Source",
    "large",
    "of_array",
    "open_source",
]

HELD = 2**30  # bytes as float32 up to which the command line holds a data set in memory
SAMPLE = 1024  # images that enter the fingerprint of an array
CHUNK = 2**24  # bytes of an array that are examined together
READERS = 4  # threads that decode pictures


class Source:
    """Measurements (N, C, H, W) by index; subclasses define `shape`, `read` and `fingerprint`.

    Attributes:
        shape: (N, C, H, W).
        device: The device of the tensors that `source[indices]` returns.
        skipped: Name and reason of each measurement that was left out.
        scale: How file values became these numbers, if they come from files.
        note: A remark about the scale for the user, or an empty text.
        floats: Whether some numbers may not be finite.
        endless: Whether it stands for more measurements than a run reads.
        select: The axes and channels that were given for its files.

    >>> class Ramp(Source):
    ...     shape = (3, 1, 1, 2)
    ...     def read(self, indices):
    ...         return torch.tensor([[[[i / 4, i / 2]]] for i in indices])
    ...     def fingerprint(self):
    ...         return {"ramp": 3}
    >>> Ramp()[1:].flatten().tolist()
    [0.25, 0.5, 0.5, 1.0]
    """

    shape: tuple[int, ...]
    device = torch.device("cpu")
    skipped: Sequence[tuple[str, str]] = ()
    scale: Scale | None = None
    note = ""
    floats = False
    endless = False
    select = ALL

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        """The number of axes of `shape`."""
        return len(self.shape)

    def to(self, device: torch.device | str) -> "Source":
        """Return the same measurements, read to another device."""
        other = copy.copy(self)
        other.device = torch.device(device)
        return other

    def __getitem__(self, indices: Tensor | slice) -> Tensor:
        """Return measurements (B, C, H, W), float32, by their indices (B,).

        Raises:
            InputError: One has values that are not finite.
        """
        every = range(len(self))
        numbers = list(every[indices] if isinstance(indices, slice) else indices.tolist())
        found = self.read(numbers)
        finite = found.isfinite().flatten(1).all(1)
        if not finite.all():
            number = numbers[int(finite.int().argmin())]
            raise InputError(
                f"image number {number} has values that are not finite: correct or remove it"
            )
        return found.to(self.device)

    def read(self, indices: list[int]) -> Tensor:
        """Return measurements (B, C, H, W), float32; several threads call this at once."""
        raise NotImplementedError

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies this data set without reading all of it, fit for JSON."""
        raise NotImplementedError


class Array(Source):
    """The images of an array, in memory or mapped from a file.

    Args:
        array: (N, H, W), (N, H, W, C) or (N, C, H, W).
        scale: What its numbers mean; its layout names the axes.
        kept: Numbers of the images that are used; None: all.

    >>> source = Array(np.full((3, 1, 8, 8), 51, np.uint8), Scale.of("uint8"))
    >>> source.shape, round(float(source[2:].mean()), 4)
    ((3, 1, 8, 8), 0.2)
    """

    def __init__(self, array: np.ndarray, scale: Scale, kept: np.ndarray | None = None) -> None:
        self.array, self.kept = array, kept
        self.scale: Scale = scale
        self.floats = array.dtype.kind == "f"
        one = to_images(np.zeros((1, *array.shape[1:]), array.dtype), scale, scale.layout)
        self.shape = (len(array) if kept is None else len(kept), *one.shape[1:])
        self.file = _file_of(array)

    def read(self, indices: list[int]) -> Tensor:
        """See `Source`."""
        numbers = indices if self.kept is None else self.kept[indices].tolist()
        return to_images(self.raw(numbers), self.scale, self.scale.layout)

    def raw(self, numbers: list[int]) -> np.ndarray:
        """Return the images with these numbers as they are in the array."""
        if self.file is None:
            return self.array[numbers]
        path, start = self.file
        found = np.empty((len(numbers), *self.array.shape[1:]), self.array.dtype)
        size = found[0].nbytes
        try:
            with open(path, "rb", buffering=0) as file:
                for number, room in zip(numbers, found, strict=True):
                    file.seek(start + number * size)
                    if file.readinto(memoryview(room).cast("B")) != size:
                        raise InputError(
                            f"{path} is cut short: copy it again, then run the same command"
                        )
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        return found

    def fingerprint(self) -> dict[str, Any]:
        """Return the shape, the type, and a hash of `SAMPLE` evenly spread images."""
        places = np.unique(np.linspace(0, len(self) - 1, min(SAMPLE, len(self))).astype(int))
        digest = hashlib.sha256()
        for part in np.array_split(places, max(1, len(places) // 16)):
            numbers = part if self.kept is None else self.kept[part]
            digest.update(np.ascontiguousarray(self.raw(numbers.tolist())).tobytes())
        kind = {"dtype": self.array.dtype.name, **self.scale.record()}
        sample = {"sha256": digest.hexdigest(), "of": f"{len(places)} images, evenly spread"}
        return {"shape": list(self.shape), **kind, **sample}


def _file_of(array: np.ndarray) -> tuple[Path, int] | None:
    """Return the file that an array of whole images is mapped from, and its offset there."""
    root = array
    while isinstance(root.base, np.memmap):
        root = root.base
    if not isinstance(root, np.memmap) or root.filename is None or not array.flags.c_contiguous:
        return None
    begin = array.__array_interface__["data"][0] - root.__array_interface__["data"][0]
    return Path(root.filename), root.offset + begin


class PictureFolder(Source):
    """The pictures of a folder, or of one file, decoded when they are needed.

    Args:
        folder: Pictures of one size, as for `load_images`.
        skip_bad: Read all of them once, and leave out those that cannot be read or differ from
            most. Otherwise the first bad picture ends the run.
        span: Numbers of black and white in the files; None: see `scale`.
        nan: See `load_images`.
        select: Their axes, and the channels to read.

    >>> from unmurk.io.saving import save_images
    >>> files = save_images(torch.ones(3, 1, 4, 6), "white", format="png")
    >>> source = PictureFolder(Path("white"))
    >>> source.shape, source.kind, float(source[1:2].mean())
    ((3, 1, 4, 6), '4x6 gray 8-bit', 1.0)
    """

    def __init__(
        self,
        folder: Path,
        skip_bad: bool = False,
        span: Spans = None,
        nan: Nan = "refuse",
        select: Selection = ALL,
    ) -> None:
        files = [folder] if holds_images(folder) else pictures_in(folder)
        self.nan, self.select = nan, select
        with ThreadPoolExecutor(READERS) as pool:
            found = list(pool.map(self.examine if skip_bad else self.listed, files))
        self.pages = [(f, page) for f, pages in zip(files, found, strict=True) for page in pages]
        if skip_bad:
            self.leave_out(folder)
        first, place = self.pages[0][0], self.pages[0][1].place
        with open_pages(first, select) as opened:
            shape, dtype, bits = opened.shape, opened.dtype, opened.bits
            masked = opened.masked
            describe(opened.read(place).shape, dtype)
        self.kind = describe(shape, dtype)
        extents = survey(list(dict.fromkeys(file for file, _ in self.pages)), span, select=select)
        extent = extents.get(dtype)
        self.note = extent.note if extent is not None else ""
        bits = bits or (extent.bits if extent is not None else 0)
        known = span_for(span, dtype) or (extent.span if extent is not None else None)
        self.scale: Scale = Scale.of(dtype, known, bits)
        self.floats = np.dtype(dtype).kind == "f" or masked
        self.shape = (len(self.pages), shape[2], *shape[:2])

    def listed(self, file: Path) -> list["_Found"]:
        """List the images of a file without reading their pixels."""
        if has_number_type(file):
            return [_Found(0, file.name, "")]
        with open_pages(file, self.select) as pages:
            return [_Found(i, name, "") for i, name in enumerate(page_names(file, len(pages)))]

    def examine(self, file: Path) -> list["_Found"]:
        """Read a file and return what its images are, or why they cannot be used."""
        try:
            found = []
            with open_pages(file, self.select) as pages:
                for place, name in enumerate(page_names(file, len(pages))):
                    pixels = pages.read(place)
                    try:
                        check_finite(pixels, str(file), self.nan)
                        bad_pixels(pages, place, str(file), self.nan)
                        found.append(_Found(place, name, describe(pixels.shape, pages.dtype)))
                    except InputError:
                        found.append(_Found(place, name, "", "not finite"))
            return found
        except InputError as error:
            return [_Found(0, file.name, "", str(error))]

    def leave_out(self, folder: Path) -> None:
        """Keep the images of the most frequent kind, and list the others with their reasons."""
        kinds = [page.kind for _, page in self.pages if page.kind]
        if not kinds:
            raise InputError(f"none of the {len(self.pages)} pictures in {folder} can be read")
        usual = usual_kind(kinds)
        self.skipped = sorted(
            (page.name, page.reason or f"{page.kind}, others are {usual}")
            for _, page in self.pages
            if page.kind != usual
        )
        self.pages = [(file, page) for file, page in self.pages if page.kind == usual]

    def read(self, indices: list[int]) -> Tensor:
        """See `Source`."""
        with ThreadPoolExecutor(READERS) as pool:
            found = list(pool.map(self.one, indices))
        images = to_images(np.stack([pixels for pixels, _ in found]), self.scale, "NHWC")
        return hidden(images, [bad for _, bad in found])

    def one(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the pixels of one picture (H, W, C), and which of them are bad (H, W)."""
        file, page = self.pages[index]
        with open_pages(file, self.select) as pages:
            pixels = pages.read(page.place)
            found = describe(pixels.shape, pages.dtype)
            where = str(file) if len(pages) == 1 else f"page {page.place} of {file}"
            bad = bad_pixels(pages, page.place, where, self.nan)
        if found != self.kind:
            raise InputError(
                f"{file} is {found}, others are {self.kind}: make them alike, or leave the "
                "others out with --skip-bad"
            )
        return check_finite(pixels, where, self.nan), bad

    def fingerprint(self) -> dict[str, Any]:
        """Return a hash of the names, pages, sizes and times of change."""
        kept = {file: split_member(file)[0].stat() for file, _ in self.pages}
        stats: list[Any] = [
            (f.name, page.place, kept[f].st_size, kept[f].st_mtime_ns) for f, page in self.pages
        ]
        if self.select.to_dict():
            stats.append(self.select.to_dict())
        digest = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
        return {
            "shape": list(self.shape),
            **self.scale.record(),
            "sha256": digest,
            "of": "names, sizes and times",
        }


@dataclass(frozen=True)
class _Found:
    """An image of a file: its page and name, its kind, or why it cannot be used."""

    place: int
    name: str
    kind: str
    reason: str = ""


class Measured(Source):
    """Measurements in an HDF5 file, read when they are needed.

    Args:
        path: See `formats.hdf5.Kspace`.
        span: See `images.load_measurements`.

    >>> import h5py
    >>> with h5py.File("scan.h5", "w") as file:
    ...     file["kspace"] = np.array([[[3 + 4j, 0]]], np.complex64)
    >>> Measured("scan.h5:kspace")[:].flatten().tolist()  # real parts, then imaginary parts
    [3.0, 0.0, 4.0, 0.0]
    """

    floats = True

    def __init__(self, path: str | Path, span: Spans = None) -> None:
        self.found = Kspace(path)
        self.shape = self.found.shape
        self.white = measured_white(span, "float32", self.found.white)
        self.scale = Scale(gain=self.white)
        self.note = self.found.note if span is None else ""

    def read(self, indices: list[int]) -> Tensor:
        """See `Source`."""
        return torch.from_numpy(self.found.read(indices)).div_(self.white)

    def fingerprint(self) -> dict[str, Any]:
        """Return the shape, and the size and time of change of the file."""
        about = split_member(self.found.path)[0].stat()
        return {"shape": list(self.shape), "size": about.st_size, "time": about.st_mtime_ns}


class Simulated(Source):
    """Measurements simulated when they are needed, the same every time.

    Args:
        clean: Clean images.
        problem: The forward model and noise; image i has the number i.
        seed: Seed of the noise.

    >>> from unmurk.problem import Problem
    >>> clean = of_array("cells", np.zeros((3, 8, 8), np.uint8), None)
    >>> y = Simulated(clean, Problem("identity", 0.1), seed=0)
    >>> bool((y[1:2] == y[1:2]).all()), len(y)
    (True, 3)
    """

    def __init__(self, clean: Source, problem: Problem, seed: int) -> None:
        self.clean, self.problem, self.seed = clean, problem, seed
        self.skipped, self.scale, self.note = clean.skipped, clean.scale, clean.note
        self.shape = (len(clean), *self.read([0]).shape[1:])

    def read(self, indices: list[int]) -> Tensor:
        """See `Source`."""
        return self.problem.simulate(self.clean.read(indices), self.seed, indices)

    def fingerprint(self) -> dict[str, Any]:
        """Return that of the clean images, with the seed."""
        return self.clean.fingerprint() | {"shape": list(self.shape), "simulated": self.seed}


def of_array(
    what: Any,
    array: np.ndarray,
    span: Spans,
    layout: str | None = None,
    select: Selection = ALL,
) -> Array:
    """Return an array as a source, with the scale of its numbers.

    Integers may be read once to find the bits that they fill.

    >>> images = of_array("cells", np.full((3, 8, 8), 255, np.uint8), None)
    >>> images.shape, float(images[1:2].max())
    ((3, 1, 8, 8), 1.0)
    """
    if layout is None:
        array, layout = images_in(Path(str(what)), array, select)
    known = span_for(span, array.dtype)
    if known is not None or array.dtype.kind == "f":
        scale = Scale.of(array.dtype, known)
        return Array(array, replace(scale, layout=layout))
    source = Array(array, replace(Scale.of(array.dtype), layout=layout))
    extent = Extent(array.dtype)
    for numbers in _chunks(array):
        if extent.full:
            break
        extent.add(source.raw(numbers))
    found = Array(array, replace(Scale.of(array.dtype, bits=extent.bits), layout=layout))
    found.note = f"{what}: {extent.note}" if extent.note else ""
    return found


def _chunks(array: np.ndarray) -> Iterator[list[int]]:
    """Iterate over the numbers of images that are examined together."""
    step = max(1, CHUNK // max(1, array[0].nbytes))
    for start in range(0, len(array), step):
        yield list(range(start, min(start + step, len(array))))


def large(path: Path) -> bool:
    """Whether a folder, a file of images or a .npy file takes over `HELD` bytes as float32.

    >>> np.save("set.npy", np.zeros((3, 8, 8), np.uint8))
    >>> large(Path("set.npy"))
    False
    """
    if is_folder(path) or holds_images(path):
        files = pictures_in(path) if is_folder(path) else [path]
        return 4 * len(files) * next((n for n in map(_readable, files) if n), 0) > HELD
    return path.suffix.lower() == ".npy" and path.is_file() and 4 * map_array(path).size > HELD


def _readable(file: Path) -> int:
    """Return how many numbers a file holds; 0 if it cannot be read."""
    try:
        with open_pages(file) as pages:
            return len(pages) * math.prod(pages.shape)
    except InputError:
        return 0


def open_source(
    path: Path,
    skip_bad: bool = False,
    span: Spans = None,
    nan: Nan = "refuse",
    select: Selection = ALL,
) -> Source:
    """Open a folder of pictures, a file of images or a .npy file.

    Its images are read when they are needed.
    The units are those of `load_images`. Floats are read once, to find numbers that are not
    finite. Integers of more than 8 bits are read until it is clear that they fill their type.

    Args:
        path: The folder or the file.
        skip_bad, span, nan: See `load_images`.
        select: The axes of the files, and the channels to read.

    Raises:
        InputError: There is nothing at the path, it is another type of file, or its images are not
            finite.

    >>> np.save("set.npy", np.full((3, 8, 8), 51, np.uint8))
    >>> source = open_source(Path("set.npy"))
    >>> source.shape, round(float(source[2:].mean()), 4)
    ((3, 1, 8, 8), 0.2)
    """
    if is_folder(path) or holds_images(path):
        return PictureFolder(path, skip_bad, span, nan, select)
    if path.suffix.lower() != ".npy" or not path.is_file():
        raise InputError(f"{path}: give a folder of pictures or a .npy file")
    found = of_array(path, map_array(path), span, select=select)
    found.select = select
    return _finite(path, found, skip_bad, nan) if found.floats else found


def _finite(path: Path, source: Array, skip_bad: bool, nan: Nan) -> Array:
    """Return an array without the images that are not finite."""
    fine = [are_finite(source.raw(numbers), nan) for numbers in _chunks(source.array)]
    good = np.flatnonzero(np.concatenate(fine))
    bad = np.setdiff1d(np.arange(len(source.array)), good)
    if not len(bad):
        return source
    if not skip_bad or not len(good):
        check_finite(source.raw([int(bad[0])]), f"image {bad[0]:05d} in {path}", nan)
    found = Array(source.array, source.scale, good)
    found.skipped = [(f"{number:05d}", "not finite") for number in bad]
    found.select = source.select
    return found
