"""Images drawn from the posterior, kept to train on: the E-step of expectation maximisation.

x ~ p(x | y) under the current prior takes many evaluations of its network, a step of training a
few. So draws are kept and used again, and the oldest give way to new ones. However
large the images are, a buffer never holds more than `LIMIT` bytes of them.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..checks import require_finite_draws
from ..devices import host_to
from ..diffusion.prior import Prior
from ..noise import Gaussian
from ..problem import Problem
from ..rng import PerImageGenerator, host_integers

__all__ = ["LIMIT", "Replay", "PosteriorSampler", "draw", "identity", "room", "together"]

LIMIT = 2**28  # bytes of a buffer: 171,000 images of 28 x 28 pixels, 512 of 512 x 512

PosteriorSampler = Callable[[Tensor, Problem, Prior, PerImageGenerator], Tensor]
"""Draws images (B, C, H, W) given (y, problem, prior, streams), a stream for each row."""


def room(rows: int, shape: Sequence[int]) -> int:
    """How many of so many images (C, H, W) a buffer holds: as many as fit into `LIMIT` bytes."""
    return min(rows, max(1, LIMIT // (2 * math.prod(shape))))


def together(prior: Prior, solver: "PosteriorSampler | None" = None) -> int:
    """How many images are drawn at once; a solver may differentiate, which takes four times."""
    _, height, width = prior.shape
    return max(1, prior.together(height * width) // (1 if solver is None else 4))


def named(solver: "PosteriorSampler | None") -> str | None:
    """What messages call a solver."""
    return (
        None if solver is None else getattr(solver, "spec", getattr(solver, "__name__", "given"))
    )


class Replay:
    """A buffer of images.

    Args:
        rows: How many it holds, at most as many as fit into `LIMIT` bytes.
        shape: Their shape (C, H, W).

    Attributes:
        tensors: All that it remembers, for the state of a run.
    """

    def __init__(self, rows: int, shape: tuple[int, int, int]) -> None:
        self.tensors = {
            "images": torch.zeros(room(rows, shape), *shape, dtype=torch.float16),
            "filled": torch.zeros((), dtype=torch.int64),
            "drawn": torch.zeros((), dtype=torch.int64),
        }

    def __len__(self) -> int:
        return len(self.tensors["images"])

    @property
    def drawn(self) -> int:
        """Images ever put in."""
        return int(self.tensors["drawn"])

    @property
    def filled(self) -> int:
        """Images held."""
        return int(self.tensors["filled"])

    def numbers(self, count: int) -> Tensor:
        """Numbers of the next images to put in, (count,): a draw's stream hangs on its number."""
        return torch.arange(self.drawn, self.drawn + count)

    def put(
        self,
        x: Tensor,
        network: nn.Module | None = None,
        solver: "PosteriorSampler | None" = None,
        problem: Problem | None = None,
    ) -> None:
        """Takes images (B, C, H, W), B <= rows, in place of the oldest.

        Args:
            x: The images.
            network: What drew them, or whose prior `solver` drew under: for the message.
            solver: What drew them for `problem`, if it was one.
            problem: How the measurements were made.

        Raises:
            InputError: One is not finite, or above the numbers of float16; then none is taken.
        """
        images = self.tensors["images"]
        held = x.to(images)
        require_finite_draws(held, network, named(solver), problem)
        images[self.numbers(len(x)) % len(images)] = held
        self.tensors["drawn"] += len(x)
        self.tensors["filled"].fill_(min(self.drawn, len(images)))

    def pick(self, n: int, noise: torch.Generator) -> Tensor:
        """Images at random, (n, C, H, W), on the generator's device."""
        rows = host_integers(self.filled, (n,), noise)
        return host_to(self.tensors["images"][rows], noise.device).float()


def identity(problem: Problem) -> bool:
    """Whether A = I with Gaussian noise, so that y is an image at noise level sigma_y."""
    return problem.operator.spec == "identity" and isinstance(problem.noise, Gaussian)


def draw(
    y: Tensor,
    problem: Problem,
    prior: Prior,
    streams: PerImageGenerator,
    solver: PosteriorSampler | None,
    steps: int,
) -> Tensor | None:
    """One image (B, C, H, W) for each measurement from p(x | y) under the prior.

    For A = I the reverse diffusion from (y, sigma_y) is exactly that; other A take the solver, and
    None is returned where there is none.
    """
    if identity(problem):
        return prior.restore(y, problem.sigma, streams, steps)
    return None if solver is None else solver(y, problem, prior, streams)
