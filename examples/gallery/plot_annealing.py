"""
Nonlinear operators: DAPS, HRDIS and FAST-DIPS
==============================================

These solvers need no linear operator. DAPS draws every noise level anew. FAST-DIPS searches the
image nearest to the denoised one that fits y. HRDIS optimizes one image with noise that follows
the prediction of the network.
"""

from pathlib import Path

import matplotlib.pyplot as plt
from torch import Tensor

import unmurk
from unmurk.evaluation.metrics import psnr


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

problem = unmurk.Problem("hdr:clip,factor=2", noise=0.05)
y = problem.simulate(truth, seed=0)
images = {"measured": y}
for method, options in {"daps": {}, "hrdis": {"init": y}, "fast-dips": {}}.items():
    result = unmurk.solve(y, problem, prior, method=method, **options)
    images[method] = result.mean
    print(f"{method}: PSNR {psnr(result.mean, truth).mean():.1f} dB, {result.nfe} evaluations")
show(**images, truth=truth)
