"""Make the picture of the README: nuclei with noise, a hole and a blur, restored by one prior.

    python docs/images/make_nuclei.py            # learns first: some fifteen minutes on one core

The prior is learned from nuclei with noise of standard deviation 0.1 only. The held-out nuclei in
the picture were measured in three other ways: with more noise, with a hole, and with a blur.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

import unmurk
from unmurk.evaluation.metrics import psnr

__all__: list[str] = []

NUCLEI = Path(unmurk.__file__).parent / "assets" / "nuclei" / "nuclei.npz"
TASKS = {
    "noise": ("identity", 0.2),
    "a hole": ("inpaint:box,size=20", 0.05),
    "a blur": ("blur:gaussian,sigma=2", 0.05),
}
SHOWN = (7, 20)  # of the held-out nuclei
LINES = ("measured", "restored", "truth")


def draw(axis: Axes, image: torch.Tensor, white: float) -> None:
    """Draw one image, without axes."""
    axis.imshow(image[0].clamp(0, white).numpy(), cmap="gray", vmin=0, vmax=white)
    axis.set_xticks([])
    axis.set_yticks([])


def main() -> None:
    """Learn, restore, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/nuclei"), help="run folder")
    parser.add_argument("--kimg", type=float, default=50.0, help="thousands of images seen")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("nuclei.png"))
    args = parser.parse_args()

    noisy = unmurk.Problem("identity", noise=0.1)
    y = noisy.simulate(unmurk.load_images(f"{NUCLEI}:train").images, seed=0)
    prior, _ = unmurk.learn(y, noisy, out=args.run, kimg=args.kimg)
    truth = unmurk.load_images(f"{NUCLEI}:val").images[list(SHOWN)]

    figure, axes = plt.subplots(len(LINES), len(TASKS) * len(SHOWN), figsize=(9, 4.75))
    for number, (name, (text, noise)) in enumerate(TASKS.items()):
        problem = unmurk.Problem(text, noise=noise)
        measured = problem.simulate(truth, seed=1)
        restored = unmurk.solve(measured, problem, prior, method="red-diff").mean
        print(
            f"{name}: {psnr(measured, truth).mean():.1f} dB, {psnr(restored, truth).mean():.1f} dB"
        )
        for place in range(len(SHOWN)):
            column = number * len(SHOWN) + place
            white = float(truth[place].max())
            for line, batch in enumerate((measured, restored, truth)):
                draw(axes[line, column], batch[place], white)
        axes[0, number * len(SHOWN)].set_title(name, loc="left", fontsize=11)
    for line, name in enumerate(LINES):
        axes[line, 0].set_ylabel(name, fontsize=11)
    figure.tight_layout(pad=0.3)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
