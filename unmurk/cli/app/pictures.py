"""Small pictures of images: what the brush paints on, and the mask that it paints.

An image of any type becomes eight bits for the screen alone. The mask that a user paints on it has
the pixels of the image itself.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError, size_text
from ...io.atomic import write
from ...io.formats.raster import encode_picture

__all__ = ["busiest", "preview", "write_mask"]

ENDS = 0.001, 0.999  # quantiles shown as black and white
SAMPLE = 2**20  # values that they are taken from


def preview(image: Tensor) -> np.ndarray:
    """Return an image for the screen, (H, W, 3) uint8; channels other than 3 are averaged.

    Args:
        image: (C, H, W).

    >>> preview(torch.linspace(0, 1, 4).view(1, 2, 2))[..., 0].tolist()
    [[0, 85], [170, 255]]
    """
    image = image.detach().float().nan_to_num(0.0)
    if image.shape[0] != 3:
        image = image.mean(0, keepdim=True).expand(3, -1, -1)
    values = image.flatten()[:: max(1, image.numel() // SAMPLE)]
    low, high = (float(values.quantile(q)) for q in ENDS)
    scaled = (image - low) / max(high - low, 1e-6)
    return (scaled.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()


def write_mask(layers: list[np.ndarray], size: tuple[int, int], path: Path) -> float:
    """Write the mask of `inpaint:file`: 0 where something was painted, 255 elsewhere.

    Args:
        layers: What was painted, each (H, W, 4) uint8 with its opacity last.
        size: Height and width of the image.
        path: The PNG file.

    Returns:
        The fraction of the pixels that is hidden.

    Raises:
        InputError: Nothing was painted, everything was, or the layers have another size.
    """
    hidden = np.zeros(size, dtype=bool)
    for layer in layers:
        if layer.shape != (*size, 4):
            raise InputError(
                f"the painting has {size_text(layer.shape[:2])} pixels and the image "
                f"{size_text(size)}: load the image again, and paint without cropping it"
            )
        hidden |= layer[..., 3] > 0
    share = float(hidden.mean())
    if not 0 < share < 1:
        how = "nothing is painted: paint over" if not share else "all is painted: leave some of"
        raise InputError(f"{how} the image, and try again")
    write(path, encode_picture(np.where(hidden, 0, 255).astype(np.uint8)[..., None]))
    return share


def busiest(image: Tensor, side: int) -> tuple[int, int]:
    """Return row and column of the square of an image that varies most.

    Args:
        image: (C, H, W).
        side: Side of the square in pixels; sides of the image that are shorter are whole.

    >>> image = torch.zeros(1, 4, 6)
    >>> image[0, 3, 5] = 1
    >>> busiest(image, 2)
    (2, 4)
    """
    height, width = image.shape[-2:]
    step = max(1, side // 2)
    best, place = -1.0, (0, 0)
    for row in {*range(0, max(1, height - side + 1), step), max(0, height - side)}:
        for column in {*range(0, max(1, width - side + 1), step), max(0, width - side)}:
            value = float(torch.var(image[:, row : row + side, column : column + side].float()))
            if value > best + 1e-12 or (value > best - 1e-12 and (row, column) < place):
                best, place = value, (row, column)
    return place
