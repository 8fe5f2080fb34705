"""
Projection and splitting: DDRM, DDNM+, DiffPIR, ProjDiff and DDiff
==================================================================

At every noise level these solvers denoise the image and then bring it into agreement with the
measurement: in the basis of the singular vectors (DDRM), by projection (DDNM+, ProjDiff), or by a
proximal step (DiffPIR, DDiff). None needs a gradient through the network.
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

problem = unmurk.Problem("inpaint:random,keep=0.4", noise=0.05)
y = problem.simulate(truth, seed=0)
images = {"measured": y}
for method in ("ddrm", "ddnm", "diffpir", "projdiff", "ddiff"):
    result = unmurk.solve(y, problem, prior, method=method)
    images[method] = result.mean
    print(f"{method}: PSNR {psnr(result.mean, truth).mean():.1f} dB, {result.nfe} evaluations")
show(**images, truth=truth)
