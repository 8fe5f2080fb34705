"""
Phase retrieval: DDiff with restarts
====================================

The magnitude of the Fourier transform fixes an image up to a shift and a rotation by 180 degrees.
Restarts keep the run that fits best, and the prior chooses among the images that are symmetric to
it.
"""

from pathlib import Path

import matplotlib.pyplot as plt
from torch import Tensor

import unmurk


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


digits = Path(unmurk.__file__).parent / "assets" / "digits"
truth = unmurk.load_images(digits / "test.idx3-ubyte.gz", limit=6).images
prior = unmurk.Prior.load("digits")

problem = unmurk.Problem("phase:fourier", noise=0.01)
y = problem.simulate(truth, seed=0)
result = unmurk.solve(y, problem, prior, method="auto")
print(f"{result.method}: {result.nfe} evaluations")
show(restored=result.mean, truth=truth)
