"""
Posterior sampling: SNIPS and PnP-DM
====================================

SNIPS runs Langevin dynamics on the posterior of the noisy image. PnP-DM alternates a likelihood
step and a reverse diffusion. The standard deviation of their samples is an error bar: large where
the measurement says nothing.
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

problem = unmurk.Problem("inpaint:box,size=12", noise=0.05)
y = problem.simulate(truth[:3], seed=0)
for method, options in {"snips": {}, "pnp-dm": {"iterations": 40}}.items():
    result = unmurk.solve(y, problem, prior, method=method, samples=4, **options)
    print(f"{method} claims: {result.claims}")
    show(
        measured=y,
        one_sample=result.samples[0],
        another=result.samples[1],
        three_standard_deviations=3 * result.std,
    )
