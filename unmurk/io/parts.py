"""Where the numbers of a capture are: in memory, in its file, or in a source."""

import math
import os
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import InputError
from .source import Source

__all__ = ["Cache", "InFile", "InMemory", "InSource", "Part", "Scratch"]

CACHED = 2**28  # bytes of the captures of a `Source` that are kept


class Part(Protocol):
    """One capture, wherever its numbers are.

    >>> part: Part = InMemory(np.zeros((4, 6, 3)))
    >>> part.shape, part.region(1, 2, 3, 4).shape
    ((4, 6, 3), (3, 4, 3))
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""

    def region(self, row: int, column: int, height: int, width: int) -> np.ndarray:
        """Return the numbers of a rectangle inside the capture, (height, width, C)."""


@dataclass(frozen=True, eq=False)
class InMemory:
    """A capture in memory, (H, W, C).

    >>> InMemory(np.arange(12).reshape(3, 4, 1)).region(1, 2, 2, 2)[..., 0].tolist()
    [[6, 7], [10, 11]]
    """

    pixels: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        height, width, channels = self.pixels.shape
        return height, width, channels

    def region(self, row: int, column: int, height: int, width: int) -> np.ndarray:
        """See `Part`."""
        return self.pixels[row : row + height, column : column + width]


@dataclass(frozen=True, eq=False)
class InFile:
    """A capture in an uncompressed file, row after row.

    Attributes:
        file: The file.
        offsets: Where its planes begin: one, or one for each channel.
        plane: Height, width, and numbers of a pixel in a plane.
        dtype: The number type, with its byte order.

    >>> pixels = np.arange(12, dtype="<u2").reshape(3, 4)
    >>> Path("raw.bin").write_bytes(pixels.tobytes())
    24
    >>> part = InFile(Path("raw.bin"), (0,), (3, 4, 1), pixels.dtype)
    >>> part.region(1, 2, 2, 2)[..., 0].tolist()
    [[6, 7], [10, 11]]
    """

    file: "Path | Scratch"
    offsets: tuple[int, ...]
    plane: tuple[int, int, int]
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        height, width, samples = self.plane
        return height, width, samples * len(self.offsets)

    def region(self, row: int, column: int, height: int, width: int) -> np.ndarray:
        """See `Part`.

        Raises:
            InputError: The file cannot be read, or has become shorter.
        """
        if isinstance(self.file, Scratch):
            return self._read(self.file.descriptor, row, column, height, width)
        try:
            with open(self.file, "rb", buffering=0) as file:
                return self._read(file.fileno(), row, column, height, width)
        except OSError as error:
            raise InputError(f"cannot read {self.file}: {error.strerror}") from error

    def _read(self, descriptor: int, row: int, column: int, height: int, width: int) -> np.ndarray:
        _, length, samples = self.plane
        line = length * samples * self.dtype.itemsize
        planes = []
        for offset in self.offsets:
            data = os.pread(descriptor, height * line, offset + row * line)
            if len(data) != height * line:
                raise InputError(
                    f"{self.file} is cut short: copy it again, then run the same command"
                )
            lines = np.frombuffer(data, self.dtype).reshape(height, length, samples)
            planes.append(lines[:, column : column + width])
        found = planes[0] if len(planes) == 1 else np.concatenate(planes, -1)
        return found.astype(found.dtype.newbyteorder("="))


@dataclass(frozen=True, eq=False)
class InSource:
    """A capture of a `Source`, read when it is needed; a cache holds the last ones.

    >>> from unmurk.io.source import of_array
    >>> source = of_array("set", np.full((5, 8, 9), 255, np.uint8), None)
    >>> part = InSource(Cache(source), number=3)
    >>> part.shape, part.region(2, 3, 1, 2)[..., 0].tolist()
    ((8, 9, 1), [[1.0, 1.0]])
    """

    cache: "Cache"
    number: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        channels, height, width = self.cache.source.shape[1:]
        return height, width, channels

    def region(self, row: int, column: int, height: int, width: int) -> np.ndarray:
        """See `Part`."""
        image = self.cache.read(self.number)
        return np.moveaxis(image[:, row : row + height, column : column + width], 0, -1)


class Cache:
    """The last images of a source that were read, up to `CACHED` bytes.

    >>> from unmurk.io.source import of_array
    >>> cache = Cache(of_array("set", np.full((5, 8, 9), 255, np.uint8), None))
    >>> cache.read(3) is cache.read(3)  # the second time from memory
    True
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._images: OrderedDict[int, np.ndarray] = OrderedDict()
        self._most = max(1, CACHED // (4 * math.prod(source.shape[1:])))
        self._lock = threading.Lock()

    def read(self, number: int) -> np.ndarray:
        """Return an image (C, H, W)."""
        with self._lock:
            if number in self._images:
                self._images.move_to_end(number)
                return self._images[number]
        image = self.source.read([number])[0].numpy()
        with self._lock:
            self._images[number] = image
            while len(self._images) > self._most:
                self._images.popitem(last=False)
        return image


class Scratch:
    """A file without a name for decoded captures; the system removes it when the process ends.

    Args:
        folder: Where it is made; the nearest folder above, if there is none.
        size: Bytes that it will hold.

    Raises:
        InputError: The disk has no room, or the file cannot be made.

    >>> scratch = Scratch(Path("."), size=24)
    >>> first, second = (scratch.add(np.full((1, 3, 1), n, np.float32)) for n in (1, 2))
    >>> second.offsets, second.region(0, 0, 1, 3).flatten().tolist()
    ((12,), [2.0, 2.0, 2.0])
    """

    def __init__(self, folder: Path, size: int) -> None:
        while not folder.is_dir() and folder != folder.parent:
            folder = folder.parent
        self.folder = folder
        try:
            free = shutil.disk_usage(folder).free
            if size > free:
                raise InputError(
                    f"decoding the images takes {size / 2**30:.1f} GiB of disk in {folder} and "
                    f"{free / 2**30:.1f} GiB are free: free some, or give uncompressed TIFF files"
                )
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)
        except OSError as error:
            raise InputError(f"cannot write into {folder}: {error.strerror}") from error
        weakref.finalize(self, self._file.close)
        self.descriptor, self.end = self._file.fileno(), 0

    def __str__(self) -> str:
        return f"the scratch file in {self.folder}"

    def add(self, pixels: np.ndarray) -> InFile:
        """Write a capture (H, W, C) and return its place."""
        flat: Any = np.ascontiguousarray(pixels).reshape(-1)
        data = memoryview(flat).cast("B")
        start, written = self.end, 0
        try:
            while written < len(data):
                written += os.pwrite(self.descriptor, data[written:], start + written)
        except OSError as error:
            raise InputError(f"cannot write {self}: {error.strerror}") from error
        self.end += len(data)
        height, width, channels = pixels.shape
        return InFile(self, (start,), (height, width, channels), pixels.dtype)
