"""The scale of intensities: numbers of a file to images and back.

Inside unmurk an image is float32 (C, H, W) in units of [0, 1]. A file holds other numbers, and the
`Scale` of a set remembers how to return to them:

    file value = offset + gain * image,    rounded and clipped to the range of the file's type

8 bits have gain 255, 16 bits 65535. Numbers of other types keep their value where they are already
in units of [0, 1] (noise may reach beyond it), have gain 255 where they lie in [0, 255], and else
an offset and gain that take the smallest to 0 and the largest to 1.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["LARGEST", "UNIT", "Scale", "Span"]

UNIT = (-2.0, 3.0)  # floats in here are in units of [0, 1] already: the range and strong noise
LARGEST = {"uint8": 255.0, "uint16": 65535.0}

Span = tuple[float, float]


def _range(kind: np.dtype, low: float, high: float) -> Span:
    """Offset and gain of numbers of a type between low and high."""
    if kind.name in LARGEST:
        return 0.0, LARGEST[kind.name]
    if kind.kind == "b" or (UNIT[0] <= low and high <= UNIT[1]):
        return 0.0, 1.0
    if low >= 0 and high <= 255:
        return 0.0, 255.0
    return low, (high - low) or 1.0


@dataclass(frozen=True)
class Scale:
    """How to write images as the kind of file they came from.

    Attributes:
        offset: File value of image value 0.
        gain: File value of image value 1, less offset.
        dtype: Name of the file's number type.
        format: "png", "npy", "npz" or "idx".
        layout: Axes of an array file: "HW", "HWC", "NHW", "NHWC" or "NCHW".
        key: Name of the array in an npz file.
    """

    offset: float = 0.0
    gain: float = 1.0
    dtype: str = "float32"
    format: str = "npy"
    layout: str = "NCHW"
    key: str = "images"

    @classmethod
    def of(cls, dtype: Any, limits: tuple[float, float], span: Span | None = None) -> "Scale":
        """The scale of numbers of a type that lie between limits.

        Args:
            dtype: Their type.
            limits: The least and the largest of them.
            span: The numbers of black and of white, where they are known.

        Raises:
            InputError: white is not above black.
        """
        kind = np.dtype(dtype)
        if span is None:
            return cls(*_range(kind, *limits), kind.name)
        black, white = span
        if not -math.inf < black < white < math.inf:
            raise InputError(f"black is {black:g}, white {white:g}: white must be above black")
        return cls(black, white - black, kind.name)

    def from_file(self, values: np.ndarray) -> Tensor:
        """File values as images, float32."""
        if self.dtype in LARGEST and not self.offset:
            images = torch.from_numpy(np.array(values, np.float32, order="C"))
            return images.div_(self.gain)
        scaled = (values.astype(np.float64) - self.offset) / self.gain
        return torch.from_numpy(np.ascontiguousarray(scaled, np.float32))

    def to_file(self, images: Tensor) -> np.ndarray:
        """Images (..., H, W) as file values: scaled, rounded, and clipped to the type's range."""
        values = images.detach().cpu().double().numpy() * self.gain
        values += self.offset
        kind = np.dtype(self.dtype)
        if kind.kind == "f":
            return values.astype(kind)
        low, high = (0, 1) if kind.kind == "b" else (np.iinfo(kind).min, np.iinfo(kind).max)
        return np.clip(np.rint(values, out=values), low, high, out=values).astype(kind)
