"""The pictures of the gallery's scripts: batches of gray images, a line for each."""

import matplotlib.pyplot as plt
from torch import Tensor

__all__ = ["show"]


def show(**batches: Tensor) -> None:
    """Draw a line of images for each name."""
    figure, axes = plt.subplots(len(batches), 6, figsize=(6, 1.1 * len(batches)), squeeze=False)
    for line, (name, batch) in zip(axes, batches.items(), strict=True):
        line[0].set_title(name.replace("_", " "), loc="left", fontsize=8)
        for axis in line:
            axis.axis("off")
        for axis, image in zip(line, batch, strict=False):
            axis.imshow(image[0].clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1)
    figure.tight_layout()
