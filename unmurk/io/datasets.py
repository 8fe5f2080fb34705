"""Measurements that stay where they are: in a file or a folder, read batch by batch.

A `Source` is used as the tensor (N, C, H, W) that it stands for: it has a length, a shape and a
device, and `source[rows]` are those rows, float32. Whole numbers stay the whole numbers they are
until then (8 bits: 0 .. 255 become 0 .. 1).

Rows of a batch are drawn from (seed, step), so the next batches are known and are read by a thread
while the networks work on this one (`Batches`). Files are read, not mapped: what a system caches
of them is not memory of the process.
"""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..devices import host_to, reader
from ..errors import InputError
from ..problem import Problem
from .folders import pictures_in, usual_kind
from .formats.arrays import map_array
from .formats.pictures import (
    ENDINGS,
    Nan,
    check_finite,
    describe,
    number_type,
    open_pages,
    page_names,
)
from .images import ImageSet
from .layouts import layout_of, to_images
from .scale import Extent, Scale, Spans, finite, span_for
from .survey import survey

__all__ = [
    "HELD",
    "Array",
    "Batches",
    "PictureFolder",
    "Simulated",
    "Source",
    "as_source",
    "large",
    "open_source",
    "simulated",
    "head",
]

HELD = 2**30  # bytes as float32 up to which the command line holds a data set in memory
SAMPLE = 1024  # rows that stand for an array in its fingerprint
CHUNK = 2**24  # bytes of an array looked at together
AHEAD = 2  # batches read ahead
READERS = 4  # threads that decode pictures


class Source:
    """Measurements (N, C, H, W) by row; members define `read` and `fingerprint`.

    Attributes:
        shape: (N, C, H, W).
        device: Where rows are put.
        skipped: Name and reason of each measurement that was left out.
        scale: How file values became these numbers, if they come from files.
        note: What a person should know of the scale, or nothing.
        floats: Whether a number may not be finite.
    """

    shape: tuple[int, ...]
    device = torch.device("cpu")
    skipped: Sequence[tuple[str, str]] = ()
    scale: Scale | None = None
    note = ""
    floats = False

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def to(self, device: torch.device | str) -> "Source":
        """The same measurements with their rows put on a device."""
        other = copy.copy(self)
        other.device = torch.device(device)
        return other

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """Rows (B, C, H, W), float32, by their numbers (B,); InputError if not finite."""
        numbers = list(range(len(self))[rows] if isinstance(rows, slice) else rows.tolist())
        found = self.read(numbers)
        finite = found.isfinite().flatten(1).all(1)
        if not finite.all():
            number = numbers[int(finite.int().argmin())]
            raise InputError(
                f"image number {number} has values that are not finite: leave it out, or mend it"
            )
        return found.to(self.device)

    def read(self, rows: list[int]) -> Tensor:
        """Rows (B, C, H, W), float32; called by several threads."""
        raise NotImplementedError

    def fingerprint(self) -> dict[str, Any]:
        """What tells this data set from another without reading all of it, fit for JSON."""
        raise NotImplementedError


class Array(Source):
    """The images of an array, in memory or mapped from a file.

    Args:
        array: (N, H, W), (N, H, W, C) or (N, C, H, W).
        scale: What its numbers mean; its layout says what the axes are.
        kept: Numbers of the images that are used; None: all.
    """

    def __init__(self, array: np.ndarray, scale: Scale, kept: np.ndarray | None = None) -> None:
        self.array, self.kept = array, kept
        self.scale: Scale = scale
        self.floats = array.dtype.kind == "f"
        one = to_images(np.zeros((1, *array.shape[1:]), array.dtype), scale, scale.layout)
        self.shape = (len(array) if kept is None else len(kept), *one.shape[1:])
        self.file = _file_of(array)

    def read(self, rows: list[int]) -> Tensor:
        numbers = rows if self.kept is None else self.kept[rows].tolist()
        return to_images(self.raw(numbers), self.scale, self.scale.layout)

    def raw(self, numbers: list[int]) -> np.ndarray:
        """Images with these numbers as they are in the array."""
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
                        raise InputError(f"{path} is cut short: mend it and run again")
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        return found

    def fingerprint(self) -> dict[str, Any]:
        """Shape, type, and a hash of `SAMPLE` evenly spread images."""
        places = np.unique(np.linspace(0, len(self) - 1, min(SAMPLE, len(self))).astype(int))
        digest = hashlib.sha256()
        for part in np.array_split(places, max(1, len(places) // 16)):
            numbers = part if self.kept is None else self.kept[part]
            digest.update(np.ascontiguousarray(self.raw(numbers.tolist())).tobytes())
        kind = {"dtype": self.array.dtype.name, "offset": self.scale.offset}
        sample = {"sha256": digest.hexdigest(), "of": f"{len(places)} images, evenly spread"}
        return {"shape": list(self.shape), **kind, "gain": self.scale.gain, **sample}


def _file_of(array: np.ndarray) -> tuple[Path, int] | None:
    """The file that an array is mapped from, whole images in order, and where it begins there."""
    root = array
    while isinstance(root.base, np.memmap):
        root = root.base
    if not isinstance(root, np.memmap) or root.filename is None or not array.flags.c_contiguous:
        return None
    begin = array.__array_interface__["data"][0] - root.__array_interface__["data"][0]
    return Path(root.filename), root.offset + begin


class PictureFolder(Source):
    """The pictures of a folder, decoded when they are wanted.

    Args:
        folder: Pictures of one size, as for `load_images`.
        skip_bad: Read all of them once, and leave out those that cannot be read or differ from
            most. Otherwise the first bad one that is met ends the run.
        span: The files' numbers of black and white; None: see `scale`.
        nan: See `load_images`.
    """

    def __init__(
        self, folder: Path, skip_bad: bool = False, span: Spans = None, nan: Nan = "refuse"
    ) -> None:
        files, self.nan = pictures_in(folder), nan
        with ThreadPoolExecutor(READERS) as pool:
            found = list(pool.map(self.look if skip_bad else _count, files))
        self.pages = [(f, page) for f, pages in zip(files, found, strict=True) for page in pages]
        if skip_bad:
            self.leave_out(folder)
        first, place = self.pages[0][0], self.pages[0][1].place
        with open_pages(first) as opened:
            shape, dtype, bits = opened.shape, opened.dtype, opened.bits
            describe(opened.read(place).shape, dtype)
        self.kind = describe(shape, dtype)
        extents = survey([file for file, _ in self.pages], span)
        extent = extents.get(dtype)
        self.note = extent.note if extent is not None else ""
        bits = bits or (extent.bits if extent is not None else 0)
        self.scale: Scale = Scale.of(dtype, span, bits)
        self.floats = np.dtype(dtype).kind == "f"
        self.shape = (len(self.pages), shape[2], *shape[:2])

    def look(self, file: Path) -> list["_Found"]:
        """The images of a file: what they are, or why they cannot be used."""
        try:
            found = []
            with open_pages(file) as pages:
                for place, name in enumerate(page_names(file, len(pages))):
                    pixels = pages.read(place)
                    try:
                        check_finite(pixels, str(file), self.nan)
                        found.append(_Found(place, name, describe(pixels.shape, pages.dtype)))
                    except InputError:
                        found.append(_Found(place, name, "", "not finite"))
            return found
        except InputError as error:
            return [_Found(0, file.name, "", str(error))]

    def leave_out(self, folder: Path) -> None:
        """Keeps the good images; the others are listed with their reasons."""
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

    def read(self, rows: list[int]) -> Tensor:
        with ThreadPoolExecutor(READERS) as pool:
            pixels = list(pool.map(self.one, rows))
        return to_images(np.stack(pixels), self.scale, "NHWC")

    def one(self, row: int) -> np.ndarray:
        """The pixels of one picture (H, W, C)."""
        file, page = self.pages[row]
        with open_pages(file) as pages:
            pixels = pages.read(page.place)
            found = describe(pixels.shape, pages.dtype)
            where = str(file) if len(pages) == 1 else f"page {page.place} of {file}"
        if found != self.kind:
            raise InputError(
                f"{file} is {found}, others are {self.kind}: make them alike, or use skip_bad"
            )
        return check_finite(pixels, where, self.nan)

    def fingerprint(self) -> dict[str, Any]:
        """A hash of names, pages, sizes and times of change."""
        stats = [
            (f.name, page.place, f.stat().st_size, f.stat().st_mtime_ns) for f, page in self.pages
        ]
        digest = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
        scale = {"offset": self.scale.offset, "gain": self.scale.gain}
        return {
            "shape": list(self.shape),
            **scale,
            "sha256": digest,
            "of": "names, sizes and times",
        }


@dataclass(frozen=True)
class _Found:
    """An image of a file: its page and name, what it is, or why it cannot be used."""

    place: int
    name: str
    kind: str
    reason: str = ""


def _count(file: Path) -> list[_Found]:
    """The images of a file, of which nothing but their number is looked up."""
    if number_type(file) is not None:
        return [_Found(0, file.name, "")]
    with open_pages(file) as pages:
        return [_Found(i, name, "") for i, name in enumerate(page_names(file, len(pages)))]


class Simulated(Source):
    """Measurements simulated when they are wanted, the same every time.

    Args:
        clean: Clean images.
        problem: How they are measured; image i is number i.
        seed: Seed of the noise.
    """

    def __init__(self, clean: Source, problem: Problem, seed: int) -> None:
        self.clean, self.problem, self.seed = clean, problem, seed
        self.skipped, self.scale, self.note = clean.skipped, clean.scale, clean.note
        self.shape = (len(clean), *self.read([0]).shape[1:])

    def read(self, rows: list[int]) -> Tensor:
        return self.problem.simulate(self.clean.read(rows), self.seed, rows)

    def fingerprint(self) -> dict[str, Any]:
        """That of the clean images, and the seed."""
        return self.clean.fingerprint() | {"shape": list(self.shape), "simulated": self.seed}


def head(y: Tensor | Source) -> Tensor:
    """Measurements in memory: all, or as many of a source as `HELD` allows."""
    return y if isinstance(y, Tensor) else y[: max(1, HELD // (4 * math.prod(y.shape[1:])))]


def simulated(clean: Tensor | Source, problem: Problem, seed: int) -> Tensor | Source:
    """Measurements of clean images, at once or when they are wanted."""
    if isinstance(clean, Tensor):
        return problem.simulate(clean, seed)
    return Simulated(clean, problem, seed)


# ---------------------------------------------------------------- what data may be


def as_source(data: Any, span: Spans = None, nan: Nan = "refuse") -> Tensor | Source:
    """Measurements as a float32 tensor, or as a source of them.

    Args:
        data: A tensor or an array (N, C, H, W), of integers or in units of [0, 1]; an `ImageSet`;
            the path of a .npy file, or of a folder of pictures; a source; a Dataset or DataLoader
            of torch (see `torch_data`); or an object whose attribute `y` is one of these.
        span: Numbers of black and white in integers and files; None: see `scale`.
        nan: See `load_images`.

    Raises:
        InputError: for anything else.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, ImageSet):
        return data.images
    if isinstance(data, Tensor):
        if data.is_floating_point():
            return data.float()
        array = data.cpu().numpy()
        if array.ndim == 4:  # no guess: a tensor is (N, C, H, W)
            return _of_array("the tensor", array, span, "NCHW")
        data = array
    if isinstance(data, np.ndarray):
        if data.ndim < 3:
            raise InputError(f"measurements must be (N, C, H, W), not {data.shape}")
        return _of_array("the array", data, span)
    if isinstance(data, str | Path):
        return open_source(Path(data), span=span, nan=nan)
    if isinstance(data, torch.utils.data.Dataset | torch.utils.data.DataLoader):
        from .torch_data import from_torch

        return from_torch(data)
    if not hasattr(data, "y"):
        raise InputError(
            "measurements are a tensor, an array, a path, a source, a Dataset or DataLoader of"
            f" torch, or an object with an attribute y, not {type(data).__name__}"
        )
    return as_source(data.y, span, nan)


def _of_array(what: Any, array: np.ndarray, span: Spans, layout: str | None = None) -> Array:
    """An array with the scale of its numbers, for which integers may be read once."""
    layout = layout or layout_of(Path(str(what)), array)
    array = array if "N" in layout else array[None]
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
    """Numbers of images that are looked at together."""
    step = max(1, CHUNK // max(1, array[0].nbytes))
    for start in range(0, len(array), step):
        yield list(range(start, min(start + step, len(array))))


def large(path: Path) -> bool:
    """Whether a folder or a .npy file holds more than `HELD` bytes as float32."""
    if path.is_dir():
        files = pictures_in(path)
        return 4 * len(files) * next((n for n in map(_readable, files) if n), 0) > HELD
    return path.suffix.lower() == ".npy" and path.is_file() and 4 * map_array(path).size > HELD


def _readable(file: Path) -> int:
    """Numbers in a file; 0 if it cannot be read."""
    try:
        with open_pages(file) as pages:
            return len(pages) * math.prod(pages.shape)
    except InputError:
        return 0


def open_source(
    path: Path, skip_bad: bool = False, span: Spans = None, nan: Nan = "refuse"
) -> Source:
    """The images of a folder of pictures or a .npy file, to be read when they are wanted.

    The units are those of `load_images`. Floats are read once, to find numbers that are not
    finite; integers of more than 8 bits until it is clear that they fill their type.

    Raises:
        InputError: nothing there, another type of file, images that are not finite.
    """
    if path.is_dir():
        return PictureFolder(path, skip_bad, span, nan)
    if path.suffix.lower() in ENDINGS or path.suffix.lower() != ".npy" or not path.is_file():
        raise InputError(f"{path}: give a folder of pictures or a .npy file")
    found = _of_array(path, map_array(path), span)
    return _finite(path, found, skip_bad) if found.floats and nan == "refuse" else found


def _finite(path: Path, source: Array, skip_bad: bool) -> Array:
    """An array without the images that are not finite."""
    kept = []
    for numbers in _chunks(source.array):
        part = source.raw(numbers)
        kept.append(numbers[0] + np.flatnonzero(finite(part.reshape(len(part), -1)).all(1)))
    good = np.concatenate(kept)
    bad = np.setdiff1d(np.arange(len(source.array)), good)
    if not len(bad):
        return source
    if not skip_bad or not len(good):
        check_finite(source.raw([int(bad[0])]), f"image {bad[0]:05d} in {path}")
    found = Array(source.array, source.scale, good)
    found.skipped = [(f"{number:05d}", "not finite") for number in bad]
    return found


# ---------------------------------------------------------------- batches


class Batches:
    """The rows and measurements of every step, read ahead by a thread.

    Args:
        y: Measurements (N, ...).
        choose: The rows of a step, (B,).
        device: Where the measurements go.
        prepare: Called by the thread with the rows and the device of every batch that it reads,
            for what else a step needs of them (masks to be drawn).
    """

    def __init__(
        self,
        y: Tensor | Source,
        choose: Callable[[int], Tensor],
        device: torch.device,
        prepare: Callable[[Tensor, torch.device], None] | None = None,
    ) -> None:
        self.y, self.choose, self.device, self.prepare = y, choose, device, prepare
        self.pool = reader()
        self.coming: dict[int, Future[tuple[Tensor, Tensor]]] = {}

    def batch_at(self, step: int) -> tuple[Tensor, Tensor]:
        """Rows (B,) and measurements (B, ...) of a step."""
        wanted = range(step, step + 1 + AHEAD)
        self.coming = {k: v for k, v in self.coming.items() if k in wanted}
        for k in wanted:
            if k not in self.coming:
                self.coming[k] = self.pool.submit(self.read, k)
        return self.coming.pop(step).result()

    def read(self, step: int) -> tuple[Tensor, Tensor]:
        """The same, read now."""
        rows = self.choose(step)
        y = host_to(self.y[rows.to(self.y.device)], self.device)
        if self.prepare is not None:
            self.prepare(rows, self.device)
        return rows, y

    def close(self) -> None:
        """Reads no further."""
        self.pool.shutdown(cancel_futures=True)
