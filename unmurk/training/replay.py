r"""The replay buffer: posterior samples that are kept and trained on, as in an E-step.

A draw :math:`x \sim p(x \mid y)` under the current prior takes many evaluations of its network,
and a training step only a few. So draws are kept and used again, and the oldest give way to new
ones. A buffer never holds more than `LIMIT` bytes of images, whatever their size.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..checks import require_finite_draws
from ..devices import host_to
from ..diffusion.prior import Prior
from ..errors import InputError
from ..noise import Gaussian
from ..problem import Problem
from ..rng import PerImageGenerator, host_integers

__all__ = [
    "LIMIT",
    "PosteriorSampler",
    "Replay",
    "capacity",
    "chunk_size",
    "draw_posterior",
    "is_denoising",
]

LIMIT = 2**28  # bytes of a buffer: 171,000 images of 28 x 28 pixels, 512 of 512 x 512

PosteriorSampler = Callable[[Tensor, Problem, Prior, PerImageGenerator], Tensor]
"""A function of (y, problem, prior, generator) that draws one image for each measurement, shape
(B, C, H, W). `unmurk.solvers.Draws` makes one of any solver."""


def capacity(images: int, shape: Sequence[int]) -> int:
    """Return how many of so many images a buffer holds.

    Args:
        images: Number of images wanted.
        shape: Their shape (C, H, W).

    Returns:
        As many as fit into `LIMIT` bytes of float16, and at least one.

    >>> capacity(8192, (1, 28, 28)), capacity(8192, (1, 512, 512))
    (8192, 512)
    """
    return min(images, max(1, LIMIT // (2 * math.prod(shape))))


def chunk_size(prior: Prior, solver: PosteriorSampler | None = None) -> int:
    """Return how many images are drawn at once.

    A solver may differentiate through the network, which takes four times the memory.

    >>> prior = Prior.create(nn.Identity(), (1, 64, 64))
    >>> chunk_size(prior), chunk_size(prior, lambda y, problem, prior, streams: y)
    (2048, 512)
    """
    _, height, width = prior.shape
    return max(1, prior.together(height * width) // (1 if solver is None else 4))


def is_denoising(problem: Problem) -> bool:
    """Whether A = I with Gaussian noise, so that y is an image at the noise level sigma_y.

    >>> is_denoising(Problem("identity", noise=0.1))
    True
    """
    return problem.operator.spec == "identity" and isinstance(problem.noise, Gaussian)


def draw_posterior(
    y: Tensor,
    problem: Problem,
    prior: Prior,
    streams: PerImageGenerator,
    solver: PosteriorSampler | None,
    steps: int,
) -> Tensor:
    r"""Draw one image from :math:`p(x \mid y)` under the prior for each measurement.

    For A = I the reverse diffusion that starts at :math:`(y, \sigma_y)` is exactly that draw. For
    any other operator the solver draws.

    Args:
        y: Measurements (B, ...).
        problem: How they were made, bound to these images.
        prior: The prior.
        streams: One random stream for each measurement.
        solver: The solver for A other than the identity.
        steps: Network evaluations of a draw for A = I.

    Returns:
        Images of shape (B, C, H, W).

    Raises:
        InputError: A is not the identity and there is no solver.

    >>> shape, y = (1, 8, 8), torch.full((2, 1, 4, 4), 0.5)
    >>> problem = Problem("sr:average,factor=2", 0.1).bind(range(2), shape)
    >>> prior, streams = Prior.create(nn.Identity(), shape), PerImageGenerator(0, range(2))
    >>> def solver(y, problem, prior, streams):
    ...     return problem.A_dagger(y)
    >>> draw_posterior(y, problem, prior, streams, solver, 16).shape
    torch.Size([2, 1, 8, 8])
    """
    if is_denoising(problem):
        return prior.restore(y, problem.sigma, streams, steps)
    if solver is None:
        raise InputError(
            f"drawing images for '{problem.operator.spec}' needs a solver: give solver="
        )
    return solver(y, problem, prior, streams)


class Replay:
    """A buffer of images.

    Args:
        images: How many it holds, at most as many as fit into `LIMIT` bytes.
        shape: Their shape (C, H, W).

    Attributes:
        tensors: Everything that the buffer remembers, for the state of a run.

    >>> replay = Replay(2, (1, 1, 1))
    >>> replay.put(torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))
    >>> replay.put(torch.tensor([3.0]).view(1, 1, 1, 1))  # in place of the oldest
    >>> replay.tensors["images"].flatten().tolist()
    [3.0, 2.0]
    """

    def __init__(self, images: int, shape: tuple[int, int, int]) -> None:
        self.tensors = {
            "images": torch.zeros(capacity(images, shape), *shape, dtype=torch.float16),
            "filled": torch.zeros((), dtype=torch.int64),
            "drawn": torch.zeros((), dtype=torch.int64),
        }

    def __len__(self) -> int:
        return len(self.tensors["images"])

    @property
    def drawn(self) -> int:
        """Number of images ever put in."""
        return int(self.tensors["drawn"])

    @property
    def filled(self) -> int:
        """Number of images held."""
        return int(self.tensors["filled"])

    def numbers(self, count: int) -> Tensor:
        """Return the numbers of the next images to put in, shape (count,).

        The random stream of a draw depends on its number.
        """
        return torch.arange(self.drawn, self.drawn + count)

    def put(
        self,
        x: Tensor,
        network: nn.Module | None = None,
        solver: PosteriorSampler | None = None,
        problem: Problem | None = None,
    ) -> None:
        """Put images in, in place of the oldest.

        Args:
            x: Images (B, C, H, W), at most as many as the buffer holds.
            network: The network that drew them, or under whose prior the solver drew them; for the
                error message.
            solver: The solver that drew them, if one did.
            problem: How the measurements were made.

        Raises:
            InputError: An image is not finite, or beyond the range of float16; then none is put
                in.
        """
        images = self.tensors["images"]
        held = x.to(images)
        require_finite_draws(held, network, _name_of(solver), problem)
        images[self.numbers(len(x)) % len(images)] = held
        self.tensors["drawn"] += len(x)
        self.tensors["filled"].fill_(min(self.drawn, len(images)))

    def restart(self, drawn: int = 0) -> None:
        """Forget all images.

        Args:
            drawn: How many images count as drawn before.
        """
        self.tensors["filled"].fill_(0)
        self.tensors["drawn"].fill_(drawn)

    def pick(self, n: int, noise: torch.Generator) -> Tensor:
        """Pick images at random, shape (n, C, H, W) in float32, on the device of the generator."""
        numbers = host_integers(self.filled, (n,), noise)
        return host_to(self.tensors["images"][numbers], noise.device).float()


def _name_of(solver: PosteriorSampler | None) -> str | None:
    """Return what messages call a solver."""
    if solver is None:
        return None
    return getattr(solver, "spec", getattr(solver, "__name__", "given"))
