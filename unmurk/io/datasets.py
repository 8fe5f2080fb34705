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
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..problem import Problem
from .formats.pictures import ENDINGS, read_picture
from .images import describe, layout_of, pictures_in, to_images
from .scale import LARGEST, Scale

__all__ = [
    "HELD",
    "Array",
    "Batches",
    "Pictures",
    "Simulated",
    "Source",
    "as_source",
    "large",
    "open_source",
    "simulated",
    "some",
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
    """

    shape: tuple[int, ...]
    device = torch.device("cpu")
    skipped: Sequence[tuple[str, str]] = ()

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
        self.array, self.scale, self.kept = array, scale, kept
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


class Pictures(Source):
    """The pictures of a folder, decoded when they are wanted.

    Args:
        folder: Pictures of one size, as for `load_images`.
        skip_bad: Read all of them once, and leave out those that cannot be read or differ from
            most. Otherwise the first bad one that is met ends the run.
    """

    def __init__(self, folder: Path, skip_bad: bool = False) -> None:
        self.files = pictures_in(folder)
        if skip_bad:
            self.kind, self.skipped = self.look()
        else:
            self.kind = describe(read_picture(self.files[0]))
        first = read_picture(self.files[0])
        self.scale = Scale(gain=LARGEST[first.dtype.name], dtype=first.dtype.name, format="png")
        self.shape = (len(self.files), first.shape[2], *first.shape[:2])

    def look(self) -> tuple[str, list[tuple[str, str]]]:
        """Keeps the good files; returns the kind of most, and the others with their reasons."""

        def kind(file: Path) -> tuple[str, str]:
            try:
                return describe(read_picture(file)), ""
            except InputError as error:
                return "", str(error)

        with ThreadPoolExecutor(READERS) as pool:
            found = list(pool.map(kind, self.files))
        kinds = [k for k, _ in found if k]
        if not kinds:
            raise InputError(
                f"none of the {len(self.files)} pictures in {self.files[0].parent} can be read"
            )
        usual = max(dict.fromkeys(kinds), key=kinds.count)
        bad = [
            (file.name, reason or f"{k}, others are {usual}")
            for file, (k, reason) in zip(self.files, found, strict=True)
            if k != usual
        ]
        self.files = [f for f, (k, _) in zip(self.files, found, strict=True) if k == usual]
        return usual, bad

    def read(self, rows: list[int]) -> Tensor:
        with ThreadPoolExecutor(READERS) as pool:
            pixels = list(pool.map(self.one, rows))
        return to_images(np.stack(pixels), self.scale, "NHWC")

    def one(self, row: int) -> np.ndarray:
        """The pixels of one picture (H, W, C)."""
        pixels = read_picture(self.files[row])
        if describe(pixels) != self.kind:
            raise InputError(
                f"{self.files[row]} is {describe(pixels)}, others are {self.kind}: make them "
                "alike, or use skip_bad"
            )
        return pixels

    def fingerprint(self) -> dict[str, Any]:
        """A hash of names, sizes and times of change."""
        stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in self.files]
        digest = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
        return {"shape": list(self.shape), "sha256": digest, "of": "names, sizes and times"}


class Simulated(Source):
    """Measurements simulated when they are wanted, the same every time.

    Args:
        clean: Clean images.
        problem: How they are measured; image i is number i.
        seed: Seed of the noise.
    """

    def __init__(self, clean: Source, problem: Problem, seed: int) -> None:
        self.clean, self.problem, self.seed = clean, problem, seed
        self.skipped = clean.skipped
        self.shape = (len(clean), *self.read([0]).shape[1:])

    def read(self, rows: list[int]) -> Tensor:
        return self.problem.simulate(self.clean.read(rows), self.seed, rows)

    def fingerprint(self) -> dict[str, Any]:
        """That of the clean images, and the seed."""
        return self.clean.fingerprint() | {"shape": list(self.shape), "simulated": self.seed}


def some(y: Tensor | Source) -> Tensor:
    """Measurements in memory: all, or as many of a source as `HELD` allows."""
    return y if isinstance(y, Tensor) else y[: max(1, HELD // (4 * math.prod(y.shape[1:])))]


def simulated(clean: Tensor | Source, problem: Problem, seed: int) -> Tensor | Source:
    """Measurements of clean images, at once or when they are wanted."""
    if isinstance(clean, Tensor):
        return problem.simulate(clean, seed)
    return Simulated(clean, problem, seed)


# ---------------------------------------------------------------- what data may be


def as_source(data: Any) -> Tensor | Source:
    """Measurements as a float32 tensor, or as a source of them.

    Args:
        data: A tensor or an array (N, C, H, W), of 8 or 16 bits or in units of [0, 1]; the path of
            a .npy file of these, or of a folder of pictures; a source; or an object whose
            attribute `y` is one of these.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, Tensor):
        if data.dtype not in (torch.uint8, torch.uint16):
            return data.float()
        data = data.cpu().numpy()
    if isinstance(data, np.ndarray):
        if data.ndim < 3:
            raise InputError(f"measurements must be (N, C, H, W), not {data.shape}")
        return Array(data, _scale(Path("the array"), data))
    if isinstance(data, str | Path):
        return open_source(Path(data))
    return as_source(data.y)


def _scale(file: Path, array: np.ndarray, limits: tuple[float, float] = (0.0, 1.0)) -> Scale:
    """What the numbers of an array between limits mean."""
    return replace(Scale.of(array.dtype, limits), layout=layout_of(file, array))


def large(path: Path) -> bool:
    """Whether a folder or a .npy file holds more than `HELD` bytes as float32."""
    if path.is_dir():
        files = pictures_in(path)
        count = next((read.size for read in map(_readable, files) if read is not None), 0)
        return 4 * count * len(files) > HELD
    return path.suffix.lower() == ".npy" and path.is_file() and 4 * _mapped(path).size > HELD


def _readable(file: Path) -> np.ndarray | None:
    try:
        return read_picture(file)
    except InputError:
        return None


def _mapped(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    return array


def open_source(path: Path, skip_bad: bool = False) -> Source:
    """The images of a folder of pictures or a .npy file, to be read when they are wanted.

    The units are those of `load_images`, for which numbers that are not whole are read once.

    Raises:
        InputError: nothing there, another type of file, images that are not finite.
    """
    if path.is_dir():
        return Pictures(path, skip_bad)
    if path.suffix.lower() in ENDINGS or path.suffix.lower() != ".npy" or not path.is_file():
        raise InputError(f"{path}: give a folder of pictures or a .npy file")
    array = _mapped(path)
    if "N" not in layout_of(path, array):
        array = array[None]
    if array.dtype.name in LARGEST:
        return Array(array, _scale(path, array))
    return _looked_through(path, array, skip_bad)


def _looked_through(path: Path, array: np.ndarray, skip_bad: bool) -> Array:
    """An array of other numbers, without the images that are not finite."""
    source = Array(array, _scale(path, array))
    step = max(1, CHUNK // array[0].nbytes)
    kept, low, high = [], np.inf, -np.inf
    for start in range(0, len(array), step):
        part = source.raw(list(range(start, min(start + step, len(array)))))
        fine = np.isfinite(part.reshape(len(part), -1)).all(1)
        kept.append(start + np.flatnonzero(fine))
        if fine.any():
            low, high = min(low, float(part[fine].min())), max(high, float(part[fine].max()))
    numbers = np.concatenate(kept)
    bad = np.setdiff1d(np.arange(len(array)), numbers)
    if len(bad) and (not skip_bad or not len(numbers)):
        raise InputError(f"image {bad[0]:05d} in {path} has values that are not finite")
    scale = replace(_scale(path, array, (low, high)), layout=source.scale.layout)
    found = Array(array, scale, numbers if len(bad) else None)
    found.skipped = [(f"{number:05d}", "not finite") for number in bad]
    return found


# ---------------------------------------------------------------- batches


class Batches:
    """The rows and measurements of every step; those of a source are read ahead.

    Args:
        y: Measurements (N, ...).
        choose: The rows of a step, (B,).
        device: Where the measurements go.
    """

    def __init__(
        self, y: Tensor | Source, choose: Callable[[int], Tensor], device: torch.device
    ) -> None:
        self.y, self.choose, self.device = y, choose, device
        self.pool = ThreadPoolExecutor(1)
        self.coming: dict[int, Future[tuple[Tensor, Tensor]]] = {}

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Rows (B,) and measurements (B, ...) of a step."""
        if isinstance(self.y, Tensor):
            return self.read(step)
        wanted = range(step, step + 1 + AHEAD)
        self.coming = {k: v for k, v in self.coming.items() if k in wanted}
        for k in wanted:
            if k not in self.coming:
                self.coming[k] = self.pool.submit(self.read, k)
        rows, y = self.coming.pop(step).result()
        return rows, y.to(self.device)

    def read(self, step: int) -> tuple[Tensor, Tensor]:
        """The same, read now."""
        rows = self.choose(step)
        y = self.y[rows.to(self.y.device)]
        return rows, y.to(self.device) if isinstance(self.y, Tensor) else y

    def close(self) -> None:
        """Reads no further."""
        self.pool.shutdown(cancel_futures=True)
