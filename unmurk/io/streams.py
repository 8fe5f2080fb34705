"""Array files written batch by batch, so that memory never holds the whole array.

The size of a .npy or idx file is known from the first batch on. Its space on the disk is reserved
before anything is computed, so a full disk is noticed at once and no later write fails.
"""

import gzip
import math
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from ..errors import InputError
from .atomic import Partial, PartialWriter, unwritable
from .scale import Scale

__all__ = ["ImagesWriter", "NpyWriter", "arranged"]


class NpyWriter:
    """A .npy file of a known shape; its parts are written in any order.

    Args:
        out: The file.
        shape: Its shape.
        dtype: Its number type.

    Raises:
        InputError: The disk has no space for it, or the place cannot be written.

    >>> import tempfile
    >>> out = Path(tempfile.mkdtemp()) / "x.npy"
    >>> writer = NpyWriter(out, (2, 3))
    >>> writer.write(1, np.ones((1, 3)))
    >>> writer.write(0, np.zeros((1, 3)))
    >>> writer.close()
    >>> np.load(out).tolist()
    [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """

    def __init__(self, out: Path, shape: Sequence[int], dtype: str = "float32") -> None:
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self._part = Partial(out)
        try:
            _npy_header(self._part.file, self.shape, self.dtype)
            self._start = self._part.file.tell()
            self._part.reserve(self._start + math.prod(self.shape) * self.dtype.itemsize)
        except BaseException:
            self._part.abandon()
            raise

    def write(self, first: int, values: np.ndarray, axis: int = 0) -> None:
        """Write the entries `first`, `first` + 1, ... of an axis.

        Args:
            first: The first entry.
            values: Their values; the other axes have the lengths of the shape.
            axis: The axis.
        """
        values, axis = np.ascontiguousarray(values, self.dtype), axis % len(self.shape)
        outer = math.prod(self.shape[:axis])
        inner = math.prod(self.shape[axis + 1 :]) * self.dtype.itemsize
        try:
            for number, block in enumerate(values.reshape(outer, -1)):
                place = self._start + (number * self.shape[axis] + first) * inner
                self._part.file.seek(place)
                self._part.file.write(block.tobytes())
        except OSError as error:
            raise unwritable(self._part.out, error) from error

    def close(self) -> None:
        """Give the file its name."""
        self._part.finish()

    def abandon(self) -> None:
        """Remove the partial file; nothing happens after `close`."""
        self._part.abandon()


class ImagesWriter(PartialWriter):
    """An array file of images, written image after image.

    Args:
        out: The file.
        count: The number of images that it will hold.
        shape: (C, H, W) of an image.
        scale: The type, range and order of axes of the numbers.
        form: "npy", "npz" or "idx" (gzipped if the name ends in .gz).

    Raises:
        InputError: An idx file has several channels, or the place cannot be written.

    >>> import torch
    >>> writer = ImagesWriter(Path("y.npy"), 2, (1, 1, 2), Scale.of("uint8"), "npy")
    >>> for value in (0.2, 1.0):
    ...     writer.write(torch.full((1, 1, 1, 2), value))
    >>> writer.close()
    >>> np.load("y.npy").tolist()
    [[[[51, 51]]], [[[255, 255]]]]
    """

    def __init__(
        self, out: Path, count: int, shape: tuple[int, ...], scale: Scale, form: str
    ) -> None:
        if form == "idx" and shape[0] != 1:
            raise InputError(f"an idx file holds gray images, not {shape[0]} channels: use .npy")
        self.out, self.scale, self.layout = out, scale, scale.layout if form != "idx" else "NHW"
        kind = np.dtype(scale.dtype)
        one = arranged(np.zeros((1, *shape), np.uint8), self.layout, 2).shape[1:]
        alone = "N" not in self.layout and count == 1
        size = count * math.prod(shape) * kind.itemsize
        self._part, self._open = Partial(out), ExitStack()
        self._file: IO[bytes] = self._part.file
        try:
            if form == "idx":
                if out.suffix.lower() == ".gz":
                    packed: Any = gzip.GzipFile("", "wb", 9, self._part.file, mtime=0)
                    self._file = self._open.enter_context(packed)
                self._file.write(b"\0\0\x08\x03" + np.array((count, *one), ">u4").tobytes())
            else:
                if form == "npz":
                    archive = zipfile.ZipFile(self._part.file, "w", zipfile.ZIP_DEFLATED)
                    member = self._open.enter_context(archive).open(
                        f"{scale.key}.npy", "w", force_zip64=True
                    )
                    self._file = self._open.enter_context(member)
                _npy_header(self._file, one if alone else (count, *one), kind)
            if self._file is self._part.file:
                self._part.reserve(self._file.tell() + size)
        except BaseException:
            self.abandon()
            raise

    def write(self, images: Tensor) -> None:
        """Write the next images (n, C, H, W), in units of [0, 1].

        Raises:
            InputError: They are not finite, or the disk is full.
        """
        if not bool(images.isfinite().all()):
            raise InputError(
                f"the images for {self.out} have values that are not finite: nothing was written"
            )
        values = arranged(self.scale.to_file(images), self.layout, len(images))
        try:
            self._file.write(np.ascontiguousarray(values).tobytes())
        except OSError as error:
            raise unwritable(self.out, error) from error


def arranged(array: np.ndarray, layout: str, count: int) -> np.ndarray:
    """Return (N, C, H, W) in another order of axes, as far as the lengths of the axes allow.

    Args:
        array: Some or all images of a file.
        layout: See `Scale`.
        count: The number of images in the whole file.

    >>> arranged(np.zeros((5, 3, 4, 4)), "NHWC", 5).shape
    (5, 4, 4, 3)
    """
    if "C" not in layout and array.shape[1] == 1:
        array = array[:, 0]
    elif layout != "NCHW":
        array = np.moveaxis(array, 1, -1)
    return array[0] if "N" not in layout and count == 1 else array


def _npy_header(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> None:
    described = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": tuple(shape),
    }
    np.lib.format.write_array_header_1_0(file, described)
