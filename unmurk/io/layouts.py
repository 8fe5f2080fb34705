"""Axes of array files: which axis numbers the images, and which holds the channels."""

from pathlib import Path

import numpy as np
from torch import Tensor

from ..errors import InputError
from .axes import ALL, CHANNELS, Selection, in_order
from .scale import Scale

__all__ = ["images_in", "layout_of", "to_images"]

NAME_AXES = ": name the axes, such as --axes TZCYX"
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
            f"or (N, C, H, W) with at most {CHANNELS} channels{hint or NAME_AXES}"
        )
    return layout


def images_in(file: Path, array: np.ndarray, select: Selection = ALL) -> tuple[np.ndarray, str]:
    """Return the chosen images of an array with an N axis, and the layout of such images.

    The layout has no N if the array is a single image and no axes are given. The array is a view
    where that is possible.

    Args:
        file: The file, for messages.
        array: The array.
        select: Its axes, and the channels to read.

    Raises:
        InputError: The array has other axes, or no such channels.

    >>> import numpy as np
    >>> found, layout = images_in(Path("a.npy"), np.zeros((8, 9, 5, 2)), Selection("YXZC", ("1",)))
    >>> found.shape, layout
    ((5, 1, 8, 9), 'NCHW')
    """
    if array.dtype.kind not in "buif" or not array.size:
        return array, layout_of(file, array)
    axes = select.axes_for(file, "", array.shape)
    layout = "" if axes else layout_of(file, array)
    if layout and not select.channels:
        return array if "N" in layout else array[None], layout
    found = in_order(file, array, axes or layout.replace("H", "Y").replace("W", "X"), select)
    if not layout:
        return (found, "NCHW") if "C" in axes or "S" in axes else (found[:, 0], "NHW")
    if "C" not in layout:
        return found[:, 0], layout
    return (np.moveaxis(found, 1, -1) if layout.endswith("C") else found), layout


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
    """Convert numbers with an N axis to images (N, C, H, W), float32 in units of [0, 1].

    >>> to_images(np.full((2, 4, 6, 3), 255, np.uint8), Scale.of("uint8"), "NHWC").shape
    torch.Size([2, 3, 4, 6])
    """
    if layout in ("NHW", "HW"):
        array = array[:, None]
    elif layout != "NCHW":
        array = np.moveaxis(array, -1, 1)
    return scale.from_file(array)
