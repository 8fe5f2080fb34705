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
- Numbers of black and white given by the user (`Span`) take precedence over all of these. They may
  be others for each channel; then so are offset and gain.

Integers are rounded and clipped to the range of their type, or of the bits found. float32 keeps 24
significant bits: integers below 2^24 are restored exactly, and so are both ends of every type.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

__all__ = [
    "Ends",
    "Extent",
    "Scale",
    "Span",
    "Spans",
    "along_channels",
    "channel_note",
    "check_units",
    "finite",
    "joined",
    "listed",
    "narrowed",
    "span_for",
]

BITS = (10, 12, 14)
FULL = 8  # a set whose largest number is at least 1/8 of the type fills it
SIGMAS = 8.0  # distance of the median of a set of floats from [0, 1], in noise sigmas, at most
LEAST = 0.05  # the same in intensities, if the noise is weaker
WIDEST = 2.0  # the same for all but two thousandths of the numbers, beside the noise


Ends = float | tuple[float, ...]
"""A number for all channels, or one for each."""


class Span(NamedTuple):
    """The numbers of black and of white in files.

    Attributes:
        black: The number that becomes 0, or one for each channel.
        white: The number that becomes 1, or one for each channel.
        dtype: The number type that the span applies to; None: every type.

    >>> Span(0, 4095, "uint16")  # a camera of 12 bits
    Span(black=0, white=4095, dtype='uint16')
    """

    black: Ends
    white: Ends
    dtype: str | None = None

    @property
    def channels(self) -> int:
        """The number of channels that have numbers of their own; 0: all have the same."""
        return len(self.black) if isinstance(self.black, tuple) else 0

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """Black and white: one pair for all channels, or one for each.

        >>> Span((0, 100), (4095, 900)).pairs
        [(0, 4095), (100, 900)]
        """
        if isinstance(self.black, tuple) and isinstance(self.white, tuple):
            return list(zip(self.black, self.white, strict=True))
        return [(self.black, self.white)]  # type: ignore[list-item]

    def __str__(self) -> str:
        """The option of a command that gives these numbers.

        >>> str(Span((0, 100), (4095, 900)))
        '--range 0 4095 --range 100 900'
        """
        return " ".join(f"--range {black:.15g} {white:.15g}" for black, white in self.pairs)


Spans = tuple[float, float] | Span | Sequence[Span] | Sequence[tuple[float, float]] | None
"""A span for all files, one `Span` for each number type, or pairs of numbers, one for each
channel; None: no span is known."""


def span_for(spans: Spans, dtype: Any) -> Span | None:
    """Return the span that applies to numbers of a type; None without one.

    >>> span_for((0, 4095), "uint16")
    Span(black=0, white=4095, dtype=None)
    >>> span_for([(0, 4095), (100, 900)], "uint16")  # two channels
    Span(black=(0, 100), white=(4095, 900), dtype=None)
    """
    name = np.dtype(dtype).name
    return next((span for span in listed(spans) if span.dtype in (None, name)), None)


def listed(spans: Spans) -> list[Span]:
    """Return spans as a list with one for each number type.

    Args:
        spans: Spans, also as JSON keeps them, with lists in place of tuples.

    Raises:
        InputError: They are none.

    >>> listed([(0, 4095), (100, 900)])
    [Span(black=(0, 100), white=(4095, 900), dtype=None)]
    """
    if not spans:
        return []
    several = not isinstance(spans, Span) and isinstance(spans[0], tuple | list)
    found = [_span(span) for span in (spans if several else (spans,))]
    if len(found) > 1 and all(span.dtype is None and not span.channels for span in found):
        pairs = [span.pairs[0] for span in found]
        found = [Span(tuple(black for black, _ in pairs), tuple(white for _, white in pairs))]
    return found


def _span(given: Any) -> Span:
    """Return a span from a sequence; JSON keeps tuples as lists."""
    parts: list[Any] = [tuple(part) if isinstance(part, list) else part for part in given]
    black, white, dtype = (parts + [None] * 3)[:3]
    ends = [end if isinstance(end, tuple) else (end,) for end in (black, white)]
    numbers = all(isinstance(number, Real) for end in ends for number in end)
    if (
        len(parts) > 3
        or len(ends[0]) != len(ends[1])
        or not numbers
        or not isinstance(dtype, str | None)
    ):
        raise InputError(f"a range is a pair of numbers, black and white, not {given}")
    return Span(black, white, dtype)


def joined(spans: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Return the smallest span that holds all spans; None without any.

    >>> joined([(0, 10), (-2, 5)])
    (-2, 10)
    """
    return (min(s[0] for s in spans), max(s[1] for s in spans)) if spans else None


def along_channels(ends: Ends) -> np.ndarray:
    """Return numbers with the axes of an image: (), or (C, 1, 1); float64.

    >>> along_channels((0, 100)).shape, along_channels(7).shape
    ((2, 1, 1), ())
    """
    found = np.asarray(ends, np.float64)
    return found[:, None, None] if found.ndim else found


@dataclass(frozen=True)
class Scale:
    """The map between numbers of a file and images, and the kind of file.

    Attributes:
        offset: File value of image value 0, or one for each channel.
        gain: File value of image value 1, minus the offset, or one for each channel.
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
    >>> scale = Scale.of("uint16", [(0, 4095), (100, 900)])  # two channels
    >>> scale.from_file(np.array([[[4095]], [[500]]], np.uint16)).flatten().tolist()
    [1.0, 0.5]
    """

    offset: Ends = 0.0
    gain: Ends = 1.0
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
            pairs = span.pairs
            for black, white in pairs:
                if not -math.inf < black < white < math.inf or not math.isfinite(white - black):
                    raise InputError(
                        f"black is {black:g}, white {white:g}: white must be above black"
                    )
            if len(set(pairs)) == 1 and len(pairs) > 1:  # channels alike
                pairs = pairs[:1]
            offset = tuple(float(black) for black, _ in pairs)
            gain = tuple(float(white - black) for black, white in pairs)
            if len(pairs) == 1:
                return cls(offset[0], gain[0], kind.name)
            return cls(offset, gain, kind.name)
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
        return self.ends

    @property
    def ends(self) -> Span:
        """The numbers of black and white, also where they follow from the type.

        >>> Scale.of("uint8").ends
        Span(black=0.0, white=255.0, dtype='uint8')
        """
        if isinstance(self.offset, tuple) and isinstance(self.gain, tuple):
            whites = (black + gain for black, gain in zip(self.offset, self.gain, strict=True))
            return Span(self.offset, tuple(whites), self.dtype)
        return Span(self.offset, self.offset + self.gain, self.dtype)  # type: ignore[operator]

    @property
    def channels(self) -> int:
        """The number of channels that have numbers of their own; 0: all have the same."""
        return len(self.gain) if isinstance(self.gain, tuple) else 0

    def channel(self, index: int) -> "Scale":
        """Return the scale of one channel.

        >>> Scale.of("uint16", [(0, 4095), (100, 900)]).channel(1).ends.white
        900.0
        """
        if isinstance(self.offset, tuple) and isinstance(self.gain, tuple):
            return replace(self, offset=self.offset[index], gain=self.gain[index])
        return self

    @property
    def step(self) -> Tensor:
        """File values for each unit of intensity, float64 of shape () or (C, 1, 1).

        A standard deviation times this is one in numbers of the file.
        """
        return torch.from_numpy(along_channels(self.gain))

    def _check_channels(self, shape: Sequence[int]) -> None:
        """Raise InputError for images (..., C, H, W) of another number of channels."""
        if self.channels and (len(shape) < 3 or shape[-3] != self.channels):
            count = shape[-3] if len(shape) >= 3 else 1
            raise InputError(
                f"black and white are known for {self.channels} channels, and these images have"
                f" {count}: give --range BLACK WHITE once for all channels, or once for each"
            )

    def record(self) -> dict[str, Any]:
        """Return offset and gain, fit for JSON.

        >>> Scale.of("uint16", (0, 4095)).record()
        {'offset': 0.0, 'gain': 4095.0}
        """
        kept = {"offset": self.offset, "gain": self.gain}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}

    def from_file(self, values: np.ndarray) -> Tensor:
        """Convert file values to images, float32, of the same shape.

        Values have the shape (..., H, W), and (..., C, H, W) if the channels have numbers of
        their own.

        Numbers that are not finite stay so, and those beyond float32 become infinite; readers
        refuse both beforehand, with `finite`.

        Raises:
            InputError: The range is so small that numbers become too large for float32, or the
                scale is one of another number of channels.
        """
        self._check_channels(values.shape)
        small = values.dtype.itemsize <= 2 and values.dtype.kind == "u"
        if small and not self.offset and not isinstance(self.gain, tuple):
            images = torch.from_numpy(np.array(values, np.float32, order="C"))
            return images.div_(self.gain)
        if values.dtype.kind == "f" and (self.offset, self.gain) == (0.0, 1.0):
            with np.errstate(over="ignore"):
                return torch.from_numpy(np.array(values, np.float32, order="C"))
        with np.errstate(over="ignore"):
            scaled = values.astype(np.float64) - along_channels(self.offset)
            scaled /= along_channels(self.gain)
            found = np.ascontiguousarray(scaled, np.float32)
        if (~np.isfinite(found) & finite(values)).any():
            raise InputError(
                f"{self.ends} makes images of numbers that float32 cannot hold: give a range that"
                " the numbers fill"
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
        self._check_channels(images.shape)
        values = images.double() * self.step + torch.from_numpy(along_channels(self.offset))
        return float(((values < low - 0.5) | (values > high + 0.5)).double().mean())

    def to_file(self, images: Tensor) -> np.ndarray:
        """Convert images (..., H, W) to file values: scaled, rounded, and clipped to `limits`."""
        self._check_channels(images.shape)
        values = images.detach().cpu().double().numpy() * along_channels(self.gain)
        values += along_channels(self.offset)
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
    if scale is not None and scale.channels:
        for index in range(scale.channels):
            part = images[:, index : index + 1]
            check_units(f"channel {index} of {what}", part, sigma, scale.channel(index))
        return
    finite = images[images.isfinite()].double()
    if not finite.numel():
        return
    median = float(finite.median())
    reach = max(SIGMAS * sigma, LEAST)
    low, high = _thousandths(finite)
    if -reach <= median <= 1 + reach and -WIDEST - reach <= low and high <= 1 + WIDEST + reach:
        return
    if scale is not None and (scale.gain != 1 or not scale.dtype.startswith("float")):
        first, last = scale.ends.pairs[0]
        numbers = [first + (last - first) * float(n) for n in (finite.min(), finite.max(), median)]
        black, white = _guess(numbers[0], numbers[1])
        raise InputError(
            f"{what} has the median {numbers[2]:.4g}, far from black at {first:g} and white at"
            f" {last:g}: give the numbers of black and white in the files, such as"
            f" --range {black:g} {white:g}"
        )
    black, white = _guess(float(finite.min()), float(finite.max()))
    inside = -reach <= median <= 1 + reach
    spread = f" and numbers from {low:.4g} to {high:.4g}" if inside else ""
    raise InputError(
        f"{what} holds floats with the median {median:.4g}{spread}, where black should be 0 and"
        " white 1: "
        f"give the numbers of black and white in the files, such as --range {black:g} {white:g}"
    )


def channel_note(images: Tensor, scale: Scale) -> str:
    """Return a remark if a channel fills far less of the range than another; else an empty text.

    Args:
        images: Images (N, C, H, W); a part of the set is enough.
        scale: The scale that they were read with.

    >>> x = torch.tensor([0.4, 0.02]).reshape(1, 2, 1, 1)
    >>> channel_note(x, Scale.of("uint16"))
    'channel 1 fills 5 % of what channel 0 fills: --range 0 32767 --range 0 2047 fits both'
    """
    if images.ndim != 4 or images.shape[1] < 2 or scale.channels:
        return ""
    brightest = []
    for channel in images.transpose(0, 1):
        values = channel[channel.isfinite()].double()
        if not values.numel():
            return ""
        brightest.append(_thousandths(values)[1])
    low, high = (brightest.index(end(brightest)) for end in (min, max))
    if brightest[high] <= 0 or brightest[low] * FULL > brightest[high]:
        return ""
    black, white = scale.ends.pairs[0]
    whites = [_round_white(black, (white - black) * end, scale.dtype) for end in brightest]
    ranges = Span((black,) * len(whites), tuple(whites))
    share = max(0.0, 100 * brightest[low] / brightest[high])
    return (
        f"channel {low} fills {share:.2g} % of what channel {high} fills: {ranges} fits"
        f" {'both' if len(whites) == 2 else 'each'}"
    )


def _round_white(black: float, width: float, dtype: str) -> float:
    """Suggest a number of white above black and a width: of full bits, or of one digit."""
    if np.dtype(dtype).kind in "iu":
        return black + 2.0 ** max(1, math.ceil(width)).bit_length() - 1
    digit = 10.0 ** math.floor(math.log10(max(width, 1e-6)))
    return black + math.ceil(max(width, 1e-6) / digit) * digit


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
