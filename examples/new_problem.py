"""Restore with a forward model and a prior of your own.

    python examples/new_problem.py                    # a Gaussian prior fitted here, in seconds
    python examples/new_problem.py runs/digits        # the prior of a run, at 28 x 28 pixels

The forward model is any function of torch that maps images (B, C, H, W) to measurements (B, ...).
Here it is a camera that saturates, is lit unevenly, and has a dead column. It is nonlinear;
`red-diff` and `dps` only need autograd to go through it. A linear function also gets its adjoint,
its pseudo-inverse and its prox.

The prior is any object with `denoise(x, sigma)`, or a function (x, sigma), that returns
E[clean image | x] for x = clean image + sigma n.
"""

import sys

import torch
from torch import Tensor

import unmurk
from unmurk.evaluation.exact import GaussianPrior
from unmurk.evaluation.metrics import psnr

__all__: list[str] = []

light = torch.linspace(0.4, 1.0, 28)  # from left to right
alive = (torch.arange(28) != 14).float()


def camera(x: Tensor) -> Tensor:
    """Apply uneven light, a dead column and a soft saturation to images (B, C, H, W)."""
    return torch.tanh(2 * light * alive * x) / 2


def gaussian_prior() -> GaussianPrior:
    """Return a Gaussian with the mean and covariance of 2,000 digits: crude, but quick."""
    images = unmurk.load_images("digits", limit=2000).images
    return GaussianPrior(images.mean(0), images.flatten(1).T.cov() + 1e-4 * torch.eye(28 * 28))


def main() -> None:
    """Measure some digits, restore them, and compare."""
    prior = unmurk.Prior.load(sys.argv[1]) if len(sys.argv) > 1 else gaussian_prior()
    truth = unmurk.load_images("digits:test", limit=16).images
    problem = unmurk.Problem(camera, noise=0.05)
    y = problem.simulate(truth)

    result = unmurk.solve(y, problem, prior, "red-diff")
    print(f"measured: {psnr(y, truth).mean():.1f} dB")
    print(f"restored: {psnr(result.mean, truth).mean():.1f} dB, {result.nfe} evaluations")
    print(f"chi2:     {result.trace[-1]['chi2']:.2f} (1: as good as the noise allows)")


if __name__ == "__main__":
    main()
