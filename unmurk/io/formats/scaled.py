"""Files whose numbers are scaled, and which come back with the header that they had.

FITS, NIfTI and DICOM store numbers n and declare a slope a and an intercept b; the physical
numbers are a n + b. What their readers and writers have in common stands here: both directions of
the scaling, streams that may be gzipped, the life of a writer that copies a header, and the axes
of results that combine repeated captures.
"""

import gzip
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from ...errors import InputError
from ..atomic import Partial, PartialWriter
from ..axes import by_scene
from ..scale import narrowed
from .registry import Pages

__all__ = ["HeaderWriter", "open_stream", "physical", "scenes_along", "stored"]

GZIP = b"\x1f\x8b"


def physical(numbers: np.ndarray, slope: float, intercept: float, dtype: str) -> np.ndarray:
    """Compute the physical numbers of stored ones, in float64, and round them to a type.

    Args:
        numbers: The stored numbers.
        slope: The slope a.
        intercept: The intercept b.
        dtype: The type of the result.

    >>> physical(np.array([0, 4095], np.uint16), 2.0, -1000.0, "float32")
    array([-1000.,  7190.], dtype=float32)
    """
    return (numbers * np.float64(slope) + intercept).astype(dtype)


def stored(
    numbers: np.ndarray,
    slope: float,
    intercept: float,
    kind: np.dtype,
    ends: tuple[int, int] | None = None,
) -> np.ndarray:
    """Compute the stored numbers of physical ones; integers are rounded and clipped.

    Args:
        numbers: The physical numbers.
        slope: The slope a.
        intercept: The intercept b.
        kind: The type of the stored numbers.
        ends: The least and the largest integer; None: those of the type.

    >>> stored(np.array([-1000.0, 7190.4, 1e9]), 2.0, -1000.0, np.dtype("uint16"))
    array([    0,  4095, 65535], dtype=uint16)
    """
    values = (numbers.astype(np.float64) - intercept) / slope
    if kind.kind == "f":
        return narrowed(values, kind)
    low, high = (np.iinfo(kind).min, np.iinfo(kind).max) if ends is None else ends
    # the largest integer of 64 bits is no float64: the next one below is
    most = float(high) if kind.itemsize < 8 else np.nextafter(float(high), 0)
    return np.rint(values).clip(float(low), most).astype(kind)


def scenes_along(lead: Sequence[int], repeats: int, axes: str = "") -> tuple[int, ...] | None:
    """Return the lengths of the axes that number images after captures became scenes.

    Captures of a scene lie along the axis T (see `axes.by_scene`). Else they are images in a row,
    so they lie along the last axes.

    Args:
        lead: The lengths for single captures, the slowest axis first.
        repeats: Number of captures of each scene.
        axes: The axes of the file.

    Returns:
        The lengths for scenes; None where scenes are no whole part of the axes.

    >>> scenes_along((5, 6), 3), scenes_along((4, 3), 6), scenes_along((4, 3), 2)
    ((5, 2), (2, 1), None)
    >>> scenes_along((4, 3), 2, "TZYX")
    (2, 3)
    """
    letters = "".join(a for a in axes if a not in "YXCS")
    if len(letters) == len(lead) > 1:
        moved = by_scene(Path(), np.broadcast_to(0, tuple(lead)), letters, repeats).shape
        if len(moved) > len(lead):
            return moved[:-1]
    found, left = list(lead), repeats
    for axis in reversed(range(len(found))):
        length = found[axis]
        if left % length == 0:
            found[axis], left = 1, left // length
        elif length % left == 0:
            found[axis], left = length // left, 1
        else:
            return None
    return tuple(found) if left == 1 else None


def open_stream(file: Path, resources: ExitStack) -> tuple[IO[bytes], int | None]:
    """Open a file that may be gzipped.

    Args:
        file: The file.
        resources: What closes the stream later.

    Returns:
        The stream of its bytes, unpacked, and their number; None where the file is gzipped.

    >>> _ = Path("a.bin").write_bytes(b"bytes"), Path("a.gz").write_bytes(gzip.compress(b"bytes"))
    >>> with ExitStack() as resources:
    ...     streams = [open_stream(Path(name), resources) for name in ("a.bin", "a.gz")]
    ...     [(stream.read(), length) for stream, length in streams]
    [(b'bytes', 5), (b'bytes', None)]
    """
    stream = resources.enter_context(file.open("rb"))
    packed = stream.read(2) == GZIP
    stream.seek(0)
    if not packed:
        return stream, file.stat().st_size
    unpacked: Any = resources.enter_context(gzip.GzipFile(fileobj=stream))
    return unpacked, None


class HeaderWriter(PartialWriter):
    """Base class of writers that copy the header of the file that the images came from.

    A subclass defines `write`, and `_finish` if something is left to write at the end.

    Args:
        out: The file. The suffix .gz compresses it.
        like: The images of the source. The writer closes them.
        history: A line that says how the images were made.
        floats: Whether the numbers are written as float32.
        repeats: Number of captures of each scene. `lead` holds the lengths of the axes that
            number the results, the slowest first.

    Raises:
        InputError: Scenes are no whole part of the axes of the source.

    >>> class Copy(HeaderWriter):
    ...     def write(self, pixels: np.ndarray) -> None:
    ...         (self._file or self._begin()).write(pixels.tobytes())
    >>> writer = Copy(Path("copied.raw.gz"), Pages())
    >>> writer.write(np.frombuffer(b"pixels", np.uint8))
    >>> writer.close()
    >>> gzip.decompress(Path("copied.raw.gz").read_bytes())
    b'pixels'
    """

    def __init__(
        self,
        out: Path,
        like: Pages,
        history: str = "",
        floats: bool = False,
        repeats: int = 1,
    ) -> None:
        self.out, self.history, self.floats = out, history, floats
        self._source = like
        self._open = ExitStack()
        self._file: IO[bytes] | None = None
        try:
            self.lead = self._scenes(repeats)
            self._part = Partial(out)
        except BaseException:
            like.close()
            raise

    def _scenes(self, repeats: int) -> tuple[int, ...]:
        """Return the lengths of the axes that number the results, the slowest first."""
        like = self._source
        found = scenes_along(like.lead, repeats, like.axes)
        if found is None:
            sizes = " x ".join(map(str, like.lead)) or "1"
            raise InputError(
                f"{self.out}: scenes of {repeats} captures are no whole part of the axes of "
                f"{like.file}, which has {sizes} images: give an --out that ends in .tif"
            )
        return found

    def _begin(self) -> IO[bytes]:
        """Return the stream to write to, compressed if the suffix says so."""
        self._file = self._part.file
        if self.out.name.lower().endswith(".gz"):
            packed: Any = gzip.GzipFile("", "wb", 6, self._part.file, mtime=0)
            self._file = self._open.enter_context(packed)
        return self._file

    def close(self) -> None:
        """Write what is left and give the file its name."""
        super().close()
        self._source.close()

    def abandon(self) -> None:
        """Remove the partial file; nothing happens after `close`."""
        try:
            super().abandon()
        finally:
            self._source.close()
