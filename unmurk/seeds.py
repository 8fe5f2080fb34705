"""Random streams that do not depend on how images are batched.

Every draw in unmurk comes from a `torch.Generator` reached by a path of integers such as
(seed, image number, sample number). Two paths give independent streams
(`numpy.random.SeedSequence` mixes them), and a path always gives the same stream: a result is the
same for any batch size, and a training step is the same after a restart.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

__all__ = ["Streams", "generator"]


def generator(seed: int, *path: int, device: str | torch.device = "cpu") -> torch.Generator:
    """The generator at a path of non-negative integers below a seed."""
    # the length goes first: numpy reads (seed, i) and (seed, i, 0) as the same
    state = np.random.SeedSequence([len(path), seed, *path]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


class Streams:
    """One random stream for each image of a batch.

    Args:
        seed: Seed of the whole computation.
        index: The images' numbers, one for each row of the batch.
        path: Further numbers appended to every image's path (a sample number, say).
        device: Where the draws are made.
    """

    def __init__(
        self,
        seed: int,
        index: Iterable[int],
        *path: int,
        device: str | torch.device = "cpu",
    ) -> None:
        self.generators = [generator(seed, int(i), *path, device=device) for i in index]

    @classmethod
    def join(cls, streams: "Iterable[Streams]") -> "Streams":
        """The streams of several batches as those of one batch, in order."""
        joined = cls(0, ())
        joined.generators = [g for s in streams for g in s.generators]
        return joined

    def __len__(self) -> int:
        return len(self.generators)

    def _stack(self, draw: Callable[..., Tensor], shape: tuple[int, ...]) -> Tensor:
        return torch.stack([draw(shape, generator=g, device=g.device) for g in self.generators])

    def randn(self, *shape: int) -> Tensor:
        """Standard normal draws, shape (B, *shape)."""
        return self._stack(torch.randn, shape)

    def rand(self, *shape: int) -> Tensor:
        """Draws uniform on [0, 1), shape (B, *shape)."""
        return self._stack(torch.rand, shape)

    def poisson(self, rates: Tensor) -> Tensor:
        """Poisson draws of these rates (B, ...), which lie where the streams do."""
        rows = zip(rates, self.generators, strict=True)
        return torch.stack([torch.poisson(rate, generator=g) for rate, g in rows])
