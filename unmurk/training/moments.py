"""A Gaussian prior fitted to corrupted images alone: what every other way to learn starts from.

y = A x + sigma_y n, A linear and as different from image to image as it likes; x ~ N(m, S) with S
diagonal on cosines (`unmurk.gaussian`). Expectation maximisation: draw x ~ p(x | y; m, S) for some
images, exactly (one linear system for each), then take m and S for the mean and the covariances
of the draws. Draws instead of posterior covariances make it stochastic EM (Celeux and Diebolt,
1985), and averaging the second half of the rounds, with weights 1, 1/2, 1/3, ..., its
approximation version (Delyon, Lavielle and Moulines, 1999, Annals of Statistics 27), which tends
to a maximum of the likelihood of y. The idea to begin with a Gaussian fitted by 16 rounds of EM is
that of Rozet et al. (2024, arXiv 2405.13712), whose Gaussian has low rank.

Where A sees nothing the likelihood is flat, and what stays is the first guess: one grey for each
channel (least squares), and power that falls with the cube of the frequency, as large as makes
E ||A x||^2 that of the images,

    power = (E ||y - A m||^2 - sigma_y^2 m_y) / E ||A x0||^2,   x0 with the power law of size 1.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..devices import host_to
from ..gaussian import Wiener, power_law
from ..problem import Problem
from ..rng import PerImageGenerator, StreamId, generator

__all__ = ["fit"]

ROUNDS = 16
NUMBERS = 2**19  # pixel values drawn in a round: 170 colour images of 32 x 32
MOST = 2048  # images of a round
CHUNK = 32  # images worked on together: their cosines stay in the cache


@torch.no_grad()
def fit(
    y: Tensor,
    problem: Problem,
    shape: tuple[int, int, int],
    seed: int = 0,
    rounds: int = ROUNDS,
    numbers: int = NUMBERS,
    device: torch.device | None = None,
) -> Wiener:
    """The Gaussian prior of the images behind measurements y (N, ...), of shape (C, H, W).

    Args:
        problem: How they were made; image i is number i.
        seed: Image i of a round draws from (seed, i, the round).
        rounds: Rounds of expectation maximisation.
        numbers: Pixel values drawn in a round.
        device: Where to work: only the measurements of a round are moved there. None: where y is.

    Raises:
        InputError: The operator is not linear.
    """
    count = images(len(y), shape, numbers)
    device = y.device if device is None else device
    model, problem = Wiener(shape).to(device), problem.to(device)
    chosen = _some(len(y), count, seed, 0)
    first = host_to(y[chosen.to(y.device)], device)
    _first_guess(model, first, problem.bind(chosen.tolist(), shape), seed)
    for step in range(1, rounds + 1):
        chosen = _some(len(y), count, seed, step)
        x = torch.cat(
            [_draw(model, y, problem, rows, (seed, step)) for rows in chosen.split(CHUNK)]
        )
        mean = x.mean(0)
        waves = model.waves(x - mean)
        covariance = torch.einsum("nihw,njhw->hwij", waves, waves) / max(len(x) - 1, 1)
        share = 1 / max(1, step - rounds // 2)
        model.set(
            torch.lerp(model.mean, mean, share),
            torch.lerp(model.covariance(), covariance, share),
        )
    return model


def images(total: int, shape: Sequence[int], numbers: int = NUMBERS) -> int:
    """How many of `total` images (C, H, W) a round draws."""
    return min(total, MOST, max(64, numbers // math.prod(shape)))


def _some(total: int, count: int, seed: int, step: int) -> Tensor:
    return torch.randperm(total, generator=generator(seed, StreamId.GAUSSIAN_SUBSET, step))[:count]


def _draw(
    model: Wiener, y: Tensor, problem: Problem, rows: Tensor, path: tuple[int, int]
) -> Tensor:
    seed, step = path
    device, numbers = model.mean.device, rows.tolist()
    streams = PerImageGenerator(seed, numbers, StreamId.GAUSSIAN_POSTERIOR, step, device=device)
    bound = problem.bind(numbers, model.shape)
    return model.draw(host_to(y[rows.to(y.device)], device), bound, streams)


def _first_guess(model: Wiener, y: Tensor, problem: Problem, seed: int) -> None:
    """One grey for each channel, and a power law of the right size."""
    c, h, w = model.shape
    greys = [
        problem.A(grey.view(1, c, 1, 1).expand(len(y), c, h, w)).flatten()
        for grey in torch.eye(c, device=y.device)
    ]
    observed = problem.operator.apply_mask(y).flatten()
    # on the CPU, whose driver takes matrices without full rank too, such as those of A that sees
    # one channel only; by the normal equations, so that C x C numbers are moved and no image is
    shown = torch.stack(greys, 1).double()
    gram, right = (shown.mT @ shown).cpu(), (shown.mT @ observed.double()).cpu()
    level = torch.linalg.lstsq(gram, right[:, None], rcond=1e-9, driver="gelsd").solution
    model.mean.copy_(level.view(c, 1, 1).expand(model.shape))
    rest = problem.residual(model.mean.expand(len(y), -1, -1, -1), y).square().sum()
    rest = rest - problem.sigma**2 * problem.measurements(y).sum()
    z = torch.randn(len(y), c, h, w, generator=generator(seed, StreamId.GAUSSIAN_START)).to(y)
    law = power_law(model.shape).to(y)
    size = problem.A(model.out(law.sqrt() * z)).square().sum()
    model.power.copy_(law * (rest / size).clamp_min(1e-8))
