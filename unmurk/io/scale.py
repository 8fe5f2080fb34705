r"""The scale of intensities: numbers of a file to images and back.

Inside unmurk an image is float32 (C, H, W) in units of [0, 1]. A file holds other numbers, and the
`Scale` of a set records how to return to them:

.. math:: v = \mathrm{offset} + \mathrm{gain} \cdot x ,

where x is an image value and v the number in the file. The scale is never derived from the minimum
and maximum of a file or a set:

- Floats are used as they are (gain 1).
- Integers are divided by the largest number of their type (255, 65535, 4294967295, ...). So are
  signed integers (32767 becomes 1); their negative numbers are below 0.
- If metadata give the number of significant bits (OME, DICOM), these take the place of the type.
- If metadata define the numbers of black and white (rescaled DICOM), these are used.
- If the numbers of a set have more than 8 bits and all stay below 1/8 of the range of their type,
  they come from a camera with fewer bits: the smallest of 10, 12 and 14 bits that holds the whole
  set is used (`Extent`).
- Numbers of black and white given by the user (`Span`) take precedence over all of these.

Integers are rounded and clipped to the range of their type, or of the bits found. float32 keeps 24
significant bits: integers below 2^24 are restored exactly, and so are both ends of every type.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

__all__ = [
    "Extent",
    "Scale",
    "Span",
    "Spans",
    "check_units",
    "finite",
    "joined",
    "narrowed",
    "span_for",
]

BITS = (10, 12, 14)
FULL = 8  # a set whose largest number is at least 1/8 of the type fills it
SIGMAS = 8.0  # distance of the median of a set of floats from [0, 1], in noise sigmas, at most
LEAST = 0.05  # the same in intensities, if the noise is weaker
WIDEST = 2.0  # the same for all but two thousandths of the numbers, beside the noise


class Span(NamedTuple):
    """The numbers of black and of white in files.

    Attributes:
        black: The number that becomes 0.
        white: The number that becomes 1.
        dtype: The number type that the span applies to; None: every type.

    >>> Span(0, 4095, "uint16")  # a camera of 12 bits
    Span(black=0, white=4095, dtype='uint16')
    """

    black: float
    white: float
    dtype: str | None = None


Spans = tuple[float, float] | Span | Sequence[Span] | None
"""A span for all files, or one for each number type; None: no span is known."""


def span_for(spans: Spans, dtype: Any) -> Span | None:
    """Return the span that applies to numbers of a type; None without one.

    >>> span_for((0, 4095), "uint16")
    Span(black=0, white=4095, dtype=None)
    """
    if not spans:
        return None
    several = isinstance(spans[0], tuple | list)
    listed = [Span(*span) for span in (spans if several else (spans,))]  # type: ignore[misc]
    name = np.dtype(dtype).name
    return next((span for span in listed if span.dtype in (None, name)), None)


def joined(spans: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Return the smallest span that holds all spans; None without any.

    >>> joined([(0, 10), (-2, 5)])
    (-2, 10)
    """
    return (min(s[0] for s in spans), max(s[1] for s in spans)) if spans else None


@dataclass(frozen=True)
class Scale:
    """The map between numbers of a file and images, and the kind of file.

    Attributes:
        offset: File value of image value 0.
        gain: File value of image value 1, minus the offset.
        dtype: Name of the file's number type.
        format: "png", "tif", "npy", "npz" or "idx".
        layout: Axes of an array file: "HW", "HWC", "NHW", "NHWC" or "NCHW".
        key: Name of the array in an npz file.
        bits: Bits that hold the set, if fewer than the type has; 0: all bits of the type.

    >>> scale = Scale.of("uint16", (0, 4095))
    >>> scale.from_file(np.array([[4095]], np.uint16)).item()
    1.0
    >>> int(scale.to_file(torch.tensor([[0.5]]))[0, 0])
    2048
    """

    offset: float = 0.0
    gain: float = 1.0
    dtype: str = "float32"
    format: str = "npy"
    layout: str = "NCHW"
    key: str = "images"
    bits: int = 0

    @classmethod
    def of(cls, dtype: Any, spans: Spans = None, bits: int = 0) -> "Scale":
        """Return the scale of numbers of a type.

        Args:
            dtype: The number type.
            spans: The numbers of black and white, if they are known.
            bits: Bits that hold the set, by its metadata or an `Extent`; 0: all of the type.

        Raises:
            InputError: White is not above black.
        """
        kind = np.dtype(dtype)
        span = span_for(spans, kind)
        if span is not None:
            black, white, _ = span
            if not -math.inf < black < white < math.inf or not math.isfinite(white - black):
                raise InputError(f"black is {black:g}, white {white:g}: white must be above black")
            return cls(float(black), float(white - black), kind.name)
        if kind.kind in "fb":
            return cls(dtype=kind.name)
        if bits:
            return cls(0.0, float(2**bits - 1), kind.name, bits=bits)
        return cls(0.0, float(np.iinfo(kind).max), kind.name)

    @property
    def span(self) -> Span | None:
        """The numbers of black and white; None if they follow from the type alone (floats as they
        are, 8 bits)."""
        ends = {"f": 1.0, "b": 1.0}.get(np.dtype(self.dtype).kind)
        plain = 255.0 if self.dtype == "uint8" else ends
        if not self.offset and self.gain == plain:
            return None
        return Span(self.offset, self.offset + self.gain, self.dtype)

    def from_file(self, values: np.ndarray) -> Tensor:
        """Convert file values to images, float32.

        Numbers that are not finite stay so, and those beyond float32 become infinite; readers
        refuse both beforehand, with `finite`.

        Raises:
            InputError: The range is so small that numbers become too large for float32.
        """
        if values.dtype.itemsize <= 2 and values.dtype.kind == "u" and not self.offset:
            images = torch.from_numpy(np.array(values, np.float32, order="C"))
            return images.div_(self.gain)
        if values.dtype.kind == "f" and (self.offset, self.gain) == (0.0, 1.0):
            with np.errstate(over="ignore"):
                return torch.from_numpy(np.array(values, np.float32, order="C"))
        with np.errstate(over="ignore"):
            scaled = (values.astype(np.float64) - self.offset) / self.gain
            found = np.ascontiguousarray(scaled, np.float32)
        if (~np.isfinite(found) & finite(values)).any():
            raise InputError(
                f"a range from {self.offset:g} to {self.offset + self.gain:g} makes images of "
                "numbers that float32 cannot hold: give one that the numbers fill, with --range"
            )
        return torch.from_numpy(found)

    def limits(self) -> tuple[int, int]:
        """Return the smallest and the largest integer that is written."""
        kind = np.dtype(self.dtype)
        if kind.kind == "b":
            return 0, 1
        info = np.iinfo(kind)
        if self.bits:
            return max(int(info.min), 1 - 2**self.bits), min(int(info.max), 2**self.bits - 1)
        return int(info.min), int(info.max)

    def clipped(self, images: Tensor) -> float:
        """Return the fraction of the images' numbers that writing clips."""
        if np.dtype(self.dtype).kind == "f":
            return 0.0
        low, high = self.limits()
        values = images.double() * self.gain + self.offset
        return float(((values < low - 0.5) | (values > high + 0.5)).double().mean())

    def to_file(self, images: Tensor) -> np.ndarray:
        """Convert images (..., H, W) to file values: scaled, rounded, and clipped to `limits`."""
        values = images.detach().cpu().double().numpy() * self.gain
        values += self.offset
        kind = np.dtype(self.dtype)
        if kind.kind == "f":
            return narrowed(values, kind)
        low, high = self.limits()
        np.rint(values, out=values)
        # the ends are set as integers: 2^64 - 1 is no float64, and the next one is too large
        # (and float32 does not tell -2^31 from 1 - 2^31)
        wide = kind.kind == "i" and kind.itemsize > 2 and not self.bits
        below, above = values <= (low + 1 if wide else low), values >= high
        inside = np.where(below | above, 0, values).astype(kind)
        inside[below], inside[above] = low, high
        return inside


def narrowed(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Round results to a type of floats.

    Raises:
        InputError: A finite number is too large for it.

    >>> narrowed(np.array([0.1, 60000.0]), "float16").tolist()
    [0.0999755859375, 60000.0]
    >>> narrowed(np.array([0.1, 70000.0]), "float16")
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: a result of 70000 does not fit the number type float16 of ...
    """
    with np.errstate(over="ignore"):
        found = values.astype(dtype)
    lost = np.isinf(found) & np.isfinite(values)
    if lost.any():
        worst = float(values[lost].flat[np.abs(values[lost]).argmax()])
        raise InputError(
            f"a result of {worst:g} does not fit the number type {np.dtype(dtype)} of its file: "
            "give a --range nearer to the data, or files of a wider type"
        )
    return found


class Extent:
    """The number of bits that the integers of a set fill; images are added until it is known.

    Args:
        dtype: The number type.

    Attributes:
        most: The largest absolute value so far.
        span: The numbers of black and white that hold those which the metadata of all files
            define; None: they define none.

    >>> extent = Extent("uint16")
    >>> extent.add(np.array([0, 3000], np.uint16))
    >>> extent.bits
    12
    """

    def __init__(self, dtype: Any) -> None:
        kind = np.dtype(dtype)
        self.wide = kind.kind in "iu" and kind.itemsize > 1
        self.limit = int(np.iinfo(kind).max) if kind.kind in "iu" else 0
        self.dtype, self.most = kind.name, 0
        self.span: tuple[float, float] | None = None

    def declare(self, span: tuple[float, float]) -> None:
        """Add the numbers of black and white that the metadata of a file define."""
        self.span = joined([span] if self.span is None else [self.span, span])

    @property
    def full(self) -> bool:
        """Whether further images cannot change the result."""
        return not self.wide or self.most * FULL >= self.limit

    def add(self, values: np.ndarray) -> None:
        """Add the numbers of further images."""
        if not self.full and values.size:
            self.most = max(self.most, int(values.max()), -int(values.min()))

    @property
    def bits(self) -> int:
        """10, 12 or 14 if these bits hold the set and it fills under 1/8 of its type; else 0."""
        if self.full or not self.most:
            return 0
        return next((bits for bits in BITS if self.most < 2**bits), 0)

    @property
    def note(self) -> str:
        """A remark about the range for the user, or an empty text."""
        if self.full or not self.most:
            return ""
        if self.bits:
            return (
                f"the largest number is {self.most} of {self.limit}: read as {self.bits} bits, "
                f"with white at {2**self.bits - 1}; --range BLACK WHITE sets another range"
            )
        return (
            f"the largest number is {self.most} of {self.limit}, so the images are almost black: "
            f"--range 0 {2 ** self.most.bit_length() - 1} sets a range that they fill"
        )


def finite(values: np.ndarray) -> np.ndarray:
    """Return which numbers are finite, also in float32 (up to 3.4e38), the type of images.

    >>> finite(np.array([1.0, np.inf, 1e39]))
    array([ True, False, False])
    """
    if values.dtype.kind != "f" or values.dtype.itemsize <= 4:
        return np.isfinite(values)
    return np.abs(values) <= np.finfo(np.float32).max


def check_units(what: Any, images: Tensor, sigma: float, scale: Scale | None = None) -> None:
    """Check that floats, read as they are, can be images in units of [0, 1].

    Numbers with a range that was given are checked too: it may be that of other files.

    Args:
        what: The file or folder, for the message.
        images: Images of the set (N, C, H, W); a part of it is enough.
        sigma: Standard deviation of their noise.
        scale: The scale that they were read with; None: floats as they are.

    Raises:
        InputError: The median lies outside [0, 1] by more than 8 sigma, or one number in a
            thousand above it or below it by more than 2 and 8 sigma (counts on a dark ground).

    >>> check_units("a.npy", torch.rand(2, 1, 8, 8), 0.1)
    >>> check_units("a.tif", torch.full((1, 1, 8, 8), 9e3), 0.1, Scale.of("uint16", (0, 1)))
    Traceback (most recent call last):
        ...
    unmurk.errors.InputError: a.tif has the median 9000, far from black at 0 and white at 1: ...
    """
    finite = images[images.isfinite()].double()
    if not finite.numel():
        return
    median = float(finite.median())
    reach = max(SIGMAS * sigma, LEAST)
    low, high = _thousandths(finite)
    if -reach <= median <= 1 + reach and -WIDEST - reach <= low and high <= 1 + WIDEST + reach:
        return
    if scale is not None and (scale.gain != 1 or not scale.dtype.startswith("float")):
        ends = [scale.offset + scale.gain * float(n) for n in (finite.min(), finite.max())]
        black, white = _guess(ends[0], ends[1])
        raise InputError(
            f"{what} has the median {scale.offset + scale.gain * median:.4g}, far from black at"
            f" {scale.offset:g} and white at {scale.offset + scale.gain:g}: give the numbers of"
            f" black and white in the files, such as --range {black:g} {white:g}"
        )
    black, white = _guess(float(finite.min()), float(finite.max()))
    inside = -reach <= median <= 1 + reach
    spread = f" and numbers from {low:.4g} to {high:.4g}" if inside else ""
    raise InputError(
        f"{what} holds floats with the median {median:.4g}{spread}, where black should be 0 and"
        " white 1: "
        f"give the numbers of black and white in the files, such as --range {black:g} {white:g}"
    )


def _thousandths(values: Tensor) -> tuple[float, float]:
    """Return the numbers that a thousandth of some values lie below, and above."""
    values = values[:: max(1, len(values) // 1_000_000)]
    count = len(values)
    low = values.kthvalue(max(1, math.ceil(count / 1000))).values
    return float(low), float(values.kthvalue(math.ceil(0.999 * count)).values)


def _guess(low: float, high: float) -> tuple[float, float]:
    """Suggest numbers of black and white."""
    if low >= 0:
        for white in (255.0, *(2.0**bits - 1 for bits in (*BITS, 16))):
            if high <= white:
                return 0.0, white
    width = max(high - low, 0.1 * max(abs(low), abs(high)), 1e-6)
    step = 10.0 ** math.floor(math.log10(width) - 1)
    black = math.floor(low / step)
    return black * step, max(math.ceil(high / step), black + 1) * step
