"""Draw docs/images/demo.png from the packaged model of digits, or from a run folder.

python benchmarks/assets/demo_picture.py digits docs/images/demo.png
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from torch import Tensor

from unmurk import Posterior, Prior, Problem, load_images

SHOWN, NOISE = 12, 0.3


def draw(run: str, out: Path) -> None:
    """Held-out digits (noisy, restored, standard deviation, truth), and samples of the prior."""
    problem = Problem("identity", NOISE)
    truth = load_images("digits:test", limit=SHOWN).images
    y = problem.simulate(truth, 0, range(12_000, 12_000 + SHOWN))
    mean, std = Posterior.load(run).mean_std(y, problem, n=64)
    new = Prior.load(run).sample(SHOWN)
    rows: dict[str, Tensor] = {
        "noisy": y,
        "restored": mean,
        "standard\ndeviation": std,
        "truth": truth,
        "drawn from\nthe prior": new,
    }
    figure, axes = plt.subplots(len(rows), SHOWN, figsize=(SHOWN, len(rows) + 0.1))
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        deviation = label.startswith("standard")
        for axis, image in zip(line, images, strict=True):
            high, colors = (float(std.max()), "magma") if deviation else (1.0, "gray")
            axis.imshow(image[0], vmin=0, vmax=high, cmap=colors, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=11)
    figure.subplots_adjust(0.1, 0.01, 0.995, 0.99, 0.04, 0.04)
    figure.savefig(out, dpi=90)


if __name__ == "__main__":
    draw(sys.argv[1], Path(sys.argv[2]))
