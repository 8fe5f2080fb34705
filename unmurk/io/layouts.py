"""Axes of array files: which axis numbers the images, and which holds the channels."""

from pathlib import Path

import numpy as np
from torch import Tensor

from ..errors import InputError
from .scale import Scale

__all__ = ["layout_of", "to_images"]

CHANNELS = 16  # most channels of an array
FEW = 4  # a shorter axis is the channel axis, whatever the other axes are


def layout_of(file: Path, array: np.ndarray) -> str:
    """Return the axes of an array: "HW", "HWC", "NHW", "NHWC" or "NCHW".

    A channel axis has at most 16 entries; in a single image it has 1 or 3.

    Raises:
        InputError: The array has other axes, or two that could be the channels.

    >>> import numpy as np
    >>> layout_of(Path("set.npy"), np.zeros((10, 28, 28, 3)))
    'NHWC'
    """
    shape = array.shape
    layout = ""
    if array.dtype.kind in "buif" and array.size:
        if array.ndim == 2:
            layout = "HW"
        elif array.ndim == 3:
            layout = "HWC" if shape[2] in (1, 3) else "NHW"
        elif array.ndim == 4:
            layout = _channel_axis(file, shape)
    if not layout:
        hint = ""
        if array.dtype.kind == "c":
            hint = "; complex numbers are two channels, real and imaginary part"
        raise InputError(
            f"{file} holds {array.dtype} of shape {shape}, which is not (N, H, W), (N, H, W, C) "
            f"or (N, C, H, W) with at most {CHANNELS} channels{hint}"
        )
    return layout


def _channel_axis(file: Path, shape: tuple[int, ...]) -> str:
    """Return "NHWC" or "NCHW" by which axis is short; "" if neither is."""
    for few in (FEW, CHANNELS):
        last, first = shape[3] <= few, shape[1] <= few
        if last and first and few == CHANNELS:
            return _square(file, shape)
        if last or first:
            return "NHWC" if last else "NCHW"
    return ""


def _square(file: Path, shape: tuple[int, ...]) -> str:
    """Decide for small images with two short axes: the sides of an image are equal."""
    if shape[2] == shape[3] != shape[1]:
        return "NCHW"
    if shape[1] == shape[2] != shape[3]:
        return "NHWC"
    raise InputError(
        f"{file} has the shape {shape}, where either {shape[1]} or {shape[3]} may be the "
        f"channels: save it as (N, H, W) of one channel each, or pad the images to more than "
        f"{CHANNELS} pixels a side"
    )


def to_images(array: np.ndarray, scale: Scale, layout: str) -> Tensor:
    """Convert numbers with an N axis to images (N, C, H, W), float32 in units of [0, 1]."""
    if layout in ("NHW", "HW"):
        array = array[:, None]
    elif layout != "NCHW":
        array = np.moveaxis(array, -1, 1)
    return scale.from_file(array)
