"""Bring a forward model and a prior of your own.

    python examples/new_problem.py                    # a Gaussian prior fitted here, in seconds
    python examples/new_problem.py runs/digits        # the prior of a run, at 28 x 28 pixels

The forward model is any function of torch that maps images (B, C, H, W) to measurements (B, ...).
Here it is a camera that saturates, unevenly lit, with a dead column. It is not linear, and
`red-diff` and `dps` do not mind: all that they ask is that autograd can go through it. A linear
function also gets its adjoint, its pseudo-inverse and its prox, found without further help.

The prior is any object with `denoise(x, sigma)`, or a function (x, sigma), that returns
E[clean image | x] for x = clean image + sigma n.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

import unmurk
from unmurk.evaluation.exact import GaussianPrior
from unmurk.evaluation.metrics import psnr

DIGITS = Path(unmurk.__file__).parent / "assets" / "digits"

__all__: list[str] = []

light = torch.linspace(0.4, 1.0, 28)  # from left to right
alive = (torch.arange(28) != 14).float()


def camera(x: Tensor) -> Tensor:
    """Uneven light, a dead column, and a soft saturation."""
    return torch.tanh(2 * light * alive * x) / 2


def gaussian_prior() -> GaussianPrior:
    """A Gaussian with mean and covariance of 2,000 digits: crude, but it needs no learning."""
    images = unmurk.load_images(DIGITS / "train.idx3-ubyte.gz", limit=2000).images
    return GaussianPrior(images.mean(0), images.flatten(1).T.cov() + 1e-4 * torch.eye(28 * 28))


def main() -> None:
    """Measure some digits, restore them, compare."""
    prior = unmurk.Prior.load(sys.argv[1]) if len(sys.argv) > 1 else gaussian_prior()
    truth = unmurk.load_images(DIGITS / "test.idx3-ubyte.gz", limit=16).images
    problem = unmurk.Problem(camera, noise=0.05)
    y = problem.simulate(truth)

    result = unmurk.solve(y, problem, prior, "red-diff")
    fit = result.trace[-1]["chi2"]
    print(f"measured: {psnr(y, truth).mean():.1f} dB")
    print(f"restored: {psnr(result.mean, truth).mean():.1f} dB, {result.nfe} evaluations")
    print(f"misfit:   {fit:.2f} in units of the noise variance (1: as good as the noise allows)")


if __name__ == "__main__":
    main()
